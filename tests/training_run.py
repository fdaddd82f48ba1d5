"""A small fine-tuning as a script, for the tests that kill it, or run it in two processes.

python training_run.py FOLDER EPOCHS [--slow]: writes FOLDER/result-RANK.pt at the end.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import elc_fx


class Pictures(Dataset[Any]):
    """Four classes of bright quarters, with noise that is drawn anew each time, as augmentation is."""

    def __init__(self, count: int, delay: float = 0.0) -> None:
        self.count, self.delay = count, delay

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        time.sleep(self.delay)
        picture, label = 0.5 * torch.randn(3, 8, 8), index % 4
        top, left = 4 * (label // 2), 4 * (label % 2)
        picture[:, top : top + 4, left : left + 4] += 1.0
        return picture, label


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.norm_a, self.norm_b = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm_b(self.b(torch.relu(self.norm_a(self.a(x))))) + x)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), Block(), Block(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32, 4)).eval()


def short_network() -> nn.Module:
    """With as few layers as a plan can be made for."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.AdaptiveAvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 4)).eval()


def loader(count: int = 128) -> DataLoader[Any]:
    return DataLoader(Pictures(count), 16, shuffle=True, drop_last=True)


def decoupled(model: nn.Module) -> elc_fx.DecoupledModule:
    return elc_fx.decouple(model, elc_fx.Plan.of(model, torch.randn(1, 3, 8, 8), collapse=["2", "3"]))


def main(folder: Path, epochs: int, delay: float) -> None:
    teacher = network()
    student = decoupled(teacher)
    loader = DataLoader(Pictures(128, delay), 16, shuffle=True, drop_last=True)
    torch.manual_seed(1)
    held_out = [Pictures(7)[index] for index in range(7)]  # not to be shared evenly
    validation = DataLoader(held_out, 4)
    options: dict[str, Any] = {"validation": validation, "gates": 0.5, "ema": 0.9, "bf16": False, "progress": False}
    history = elc_fx.finetune(student, loader, teacher=teacher, epochs=epochs, folder=folder, **options)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    losses = [epoch.loss for epoch in history.epochs]
    with torch.no_grad():
        right = sum(int(student(x[None]).argmax(1)) == y for x, y in held_out) / len(held_out)
    scores = [history.best.score, right]
    torch.save({"state": student.state_dict(), "losses": losses, "scores": scores}, folder / f"result-{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), 0.002 if "--slow" in sys.argv else 0.0)
