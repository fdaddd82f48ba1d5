"""Fine-tuning: it learns, closes gates, goes on after a kill as if there had been none, and runs in two processes."""

from __future__ import annotations

import contextlib
import copy
import csv
import math
import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections import UserDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from training_run import Pictures, decoupled, loader, network, short_network

import elc_fx
from elc_fx.training import finetuning
from elc_fx.training.features import Features
from elc_fx.workarounds import SoundConvolutions

SCRIPT = Path(__file__).parent / "training_run.py"
PICTURE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield Pictures(4)[0]


def trained_teacher() -> nn.Module:
    model = network()
    elc_fx.finetune(model, loader(), epochs=3, learning_rate=0.05, progress=False)
    return model


def score(model: nn.Module) -> float:
    torch.manual_seed(1)
    with torch.no_grad():
        return sum(float((model(x).argmax(1) == y).float().mean()) for x, y in DataLoader(Pictures(128), 32)) / 4


def start(folder: Path, *options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, str(SCRIPT), str(folder), "4", *options])


def test_a_killed_run_goes_on_and_ends_as_one_that_was_not(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait() == 0
    process = start(killed, "--slow")
    while not list(killed.glob("checkpoint-*")) and process.poll() is None:
        time.sleep(0.02)
    time.sleep(0.1)  # into the second epoch
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "result-0.pt").exists()
    assert start(killed).wait() == 0
    expected, actual = (torch.load(f / "result-0.pt", weights_only=True) for f in (whole, killed))
    assert actual["losses"] == expected["losses"]
    assert all(torch.equal(value, expected["state"][name]) for name, value in actual["state"].items())
    with (killed / "metrics.csv").open() as file:
        assert [row["number"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]
    assert len(list(killed.glob("checkpoint-*"))) == 1


def test_two_processes_train_one_network(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)]
    subprocess.run([*command, str(tmp_path), "2"], check=True, timeout=120)
    first, second = (torch.load(tmp_path / f"result-{rank}.pt", weights_only=True) for rank in range(2))
    assert first["losses"] == second["losses"]
    assert first["scores"][0] == pytest.approx(first["scores"][1])
    assert all(torch.equal(value, second["state"][name]) for name, value in first["state"].items())


def test_it_ends_closed_in_eval_mode_and_learns_what_the_teacher_knows() -> None:
    teacher = trained_teacher()
    before = copy.deepcopy(teacher.state_dict())
    student = decoupled(teacher)
    history = elc_fx.finetune(student, loader(), teacher=teacher, epochs=4, gates=0.5, progress=False)
    assert [epoch.gate for epoch in history.epochs][-2:] == [0.0, 0.0] and history.epochs[0].gate > 0
    assert not student.training and set(elc_fx.gates(student).values()) == {0.0}
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert score(elc_fx.merge(student)) > 0.9
    closed = decoupled(teacher)
    elc_fx.set_gate(closed, 0)
    assert score(student) > score(closed) or score(closed) == 1.0


def test_what_did_best_on_the_validation_data_remains() -> None:
    student = network()
    validation = [next(iter(loader()))]
    options: dict[str, Any] = {"validation": validation, "learning_rate": 3.0, "warmup": 0.0, "progress": False}
    history = elc_fx.finetune(student, loader(), epochs=4, **options)
    with torch.no_grad():
        inputs, target = validation[0]
        remaining = float((student(inputs).argmax(1) == target).float().mean())
    assert remaining == pytest.approx(history.best.score)
    assert f"{history.best.number}*" in str(history) and str(history).count("*") == 1
    assert history.best.score == max(epoch.score for epoch in history.epochs if epoch.score is not None)


def test_it_stops_when_nothing_gets_better(tmp_path: Path) -> None:
    validation = [(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))]  # always half right
    options: dict[str, Any] = {"validation": validation, "patience": 2, "learning_rate": 1e-3, "folder": tmp_path}
    for _ in range(2):  # the second time it only finds that it is done
        history = elc_fx.finetune(network(), loader(), epochs=9, progress=False, **options)
        assert len(history.epochs) == 3


def test_a_checkpoint_of_another_run_is_refused_and_stays(tmp_path: Path) -> None:
    elc_fx.finetune(network(), loader(), epochs=1, folder=tmp_path, progress=False)
    kept = sorted(file.name for file in tmp_path.rglob("*"))
    with pytest.raises(elc_fx.TrainingError, match="another run"):
        elc_fx.finetune(network(), loader(), epochs=1, learning_rate=0.5, folder=tmp_path, progress=False)
    assert sorted(file.name for file in tmp_path.rglob("*")) == kept


