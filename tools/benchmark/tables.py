"""Tables and plots from what is stored."""

from __future__ import annotations

import itertools
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import provenance
import terminal
from benchmark import latencies
from benchmark.methods import BATCHES, FOR_TIME, METHODS, RUNTIMES
from benchmark.rows import Row, layers_of, stem_of
from elc_fx.report.charts import INK, STYLE, picture

NOT_RUN, UNREACHABLE = "not run", "cannot reach the budget"
PRUNED = "torch-pruning"
# The others show what an idea buys.
USED = ("elc", "features", "balanced", "shrinks", *FOR_TIME, "both", PRUNED, f"{PRUNED}-8")
# A file for each processor, and one for `both`; where a network was timed in several, the first counts, then the last.
LATENCIES = ("benchmark_latency", *(f"benchmark_latency_{name}" for name in ("amd", "intel", "xeon", "amx", "both")))
COLUMNS = [(runtime, batch) for runtime in RUNTIMES for batch in BATCHES]
TIMES = tuple(f"{runtime}, {batch}" for runtime, batch in COLUMNS)
PAPER = (0.5, 0.454, 0.259)  # shares of the FLOPs that are left in "Efficient Layer Compression Without Pruning"
ACCURACY = (
    "network",
    "budget",
    "method",
    "epochs",
    "test accuracy",
    "points",
    "untrained",
    "FLOPs",
    "depth",
    "seeds",
    "trained on",
)


def show() -> None:
    """Prints the tables, and writes the plots, docs/results/benchmark_NETWORK.svg."""
    rows = stored()
    print(speed_table(rows))
    print()
    print(accuracy_table(rows))
    print()
    print(versus_table(rows))
    print()
    print(flops_table(rows))
    print()
    print(ablation_table(rows))
    print()
    print(latency_table(timed(rows)))
    for network in sorted({row["network"] for row in rows}):
        plot(network, rows, provenance.RESULTS / f"benchmark_{network}.svg")


def stored() -> list[Row]:
    """All rows, in the order of the methods."""
    folder = provenance.RESULTS / "benchmark"
    rows = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    order = list(METHODS)
    return sorted(rows, key=lambda r: (r["network"], -r["budget"], r["epochs"], order.index(r["method"]), r["seed"]))


def timed(rows: Sequence[Row], name: str = LATENCIES[0]) -> list[Row]:
    """What was timed on one processor, without networks that their rows have not had since."""
    made = {stem_of(row): row["provenance"]["date"] for row in rows}
    times = latencies.stored(provenance.RESULTS / f"{name}.json")
    return [row for row in times if made.get(row["row"], "") <= row["date"]]


def _speedups(rows: Sequence[Row], name: str = LATENCIES[0]) -> dict[tuple[str, str, int], float]:
    """By layers, runtime and batch size, on one processor."""
    layers = {stem_of(row): layers_of(row) for row in rows}
    times = [row for row in timed(rows, name) if row["row"] in layers]
    return {(layers[row["row"]], row["runtime"], row["batch"]): row["speedup"] for row in times}


