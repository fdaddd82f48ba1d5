"""README.md and docs/: every block of code runs, every link leads somewhere, every example prints its table.

The Python blocks of a page run in order in one namespace, then its shell commands in order in one folder. What a page
uses without defining it is in PREPARED; a command that is not run is in NOT_RUN, with the reason.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import cifar_models
import elc_fx
import render_docs
from elc_fx.cli import app

ROOT = Path(__file__).resolve().parent.parent
FILES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PAGES = {file.relative_to(ROOT).as_posix(): file for file in FILES}
BLOCK = re.compile(r"^(?P<fence>`{3,})(?P<language>.*)\n(?P<code>(?s:.*?))^(?P=fence)$", re.MULTILINE)
INCLUDED = re.compile(r'--8<-- "(?P<file>[^":]+)(?::(?P<section>[\w-]+))?"\n')  # of the site: another file's text
SIZE = 8  # of the images that stand for anybody's


def small_network() -> torch.nn.Module:
    """A ResNet of 14 layers, in eval mode: it has layer1.0 to layer3.1, which pages name."""
    torch.manual_seed(0)
    return cifar_models.ResNet(2).eval()


def batches() -> list[torch.Tensor]:
    return [torch.randn(4, 3, SIZE, SIZE) for _ in range(2)]


def loader() -> DataLoader[Any]:
    images = torch.randn(4, 3, 32, 32)  # smaller ones leave ResNet-18 one position: its training diverges
    return DataLoader(TensorDataset(images, torch.randint(10, (4,))), batch_size=4)


# What stands for the reader's own, by page; a name is there from the block with that number on, counted from 0.
OWN: dict[str, Callable[[], Any]] = {
    "model": small_network,
    "x": lambda: torch.randn(1, 3, SIZE, SIZE),
    "batches": batches,
    "held_out": loader,
    "train_loader": loader,
    "small": lambda: elc_fx.compile(small_network()),
}
PREPARED: dict[str, list[tuple[int, str]]] = {
    "README.md": [(1, "train_loader"), (2, "model"), (2, "x")],  # the last block trains: not on ImageNet's sizes
    "docs/deploy.md": [(0, "model"), (0, "small"), (0, "x"), (0, "batches")],
    "docs/own-network.md": [(0, "model"), (0, "x"), (0, "batches"), (0, "held_out"), (0, "train_loader")],
    "docs/planning.md": [(0, "model"), (0, "x"), (0, "batches")],
    "docs/report.md": [(0, "model"), (0, "x"), (1, "small")],
    "docs/training.md": [(0, "model"), (0, "x"), (0, "batches"), (0, "train_loader")],
}
OPTIONAL = ("executorch", "torchao")  # packages not everywhere: a block that imports one needs it
NOT_RUN = {
    "pip install -e .": "installs",
    "pip install -e . && python -m elc_fx demo": "installs; tests/test_demo.py runs the demo",
    "pip install -e '.[test]' && pytest": "installs, and runs this test; .ci/run runs it",
    "pip install -e '.[test]' && pytest tests/test_properties.py": "installs, and runs tests",
    "ruff check . && ruff format --check . && mypy": ".ci/run runs them",
    "python -m elc_fx demo": "trains for a minute; tests/test_demo.py runs it",
}
EXAMPLES: dict[str, dict[str, int]] = {  # by which they take a few seconds
    "audio": {"length": 400, "steps": 4},
    "detector": {"size": 64, "steps": 2},
    "multibranch": {"width": 8, "size": 32},
    "resnet18": {"size": 32, "samples": 8},
}


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int  # of its first line of code


def blocks(page: str) -> list[Block]:
    text = PAGES[page].read_text(encoding="utf-8")
    found = BLOCK.finditer(text)
    return [Block(m["language"].strip(), m["code"], text.count("\n", 0, m.start("code"))) for m in found]


def python_blocks(page: str) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]


def commands(page: str) -> list[str]:
    """The lines of the shell blocks, without comments; a line that ends in a backslash goes on."""
    lines: list[str] = []
    for block in blocks(page):
        if block.language == "bash":
            lines += block.code.replace("\\\n", " ").splitlines()
    return [without for line in lines if (without := re.sub(r"(^|\s+)#.*", "", line).strip())]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with what the commands of the pages name: mynets.py, net.safetensors, images/."""
    (tmp_path / "mynets.py").write_text("import cifar_models\n\ndef net():\n    return cifar_models.ResNet(2)\n")
    save_file(small_network().state_dict(), tmp_path / "net.safetensors")
    for index in range(40):
        file = tmp_path / "images" / f"class{index % 10}" / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (SIZE, SIZE, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mynets", raising=False)
    return tmp_path


def test_every_block_is_of_a_kind_that_is_run_or_is_no_code() -> None:
    for page in PAGES:
        for block in blocks(page):
            shows_a_script = INCLUDED.fullmatch(block.code) and block.language == "{.python .script}"
            assert shows_a_script or block.language in ("python", "bash", "text", ""), f"{page}:{block.line}"
        assert PAGES[page].read_text(encoding="utf-8").count("```") == 2 * len(blocks(page)), f"{page}: a fence is open"


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)])
def test_python_blocks_run_in_order(page: str, folder: Path) -> None:
    torch.manual_seed(0)
    namespace: dict[str, Any] = {}
    missing = {package for package in OPTIONAL if importlib.util.find_spec(package) is None}
    left_out: list[str] = []
    for number, block in enumerate(python_blocks(page)):
        namespace.update({name: OWN[name]() for since, name in PREPARED.get(page, []) if since == number})
        if needed := missing & set(re.findall(r"^(?:from|import) (\w+)", block.code, re.MULTILINE)):
            left_out.append(f"line {block.line} needs {', '.join(sorted(needed))}")
            continue
        tree = ast.increment_lineno(ast.parse(block.code), block.line)  # a traceback names the line of the page
        exec(compile(tree, str(PAGES[page]), "exec"), namespace)
    if left_out:
        pytest.skip(f"{page} ran, but for the blocks of {'; '.join(left_out)}")


