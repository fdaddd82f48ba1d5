"""The whole job on files: what it writes, that it goes on after a kill, and what it says of bad input."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file, save_file
from training_run import Pictures, loader, network, short_network
from typer.testing import CliRunner

import elc_fx
from elc_fx.cli import app
from elc_fx.deploying import exporting
from elc_fx.training import data

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, of four classes, and the `weights` of a network that knows them."""
    root = tmp_path_factory.mktemp("job")
    torch.manual_seed(0)
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (data.MEAN, data.DEVIATION))
    for split, count in (("train", 200), ("test", 40)):
        pictures = Pictures(count)
        for index in range(count):
            pixels, label = pictures[index]
            file = root / "data" / split / "abcd"[label] / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = 255 * (pixels * deviation + mean)  # so that, normalised, they are what the network knows
            Image.fromarray(pixels.clamp(0, 255).byte().permute(1, 2, 0).numpy()).save(file)
    model = network()
    elc_fx.finetune(model, loader(), epochs=3, progress=False)
    save_file(model.state_dict(), root / "weights.safetensors")
    return root


def arguments(files: Path, out: Path, epochs: int = 1) -> list[str]:
    source = ["--model", "training_run:network", "--weights", str(files / "weights.safetensors")]
    data = ["--data", str(files / "data"), "--batch", "16"]
    return ["compress", *source, *data, "--budget", "flops=0.5", "--epochs", str(epochs), "--out", str(out)]


def digest(folder: Path) -> str:
    content = [file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()]
    return hashlib.sha256(b"".join(content)).hexdigest()


def test_everything_is_written_and_the_data_is_only_read(files: Path, tmp_path: Path) -> None:
    before = digest(files)
    result = CliRunner().invoke(app, [*arguments(files, tmp_path / "out"), "--onnx", "--json"])
    assert result.exit_code == 0, result.stderr
    assert digest(files) == before
    shown, out = json.loads(result.stdout), tmp_path / "out"
    written = {file.name for file in out.iterdir() if not file.name.startswith(".")}
    expected = {
        "model.pt2",
        "model.elc",
        "model.safetensors",
        "model.onnx",
        "plan.json",
        "report.html",
        "report.json",
        "metrics.csv",
    }
    assert written == {*expected, "work"}
    flops = [shown["comparison"][side]["flops"] for side in ("before", "after")]
    assert flops[1] <= 0.5 * flops[0] and shown["accuracy"]["test"][1] > 0.8
    x = torch.randn(3, 3, 8, 8)
    exported = torch.export.load(out / "model.pt2").module()
    import onnxruntime

    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(scores), exported(x), rtol=1e-4, atol=1e-4)
    assert set(load_file(out / "model.safetensors")) == set(exported.state_dict())
    torch.testing.assert_close(elc_fx.load(out / "model.elc")(x), exported(x))
    plan = elc_fx.Plan.from_json((out / "plan.json").read_text())
    assert plan.candidates and plan.candidates[0].name in (out / "report.html").read_text()


def test_latencies_are_those_of_the_runtime_that_is_named(files: Path, tmp_path: Path) -> None:
    budget = "flops=0.9,latency=1 s"
    save_file(short_network().state_dict(), tmp_path / "weights.safetensors")
    model = ["--model", "training_run:short_network", "--weights", str(tmp_path / "weights.safetensors")]
    given = [*arguments(files, tmp_path / "out"), *model, "--backend", "onnxruntime", "--budget", budget, "--json"]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.stderr
    shown = json.loads(result.stdout)
    assert shown["backend"] == "onnxruntime" and min(shown["latency"]) > 0
    assert shown["report"]["plan"]["prediction"]["latency"]
    assert "by onnxruntime" in (tmp_path / "out" / "report.html").read_text()
    assert "backend is 'tensorrt'" in complaint([*arguments(files, tmp_path / "other"), "--backend", "tensorrt"])
    assert "other backend" in complaint([*arguments(files, tmp_path / "out"), "--budget", budget])


def test_a_killed_job_goes_on_and_ends_as_one_that_was_not(files: Path, tmp_path: Path) -> None:
    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "elc_fx", *arguments(files, out, epochs=4)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**environment, "OMP_NUM_THREADS": "1"})

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait() == 0
    process = start(killed)
    while not list(killed.glob("work/checkpoint-*")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "report.json").exists()
    assert start(killed).wait() == 0
    expected, actual = (load_file(out / "model.safetensors") for out in (whole, killed))
    assert all(torch.equal(value, expected[name]) for name, value in actual.items())


