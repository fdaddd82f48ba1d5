"""The wheel has all that a user needs, and nothing that is ours."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
USE = """
import sys, torch
from torch import nn
model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), torch.ones(1, 3, 8, 8)
fast = torch.compile(model, backend="elc_fx", options={"backend": "eager"})
with torch.no_grad():
    torch.testing.assert_close(fast(x), model(x))
import elc_fx
assert elc_fx.__file__.startswith(sys.argv[1]), elc_fx.__file__
print(elc_fx.report_of(elc_fx.compile(model, x)).merged[0].result)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    copied = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True)
    if copied.returncode:
        pytest.skip("not a checkout")
    subprocess.run(["tar", "x", "-C", folder], input=copied.stdout, check=True)
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *offline, "-w", folder / "dist", folder], check=True)
    return next((folder / "dist").glob("elc_fx-*.whl"))


def test_the_wheel_has_types_templates_licence_and_entry_points(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
        entries = files.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert {"elc_fx/py.typed", "elc_fx/report/templates/report.html"} <= set(names)
    assert any(name.endswith("LICENSE") for name in names)
    assert "elc_fx = elc_fx.deploying.dynamo:backend" in entries and "elc-fx = elc_fx.cli:main" in entries
    assert not [name for name in names if name.startswith(("tests", "tools"))]


def test_what_is_installed_is_found_by_torch(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as files:
        files.extractall(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", USE, str(tmp_path)]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "3×3 3→4\n"