def test_a_damaged_checkpoint_is_told(tmp_path: Path) -> None:
    elc_fx.finetune(network(), loader(), epochs=1, folder=tmp_path, progress=False)
    state = next(tmp_path.glob("checkpoint-*")) / "state.pt"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(elc_fx.TrainingError, match="cannot be read"):
        elc_fx.finetune(network(), loader(), epochs=1, folder=tmp_path, progress=False)


def test_a_loss_that_is_not_finite_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(elc_fx.TrainingError, match="learning_rate"):
        elc_fx.finetune(
            network(), loader(), epochs=1, progress=False, loss=lambda output, target: output.sum() * float("nan")
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs"),
        ({"gates": 2}, "gates"),
        ({"learning_rate": -1}, "learning_rate"),
        ({"ema": 1.5}, "ema"),
        ({"train_data": 3}, "train_data"),
        ({"train_data": []}, "empty"),
        ({"train_data": iter(loader())}, "no batches in epoch 2; give what can be gone through again"),
        ({"train_data": DataLoader(Endless(), 4)}, "__len__"),
        ({"loss": nn.CrossEntropyLoss(reduction="none")}, "a tensor of .16., expected a tensor with one number"),
        ({"loss": lambda output, target: 0.5}, "a float"),
        ({"loss": lambda output, target: output.detach().mean()}, "detached"),
        ({"loss": lambda output: output.mean()}, "the loss function does not run on what the network gives: TypeError"),
        ({"train_data": [torch.zeros(1, 3, 8, 8)]}, "pair"),
        ({"tensorboard": True}, "folder"),
        ({"gate_order": "sideways"}, "gate_order"),
        ({"gate_shape": "round"}, "gate_shape"),
        ({"seed": "x"}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"weight_decay": "x"}, "weight_decay"),
        ({"features": "many"}, "features"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"loss": 3}, "loss"),
        ({"folder": 123}, "folder"),
        ({"teacher": "x"}, "teacher"),
        ({"teacher": nn.Sequential(nn.Flatten(), nn.Linear(192, 7))}, "teacher"),
        ({"validation": 5}, "validation"),
        ({"validation": iter([])}, "validation"),
        ({"train_data": [(torch.zeros(2, 3, 8, 8), torch.tensor([0, 9]))]}, "from 0 to 9"),
        ({"train_data": [(torch.zeros(2, 3, 8, 8), torch.tensor([0.5, 1.0]))]}, "loss of your own"),
    ],
)
def test_bad_options_are_told(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"train_data": loader(), "progress": False, **options}
    with pytest.raises(elc_fx.InvalidInputError, match=message):
        elc_fx.finetune(decoupled(network()), given.pop("train_data"), **given)


def test_the_teacher_may_not_be_the_student() -> None:
    model = network()
    with pytest.raises(elc_fx.InvalidInputError, match="teacher"):
        elc_fx.finetune(model, loader(), teacher=model)


def test_outputs_of_any_structure_are_distilled() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 2, 1)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"a": self.a(x), "b": self.b(x)}

    teacher, student, data = Two().eval(), Two(), [(torch.randn(4, 3, 6, 6), None) for _ in range(8)]
    options: dict[str, Any] = {"distillation": 1.0, "progress": False, "learning_rate": 0.1}
    history = elc_fx.finetune(student, data, teacher=teacher, epochs=5, **options)
    assert history.epochs[-1].loss < 0.5 * history.epochs[0].loss


FAULTY = """
import torch, elc_fx
import torch.nn.functional as F
from elc_fx.planning.planner import Planner
from torch import nn

class ChannelsLast(nn.Module):  # inside, however images and weights are given
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.down = nn.Conv2d(3, 3, 3, padding=1), nn.LayerNorm(3), nn.Conv2d(3, 32, 1, stride=2)
        self.last = nn.Linear(32, 4)
    def forward(self, x):
        x = self.norm(self.first(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.last(torch.relu(self.down(x)).mean((2, 3)))

class Functional(nn.Module):  # with a weight that is none of a convolution's
    def __init__(self):
        super().__init__()
        self.down, self.last = nn.Linear(3, 32), nn.Linear(32, 4)
    def forward(self, x):
        x = F.conv2d(x, self.down.weight[:, :, None, None], stride=(2, 2))
        return self.last(torch.relu(x).mean((2, 3)))

torch.manual_seed(0)
data = [(torch.randn(128, 3, 32, 32), torch.randint(0, 4, (128,))) for _ in range(8)]
images = [x for x, _ in data]
options = {"epochs": 4, "progress": False, "bf16": False}
for model in (ChannelsLast(), ChannelsLast().to(memory_format=torch.channels_last), Functional()):
    elc_fx.finetune(model, data, **options)
print("fine-tuned")
planner = Planner(ChannelsLast().eval(), images[0], images, progress=False, refinements=0)
for position in range(len(planner.choices)):
    planner.loss_after_training([position])
print("planned")
plain = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))
planner = Planner(plain.eval(), images[0], progress=False, loss="uniform", allow=lambda c: c.kernel_size == (1, 1))
decoupled = elc_fx.decouple(plain, planner.plan(elc_fx.Budget(flops=0.5)), images)
elc_fx.finetune(decoupled, data, gates=0.5, **options)
print("decoupled")
"""


