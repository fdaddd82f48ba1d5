"""The diff as a picture: SVG of its rows, and text for graphviz."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from elc_fx.report.diff import Change, Diff
from elc_fx.report.network import Layer
from elc_fx.report.rows import Cell, layout

ROW, LANE = 22, 12  # pixels
TEXT, LONGEST_TEXT = 300, 44  # the width of the names, and the characters for which there is room
INK, PAPER = ("#1c2128", "#e6e9ee"), ("#fff", "#14181d")  # in light and dark
COLORS = {  # of each kind, in light and dark
    "kept": ("#6b7280", "#9aa3af"),
    "merged": ("#1d64c8", "#7ab3ff"),
    "split": ("#7a4fd0", "#b79bff"),
    "changed": ("#9a6700", "#e0b040"),
    "inserted": ("#1a7f37", "#5fd07a"),
    "removed": ("#c62f35", "#ff8a86"),
}


def curves(cell: Cell) -> str:
    """The lanes of a cell, as the path of an SVG."""
    parts = [f"M{_x(lane)} 0V{ROW}" for lane in cell.passing]
    if cell.lane is not None:
        x, middle = _x(cell.lane), ROW / 2
        for lane in cell.arriving:
            bent = f"C{_x(lane)} {middle:g} {x} 0 {x} {middle:g}"
            parts.append(f"M{_x(lane)} 0" + (f"V{middle:g}" if lane == cell.lane else bent))
        if cell.leaves:
            parts.append(f"M{x} {middle:g}V{ROW}")
    return "".join(parts)


def _x(lane: int) -> int:
    return LANE * lane + LANE // 2 + 2


def gutter(lanes: int) -> int:
    """The width of the lanes."""
    return LANE * lanes + 4


def _filled(scheme: int) -> str:
    """The colours of the kinds, light (0) or dark (1). Programs that draw SVG do not all know variables."""
    return "".join(f".{kind} rect,.{kind} circle{{fill:{pair[scheme]}}}" for kind, pair in COLORS.items())


_STYLE = (
    f"text{{font:12px system-ui,sans-serif;fill:{INK[0]}}}path{{fill:none;stroke:#8b949e}}rect{{opacity:.13}}"
    f".o{{opacity:.65}}.paper{{fill:{PAPER[0]};opacity:1}}{_filled(0)}.kept rect{{opacity:0}}"
    f"@media(prefers-color-scheme:dark){{text{{fill:{INK[1]}}}.paper{{fill:{PAPER[1]}}}{_filled(1)}}}"
)


def to_svg(diff: Diff) -> str:
    """The two networks side by side, as one picture of its own that follows light and dark."""
    drawn = layout(diff)
    widths = [gutter(lanes) + TEXT for lanes in drawn.lanes]
    rows = sum(len(block.rows) for block in drawn.blocks)
    width, height = sum(widths) + 20, ROW * (rows + 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{_xml(diff.summary())}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="paper" width="{width}" height="{height}"/>',
        _svg_heading(diff.before.name, 6),
        _svg_heading(diff.after.name, widths[0] + 26),
    ]
    y = 1.5 * ROW
    for block in drawn.blocks:
        parts.append(f'<g class="{block.change.kind}">')
        parts.append(f'<rect y="{y:g}" width="{width}" height="{ROW * len(block.rows) - 1}"/>')
        for pair in block.rows:
            for cell, x, lanes in zip(pair, (0, widths[0] + 20), drawn.lanes, strict=True):
                parts.extend(_svg_cell(cell, x, y, gutter(lanes)))
            y += ROW
        parts.append("</g>")
    return "\n".join([*parts, "</svg>"])


def _svg_heading(name: str, x: int) -> str:
    shown, whole = _xml(shortened(name, LONGEST_TEXT - 4)), _xml(name)
    return f'<text x="{x}" y="16" style="font-weight:600">{shown}<title>{whole}</title></text>'


def _svg_cell(cell: Cell, x: int, y: float, text_at: int) -> Iterator[str]:
    yield f'<g transform="translate({x} {y:g})"><path d="{curves(cell)}"/>'
    if cell.layer is not None and cell.lane is not None:
        yield f'<circle cx="{_x(cell.lane)}" cy="{ROW // 2}" r="4"/>'
        name, operation = _fitting(cell.layer)
        yield (
            f'<text x="{text_at + 4}" y="15">{_xml(name)} <tspan class="o">{_xml(operation)}</tspan>'
            f"<title>{_xml(cell.layer.place)}: {_xml(cell.layer.operation)}</title></text>"
        )
    yield "</g>"


def _xml(text: str) -> str:
    """Escaped, without what XML may not hold at all, such as control characters."""
    return escape("".join(c if c.isprintable() else "\ufffd" for c in text))


def shortened(text: str, characters: int) -> str:
    """The end of a text, which tells names from others."""
    return text if len(text) <= characters else "…" + text[1 - characters :]


def _fitting(layer: Layer) -> tuple[str, str]:
    """The name and the operation, as far as there is room."""
    name, operation = layer.place, "" if layer.operation == layer.place else layer.operation
    if len(name) + len(operation) > LONGEST_TEXT:
        name = shortened(name, LONGEST_TEXT // 2)
    room = LONGEST_TEXT - len(name)
    return name, operation if len(operation) <= room else operation[: room - 1] + "…"


def to_dot(diff: Diff) -> str:
    """For graphviz: the two networks in a cluster each, a dashed line from what was changed to what it became."""
    lines = ["digraph diff {", '  rankdir=TB; node [shape=box, style="rounded,filled", fontname="sans-serif"];']
    kind = {(side, layer.name): change.kind for change in diff.changes for side, layer in _layers(change)}
    for side, network in (("before", diff.before), ("after", diff.after)):
        lines.append(f"  subgraph cluster_{side} {{ label={_quoted(network.name)};")
        for layer in network.layers:
            color = COLORS[kind[side, layer.name]][0]
            text = layer.place if layer.place == layer.operation else f"{layer.place}\n{layer.operation}"
            colors = f'color="{color}", fillcolor="{color}22"'
            lines.append(f"    {_quoted(f'{side}.{layer.name}')} [label={_quoted(text)}, {colors}];")
        for layer in network.layers:
            to = _quoted(f"{side}.{layer.name}")
            lines.extend(f"    {_quoted(f'{side}.{source}')} -> {to};" for source in layer.sources)
        lines.append("  }")
    for change in diff.changes:
        if change.kind != "kept" and change.before and change.after:
            ends = _quoted(f"before.{change.before[-1].name}"), _quoted(f"after.{change.after[-1].name}")
            color = COLORS[change.kind][0]
            lines.append(f'  {ends[0]} -> {ends[1]} [style=dashed, constraint=false, color="{color}"];')
    return "\n".join([*lines, "}", ""])


def _layers(change: Change) -> Iterator[tuple[str, Layer]]:
    for side, layers in (("before", change.before), ("after", change.after)):
        yield from ((side, layer) for layer in layers)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
