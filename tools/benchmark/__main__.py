"""Compressed networks of equal cost, made in several ways from the same trained network with the same fine-tuning.

    python tools/benchmark importance --weights W --data D               which importance to prune by
    python tools/benchmark train --weights W --data D --method elc ...   one row: a network, a method, a budget, a seed
    python tools/benchmark latency --network N                           all rows of a network, in one run
    python tools/benchmark show                                          what has been measured

A row is stored in docs/results/benchmark/ and not run again; one that was killed goes on. The networks themselves stay
in --runs, where `latency` finds them. The epoch that remains is chosen on held-out training images, and so is all else;
test images only give the figures.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the other tools

import typer

import terminal
from benchmark import latencies, pruning, rows, tables

app = typer.Typer(add_completion=False, rich_markup_mode=None, help=terminal.verbatim(__doc__), no_args_is_help=True)
app.command("importance")(pruning.choose)
app.command("train")(rows.train)
app.command("latency")(latencies.measure)
app.command("show")(tables.show)

if __name__ == "__main__":
    app()
