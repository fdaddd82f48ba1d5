"""Writes the measured tables of README.md and docs/*.md from the stored runs in docs/results/.

Between `<!-- results:NAME -->` and `<!-- /results:NAME -->` the table NAME is put, with the machine, the versions and
the command that measured it. A figure in the documentation thus always comes from a stored run.

    python tools/render_results.py             writes what is out of date
    python tools/render_results.py --check     writes nothing; exits 1 if a file is out of date
    python tools/render_results.py --list      the tables there are
"""

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

import bench_compile
import bench_compress
import bench_decouple
import bench_depth
import bench_finetune
import bench_latency
import bench_plan
import bench_rank
import bench_rehearsal
import bench_runtimes
import bench_samples
import cifar_lossless
import decouple_zoo
import provenance
import quantise
import terminal
import zoo_sweep
from benchmark import tables as benchmark

MARKED = re.compile(r"(<!-- results:(?P<name>[\w-]+) -->\n).*?(<!-- /results:(?P=name) -->)", re.DOTALL)
STYLE = "github"
Result = dict[str, Any]


def _latencies(name: str, _: Result) -> str:
    return benchmark.latency_table(benchmark.timed(benchmark.stored(), name), STYLE)


TABLES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "zoo_sweep": ("zoo_sweep", lambda result: zoo_sweep.table(result["rows"], STYLE)),
    "zoo_summary": ("zoo_sweep", lambda result: zoo_sweep.summary(result["rows"]) + "."),
    "cifar_lossless": ("cifar_lossless", lambda result: cifar_lossless.table(result["rows"], STYLE)),
    "compile_zoo": ("compile_zoo", lambda result: bench_compile.zoo_table(result, STYLE)),
    "compile_chains": ("compile_chains", lambda result: bench_compile.chains_table(result, STYLE)),
    "compile_memory": ("compile_memory", lambda result: bench_compile.memory_table(result, STYLE)),
    "decouple_flops": ("decouple_flops", lambda result: bench_decouple.flops_table(result["rows"], STYLE)),
    "decouple_training_step": (
        "decouple_training_step",
        lambda result: bench_decouple.steps_table(result["rows"], STYLE),
    ),
    "decouple_zoo": ("decouple_zoo", lambda result: decouple_zoo.table(result["rows"], STYLE)),
    "plan_accuracy": ("plan_accuracy", lambda result: bench_plan.table(result["rows"], STYLE)),
    "plan_seconds": ("plan_accuracy", lambda result: bench_plan.seconds_table(result["rows"], STYLE)),
    "plan_latency": ("plan_latency", lambda result: bench_latency.table(result["rows"], STYLE)),
    "rehearsal": ("rehearsal", lambda result: bench_rehearsal.table(result["rows"], STYLE)),
    "fit_samples": ("fit_samples", lambda result: bench_samples.table(result["rows"], STYLE)),
    "plan_depth": ("plan_depth", lambda result: bench_depth.table(result["rows"], STYLE)),
    "plan_rank": ("plan_rank", lambda result: bench_rank.table(result["rows"], STYLE)),
    "finetune_vgg16": ("finetune_vgg16", lambda result: bench_finetune.table(result["rows"], STYLE)),
    "finetune_resnet56": ("finetune_resnet56", lambda result: bench_finetune.table(result["rows"], STYLE)),
    "finetune": ("finetune", lambda result: bench_finetune.table(result["rows"], STYLE)),
    "compress": ("compress", lambda result: bench_compress.table(result["rows"], STYLE)),
    "benchmark_accuracy": ("benchmark", lambda result: benchmark.accuracy_table(result["rows"], STYLE)),
    "benchmark_headline": ("benchmark", lambda result: benchmark.headline_table(result["rows"], STYLE)),
    "benchmark_speed": ("benchmark", lambda result: benchmark.speed_table(result["rows"], STYLE)),
    "benchmark_versus": ("benchmark", lambda result: benchmark.versus_table(result["rows"], STYLE)),
    "benchmark_flops": ("benchmark", lambda result: benchmark.flops_table(result["rows"], STYLE)),
    "benchmark_ablations": ("benchmark", lambda result: benchmark.ablation_table(result["rows"], STYLE)),
    **{name: (name, partial(_latencies, name)) for name in benchmark.LATENCIES},
    "quantised": ("quantised", lambda result: quantise.table(result["rows"], STYLE)),
    "quantised_speed": ("quantised", lambda result: quantise.speed_table(result["rows"], STYLE)),
    "runtimes": ("runtimes", lambda result: bench_runtimes.table(result["rows"], STYLE)),
    "compile_end_to_end": ("compile_end_to_end", lambda result: bench_compile.end_to_end_table(result, STYLE)),
}


def render(name: str, results: Path) -> str:
    """The Markdown of one table. Raises KeyError for an unknown name."""
    if name not in TABLES:
        raise KeyError(f"no table `{name}`; there are {', '.join(TABLES)}")
    stem, table = TABLES[name]
    folder, file = results / stem, results / f"{stem}.json"
    if folder.is_dir():  # a file for each row
        result = {"rows": benchmark.stored()}
        measured = provenance.describe_all([row["provenance"] for row in result["rows"]])
        measured += f"; the command, commit and machine of each row are in docs/results/{stem}/"
    elif file.exists():
        result = json.loads(file.read_text(encoding="utf-8"))
        measured = provenance.describe(result["provenance"])
    else:
        return "Not measured yet.\n"
    return f"{table(result)}\n\n*Measured {measured}*\n"


def fill(text: str, results: Path) -> str:
    """The text with every marked table rendered anew."""
    return MARKED.sub(lambda match: f"{match[1]}\n{render(match['name'], results)}\n{match[3]}", text)


def documents(root: Path) -> list[Path]:
    """README.md and what lies in docs/, as far as it is there."""
    return [file for file in (root / "README.md", *sorted((root / "docs").glob("*.md"))) if file.exists()]


def main(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit 1 if a file is out of date.")] = False,
    list_tables: Annotated[
        bool, typer.Option("--list", help="Print the names of the tables and the file of each.")
    ] = False,
) -> None:
    if list_tables:
        print("\n".join(f"{name:<20} docs/results/{stem}.json" for name, (stem, _) in TABLES.items()))
        return
    outdated = 0
    for file in documents(provenance.ROOT):
        text = file.read_text(encoding="utf-8")
        filled = fill(text, provenance.RESULTS)
        if filled != text:
            outdated += 1
            print(f"{file.relative_to(provenance.ROOT)}: {'out of date' if check else 'written'}", file=sys.stderr)
            if not check:
                file.write_text(filled, encoding="utf-8")
    if check and outdated:
        sys.exit("run python tools/render_results.py")


if __name__ == "__main__":
    terminal.run(main, __doc__)
