"""Draws the report's plots: tables of numbers in, SVG text out, the same bytes for the same numbers.

The SVG is made to stand inside an HTML page. Every colour in it is a variable of the page (see `PAINTS`), so
that the plots follow light and dark mode and print; every id carries the plot's name, so that several
can share a page.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

# What matplotlib paints with, and the page's variable that takes its place.
PAINTS = {
    "#101010": "var(--ink)",
    "#202020": "var(--muted)",
    "#303030": "var(--rule)",
    "#404040": "var(--accent)",
    "#505050": "var(--second)",
    "#606060": "var(--paper)",
}
INK, MUTED, RULE, ACCENT, SECOND, PAPER = PAINTS

WIDTH = 1000  # units of the viewBox; a unit is a CSS pixel where the page is wide enough
FADED = 0.45  # opacity of a bar that is not among the stressed ones
LOG_FROM = 4.0  # largest over smallest perplexity from which on the axis is logarithmic
STEPS = [1, 2, 2.5, 5, 10]  # round numbers for ticks
LABEL = (92.0, 16.0)  # width and height that a point's label needs, in units

STYLE = {
    "svg.fonttype": "none",  # text stays text: it can be read out, searched and set in the page's font
    "svg.hashsalt": "pareline",
    "text.parse_math": False,  # a text called `$x$` is a name, not a formula
    "font.size": 12,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": 12,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
}


@dataclass(frozen=True)
class Plot:
    """A plot for the page: the SVG, and the sentence that says what it shows (its accessible name too)."""

    name: str
    svg: str
    caption: str


def layer_sparsity(table: pd.DataFrame) -> Plot:
    """A field a linear layer, a column a block, the deeper the colour the more weights are gone.

    Args:
        table: columns layer, block, checkpoint, sparsity (a share). The last checkpoint in it is drawn.
    """
    if table.empty:
        return Plot("sparsity", "", "No checkpoint has a mask: nothing was pruned.")
    shown = str(table["checkpoint"].iloc[-1])
    drawn = table[(table["checkpoint"] == shown) & table["block"].notna()].copy()
    if drawn.empty:
        return Plot("sparsity", "", "The mask covers no layer of a numbered block.")
    drawn["kind"] = [_kind(layer) for layer in drawn["layer"]]
    kinds = list(dict.fromkeys(drawn["kind"]))
    low, high = _shades(table["sparsity"])
    tips: dict[str, str] = {}
    with rc_context(STYLE):
        figure, (axes,) = _canvas(height=96 + 26 * len(kinds), panels=(1, 1))
        shares = drawn.groupby(["block", "kind"], as_index=False)["sparsity"].mean()
        for block, kind, share in zip(shares["block"], shares["kind"], shares["sparsity"], strict=True):
            paint = to_rgba(ACCENT, _depth(share, low, high))
            bar = axes.bar(block, 0.88, 0.92, kinds.index(kind) - 0.44, color=paint, linewidth=0)
            _tip(bar, tips, f"block {block}, {kind}: {_percent(share)} of the weights masked")
        axes.set_yticks(range(len(kinds)), kinds)
        axes.set_ylim(len(kinds) - 0.5, -0.5)
        axes.set_xlabel("block")
        axes.tick_params(length=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
        for side in axes.spines.values():
            side.set_visible(False)
        axes.margins(x=0.005)
        _shade_key(axes, low, high)
        svg = _svg(figure, "sparsity", tips)
    return Plot("sparsity", svg, _sparsity_caption(table, shown))


def sensitivity(table: pd.DataFrame, stressed: Sequence[int] = (), bits: float | None = None) -> Plot:
    """Two rows of bars, a bar a block: the loss increase, and the outlier ratio.

    Args:
        table: columns block, pmpq (nats), outlier_ratio (a share); a value may be missing.
        stressed: blocks that quantisation kept at more bits, drawn in full colour.
        bits: how many bits those have.
    """
    rows = (("pmpq", "loss increase, nats", ACCENT), ("outlier_ratio", "outlier ratio", SECOND))
    measured = [row for row in rows if table[row[0]].notna().any()]
    if not measured:
        return Plot("sensitivity", "", "Sensitivity was not measured in this run.")
    tips: dict[str, str] = {}
    with rc_context(STYLE):
        figure, panels = _canvas(height=60 + 150 * len(measured), panels=(len(measured), 1), sharex=True)
        for axes, (column, label, paint) in zip(panels, measured, strict=True):
            for block, value in table[["block", column]].dropna().itertuples(index=False):
                full = not stressed or block in stressed
                bar = axes.bar(block, value, 0.72, color=to_rgba(paint, 1.0 if full else FADED), linewidth=0)
                _tip(bar, tips, f"block {block:.0f}: {label} {value:.4g}")
            axes.set_title(label, color=INK)
            axes.grid(axis="y")
            axes.spines["left"].set_visible(False)
            axes.tick_params(length=0)
            axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=STEPS))
            axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
            axes.margins(x=0.01)
        panels[-1].set_xlabel("block")
        svg = _svg(figure, "sensitivity", tips)
    return Plot("sensitivity", svg, _sensitivity_caption(table, stressed, bits))


def perplexity_bytes(table: pd.DataFrame) -> Plot:
    """A panel a text, a point a checkpoint: what its weights take on disk against its perplexity.

    Args:
        table: columns checkpoint, text, perplexity, bytes; the rows are in the order of the stages.
    """
    if table.empty:
        return Plot("perplexity", "", "No perplexity is known.")
    texts = list(dict.fromkeys(table["text"]))
    columns = min(len(texts), 2)
    rows = math.ceil(len(texts) / columns)
    low, high = table["perplexity"].min(), table["perplexity"].max()
    logarithmic = bool(low > 0 and high / low > LOG_FROM)
    tips: dict[str, str] = {}
    with rc_context(STYLE):
        figure, panels = _canvas(height=50 + 330 * rows, panels=(rows, columns))
        for axes, text in zip(panels, texts, strict=False):
            points = table[table["text"] == text]
            _scatter(axes, points, logarithmic, tips)
            axes.set_title(f"{text}: perplexity" + (", logarithmic" if logarithmic else ""), color=INK)
            axes.set_xlabel("megabytes on disk")
        for axes in panels[len(texts) :]:
            axes.set_axis_off()
        figure.draw_without_rendering()  # settles the layout, on which the place of the labels hangs
        for axes, text in zip(panels, texts, strict=False):
            _label_points(axes, table[table["text"] == text])
        svg = _svg(figure, "perplexity", tips)
    caption = "Down and to the left is better: less perplexity from fewer bytes. The line follows the stages."
    return Plot("perplexity", svg, caption)


def _canvas(height: float, panels: tuple[int, int], sharex: bool = False) -> tuple[Figure, list[Any]]:
    layout = ConstrainedLayoutEngine(w_pad=8 / 72, h_pad=6 / 72, hspace=0.05, wspace=0.04)
    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72, layout=layout, facecolor="none")
    FigureCanvasSVG(figure)
    grid = figure.subplots(*panels, sharex=sharex, squeeze=False)
    for axes in grid.flat:
        axes.set_facecolor("none")
    return figure, list(grid.flat)


def _kind(layer: str) -> str:
    """A layer's name within its block; experts and the like, told apart by a number only, share a kind."""
    within = re.sub(r"^.*?\.\d+\.", "", layer)
    return re.sub(r"\.\d+(?=\.|$)", ".*", within)


