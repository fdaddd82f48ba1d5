"""A 1-d network on raw audio, with gates in a training loop of its own.

The sounds are tones that the script makes, one pitch for each class, in noise; the network learns them first.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import elc_fx

CLASSES, RATE = 4, 8000


def sounds(samples: int, length: int) -> tuple[Tensor, Tensor]:
    """Waves [N, 1, length] of a class's pitch at a random phase, and the classes [N]."""
    classes = torch.randint(CLASSES, (samples,))
    pitch = 300.0 * 2 ** classes.view(-1, 1)  # Hz
    times = torch.arange(length) / RATE
    waves = torch.sin(2 * math.pi * (pitch * times + torch.rand(samples, 1)))
    return (waves + torch.randn(samples, length)).unsqueeze(1), classes


def layer(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv1d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm1d(out_channels), nn.ReLU())


def network() -> nn.Module:
    """[N, 1, length] → [N, classes]."""
    stem = [layer(1, 16, 9, stride=4), layer(16, 16, 3), layer(16, 16, 3), nn.MaxPool1d(4)]
    body = [layer(16, 32, 3), layer(32, 32, 3), layer(32, 32, 3)]
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, CLASSES))


def train(model: nn.Module, steps: int, length: int, schedule: elc_fx.GateSchedule | None = None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model.train()
    for _ in range(steps):
        waves, classes = sounds(32, length)
        loss = F.cross_entropy(model(waves), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    model.eval()


def accuracy(model: nn.Module, waves: Tensor, classes: Tensor) -> float:
    with torch.no_grad():
        return (model(waves).argmax(1) == classes).float().mean().item()


def main(length: int = 2000, steps: int = 150) -> None:
    torch.manual_seed(0)
    model = network()
    train(model, steps, length)

    x, calibration = torch.randn(1, 1, length), sounds(128, length)
    plan = elc_fx.plan(model, x, elc_fx.Budget(flops=0.5), [calibration], progress=False)
    print(plan, end="\n\n")
    decoupled = elc_fx.decouple(model, plan, [calibration])
    train(decoupled, 2 * steps, length, elc_fx.GateSchedule(decoupled, total_steps=steps))
    small = elc_fx.compile(elc_fx.merge(decoupled), x)

    test = sounds(500, length)
    print(f"accuracy before {accuracy(model, *test):.1%}, after {accuracy(small, *test):.1%}\n")
    print(elc_fx.compare(model, small, x))


if __name__ == "__main__":
    main()
