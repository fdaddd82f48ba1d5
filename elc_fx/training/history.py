"""What a fine-tuning gave, epoch by epoch."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from tabulate import tabulate

METRICS = "metrics.csv"


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave. loss: mean over the training batches. gate: the mean of all at the end of the epoch.

    score: on the validation data, with closed gates: the share of right classes, else minus the loss.
    """

    number: int
    loss: float
    gate: float
    learning_rate: float
    images_per_second: float
    score: float | None = None


@dataclass(frozen=True)
class History:
    """The epochs of a fine-tuning, those of an earlier part of it included."""

    epochs: tuple[Epoch, ...]

    @property
    def best(self) -> Epoch:
        """The one whose weights remain: the best of those with closed gates; without validation the last."""
        scored = [epoch for epoch in self.epochs if epoch.score is not None]
        return max(scored, key=lambda epoch: epoch.score or 0.0) if scored else self.epochs[-1]

    def __str__(self) -> str:
        """A table; a star marks the epoch whose weights remain."""
        rows = [
            (
                f"{epoch.number}{'*' if epoch == self.best else ''}",
                f"{epoch.loss:.4g}",
                f"{epoch.gate:.2f}",
                f"{epoch.learning_rate:.2g}",
                f"{epoch.images_per_second:,.0f}",
                "" if epoch.score is None else f"{epoch.score:.4f}",
            )
            for epoch in self.epochs
        ]
        headers = ("epoch", "loss", "gate", "learning rate", "images/s", "score")
        return tabulate(rows, headers, disable_numparse=True, colalign=["right"] * len(headers))


def metrics(epochs: Iterable[Epoch]) -> bytes:
    """CSV with one line for each epoch."""
    rows = [asdict(epoch) for epoch in epochs]
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()
