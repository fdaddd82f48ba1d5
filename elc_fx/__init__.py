"""elc_fx makes trained convolutional networks shallower and faster, without pruning."""

from elc_fx.api import compile, draw
from elc_fx.comparison import Comparison, Measurement, compare, measure
from elc_fx.compiled import report_of
from elc_fx.decoupling.decoupled import DecoupledModule
from elc_fx.decoupling.gates import GateSchedule, gates, set_gate
from elc_fx.decoupling.merging import merge
from elc_fx.decoupling.rewrite import decouple
from elc_fx.deploying.storing import load, save
from elc_fx.errors import (
    CaptureError,
    ElcError,
    ExportError,
    GateNotClosedError,
    InvalidInputError,
    LatencyError,
    MissingPackageError,
    NotAffineError,
    OutOfMemoryError,
    PlanError,
    Refusal,
    RuntimeFailedError,
    StorageError,
    TrainingError,
    TrainingModeError,
    VerificationError,
)
from elc_fx.explanation import Explanation, explain
from elc_fx.matching.activations import register_activation
from elc_fx.merging.fusion import MergedRegion
from elc_fx.planning.budget import Budget, Costs
from elc_fx.planning.candidates import Candidate, Candidates, candidates
from elc_fx.planning.plan import Plan, Prediction
from elc_fx.planning.planner import Planner, pareto, plan
from elc_fx.report import Report
from elc_fx.report.diff import Change, Diff, diff
from elc_fx.training.finetuning import FinetuneConfig, finetune
from elc_fx.training.history import History

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Candidate",
    "Candidates",
    "CaptureError",
    "Change",
    "Comparison",
    "Costs",
    "DecoupledModule",
    "Diff",
    "ElcError",
    "Explanation",
    "ExportError",
    "FinetuneConfig",
    "GateNotClosedError",
    "GateSchedule",
    "History",
    "InvalidInputError",
    "LatencyError",
    "Measurement",
    "MergedRegion",
    "MissingPackageError",
    "NotAffineError",
    "OutOfMemoryError",
    "Plan",
    "PlanError",
    "Planner",
    "Prediction",
    "Refusal",
    "Report",
    "RuntimeFailedError",
    "StorageError",
    "TrainingError",
    "TrainingModeError",
    "VerificationError",
    "candidates",
    "compare",
    "compile",
    "decouple",
    "diff",
    "draw",
    "explain",
    "finetune",
    "gates",
    "load",
    "measure",
    "merge",
    "pareto",
    "plan",
    "register_activation",
    "report_of",
    "save",
    "set_gate",
]