def _grouped(rows: Sequence[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """The seeds of each network, method, budget and number of epochs."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["network"], row["method"], row["budget"], row["epochs"]].append(row)
    return groups


def accuracy_table(rows: Sequence[Row], style: str = "simple") -> str:
    """Test accuracy and costs of each method; where most were run for a network, those that were not are there, too."""
    return terminal.table(_accuracies(rows), ACCURACY, style)


def headline_table(rows: Sequence[Row], style: str = "simple") -> str:
    """The default, channel pruning and both together, at the paper's budgets; see `speed_table`."""
    lines = [own for own in _useful(rows) if own[0]["budget"] in PAPER and own[0]["method"] in ("elc", "both", PRUNED)]
    return _speeds(lines, rows, style)


def speed_table(rows: Sequence[Row], style: str = "simple") -> str:
    """What people would use: costs, accuracy, and how many times as fast as the original with folded batch norms.

    With a star, what was only timed on another processor, or in another run, against the original there.
    """
    return _speeds(_useful(rows), rows, style)


def _useful(rows: Sequence[Row]) -> list[list[Row]]:
    return [own for own in _grouped(rows).values() if own[0]["method"] in USED and "test" in own[0]]


def _speeds(lines: Sequence[list[Row]], rows: Sequence[Row], style: str) -> str:
    main, *others = (_speedups(rows, name) for name in LATENCIES)
    shown = {key: f"{speedup:.2f}×*" for times in others for key, speedup in times.items()}
    shown |= {key: f"{speedup:.2f}×" for key, speedup in main.items()}
    cells = []
    for own in lines:
        accuracy, points, _, flops, _, seeds = _cells(own)
        times = [shown.get((layers_of(own[0]), *column), "") for column in COLUMNS]
        head = own[0]["network"], own[0]["method"], flops, own[0]["epochs"]
        cells.append([*head, accuracy, points, seeds, *times])
    headers = ("network", "method", "FLOPs", "epochs", "test accuracy", "points", "seeds")
    return terminal.table(cells, (*headers, *TIMES), style)


def versus_table(rows: Sequence[Row], style: str = "simple") -> str:
    """At equal time: by how many points the best of our networks that are at least as fast is above a pruned one.

    Two networks are compared on the first processor on which both were timed.
    """
    times, useful, lines = [_speedups(rows, name) for name in LATENCIES], _useful(rows), []
    for pruned in filter(_is_pruned, useful):
        key = pruned[0]["network"], pruned[0]["epochs"]
        rivals = [own for own in useful if (own[0]["network"], own[0]["epochs"]) == key]
        ours = [own for own in rivals if not METHODS[own[0]["method"]].prunes]
        cells = []
        for column in COLUMNS:
            found = [(_faster(own, pruned, times, column), _accuracy(own) - _accuracy(pruned)) for own in ours]
            best = max((points for faster, points in found if faster), default=None)
            slower = any(faster is not None for faster, _ in found)
            cells.append(f"{100 * best:+.2f}" if best is not None else "slower" if slower else NOT_RUN)
        accuracy, _, _, flops, _, _ = _cells(pruned)
        lines.append([key[0], pruned[0]["method"], flops, key[1], accuracy, *cells])
    return terminal.table(lines, ("network", "method", "FLOPs", "epochs", "test accuracy", *TIMES), style)


def flops_table(rows: Sequence[Row], style: str = "simple") -> str:
    """At equal FLOPs: by how many points ours are above a pruned network; seeds in brackets."""
    ours = [name for name in USED if name not in FOR_TIME and not name.startswith(PRUNED)]
    groups, lines = _grouped(rows), []
    for (network, method, budget, epochs), pruned in groups.items():
        if method == PRUNED and not _missing(pruned):
            others = (groups.get((network, name, budget, epochs)) for name in ours)
            points = [_counted(own, _accuracy(pruned)) if own else "" for own in others]
            lines.append([network, _share(budget), epochs, f"{_accuracy(pruned):.2%} ({len(pruned)})", *points])
    return terminal.table(lines, ("network", "budget", "epochs", PRUNED, *ours), style)


def ablation_table(rows: Sequence[Row], style: str = "simple") -> str:
    """What each method loses of the original's points where most were run of a network; seeds in brackets."""
    groups, columns = _grouped(rows), sorted(_most_run(rows))
    lines = []
    for name in METHODS:
        found = [groups.get((network, name, budget, epochs), []) for network, budget, epochs in columns]
        if name not in FOR_TIME and any(found):
            lines.append([name, *(_missing(own) or _counted(own, own[0]["test"][0]) for own in found)])
    headers = [f"{network}, {_share(budget)}" for network, budget, _ in columns]
    return terminal.table(lines, ("method", *headers), style)


def _counted(own: Sequence[Row], other: float) -> str:
    """By how many points the mean is above another accuracy, and of how many seeds it is."""
    return f"{100 * (_accuracy(own) - other):+.2f} ({len(own)})"


def _missing(own: Sequence[Row]) -> str | None:
    """Why there is no accuracy, or None."""
    if not own:
        return NOT_RUN
    return UNREACHABLE if "unreachable" in own[0] else None


def _is_pruned(own: Sequence[Row]) -> bool:
    return bool(own[0]["method"].startswith(PRUNED))


def _faster(
    own: Sequence[Row], other: Sequence[Row], times: Sequence[Mapping[Any, float]], column: tuple[str, int]
) -> bool | None:
    """Whether one is at least as fast as the other, or None. times: of each processor."""
    a, b = ((layers_of(rows[0]), *column) for rows in (own, other))
    return next((processor[a] >= processor[b] for processor in times if a in processor and b in processor), None)


def _accuracy(rows: Sequence[Row]) -> float:
    """The mean over seeds."""
    return statistics.mean(row["test"][1] for row in rows)


def _accuracies(rows: Sequence[Row]) -> list[list[Any]]:
    lines = []
    groups = _grouped(rows)
    compared = _most_run(rows)
    for network, budget, epochs in dict.fromkeys((row["network"], row["budget"], row["epochs"]) for row in rows):
        for name, method in METHODS.items():
            own = groups.get((network, name, budget, epochs), [])
            of = " of the time" if name in FOR_TIME else ""
            head = [network, f"{_share(budget)}{of}", name, epochs * method.epochs]
            if not own and (name in FOR_TIME or (network, budget, epochs) not in compared):
                continue
            missing = _missing(own)
            lines.append([*head, *([missing] if missing else [*_cells(own), _trained_on(own)])])
    return [[*line, *[""] * (len(ACCURACY) - len(line))] for line in lines]


def _most_run(rows: Sequence[Row]) -> set[tuple[str, float, int]]:
    """The budget and the epochs of each network with most rows."""
    counts = Counter((row["network"], row["budget"], row["epochs"]) for row in rows)
    return {max((key for key in counts if key[0] == network), key=counts.__getitem__) for network, *_ in counts}


def _trained_on(rows: Sequence[Row]) -> str:
    """The makers of the processors, and in what they computed."""
    makers = (row["provenance"]["machine"]["cpu"].split()[0].removesuffix("(R)") for row in rows)
    return ", ".join(sorted({f"{maker} in {row['arithmetic']}" for maker, row in zip(makers, rows, strict=True)}))


def _cells(rows: Sequence[Row]) -> list[str]:
    after = [row["test"][1] for row in rows]
    spread = f" ({min(after):.2%}–{max(after):.2%})" if len(after) > 1 else ""
    mean, flops = _accuracy(rows), rows[0]["after"]["flops"] / rows[0]["before"]["flops"]
    return [
        f"{mean:.2%}{spread}",
        f"{100 * (mean - rows[0]['test'][0]):+.2f}",
        f"{statistics.mean(row['held_out'][0] for row in rows):.1%}",
        f"{flops:.1%}",
        f"{rows[0]['before']['depth']} → {rows[0]['after']['depth']}",
        str(len(rows)),
    ]


def latency_table(rows: Sequence[Row], style: str = "simple") -> str:
    """How many times as fast as the original with its batch norms folded, median and quartiles."""
    lines: dict[tuple[str, str], dict[tuple[str, int], str]] = defaultdict(dict)
    for row in rows:
        low, high = row["quartiles"]
        cell = f"{row['speedup']:.2f} ({low:.2f}–{high:.2f})"
        lines[row["network"], _method(row)][row["runtime"], row["batch"]] = cell
    cells = [[*key, *(own.get(column, "") for column in COLUMNS)] for key, own in lines.items()]
    return terminal.table(cells, ("network", "method", *TIMES), style)


def _method(row: Row) -> str:
    """Of "network-method-budget-epochs-seed"."""
    own = row["row"].removeprefix(f"{row['network']}-")
    return own if own == row["row"] else f"{own.rsplit('-', 3)[0]}, {_share(float(own.rsplit('-', 3)[1]))}"


def _share(budget: float) -> str:
    return f"{100 * budget:g}%"


def plot(network: str, rows: Sequence[Row], file: Path) -> None:
    """Accuracy over speed, a picture for each runtime and batch, and over FLOPs; of the schedule that most have."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({**STYLE, "font.size": 9})
    from matplotlib import pyplot

    done = [row for row in rows if row["network"] == network and "test" in row]
    epochs = statistics.mode(row["epochs"] for row in done)
    done = [row for row in done if row["epochs"] == epochs]
    speed = _speedups([row for row in rows if row["network"] == network])
    columns = [column for column in COLUMNS if any(key[1:] == column for key in speed)]
    count = len(columns) + 1
    wide = min(count, 3)
    figure, axes = pyplot.subplots(
        -(-count // wide), wide, figsize=(3.4 * wide, 2.8 * -(-count // wide)), squeeze=False, sharey=True
    )
    run = [name for name in METHODS if any(row["method"] == name for row in rows)]  # of any network: one colour each
    colours = dict(zip(run, itertools.cycle(matplotlib.colormaps["tab20"].colors), strict=False))
    for axis, column in zip(axes.flat, [None, *columns], strict=False):
        for name, colour in colours.items():
            points = []
            for row in done:
                share = row["after"]["flops"] / row["before"]["flops"]
                x = share if column is None else speed.get((layers_of(row), *column))
                if row["method"] == name and x is not None:
                    points.append((x, 100 * row["test"][1]))
            if points:
                line = "o-" if name in USED else "o"
                axis.plot(*zip(*sorted(points), strict=True), line, color=colour, linewidth=0.8, label=name)
        axis.plot(1, 100 * done[0]["test"][0], "*", color=INK, label="original")
        if column is None:
            axis.set_xlim(0, 1.05)
        axis.axhline(100 * done[0]["test"][0], color="grey", linewidth=0.8, linestyle="--")
        axis.set_title("share of the FLOPs" if column is None else f"times as fast: {column[0]}, batch {column[1]}")
        axis.grid(alpha=0.3)
    for axis in axes.flat[count:]:
        axis.axis("off")
    for row in axes:
        row[0].set_ylabel("test accuracy [%]")
    found = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(found.values(), found.keys(), loc="lower center", ncols=min(8, len(found)), frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    file.write_text(picture(figure, "elc_fx"), encoding="utf-8")
    pyplot.close(figure)
