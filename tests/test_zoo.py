"""A small part of tools/zoo_sweep.py: one model of each kind, checked as the whole sweep checks them all."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from zoo import family_of
from zoo_sweep import CallWatch, relative_error, sweep

MODELS = (
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "lraspp_mobilenet_v3_large",
    "ssdlite320_mobilenet_v3_large",
    "mc3_18",
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Many small convolutions: on a busy machine, threads would mostly wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", MODELS)
def test_model_of_the_zoo_compiles_to_its_equal(name: str) -> None:
    row = sweep(family_of(name), name)
    assert row.status == "ok", row.reasons


def test_a_model_that_does_not_run_becomes_a_reason() -> None:
    assert sweep(family_of("resnet18"), "no_such_model").reasons


class ReadTwice(nn.Module):
    """A batch norm behind a convolution whose output another layer reads too: it must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.relu(y) + self.norm(y)


@pytest.mark.parametrize(
    ("model", "left_behind"),
    [
        (nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)), 1),
        (nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.BatchNorm2d(2)), 0),
        (ReadTwice(), 0),
    ],
)
def test_watch_counts_batch_norms_that_alone_read_a_convolution(model: nn.Module, left_behind: int) -> None:
    with CallWatch() as watch:
        model.eval()(torch.zeros(1, 2, 3, 3))
    assert watch.left_behind == left_behind
    assert watch.convolutions == watch.calls["batch_norm"] == 1


@pytest.mark.parametrize(
    ("expected", "actual", "error"),
    [
        ({"out": torch.tensor([2.0, -4.0])}, {"out": torch.tensor([2.0, -3.0])}, 0.25),
        ([torch.zeros(2), torch.ones(2)], [torch.zeros(2), torch.ones(2)], 0.0),
        ([torch.ones(2)], (torch.ones(2),), math.inf),
        (torch.ones(2), torch.ones(3), math.inf),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), math.inf),
        (torch.ones(2), torch.tensor([1.0, math.nan]), math.inf),
    ],
)
def test_relative_error_is_the_worst_of_all_tensors(expected: object, actual: object, error: float) -> None:
    assert relative_error(expected, actual) == error
