"""What a tool shows in a terminal: help, a table, and a progress bar on stderr: stdout carries the result alone."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tabulate import tabulate

T = TypeVar("T")


def verbatim(text: str | None) -> str:
    """The text as help that keeps its line breaks (click's mark for that is a \\b line before a paragraph)."""
    return "\n\n".join(f"\b\n{paragraph}" for paragraph in (text or "").strip().split("\n\n"))


def run(command: Callable[..., None], text: str | None) -> None:
    """Runs a tool of one command; --help prints the text."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(help=verbatim(text))(command)
    app()


def table(cells: Sequence[Sequence[object]], headers: Sequence[str], style: str = "simple") -> str:
    """The cells as they are, under headers, in a style of tabulate: "simple" for a terminal, "github" for Markdown."""
    text: str = tabulate(cells, headers, tablefmt=style, disable_numparse=True)
    return text


def tracked(items: Sequence[T], label: Callable[[T], str] = str) -> Iterator[T]:
    """Yields the items; the bar names the current one. Where stderr is no terminal, only the final state appears."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(items))
        for item in items:
            progress.update(task, description=label(item))
            yield item
            progress.advance(task)
        progress.update(task, description="done")