def test_strided_pointwise_layers_of_few_channels_train() -> None:
    """Their backward, with channels last, writes beyond its memory with AVX2: the process dies."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", FAULTY], env=environment, capture_output=True, text=True, timeout=500)
    assert done.stdout.split() == ["fine-tuned", "planned", "decoupled"], (done.returncode, done.stderr[-2000:])


@pytest.mark.parametrize("stride", [1, 2, (1, 2)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("called", [torch.conv2d, torch.ops.aten.conv2d.default])
def test_sound_convolutions_compute_the_same(called: Any, layout: torch.memory_format, stride: Any) -> None:
    x, w = torch.randn(2, 4, 5, 6, dtype=torch.double), torch.randn(8, 4, 1, 1, dtype=torch.double)
    x, w, b = x.to(memory_format=layout), w.to(memory_format=layout), torch.randn(8, dtype=torch.double)
    found = []
    for around in (contextlib.nullcontext(), SoundConvolutions()):
        leaves = [value.detach().clone().requires_grad_() for value in (x, w, b)]
        with around:
            y = called(*leaves, [stride] * 2 if isinstance(stride, int) else list(stride))
        assert y.is_contiguous(memory_format=layout)
        y.square().sum().backward()
        found.append([y, *(leaf.grad for leaf in leaves)])
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    with SoundConvolutions():
        again = torch.conv2d(input=x, weight=w, bias=b, stride=stride)
    torch.testing.assert_close(again, found[0][0].detach(), rtol=1e-12, atol=1e-12)


def test_inside_of_autocast_each_step_has_the_weights_of_the_one_before() -> None:
    """Autocast keeps what it has cast until the outermost context ends."""
    found = []
    image = loader().dataset[0][0][None]
    for cached in (False, True):
        student = network()
        own = student.get_parameter("6.weight")

        def loss(output: Any, target: Any, own: torch.Tensor = own) -> torch.Tensor:
            return nn.functional.cross_entropy(output.float(), target) + (own @ own.T).square().mean()

        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            before = student(image)
            elc_fx.finetune(student, loader(), epochs=2, progress=False, bf16=True, loss=loss)
            assert torch.is_autocast_cache_enabled() == cached
            found.append([*student.state_dict().values(), student(image)])
        assert not torch.equal(before, found[-1][-1])
    for value, expected in zip(*found, strict=True):
        assert torch.equal(value, expected)


def test_events_for_tensorboard_name_the_package_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(elc_fx.MissingPackageError, match="pip install tensorboard"):
        elc_fx.finetune(network(), loader(), epochs=1, folder=tmp_path, tensorboard=True, progress=False)
    assert not list(tmp_path.iterdir())


def test_events_for_tensorboard_have_a_number_for_each_epoch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a stand-in for the writer: TensorBoard itself is no dependency."""
    written: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert folder == str(tmp_path / "tensorboard")

        def __enter__(self) -> Writer:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type(sys)("torch.utils.tensorboard"))
    sys.modules["torch.utils.tensorboard"].SummaryWriter = Writer  # type: ignore[attr-defined]
    history = elc_fx.finetune(network(), loader(), epochs=2, folder=tmp_path, tensorboard=True, progress=False)
    losses = [(value, step) for name, value, step in written if name == "loss"]
    assert losses == [(epoch.loss, epoch.number) for epoch in history.epochs]