def test_a_plan_from_the_command_line(files: Path, tmp_path: Path) -> None:
    given = arguments(files, tmp_path)[1:7]
    result = CliRunner().invoke(app, ["plan", *given, "--budget", "params=0.7", "--save", str(tmp_path / "plan.json")])
    assert result.exit_code == 0, result.stderr
    plan = elc_fx.Plan.from_json((tmp_path / "plan.json").read_text())
    assert plan.candidates and plan.candidates[0].name in result.stdout


def complaint(given: list[str], code: int = 1) -> str:
    result = CliRunner().invoke(app, given)
    assert result.exit_code == code, result.output
    assert result.stderr.strip().splitlines()[-1].startswith("elc-fx: error:")
    return result.stderr


def test_a_missing_data_set_is_told(files: Path, tmp_path: Path) -> None:
    given = arguments(files, tmp_path / "out")
    given[given.index("--data") + 1] = str(tmp_path / "nowhere")
    assert "no data set at" in complaint(given)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "train" / "a" / "0.png").write_bytes(b"no"), "a/0.png is no image"),
        (lambda root: (root / "train" / "d").rename(root.parent / "d"), "4 scores, and the data has 3 classes"),
        (lambda root: (root / "test" / "d").rename(root.parent / "d"), "differ in their classes: d"),
    ],
)
def test_damaged_data_is_told(damage: object, message: str, files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "data", tmp_path / "data")
    damage(tmp_path / "data")  # type: ignore[operator]
    given = arguments(files, tmp_path / "out")
    given[given.index("--data") + 1] = str(tmp_path / "data")
    assert message in complaint(given)


def test_an_impossible_budget_says_what_can_be_reached(files: Path, tmp_path: Path) -> None:
    given = arguments(files, tmp_path / "out")
    given[given.index("flops=0.5")] = "flops=0.001"
    assert "is the least" in complaint(given)


def test_a_plan_is_carried_out_in_the_place_of_a_budget(files: Path, tmp_path: Path) -> None:
    model = network()
    plan = elc_fx.Plan.of(model, torch.randn(1, 3, 8, 8), collapse=["2", "3.b:1x1"])
    (tmp_path / "plan.json").write_text(plan.to_json())
    given = arguments(files, tmp_path / "out")
    at = given.index("--budget")
    given[at : at + 2] = ["--plan", str(tmp_path / "plan.json")]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    done = elc_fx.Plan.from_json((tmp_path / "out" / "plan.json").read_text())
    assert done.candidates == plan.candidates
    assert "one of the two" in CliRunner().invoke(app, [*given, "--budget", "flops=0.5"]).output
    (tmp_path / "plan.json").write_text("{")
    assert "not JSON" in complaint(given)


def test_images_are_normalised_as_they_are_told_to_be(files: Path, tmp_path: Path) -> None:
    given = arguments(files, tmp_path / "out")
    with pytest.warns(UserWarning, match="hardly more than chance"):
        result = CliRunner().invoke(app, [*given, "--mean", "40", "--std", "2,3,4"])
    assert result.exit_code == 0, result.output
    assert "of the images that are held out" in result.stderr
    assert "other mean" in complaint(given)
    for wrong in (["--mean", "1,2"], ["--std", "0"]):
        assert "mean has 2" in (told := complaint([*arguments(files, tmp_path / "b"), *wrong])) or "above 0" in told
    assert "expected numbers" in complaint([*arguments(files, tmp_path / "b"), "--mean", "nan"])
    assert CliRunner().invoke(app, [*given, "--mean", "x"]).exit_code == 2


def test_a_run_that_trained_nothing_does_not_keep_its_folder(files: Path, tmp_path: Path) -> None:
    given = arguments(files, tmp_path / "out")
    complaint([*given, "--learning-rate", "0"])
    complaint([*given, "--budget", "flops=0.001"])
    assert CliRunner().invoke(app, given).exit_code == 0
    assert "other batch" in complaint([*given, "--batch", "8"])


def test_a_budget_that_is_none_is_wrong_usage(files: Path, tmp_path: Path) -> None:
    given = arguments(files, tmp_path / "out")
    given[given.index("flops=0.5")] = "speed=2"
    assert "--budget" in complaint(given, code=2)


