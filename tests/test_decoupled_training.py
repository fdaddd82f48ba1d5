"""The decoupled network in ordinary training: a loop, torch.compile, autocast, and two processes."""

from __future__ import annotations

import contextlib
import copy
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from networks import image, ready
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import elc_fx


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + x)


def network() -> nn.Module:
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), Block(8), Block(8)]
    return nn.Sequential(*stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


def decoupled_network(kernel: str = "3x3") -> elc_fx.DecoupledModule:
    model = network()
    plan = elc_fx.Plan.of(model, torch.randn(1, 3, 8, 8), collapse=[f"3:{kernel}", f"4:{kernel}"])
    warns = pytest.warns(UserWarning, match="costs more") if kernel == "5x5" else contextlib.nullcontext()
    with warns:
        return elc_fx.decouple(model, plan)


def task() -> tuple[Tensor, Tensor]:
    """Images whose mean colour tells the class."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(4, (64,), generator=generator)
    colours = torch.randn(4, 3, 1, 1, generator=generator)
    return colours[labels] + 0.3 * torch.randn(64, 3, 8, 8, generator=generator), labels


@pytest.mark.parametrize("kernel", ["3x3", "5x5"])
def test_it_trains_while_the_gates_close_and_merges_after(kernel: str) -> None:
    images, labels = task()
    decoupled = decoupled_network(kernel).train()
    optimizer = torch.optim.SGD(decoupled.parameters(), lr=0.05, momentum=0.9)
    schedule = elc_fx.GateSchedule(decoupled, total_steps=20, shape="cosine", order="depth")
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(decoupled(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert schedule.closed and set(elc_fx.gates(decoupled).values()) == {0.0}
    assert losses[-1] < 0.3 * losses[0]
    decoupled.eval()
    merged = elc_fx.merge(decoupled)
    torch.testing.assert_close(merged(images), decoupled(images), rtol=1e-4, atol=1e-4)
    assert sum(isinstance(m, nn.Conv2d) for m in merged.modules()) == 3


@pytest.mark.parametrize("gate", [1.0, 0.5, 0.0])
def test_under_torch_compile(gate: float) -> None:
    images, _ = task()
    decoupled = decoupled_network("5x5").train()
    elc_fx.set_gate(decoupled, gate)
    compiled = torch.compile(copy.deepcopy(decoupled), backend="aot_eager")
    for module in (decoupled, compiled):
        module(images).square().sum().backward()
    torch.testing.assert_close(compiled(images), decoupled(images), rtol=1e-4, atol=1e-5)
    gradients = {name.removeprefix("_orig_mod."): p.grad for name, p in compiled.named_parameters()}
    for name, parameter in decoupled.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("gate", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("kernel", ["3x3", "5x5"])
def test_under_autocast(gate: float, kernel: str) -> None:
    images, labels = task()
    decoupled = decoupled_network(kernel).train()
    elc_fx.set_gate(decoupled, gate)
    with torch.autocast("cpu", torch.bfloat16):
        output = decoupled(images)
        loss = F.cross_entropy(output, labels)
    loss.backward()
    assert output.dtype == torch.bfloat16
    for name, parameter in decoupled.named_parameters():
        if gate == 1 and name.endswith((".slope", ".offset")):
            assert parameter.grad is None  # what would be multiplied by 0 is not computed
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def _train_on_one_of_two(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    images, labels = task()
    model = DistributedDataParallel(decoupled_network("3x3").train(), find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    schedule = elc_fx.GateSchedule(model.module, total_steps=4)
    for _ in range(5):
        loss = F.cross_entropy(model(images[rank::2]), labels[rank::2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    torch.save([p.detach() for p in model.parameters()], Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_with_two_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_train_on_one_of_two, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("order", ["together", "depth", "reverse depth", "cost"])
@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_gate_schedules_go_from_one_to_zero(order: Any, shape: Any) -> None:
    decoupled = decoupled_network()
    schedule = elc_fx.GateSchedule(decoupled, 10, start=2, shape=shape, order=order, overlap=0.3)
    history = [elc_fx.gates(decoupled)]
    for _ in range(10):
        assert not schedule.closed
        schedule.step()
        history.append(elc_fx.gates(decoupled))
    assert schedule.closed
    for name in history[0]:
        values = [gates[name] for gates in history]
        assert values[:3] == [1.0, 1.0, 1.0] and values[-1] == 0.0
        assert values == sorted(values, reverse=True)
    halfway = list(history[6].values())
    assert (len(set(halfway)) == 1) == (order == "together")


def test_a_gate_schedule_resumes() -> None:
    decoupled, other = decoupled_network(), decoupled_network()
    schedule = elc_fx.GateSchedule(decoupled, 10)
    for _ in range(4):
        schedule.step()
    resumed = elc_fx.GateSchedule(other, 10)
    resumed.load_state_dict(schedule.state_dict())
    assert elc_fx.gates(other) == elc_fx.gates(decoupled)


def test_gates_are_set_by_name_and_checked() -> None:
    decoupled = decoupled_network()
    elc_fx.set_gate(decoupled, {"3.*": 0.0})
    assert {name[0] for name, gate in elc_fx.gates(decoupled).items() if gate == 0} == {"3"}
    for wrong in (2, -0.1, float("nan"), {"nothing": 0.5}):
        with pytest.raises(elc_fx.InvalidInputError):
            elc_fx.set_gate(decoupled, wrong)
    with pytest.raises(elc_fx.InvalidInputError, match="no decoupling nodes"):
        elc_fx.set_gate(network(), 0)
    for arguments in ({"total_steps": 0}, {"total_steps": 5, "start": 5}, {"total_steps": 5, "order": "size"}):
        with pytest.raises(elc_fx.InvalidInputError):
            elc_fx.GateSchedule(decoupled, **arguments)  # type: ignore[arg-type]


def test_a_batch_norm_takes_a_closed_activation_into_its_own_scale() -> None:
    """With rings and closed gates, in training: the same outputs and gradients, with one pass less."""
    model = ready(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    )
    x = image(4, 3, 7, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that 5×5 costs more
        one = elc_fx.decouple(model, elc_fx.Plan.of(model, x, kernels={"0": 3, "3": 3}))
    elc_fx.set_gate(one, 0)
    other, outputs = copy.deepcopy(one), []
    assert one.get_submodule("1").line[0] is one.get_submodule("2")
    assert other.get_submodule("1").line[0] is other.get_submodule("2")
    other.get_submodule("1").line, other.get_submodule("2").norm = [], []
    for network in (one, other):
        outputs.append(network.train()(x))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-9, atol=1e-9)
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)
    assert one.get_submodule("1").takes_line and not one.eval().get_submodule("1").takes_line