def _shades(shares: "pd.Series[float]") -> tuple[float, float]:
    """The shares that the palest and the deepest colour stand for: tenths around the data, two at least."""
    low, high = math.floor(shares.min() * 10 + 1e-9) / 10, math.ceil(shares.max() * 10 - 1e-9) / 10
    if high - low < 0.2:
        low, high = low - 0.1, high + 0.1
    return max(low, 0.0), min(high, 1.0)


def _depth(share: float, low: float, high: float) -> float:
    return 0.12 + 0.88 * min(max((share - low) / (high - low), 0.0), 1.0)


def _percent(share: float, digits: int = 1) -> str:
    return f"{share * 100:.{digits}f}\u00a0%"


def _shade_key(axes: Any, low: float, high: float) -> None:
    """Five fields above the plot's right end that say what the colours stand for."""
    left, bottom, step = 0.80, 1.06, 0.022
    words = {"transform": axes.transAxes, "va": "center", "color": MUTED, "fontsize": 11}
    for place in range(5):
        share = low + (high - low) * place / 4
        axes.add_artist(_field(axes, left + place * step, bottom, step, _depth(share, low, high)))
    axes.text(left - 0.008, bottom + 0.03, _percent(low, 0), ha="right", **words)
    axes.text(left + 5 * step + 0.008, bottom + 0.03, f"{_percent(high, 0)} masked", ha="left", **words)


def _field(axes: Any, x: float, y: float, width: float, depth: float) -> Any:
    return Rectangle((x, y), width, 0.06, transform=axes.transAxes, color=to_rgba(ACCENT, depth), lw=0, clip_on=False)


def _sparsity_caption(table: pd.DataFrame, shown: str) -> str:
    masks = {
        str(checkpoint): dict(zip(rows["layer"], rows["sparsity"], strict=True))
        for checkpoint, rows in table.groupby("checkpoint", sort=False)
    }
    shares = list(masks[shown].values())
    least, most = _percent(min(shares)), _percent(max(shares))
    spread = f"{least} in every layer" if least == most else f"from {least} to {most} a layer"
    other = [name for name, mask in masks.items() if mask != masks[shown]]
    same = f" It differs from {' and '.join(other)}." if other else ""
    if not other and len(masks) > 1:
        same = " The masks of the other checkpoints are the same."
    return f"Share of the weights that the mask of the {shown} checkpoint removes: {spread}.{same}"