@pytest.mark.parametrize("page", [page for page in PAGES if set(commands(page)) - set(NOT_RUN)])
def test_shell_commands_run_in_order(page: str, folder: Path) -> None:
    for command in commands(page):
        if command in NOT_RUN:
            continue
        program, *arguments = shlex.split(command)
        if program == "elc-fx":
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, f"{command}\n{result.stderr}"
        else:
            pytest.fail(f"{page}: `{command}` is not run; run it here, or put it into NOT_RUN with the reason")


def test_commands_that_are_not_run_are_in_a_page() -> None:
    assert set(NOT_RUN) <= {command for page in PAGES for command in commands(page)}


# --- links -----------------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The names that GitHub and the site give to headings."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def links(text: str) -> Iterator[str]:
    text = re.sub(r"`[^`\n]*`", "", BLOCK.sub("", text))
    yield from re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    file = PAGES[page]
    for link in links(file.read_text(encoding="utf-8")):
        if re.match(r"https?:", link):
            continue  # nothing is fetched
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        assert target.exists() and target.is_relative_to(ROOT), f"{page}: {link} leads nowhere"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{page}: {link} has no such heading"


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_includes_is_there(page: str) -> None:
    for included in INCLUDED.finditer(PAGES[page].read_text(encoding="utf-8")):
        text = (ROOT / included["file"]).read_text(encoding="utf-8")
        if section := included["section"]:
            assert f"[start:{section}]" in text and f"[end:{section}]" in text


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES.keys() - {"README.md"}:
        assert f": {Path(page).name}\n" in navigation, page


# --- examples, figures, reference ------------------------------------------------------------------------------------


def test_every_example_has_a_small_form() -> None:
    assert {file.stem for file in (ROOT / "docs" / "examples").glob("*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_ends_with_the_comparison(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    script = ROOT / "docs" / "examples" / f"{name}.py"
    runpy.run_path(str(script))["main"](**EXAMPLES[name])
    stored = script.with_suffix(".txt").read_text(encoding="utf-8")
    for printed in (capsys.readouterr().out, stored):
        *_, header, _rule, flops, parameters, convolutions, depth, error = printed.rstrip().splitlines()
        assert header.split() == ["before", "after", "after", "/", "before"]
        names = [row.split()[0] for row in (flops, parameters, convolutions, depth)]
        assert names == ["FLOPs", "parameters", "convolutions", "depth"] and error.startswith("largest error:")


def test_figures_are_drawn_and_each_is_shown(tmp_path: Path) -> None:
    render_docs.draw_figures(tmp_path)
    drawn = {file.name for file in tmp_path.iterdir()}
    assert drawn == {file.name for file in (ROOT / "docs" / "figures").iterdir()}
    text = "".join(file.read_text(encoding="utf-8") for file in PAGES.values())
    assert all(f"(figures/{name})" in text for name in drawn)


def test_pictures_follow_light_and_dark(tmp_path: Path) -> None:
    render_docs.draw_figures(tmp_path)
    stored = [*(ROOT / "docs" / "figures").glob("*.svg"), *(ROOT / "docs" / "results").glob("*.svg")]
    for file in (*tmp_path.iterdir(), *stored):
        picture = file.read_text(encoding="utf-8")
        assert "prefers-color-scheme:dark" in picture and not re.search("#(fff|000){2}", picture), file


def test_reference_has_every_public_name_once() -> None:
    named = re.findall(r"^::: elc_fx\.(\w+)$", PAGES["docs/api.md"].read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(elc_fx.__all__)


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="the site is built with elc_fx[docs]")
def test_site_builds(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "api" / "index.html").read_text(encoding="utf-8").count("doc-heading") >= len(elc_fx.__all__)
