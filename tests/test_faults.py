"""What goes wrong outside of elc_fx: kills, full disks, folders that cannot be written, numbers that are none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import image, ready
from torch import nn

import elc_fx

TESTS = Path(__file__).parent
ROOT = TESTS.parent


def network(*, scale: float = 1.0) -> nn.Module:
    model = ready(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)))
    with torch.no_grad():
        model[0].weight.mul_(scale)
    return model


def python(code: str, *arguments: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(TESTS))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# Files.

SAVING = """
import os, sys, torch, elc_fx
from test_faults import network
network = elc_fx.compile(network(scale=2.0))
if sys.argv[2] == "before the rename":
    import pathlib
    pathlib.Path.replace = lambda *_: (print("writing", flush=True), __import__("time").sleep(60))
elif sys.argv[2] == "while it writes":
    os.fsync = lambda _: (print("writing", flush=True), __import__("time").sleep(60))
elc_fx.save(network, sys.argv[1])
"""


@pytest.mark.parametrize("when", ["while it writes", "before the rename"])
def test_a_kill_while_saving_leaves_the_old_file(when: str, tmp_path: Path) -> None:
    file = tmp_path / "net.elc"
    elc_fx.save(elc_fx.compile(network()), file)
    before = file.read_bytes()
    process = python(SAVING, file, when)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert file.read_bytes() == before
    assert python(SAVING, file, "never").wait() == 0
    elc_fx.load(file)
    assert file.read_bytes() != before


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, compiled = tmp_path / "net.elc", elc_fx.compile(network())
    elc_fx.save(compiled, file)
    before = file.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("elc_fx.files.os.fsync", full)
    with pytest.raises(elc_fx.StorageError, match=r"cannot write .*net\.elc: .*No space left"):
        elc_fx.save(compiled, file)
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["net.elc"]


def test_a_target_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = elc_fx.compile(network())
    for file in (tmp_path, tmp_path / "nowhere" / "net.elc", Path("/proc/net.elc")):  # root may write anywhere else
        with pytest.raises(elc_fx.StorageError, match=f"cannot write {file}"):
            elc_fx.save(compiled, file)
    assert not list(tmp_path.iterdir())

    def read_only(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(elc_fx.StorageError, match="Permission denied"):
        elc_fx.save(compiled, tmp_path / "net.elc")


PLANNING = """
import sys, torch, elc_fx
from networks import image, ready
from torch import nn
torch.manual_seed(0)
layers = [layer for _ in range(3) for layer in (nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())]
model = ready(nn.Sequential(*layers))
x = image(4, 4, 8, 8)
planner = elc_fx.Planner(model, x, [x], cache=sys.argv[1])
print(planner.plan(elc_fx.Budget(depth=2)).to_json())
"""


def test_two_processes_that_plan_with_one_cache_agree(tmp_path: Path) -> None:
    processes = [python(PLANNING, tmp_path / "cache") for _ in range(2)]
    plans = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0] and plans[0] == plans[1] != ""
    again = python(PLANNING, tmp_path / "cache")
    assert again.communicate()[0] == plans[0]


# Numbers that are none.


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["0.weight", "0.bias", "1.running_var", "1.running_mean"])
def test_weights_that_are_no_numbers_are_not_merged_and_told(value: float, where: str) -> None:
    model, x = network(), image(1, 3, 5, 5)
    with torch.no_grad():
        model.state_dict()[where].view(-1)[1] = value
    compiled = elc_fx.compile(model, x)
    assert torch.equal(compiled(x), model(x)) or torch.allclose(compiled(x), model(x), equal_nan=True)
    report = elc_fx.report_of(compiled)
    if where == "1.running_var" and value == float("inf"):  # 1/√∞ is 0, a number
        return
    assert not report.merged
    assert any("not finite" in refusal.reason for refusal in report.refused)


def test_inputs_that_are_no_numbers_prove_nothing_and_that_is_told() -> None:
    x = image(1, 3, 5, 5)
    x[0, 0, 0, 0] = float("nan")
    told = [refusal for refusal in elc_fx.report_of(elc_fx.compile(network(), x)).refused if "NaN" in refusal.reason]
    assert [str(refusal) for refusal in told] == [
        "the output: 4 of 36 numbers are NaN or infinite on the example_inputs, and only their places were compared"
    ]


def test_a_network_with_numbers_that_are_none_is_saved_as_it_is(tmp_path: Path) -> None:
    model = network()
    with torch.no_grad():
        model[3].weight[0, 0] = float("nan")
    elc_fx.save(elc_fx.compile(model), tmp_path / "net.elc")
    assert bool(elc_fx.load(tmp_path / "net.elc").get_parameter("3.weight").isnan().any())


# Packages and networks of computers.

OFFLINE = """
import socket, sys
def refuse(*_, **__):
    raise AssertionError("it asks the network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import torch, elc_fx
from networks import image
from test_faults import network
compiled = elc_fx.compile(network(), image(1, 3, 5, 5))
elc_fx.save(compiled, sys.argv[1])
elc_fx.load(sys.argv[1])
from elc_fx.loading import Spec
Spec.parse("torchvision:resnet18").load()
"""


def test_nothing_asks_the_network(tmp_path: Path) -> None:
    process = python(OFFLINE, tmp_path / "net.elc")
    assert (process.communicate()[1], process.returncode) == ("", 0)


@pytest.mark.parametrize(
    ("package", "backend", "extra"), [("onnxruntime", "onnxruntime", "onnx"), ("openvino", "openvino", "openvino")]
)
def test_a_missing_package_names_its_extra(
    package: str, backend: Any, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(elc_fx.MissingPackageError, match=rf"pip install 'elc_fx\[{extra}\]'"):
        elc_fx.compile(network(), image(1, 3, 5, 5), backend=backend)


@pytest.mark.parametrize("where", ["calibration", "example_inputs"])
def test_memory_that_ends_inside_of_the_model_is_no_fault_of_the_inputs(where: str) -> None:
    class Hungry(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > 1 or where == "example_inputs":
                raise MemoryError
            return x

    model = nn.Sequential(Hungry(), nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3)).double().eval()
    given = {"budget": elc_fx.Budget(flops=0.5), "calibration": [image(2, 3, 9, 9)]}
    with pytest.raises(elc_fx.OutOfMemoryError):
        elc_fx.compile(model, image(1, 3, 9, 9), mode="decouple", **given)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process as Linux does")
def test_a_network_that_does_not_fit_twice_is_told_and_left_as_it_was() -> None:
    script = """
import resource, torch, elc_fx
from torch import nn
layers = [m for _ in range(16) for m in (nn.Conv2d(512, 512, 3, padding=1), nn.BatchNorm2d(512), nn.ReLU())]
model = nn.Sequential(*layers).eval()
elc_fx.compile(model[:3].eval())  # what is imported late
before = {name: value.sum() for name, value in model.state_dict().items()}
taken = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024
resource.setrlimit(resource.RLIMIT_AS, (taken + 70 * 2**20, resource.RLIM_INFINITY))  # the model has 144 MiB
try:
    elc_fx.compile(model)
except elc_fx.OutOfMemoryError as error:
    print(error)
assert all(value.sum() == before[name] for name, value in model.state_dict().items())
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
elc_fx.compile(model)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    assert "which takes 144 MiB" in done.stdout