@pytest.mark.parametrize("collapsed", [False, True])
def test_features_at_the_ends_of_regions_come_closer(collapsed: bool) -> None:
    teacher = trained_teacher()
    data = [(torch.randn(16, 3, 8, 8), None) for _ in range(8)]
    distances = []
    for features in (0.0, 10.0):
        if collapsed:
            planner = elc_fx.Planner(teacher, data[0][0][:1], [x for x, _ in data], progress=False)
            student: nn.Module = planner.collapse(planner.plan(elc_fx.Budget(flops=0.5)))
        else:
            student = decoupled(teacher)
        options: dict[str, Any] = {"features": features, "distillation": 1.0, "progress": False}
        elc_fx.finetune(student, data, teacher=teacher, epochs=6, **options)
        assert not any(module._forward_hooks for module in student.modules())
        seen = Features(student, teacher)
        with torch.no_grad():
            seen.teach(data[0][0])
            student(data[0][0])
        distances.append(float(seen.distance()))
    assert distances[1] < 0.9 * distances[0]


def test_features_need_a_network_of_the_teacher() -> None:
    with pytest.raises(elc_fx.InvalidInputError, match="has none"):
        elc_fx.finetune(network(), loader(), teacher=network(), features=1.0, progress=False)
    with pytest.raises(elc_fx.InvalidInputError, match="pass one"):
        elc_fx.finetune(decoupled(network()), loader(), features=1.0, progress=False)
    with pytest.raises(elc_fx.InvalidInputError, match="it is another"):
        elc_fx.finetune(decoupled(network()), loader(), teacher=Deeper(), features=1.0, progress=False)


class Deeper(nn.Sequential):
    """With all layers of `network`, by the same names, and one more."""

    def __init__(self) -> None:
        super().__init__(*network(), nn.Linear(4, 4))
        self.eval()


def test_the_callers_random_numbers_stay() -> None:
    student, data = network(), loader()
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    elc_fx.finetune(student, data, epochs=1, progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)


# Found by a fresh view.


def test_a_moving_average_ends_with_closed_gates_too() -> None:
    teacher = network()
    student = decoupled(teacher)
    options: dict[str, Any] = {"gates": 0.5, "ema": 0.99, "validation": list(loader()), "progress": False}
    elc_fx.finetune(student, loader(), teacher=teacher, epochs=3, **options)
    assert set(elc_fx.gates(student).values()) == {0.0}
    elc_fx.merge(student)


@pytest.mark.parametrize("change", ["teacher", "loss", "validation"])
def test_a_checkpoint_with_another_teacher_loss_or_validation_is_refused(change: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"teacher": network(), "validation": list(loader()), "loss": nn.functional.cross_entropy}
    options: dict[str, Any] = {"epochs": 1, "folder": tmp_path, "progress": False}
    elc_fx.finetune(network(), loader(), **given, **options)
    if change == "teacher":
        with torch.no_grad():
            next(given["teacher"].parameters()).add_(1)
    else:
        given[change] = {"loss": nn.functional.multi_margin_loss, "validation": list(loader(64))}[change]
    with pytest.raises(elc_fx.TrainingError, match="another run"):
        elc_fx.finetune(network(), loader(), **given, **options)


def test_metrics_that_a_kill_kept_from_being_written_are_written_by_the_next_call(tmp_path: Path) -> None:
    for _ in range(2):
        elc_fx.finetune(network(), loader(), epochs=1, folder=tmp_path, progress=False)
        (tmp_path / "metrics.csv").rename(tmp_path / "kept.csv")
    assert len((tmp_path / "kept.csv").read_text().splitlines()) == 2


def test_a_checkpoint_without_one_of_its_files_is_told(tmp_path: Path) -> None:
    for name in ("network", "best"):
        folder, validation = tmp_path / name, list(loader())
        options: dict[str, Any] = {"validation": validation, "epochs": 1, "folder": folder, "progress": False}
        elc_fx.finetune(network(), loader(), **options)
        next(folder.glob(f"checkpoint-*/{name}.safetensors")).unlink()
        with pytest.raises(elc_fx.TrainingError, match="cannot be read"):
            elc_fx.finetune(network(), loader(), **options)


@pytest.mark.parametrize("point", range(4))
def test_a_disk_that_fills_up_leaves_the_last_checkpoint(
    point: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"folder": tmp_path, "progress": False}
    calls = iter(range(100))
    real = os.fsync

    def full(descriptor: int) -> None:
        if next(calls) == 3 + point:  # each checkpoint is three files
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr("elc_fx.files.os.fsync", full)
    with pytest.raises(elc_fx.TrainingError, match="No space left"):
        elc_fx.finetune(network(), loader(), epochs=4, **options)
    assert not list(tmp_path.rglob("*.tmp"))
    done = len(list(csv.reader((tmp_path / "metrics.csv").open()))) - 1
    monkeypatch.setattr("elc_fx.files.os.fsync", real)
    assert done == (2 if point == 3 else 1)
    assert len(elc_fx.finetune(network(), loader(), epochs=4, **options).epochs) == 4


