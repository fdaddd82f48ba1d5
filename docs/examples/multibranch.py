"""A network of parallel branches, as RepVGG has them: one convolution for each block, exactly.

The network is defined here, its weights and the statistics of its batch norms are random. Nothing in elc_fx knows
the block: what it computes is read from its code.
"""

import itertools

import torch
from torch import Tensor, nn

import elc_fx


def normalised(conv: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels))


class Block(nn.Module):
    """relu(3×3 + 1×1 + identity), each with a batch norm. The identity is there where the shape stays."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.dense = normalised(nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False))
        self.point = normalised(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))
        self.identity = nn.BatchNorm2d(in_channels) if in_channels == out_channels and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.dense(x) + self.point(x)
        if self.identity is not None:
            y = y + self.identity(x)
        return torch.relu(y)


def network(width: int) -> nn.Module:
    widths = [3, width, width, 2 * width, 2 * width, 4 * width, 4 * width]
    blocks = [Block(a, b, stride=1 if a == b else 2) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def main(width: int = 64, size: int = 128) -> None:
    torch.manual_seed(0)
    model = network(width)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, 3, size, size))  # so that the batch norms have statistics
    model.eval()

    x = torch.randn(1, 3, size, size)
    fast = elc_fx.compile(model, x)
    print(elc_fx.report_of(fast), end="\n\n")
    print(elc_fx.compare(model, fast, x))


if __name__ == "__main__":
    main()
