"""The command line, as a shell user meets it: results on stdout, one line for an error, exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import elc_fx
from elc_fx.cli import app

FACTORIES = """
import torch
from torch import nn

print("importing prints")

def net():
    print("building prints")
    first = nn.Conv2d(3, 4, 3, padding=1)
    return nn.Sequential(first, nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 2, 1))

class Sum(nn.Module):
    def forward(self, x, y):
        return {"sum": x + y}

class OneSample(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x.view(1, 3, 8, 8)).flatten(1)

instance = nn.BatchNorm2d(3)
number = 3

def fails():
    raise KeyError("no such layer")

def quits():
    raise SystemExit(0)
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a module `mynets` that only this test sees."""
    (tmp_path / "mynets.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mynets", raising=False)
    return tmp_path


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def error_of(result: Any, code: int) -> str:
    """The one line on stderr of a command that failed with this code, and printed nothing to stdout."""
    assert (result.exit_code, result.stdout) == (code, "")
    lines = [line for line in result.stderr.splitlines() if "prints" not in line]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("elc-fx: error: ")
    return lines[0].removeprefix("elc-fx: error: ")


def net() -> nn.Module:
    """The network of `mynets:net`, with weights of its own."""
    torch.manual_seed(7)
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 2, 1)
    )
    nn.init.uniform_(layers[1].running_var, 0.5, 2.0)
    return layers.eval()


def test_tables_show_the_report_and_the_comparison(workplace: Path) -> None:
    result = run("compile", "mynets:net", "--input", "1x3x8x8")
    assert result.exit_code == 0, result.stderr
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line.strip()}
    assert rows["convolutions"] == ["3", "2", "66.7%"]
    assert "in float64" in result.stdout
    assert "prints" not in result.stdout


def test_json_is_one_document_and_nothing_else_on_stdout(workplace: Path) -> None:
    result = run("compile", "mynets:net", "--input", "1x3x8x8", "--json")
    document = json.loads(result.stdout)
    assert document["comparison"]["before"]["convolutions"] == 3
    assert document["comparison"]["after"]["convolutions"] == 2
    assert document["comparison"]["max_rel_error"] < 1e-6
    assert document["report"]["merged"]
    assert "building prints" in result.stderr


def test_without_inputs_there_is_a_report_and_no_comparison(workplace: Path) -> None:
    document = json.loads(run("compile", "mynets:net", "--json").stdout)
    assert document["report"]["merged"]
    assert document["comparison"] is None


def test_the_same_command_prints_the_same_twice(workplace: Path) -> None:
    first, second = (run("compile", "mynets:net", "--input", "2x3x8x8", "--json").stdout for _ in range(2))
    assert first == second


@pytest.mark.parametrize("spec", ["mynets:Sum", "mynets:instance"])
def test_a_spec_may_name_a_class_or_a_model(workplace: Path, spec: str) -> None:
    inputs = ["--input", "1x3x8x8"] * (2 if spec == "mynets:Sum" else 1)
    result = run("compile", spec, *inputs)
    assert result.exit_code == 0, result.stderr


def test_dtype_converts_the_model_and_its_inputs(workplace: Path) -> None:
    run("compile", "mynets:net", "--input", "1x3x8x8", "--dtype", "bfloat16", "--save", "net.pt2")
    module = torch.export.load("net.pt2").module()
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("wrapper", ["safetensors", "plain", "state_dict", "model_state_dict"])
def test_weights_are_loaded_and_saved_for_any_batch_size(workplace: Path, wrapper: str) -> None:
    trained, file = net(), workplace / "weights.safetensors"
    if wrapper == "safetensors":
        save_file(trained.state_dict(), file)
    else:
        file = file.with_suffix(".pth")
        state = trained.state_dict()
        torch.save(state if wrapper == "plain" else {"epoch": 3, wrapper: state}, file)
    result = run("compile", "mynets:net", "--input", "1x3x8x8", "--weights", file, "--save", "net.pt2")
    assert result.exit_code == 0, result.stderr
    assert "note" not in result.stderr
    exported = torch.export.load("net.pt2").module()
    for batch in (1, 5):
        x = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(exported(x), trained(x))
    assert sum(node.target is torch.ops.aten.conv2d.default for node in exported.graph.nodes) == 2


def test_weights_that_do_not_fit_are_listed(workplace: Path) -> None:
    state = net().state_dict()
    state["0.weight"] = torch.zeros(5, 3, 3, 3)
    state["extra"] = state.pop("4.bias")
    save_file(state, workplace / "weights.safetensors")
    message = error_of(run("compile", "mynets:net", "--weights", "weights.safetensors"), 1)
    assert "1 wrong shapes: 0.weight [5, 3, 3, 3], expected [4, 3, 3, 3]" in message
    assert "1 missing: 4.bias" in message
    assert "1 unexpected: extra" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file"),
        (b"garbage", "is no file of torch.save"),
        (b"epoch,loss", "of neither torch.save nor safetensors"),
        ([1, 2], "holds a list, expected a state dict"),
        ({"0.weight": 3.0}, "tensors by name: '0.weight' is a float"),
        ({0: torch.zeros(2)}, "tensors by name: 0 is a Tensor"),
        (nn.Linear(1, 1), "holds more than weights"),
    ],
)
def test_files_that_are_no_weights_are_refused(workplace: Path, content: Any, message: str) -> None:
    file = workplace / "weights.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    assert message in error_of(run("compile", "mynets:net", "--weights", file), 1)


def test_whatever_reading_a_damaged_file_raises_is_told(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError  # as torch does for some damaged files of its old format

    torch.save({}, workplace / "weights.pth")
    monkeypatch.setattr(torch, "load", load)
    assert "it is damaged" in error_of(run("compile", "mynets:net", "--weights", "weights.pth"), 1)


def test_a_broken_safetensors_file_is_refused(workplace: Path) -> None:
    (workplace / "weights.safetensors").write_bytes(b"garbage")
    assert "cannot be read" in error_of(run("compile", "mynets:net", "--weights", "weights.safetensors"), 1)


def test_a_model_of_one_sample_is_saved_for_one_sample_with_a_note(workplace: Path) -> None:
    result = run("compile", "mynets:OneSample", "--input", "1x3x8x8", "--save", "net.pt2")
    assert result.exit_code == 0, result.stderr
    assert "elc-fx: note: net.pt2 takes this batch size only" in result.stderr
    assert torch.export.load("net.pt2").module()(torch.randn(1, 3, 8, 8)).shape == (1, 144)


def test_a_failed_save_leaves_the_old_file_and_no_other(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(program: Any, stream: Any, **options: Any) -> None:
        stream.write(b"half")
        raise OSError("disk full")

    (workplace / "net.pt2").write_bytes(b"old")
    before = set(workplace.iterdir())
    monkeypatch.setattr(torch.export, "save", half)
    result = run("compile", "mynets:net", "--input", "1x3x8x8", "--save", "net.pt2")
    assert "disk full" in error_of(result, 1)
    assert (workplace / "net.pt2").read_bytes() == b"old"
    assert {path for path in workplace.iterdir() if path.name != "__pycache__"} == before


def test_a_model_is_saved_for_elc_fx_and_compared(workplace: Path) -> None:
    run("compile", "mynets:net", "--save", "net.elc")
    assert elc_fx.report_of(elc_fx.load(workplace / "net.elc")).merged
    assert "mynets:net" in run("diff", "mynets:net", "net.elc").stdout
    (workplace / "net.elc").write_bytes((workplace / "net.elc").read_bytes()[:-9])
    assert "net.elc is no network" in error_of(run("diff", "mynets:net", "net.elc"), 1)


def test_an_impossible_save_is_refused_before_the_model_is_even_built(workplace: Path) -> None:
    arguments = ("compile", "mynets:fails", "--input", "1x3x8x8", "--save")
    assert "there is no directory missing" in error_of(run(*arguments, "missing/net.pt2"), 1)
    assert "is a directory" in error_of(run(*arguments, workplace), 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet18"], "'resnet18' is no model; expected torchvision:NAME"),
        (["torchvision:"], "is no model"),
        (["my nets:net"], "is no model"),
        (["mynets:net", "--input", "1x3xlarge"], "'1x3xlarge' is no shape; expected sizes as in 1x3x224x224"),
        (["mynets:net", "--input", "1x0x2"], "is no shape"),
        (["mynets:net", "--input", ""], "is no shape"),
        (["mynets:net", "--save", "net.pt2"], "needs --input"),
        (["mynets:net", "--input", "1x3x8x8", "--save", "net.onnx"], "neither .pt2 nor .elc"),
        (["mynets:net", "--dtype", "float31"], "float31"),
        (["mynets:net", "--unheard-of"], "--unheard-of"),
        ([], "SPEC"),
        (["mynets.py:net"], "without .py, such as mynets:net"),
        (["a/mynets.py:net"], "without .py, such as a.mynets:net"),
        (["../mynets.py:net"], "without .py, such as mynets:net, with PYTHONPATH=.."),
        (["my-nets.py:net"], "without .py, such as my_nets:net, once the file has that name"),
        (["mynets.py"], "without .py, such as mynets:FACTORY"),
    ],
)
def test_wrong_usage_ends_with_code_2(workplace: Path, arguments: list[str], message: str) -> None:
    assert message in error_of(run("compile", *arguments), 2)


def test_weights_of_a_network_that_is_not_there_are_wrong_usage(workplace: Path) -> None:
    assert "--weights-b: there is no B" in error_of(run("diff", "mynets:net", "--weights-b", "net.pth"), 2)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torchvision:resnet81", "torchvision has no model 'resnet81'; did you mean resnet18"),
        ("mynets:nett", "mynets has no 'nett'; did you mean net"),
        ("mynets:number", "gives a int, expected a torch.nn.Module"),
        ("mynets:fails", "mynets:fails() failed: KeyError: 'no such layer'"),
        ("mynets:quits", "mynets:quits() failed: SystemExit"),
        ("nowhere.mynets:net", "there is no module 'nowhere'"),
    ],
)
def test_a_model_that_cannot_be_had_ends_with_code_1(workplace: Path, spec: str, message: str) -> None:
    assert message in error_of(run("compile", spec), 1)


def test_an_input_that_the_model_does_not_take_ends_with_code_1(workplace: Path) -> None:
    assert "channels" in error_of(run("compile", "mynets:net", "--input", "1x4x8x8"), 1)


@pytest.mark.parametrize("how", ["option", "environment"])
def test_debug_shows_the_traceback(workplace: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "environment":
        monkeypatch.setenv("ELC_FX_DEBUG", "1")
    result = run("compile", "mynets:fails", *(["--debug"] if how == "option" else []))
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert result.stderr.rstrip().endswith("elc-fx: error: mynets:fails() failed: KeyError: 'no such layer'")


def test_timm_models_compile(workplace: Path) -> None:
    pytest.importorskip("timm")
    assert "Invalid pretrained tag" in error_of(run("compile", "timm:resnet18.nobodys"), 1)
    result = run("compile", "timm:repvgg_a0", "--json")
    assert result.exit_code == 0, result.stderr
    assert len(json.loads(result.stdout)["report"]["merged"]) == 22


def test_help_teaches_by_examples() -> None:
    text = run("compile", "--help").stdout
    assert "  elc-fx compile torchvision:resnet50 --input 1x3x224x224\n" in text
    bare = run()
    assert (bare.exit_code, bare.stdout) == (2, "")
    assert "compile" in bare.stderr


def shell(*arguments: str, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A real process; PYTHONPATH leads to this checkout, should the package not be installed."""
    root = str(Path(__file__).resolve().parents[1])
    return subprocess.run(
        [sys.executable, "-m", "elc_fx", *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": root, **environment},
        capture_output=True,
        text=True,
        encoding=environment.get("PYTHONIOENCODING"),
        timeout=120,
    )


def test_in_a_shell_torchvision_models_with_auxiliary_heads_come_quietly(workplace: Path) -> None:
    result = shell("compile", "torchvision:googlenet", "--input", "1x3x32x32", "--json", directory=workplace)
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["comparison"]["after"]["convolutions"] <= 57


def test_in_a_shell_the_working_directory_can_be_imported(workplace: Path) -> None:
    result = shell("compile", "mynets:number", directory=workplace)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "elc-fx: error: mynets:number gives a int, expected a torch.nn.Module"


@pytest.mark.parametrize("command", ["explain", "diff"])
def test_in_a_shell_signs_that_its_encoding_lacks_are_replaced(command: str, workplace: Path) -> None:
    arguments = command, "mynets:net", "--input", "1x3x8x8"
    result = shell(*arguments, directory=workplace, PYTHONIOENCODING="cp1252")
    assert result.returncode == 0 and "3×3 3?4" in result.stdout


def test_in_a_shell_the_version_is_printed(workplace: Path) -> None:
    assert shell("--version", directory=workplace).stdout.startswith("elc-fx 0.")


def test_what_compiled_libraries_print_is_no_part_of_the_result() -> None:
    script = """
import ctypes, os
from elc_fx.cli import _working
with _working("something"):
    os.write(1, b"noise")
    ctypes.CDLL(None).puts(b"noise in C's buffer")
print("{}")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "{}\n" and done.stderr.count("noise") == 2