def test_a_loader_with_a_generator_of_its_own_goes_on_as_it_would_have(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def run(folder: Path, after: int | None) -> dict[str, Any]:
        calls = iter(range(1000))

        def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            if next(calls) == after:
                raise Killed
            return nn.functional.cross_entropy(output, target)

        generator = torch.Generator().manual_seed(3)
        data = DataLoader(pictures, 2, shuffle=True, generator=generator)
        model = network()
        elc_fx.finetune(model, data, epochs=3, folder=folder, progress=False, loss=loss)
        return model.state_dict()

    pictures: Any = [Pictures(8)[i] for i in range(8)]
    whole = run(tmp_path / "whole", None)
    with pytest.raises(Killed):
        run(tmp_path / "killed", 6)
    resumed = run(tmp_path / "killed", None)
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


def test_numbers_are_not_taken_for_scores_of_classes() -> None:
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student[1].bias += 10
    data = [(x, teacher(x).detach()) for x in torch.randn(50, 16, 3, 2, 2)]
    options: dict[str, Any] = {"distillation": 1.0, "loss": nn.functional.mse_loss, "learning_rate": 0.1}
    elc_fx.finetune(student, data, teacher=teacher, epochs=5, progress=False, **options)
    assert float((student[1].bias - teacher[1].bias).detach().abs().max()) < 1


def test_an_accelerator_of_the_caller_neither_changes_the_training_nor_is_changed() -> None:
    """In a process of its own: what Accelerate knows is shared by all of a process."""
    script = """
import sys; sys.path.insert(0, sys.argv[1])
import torch, elc_fx
from accelerate import Accelerator
from training_run import loader, network
own = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=4, cpu=True)
seen = set()
model = network()
model[0].register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
elc_fx.finetune(model, loader(), epochs=1, bf16=False, progress=False)
assert seen == {torch.float32}, seen
assert own.gradient_accumulation_steps == 4
for data in ([], loader()):
    try:
        elc_fx.finetune(network().requires_grad_(False), data, progress=False)
    except elc_fx.ElcError:
        assert own.gradient_accumulation_steps == 4
    else:
        raise AssertionError("there is nothing to train")
assert not hasattr(model, "_is_accelerate_prepared")
"""
    subprocess.run([sys.executable, "-c", script, str(SCRIPT.parent)], check=True)


@pytest.mark.parametrize("change", ["window", "activation", "smoothing"])
def test_a_checkpoint_of_a_network_or_loss_with_the_same_tensors_is_refused(change: str, tmp_path: Path) -> None:
    def made(*, other: bool) -> elc_fx.DecoupledModule:
        model = network()
        if other and change == "activation":
            model[1] = nn.Tanh()
        kept = (1, 3) if other and change == "window" else (3, 1)
        return elc_fx.decouple(model, elc_fx.Plan.of(model, PICTURE, collapse=["2.a"], kernels={"2.a": kept}))

    def run(*, other: bool) -> elc_fx.History:
        loss = nn.CrossEntropyLoss(label_smoothing=0.1 if other and change == "smoothing" else 0.0)
        options: dict[str, Any] = {"loss": loss, "epochs": 1, "folder": tmp_path, "progress": False}
        return elc_fx.finetune(made(other=other), loader(), **options)

    first = run(other=False)
    assert run(other=False) == first
    with pytest.raises(elc_fx.TrainingError, match="another run"):
        run(other=True)


class Normalises(nn.Module):
    """Writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x.sub_(0.5).div_(0.25))
        return y


def test_what_the_network_overwrites_is_its_own_input() -> None:
    teacher, batches = Normalises().eval(), list(loader(64))
    given = copy.deepcopy(batches)
    seen: list[Tensor] = []
    plan = elc_fx.Plan.of(teacher, PICTURE, collapse=["inner.2"])
    student = elc_fx.decouple(teacher, plan, [x for x, _ in batches])
    teacher.inner.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    elc_fx.finetune(student, batches, teacher=teacher, validation=batches, epochs=2, progress=False)
    assert all(torch.equal(x, kept) for (x, _), (kept, _) in zip(batches, given, strict=True))
    assert len(seen) == 8 and all(
        torch.equal(x, (kept - 0.5) / 0.25) for x, (kept, _) in zip(seen, [*given, *given], strict=True)
    )


class Stateful(nn.Module):
    """Keeps what cannot be copied: a lock, a value with a history; and what is no tensor in its state."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.lock = network(), threading.Lock()
        self.kept = torch.ones(1, requires_grad=True) * 2

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y

    def get_extra_state(self) -> dict[str, str]:
        return {"version": "1"}

    def set_extra_state(self, state: dict[str, str]) -> None:
        assert state == {"version": "1"}


def test_what_deepcopy_cannot_copy_is_planned_and_trained(tmp_path: Path) -> None:
    model, batches = Stateful().eval(), list(loader(64))
    options: dict[str, Any] = {"teacher": model, "epochs": 1, "progress": False}
    tuning = elc_fx.FinetuneConfig(batches, epochs=1, folder=tmp_path / "all", progress=False)
    elc_fx.compile(model, PICTURE, mode="decouple", budget=elc_fx.Budget(flops=0.6), finetune=tuning)
    elc_fx.finetune(Stateful(), batches, validation=batches, folder=tmp_path / "own", **options)
    again = elc_fx.finetune(Stateful(), batches, validation=batches, folder=tmp_path / "own", **options)
    assert len(again.epochs) == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_trains_whatever_the_callers_grad_mode_is(mode: Any) -> None:
    model, batches = network(), list(loader(64))
    with mode():
        planner = elc_fx.Planner(model, PICTURE, [x for x, _ in batches], loss="uniform")
        collapsed = planner.collapse(elc_fx.Plan.of(model, PICTURE, collapse=["2"]))
        elc_fx.finetune(collapsed, batches, teacher=model, epochs=1, progress=False)
    elc_fx.finetune(collapsed, batches, teacher=model, epochs=1, progress=False)


def test_frozen_networks_are_told_before_anything_is_planned() -> None:
    model = network().requires_grad_(False)
    tuning = elc_fx.FinetuneConfig(loader(), epochs=1, gates=0.5, progress=False)
    with pytest.raises(elc_fx.InvalidInputError, match="requires_grad_"):
        elc_fx.compile(model, PICTURE, mode="decouple", budget=elc_fx.Budget(flops=0.6), finetune=tuning)
    with pytest.raises(elc_fx.InvalidInputError, match="requires_grad_"):
        elc_fx.finetune(decoupled(model), loader(), epochs=1, progress=False)


@pytest.mark.parametrize(
    "batch",
    [
        (torch.zeros(4, 2, 8, 8), torch.zeros(4, dtype=torch.long)),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.long)),
        (torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.long)),
        ({"y": torch.zeros(4, 3, 8, 8)}, torch.zeros(4, dtype=torch.long)),
    ],
    ids=["channels", "bytes", "empty", "another name"],
)
@pytest.mark.parametrize("where", ["train_data", "validation"])
def test_data_that_does_not_fit_the_network_is_told(batch: Any, where: str) -> None:
    given = {"train_data": list(loader(32)), "validation": list(loader(32))} | {where: [batch]}
    with pytest.raises(elc_fx.InvalidInputError, match="batch of the data"):
        elc_fx.finetune(network(), epochs=1, progress=False, **given)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_numbers_of_another_precision_are_converted(dtype: torch.dtype) -> None:
    plan = elc_fx.Plan.of(network(), PICTURE, collapse=["2"])
    student = elc_fx.decouple(network().to(dtype), plan, [PICTURE])
    elc_fx.finetune(student, list(loader(32)), epochs=1, progress=False)
    assert {p.dtype for p in student.parameters()} == {dtype}