@pytest.mark.parametrize("file", ["model.pt2", "report.html"])
def test_a_full_disk_leaves_nothing_half_written(
    file: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, out = os.fsync, tmp_path / "out"

    def full(descriptor: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.startswith(f".{file}") and not room:
            raise OSError(28, "No space left on device")
        real(descriptor)

    room = False
    monkeypatch.setattr("elc_fx.files.os.fsync", full)
    assert "No space left" in complaint(arguments(files, out))
    assert [path.name for path in out.iterdir()] == ["work"]
    room = True
    assert CliRunner().invoke(app, arguments(files, out)).exit_code == 0


def test_an_output_that_is_a_file_is_told(files: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    assert "it is a file" in complaint(arguments(files, tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"


def test_onnx_without_its_packages_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(elc_fx.MissingPackageError, match=r"elc_fx\[onnx\]"):
        exporting.onnx_bytes(torch.nn.ReLU(), (torch.zeros(1),))


# Found by a fresh view: what of the user's was lost, or taken for something else.


def test_another_model_or_other_data_is_not_taken_for_the_run_in_the_folder(files: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other.safetensors"
    assert CliRunner().invoke(app, arguments(files, out)).exit_code == 0
    before = digest(out)
    state = load_file(files / "weights.safetensors")
    save_file({name: 1.5 * value if value.is_floating_point() else value for name, value in state.items()}, other)
    given = arguments(files, out)
    given[given.index("--weights") + 1] = str(other)
    assert "other model" in complaint(given)
    shutil.copytree(files / "data", tmp_path / "data")
    shutil.copy(files / "data/train/a/0.png", tmp_path / "data/train/a/4.png")
    given = arguments(files, out)
    given[given.index("--data") + 1] = str(tmp_path / "data")
    assert "other data" in complaint(given)
    assert "held_out" in complaint([*arguments(files, out), "--held-out", "0.2"])
    assert digest(out) == before


def test_nothing_of_the_users_is_overwritten(files: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    shutil.copy(files / "weights.safetensors", mine / "model.safetensors")
    before = digest(mine)
    given = arguments(files, mine)
    assert "another folder" in complaint(given)
    given[given.index("--weights") + 1] = str(mine / "model.safetensors")
    assert "would be overwritten" in complaint(given)
    assert "apart from it" in complaint(arguments(files, files / "data"))
    assert "apart from it" in complaint(arguments(files, files / "data" / "out"))
    assert digest(mine) == before


def test_what_cannot_be_written_is_told_before_anything_is_trained(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["plan", *arguments(files, tmp_path)[1:5], "--data", str(files / "data"), "--budget", "flops=0.5"]
    assert "no directory" in complaint([*given, "--save", str(tmp_path / "nowhere" / "plan.json")])
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "elc_fx[onnx]" in complaint([*arguments(files, tmp_path / "out"), "--onnx"])
    assert not (tmp_path / "out").exists()


def test_two_runs_do_not_work_in_one_folder(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elc_fx.files.PATIENCE", 0.0)
    out = tmp_path / "out"
    (out / "work").mkdir(parents=True)
    with FileLock(out / "work" / ".lock"):
        result = CliRunner().invoke(app, arguments(files, out))
        assert result.exit_code == 1 and "another run is at work" in result.stderr
        with pytest.raises(elc_fx.TrainingError, match="another run is at work"):
            elc_fx.finetune(network(), loader(32), epochs=1, folder=out / "work", progress=False)
    assert [path.name for path in (out / "work").iterdir()] == [".lock"]
    elc_fx.finetune(network(), loader(32), epochs=1, folder=out / "work", progress=False)


@pytest.mark.parametrize("noted", ["[]", "{"])
def test_a_note_that_is_none_is_told(noted: str, files: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "work").mkdir(parents=True)
    (tmp_path / "out" / "work" / "job.json").write_text(noted)
    result = CliRunner().invoke(app, arguments(files, tmp_path / "out"))
    assert result.exit_code == 1 and "to begin anew" in result.stderr


def test_a_folder_that_cannot_be_locked_is_used_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: FileLock) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.warns(UserWarning, match="cannot be locked"):
        elc_fx.finetune(network(), loader(32), epochs=1, folder=tmp_path, progress=False)
    assert (tmp_path / "metrics.csv").exists()
