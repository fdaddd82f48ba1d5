"""A merged network quantises like any other: PT2E of torchao, and the tool that measures it."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import randomize_
from torch import Tensor, nn

import elc_fx
import quantise
from elc_fx.training.data import Images

pytest.importorskip("torchao")


class Block(nn.Module):
    """3×3, 1×1 and identity, each with batch norm, added: one convolution once it is merged."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.narrow = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.same = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.wide(x) + self.narrow(x) + self.same(x))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Block(8), nn.MaxPool2d(2), Block(8))
        self.classifier = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


@pytest.fixture
def images() -> Images:
    torch.manual_seed(0)
    pixels = torch.randint(256, (64, 3, 16, 16), dtype=torch.uint8)
    return Images(pixels, torch.arange(64) % 10, tuple("0123456789"))


@pytest.fixture
def merged() -> nn.Module:
    return elc_fx.compile(randomize_(Network()).eval())


def int8_weights(network: nn.Module) -> int:
    return sum(value.dtype == torch.int8 for value in [*network.parameters(), *network.buffers()])


@torch.no_grad()
def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
@pytest.mark.parametrize("per_channel", [True, False])
def test_a_merged_network_stays_close_in_int8(merged: nn.Module, images: Images, per_channel: bool) -> None:
    x = images.inputs()
    before = copy.deepcopy(merged.state_dict())
    int8 = quantise.quantised(merged, images, per_channel)
    assert int8_weights(int8) == 4  # a convolution, two merged blocks, the classifier
    for some in (x, x[:1]):
        assert 0 < relative_error(int8(some), merged(some)) < 0.05
    torch.testing.assert_close(merged.state_dict(), before, rtol=0, atol=0)  # the network itself stays


@torch.no_grad()
def test_what_is_quantised_exports_again(merged: nn.Module, images: Images) -> None:
    int8, x = quantise.quantised(merged, images), images.inputs()
    again = torch.export.export(int8, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    torch.testing.assert_close(again(x[:3]), int8(x[:3]))


def test_the_tool_counts_right_and_changed_predictions(merged: nn.Module, images: Images) -> None:
    row = quantise.examine(merged, quantise.draws(images, 16, 2), images)
    assert row["images"] == 64
    assert all(len(runs) == 2 and all(run["changed"] < 16 for run in runs) for runs in row["int8"].values())
    table = quantise.table([{"network": "tiny", **row}])
    assert "tiny" in table and f"{row['float32']['right'] / 64:.2%}" in table


def test_draws_have_no_image_in_common(images: Images) -> None:
    first, second = quantise.draws(images, 20, 2)
    assert len(first) == len(second) == 20
    assert not {tuple(p.flatten().tolist()) for p in first.pixels} & {
        tuple(p.flatten().tolist()) for p in second.pixels
    }