def test_gradients_of_before_are_left_behind() -> None:
    trained = [network(), network()]
    trained[1](PICTURE).sum().backward()
    batches = list(loader(32))
    for one in trained:
        elc_fx.finetune(one, batches, epochs=1, bf16=False, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(*(one.parameters() for one in trained), strict=True))


def test_gradients_that_frozen_parameters_have_do_not_count() -> None:
    trained = [network(), network()]
    for one in trained:
        one[0].requires_grad_(False)
    trained[1][0].weight.grad = torch.full_like(trained[1][0].weight, 1e4)
    batches = list(loader(32))
    for one in trained:
        elc_fx.finetune(one, batches, epochs=1, bf16=False, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(*(one.parameters() for one in trained), strict=True))


class Sees(nn.Module):
    """Keeps the first number of each input, and halves its input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.seen = network(), []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(float(x.flatten()[0]))
        scores: Tensor = self.inner(x.mul_(0.5))
        return scores


def test_a_loader_of_a_class_of_its_own_is_gone_through_as_it_says() -> None:
    class Sevens(DataLoader[Any]):
        def __iter__(self) -> Any:
            return ((torch.full_like(x, 7), y) for x, y in super().__iter__())

    student = Sees()
    elc_fx.finetune(student, Sevens(Pictures(32), 16), epochs=1, progress=False)
    assert student.seen == [7, 7]


@pytest.mark.parametrize("kind", [UserDict, types.MappingProxyType])
def test_mappings_that_are_no_dicts_are_trained_on_as_dicts_are(kind: Any) -> None:
    results = []
    for made in (dict, kind):
        batches = [(made({"x": PICTURE.double()}), torch.arange(4))]
        before = batches[0][0]["x"].clone()
        history = elc_fx.finetune(Sees(), batches, validation=batches, epochs=1, progress=False)
        assert torch.equal(batches[0][0]["x"], before)
        results.append((history.epochs[0].loss, history.epochs[0].score))
    assert results[0] == results[1]


def test_mappings_inside_of_inputs_and_targets_count() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, given: Any) -> Any:
            return self.inner(given["x"])

    def loss(output: Tensor, target: Any) -> Tensor:
        return nn.functional.cross_entropy(output, target["label"])

    batch = [UserDict(x=PICTURE.double())], UserDict(label=torch.arange(4))
    elc_fx.finetune(Nested(), [batch], loss=loss, epochs=1, progress=False)


def test_what_can_be_gone_through_again_need_not_be_a_list() -> None:
    class Prefetcher:
        def __init__(self) -> None:
            self.batches = list(loader(32))

        def __len__(self) -> int:
            return len(self.batches)

        def __iter__(self) -> Any:
            self.left = iter(self.batches)
            return self

        def __next__(self) -> Any:
            return next(self.left)

    assert len(elc_fx.finetune(network(), Prefetcher(), epochs=2, progress=False).epochs) == 2


def test_a_loss_without_gradient_is_borne_where_the_teacher_gives_one() -> None:
    options: dict[str, Any] = {"epochs": 1, "progress": False, "loss": lambda output, target: torch.zeros(())}
    elc_fx.finetune(network(), loader(32), teacher=trained_teacher(), **options)


def test_an_epoch_without_batches_is_told() -> None:
    class Once(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            taken = list(super().__iter__())
            self.clear()
            return iter(taken)

        def __len__(self) -> int:
            return 2

    with pytest.raises(elc_fx.InvalidInputError, match="no batches in epoch 2"):
        elc_fx.finetune(network(), Once(loader(32)), epochs=2, progress=False)


def test_targets_made_in_inference_mode_are_trained_on() -> None:
    with torch.inference_mode():
        soft = network()(PICTURE).softmax(1)
    elc_fx.finetune(network(), [(PICTURE.clone(), soft)], epochs=1, progress=False)


def test_what_has_no_class_does_not_count() -> None:
    labels, some = torch.arange(4), torch.tensor([0, -100, 2, -100])
    results = []
    for x, y in ((PICTURE, some), (PICTURE[[0, 2]], labels[[0, 2]])):
        model = short_network()  # without batch norms, to which the others do count
        history = elc_fx.finetune(model, [(x, y)], validation=[(x, y)], epochs=1, progress=False, bf16=False)
        results.append((history.epochs[0].loss, history.epochs[0].score))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_a_batch_in_which_nothing_has_a_class_is_borne() -> None:
    batches = list(loader(32))
    batches[0][1].fill_(-100)
    history = elc_fx.finetune(network(), batches, validation=batches, epochs=1, progress=False)
    assert math.isfinite(history.epochs[0].loss)


def test_a_class_of_bytes_is_not_taken_for_none() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 200)).eval()
    targets = [torch.full((4,), 156, dtype=kind) for kind in (torch.uint8, torch.int64)]
    histories = [
        elc_fx.finetune(copy.deepcopy(model), [(PICTURE, y)], validation=[(PICTURE, y)], epochs=1, progress=False)
        for y in targets
    ]
    assert histories[0].epochs[0].loss == histories[1].epochs[0].loss > 0
    assert histories[0].epochs[0].score == histories[1].epochs[0].score


def test_a_checkpoint_of_a_run_of_other_parameters_is_told_and_changes_nothing(tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 1, "folder": tmp_path, "progress": False, "features": 1.0}
    elc_fx.finetune(decoupled(network()), loader(32), teacher=network(), **options)
    student = decoupled(network())
    student.get_submodule("0").requires_grad_(False)
    with pytest.raises(elc_fx.TrainingError, match="other parameters"):
        elc_fx.finetune(student, loader(32), teacher=network(), **options)
    assert set(elc_fx.gates(student).values()) == {1.0}
    assert not any(module._forward_hooks for module in student.modules())


def test_a_refused_folder_leaves_the_gates_as_they_were(tmp_path: Path) -> None:
    elc_fx.finetune(network(), loader(32), epochs=1, folder=tmp_path, progress=False)
    student = decoupled(network())
    with pytest.raises(elc_fx.TrainingError, match="another run"):
        elc_fx.finetune(student, loader(32), epochs=1, folder=tmp_path, progress=False)
    assert set(elc_fx.gates(student).values()) == {1.0}


def test_a_whole_number_is_the_same_option_as_that_number(tmp_path: Path) -> None:
    for share in (1, 1.0):
        options: dict[str, Any] = {"distillation": share, "folder": tmp_path, "progress": False}
        elc_fx.finetune(network(), loader(32), teacher=network(), epochs=1, **options)


def test_a_batch_of_one_that_cannot_be_trained_on_names_the_way_out() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.Flatten())
    with pytest.raises(elc_fx.InvalidInputError, match="drop_last=True"):
        elc_fx.finetune(model, [(PICTURE[:1], torch.zeros(1, dtype=torch.long))], epochs=1, progress=False)


class Shorter(list[Any]):
    """Says that it is twice as long as it is."""

    def __len__(self) -> int:
        return 2 * super().__len__()


def test_all_gates_are_closed_after_fewer_batches_than_were_promised() -> None:
    student = decoupled(network())
    elc_fx.finetune(student, Shorter(loader(32)), epochs=2, gates=0.9, progress=False)
    assert set(elc_fx.gates(student).values()) == {0.0}


@pytest.mark.parametrize("inplace", [False, True])
def test_features_are_what_regions_give_before_others_overwrite_it(inplace: bool) -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.act(self.a(x)))
            y += x
            return self.act(y)

    model = Adds().eval()
    plan = elc_fx.Plan.of(model, PICTURE, collapse=["a..b"])
    student = elc_fx.decouple(model, plan)
    features = Features(student, model)
    features.teach(PICTURE)
    assert torch.equal(student(PICTURE), model(PICTURE))
    assert float(features.distance().detach()) == 0
    collapsed = elc_fx.Planner(model, PICTURE, [PICTURE], loss="uniform").collapse(plan)
    features = Features(collapsed, model)
    features.teach(PICTURE)
    collapsed(PICTURE)
    assert float(features.distance().detach()) > 0.01


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        ([torch.zeros(4, 3, 8, 8)], "validation: a batch is a Tensor"),
        ([], "validation holds no samples"),
        ([(torch.zeros(4, 5, 8, 8), torch.zeros(4, dtype=torch.long))], "validation: the network does not run"),
    ],
    ids=["no pairs", "empty", "other images"],
)
def test_validation_that_does_not_fit_is_told_before_anything_is_trained(validation: Any, message: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3))
    before = copy.deepcopy(network.state_dict())
    data = [(torch.randn(4, 3, 8, 8), torch.randint(0, 3, (4,)))]
    with pytest.raises(elc_fx.ElcError, match=message):
        elc_fx.finetune(network, data, epochs=3, validation=validation)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_without_labels_a_network_is_judged_by_its_distance_from_the_teacher() -> None:
    class Segments(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 2, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"out": self.layer(x)}

    data = [(torch.randn(4, 3, 8, 8), torch.zeros(4)) for _ in range(3)]
    history = elc_fx.finetune(
        Segments(), data, teacher=Segments(), epochs=4, distillation=1, validation=data, progress=False
    )
    scores = [epoch.score for epoch in history.epochs]
    assert all(score is not None and score < 0 for score in scores) and scores[-1] > scores[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_only_float32_is_cast_by_default(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetuning, "computes_in_bf16", lambda device: True)
    options: dict[str, Any] = {"epochs": 1, "progress": False}
    elc_fx.finetune(network().to(dtype), loader(), teacher=network().to(dtype), **options)
    with pytest.raises(elc_fx.InvalidInputError, match="the teacher does not run") as raised:
        elc_fx.finetune(network().to(dtype), loader(), teacher=network(), **options)
    assert "BFloat16" not in str(raised.value)