def _sensitivity_caption(table: pd.DataFrame, stressed: Sequence[int], bits: float | None) -> str:
    parts = []
    if table["pmpq"].notna().any():
        worst = table.sort_values("pmpq").dropna(subset="pmpq").iloc[-1]
        parts.append(
            "Loss increase: what pruning this block alone adds to the loss (PMPQ), "
            f"most in block {worst['block']:.0f} with {worst['pmpq']:.3g} nats."
        )
    if table["outlier_ratio"].notna().any():
        worst = table.sort_values("outlier_ratio").dropna(subset="outlier_ratio").iloc[-1]
        parts.append(
            "Outlier ratio: the share of weights whose |W|·‖X‖ stands out from their layer, "
            f"highest in block {worst['block']:.0f} with {worst['outlier_ratio']:.3g}."
        )
    if stressed and bits is not None:
        parts.append(f"Full colour: the blocks that quantisation kept at {bits:.0f} bits.")
    return " ".join(parts)


def _scatter(axes: Any, points: pd.DataFrame, logarithmic: bool, tips: dict[str, str]) -> None:
    megabytes = points["bytes"] / 1e6
    axes.plot(megabytes, points["perplexity"], color=to_rgba(MUTED, FADED), linewidth=1.4, zorder=2)
    for name, x, y in zip(points["checkpoint"], megabytes, points["perplexity"], strict=True):
        (dot,) = axes.plot(x, y, "o", color=ACCENT, markersize=9, mec=PAPER, mew=1.5, zorder=3)
        _tip([dot], tips, f"{name}: perplexity {y:.4g}, {x:,.1f} MB")
    # From zero on, so that lengths along the axis compare; the right end is room for the labels.
    axes.set_xlim(0, max(megabytes.max(), 1e-9) * 1.42)
    ticks = MaxNLocator(nbins=6, steps=STEPS).tick_values(0, max(megabytes.max(), 1e-9))
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if tick <= megabytes.max() * 1.1]))
    low, high = points["perplexity"].min(), points["perplexity"].max()
    if logarithmic:
        axes.set_yscale("log")
        axes.set_ylim(low / (high / low) ** 0.12 / 1.05, high * (high / low) ** 0.12 * 1.05)
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if high / low > 1000 else (1, 2, 5), numticks=12))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    else:
        room = max((high - low) * 0.15, abs(high) * 0.05, 1e-9)
        axes.set_ylim(low - room, high + room)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=STEPS))
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(length=0)


def _label_points(axes: Any, points: pd.DataFrame) -> None:
    """The checkpoints' names to the right of their points, moved up until no two overlap."""
    placed: list[tuple[float, float]] = []
    where = axes.transData.transform(list(zip(points["bytes"] / 1e6, points["perplexity"], strict=True)))
    for (x, y), name in sorted(zip(where, points["checkpoint"], strict=True), key=lambda one: one[0][1]):
        up = 0.0
        while any(abs(x - a) < LABEL[0] and abs(y + up - b) < LABEL[1] for a, b in placed):
            up += 1.0
        placed.append((x, y + up))
        place = axes.transData.inverted().transform((x + 11, y + up))
        # The paper behind the name hides the line, not the points (2 < 2.5 < 3).
        behind = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.0}
        axes.text(*place, name, va="center", ha="left", color=INK, fontsize=12, zorder=2.5, bbox=behind)


def _tip(artists: Any, tips: dict[str, str], words: str) -> None:
    """What shows when the pointer rests on these artists."""
    for artist in artists:
        gid = f"tip{len(tips)}"
        artist.set_gid(gid)
        tips[gid] = words


def _svg(figure: Figure, name: str, tips: dict[str, str]) -> str:
    """The figure as an inline <svg> without metadata, a style sheet or a fixed size of its own."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, facecolor="none")
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    head, body = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box, "matplotlib wrote an SVG without a viewBox"
    body = body.replace("xlink:href", "href")
    body = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', body)
    body = re.sub(r'href="#([^"]*)"', rf'href="#{name}-\1"', body)
    body = re.sub(r"url\(#([^)]*)\)", rf"url(#{name}-\1)", body)
    body = re.sub(r"(fill|stroke): (#[0-9a-f]{6})", lambda hit: f"{hit[1]}: {PAINTS.get(hit[2], hit[2])}", body)
    body = re.sub(rf'(<g id="{name}-(tip\d+)">)', lambda hit: f"{hit[1]}<title>{escape(tips[hit[2]])}</title>", body)
    body = re.sub(r"\n\s*", "\n", body).replace("\n\n", "\n")
    return f'<svg {box[0]} role="img" aria-labelledby="{name}-caption">{body}'
