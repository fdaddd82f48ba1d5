"""elc_fx makes trained convolutional networks shallower and faster, without pruning."""

from elc_fx.api import compile, report_of
from elc_fx.capture import Refusal
from elc_fx.comparison import Comparison, Measurement, compare, measure
from elc_fx.errors import (
    ElcError,
    InvalidInputError,
    NotAffineError,
    TrainingModeError,
    VerificationError,
)
from elc_fx.fusion import MergedRegion
from elc_fx.report import Report

__version__ = "0.1.0"

__all__ = [
    "Comparison",
    "ElcError",
    "InvalidInputError",
    "Measurement",
    "MergedRegion",
    "NotAffineError",
    "Refusal",
    "Report",
    "TrainingModeError",
    "VerificationError",
    "compare",
    "compile",
    "measure",
    "report_of",
]
