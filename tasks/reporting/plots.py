"""The report's plots: a tidy table in, a plot for the page out."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.colors import ListedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    FormatStrFormatter,
    Formatter,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
)

from tasks.reporting.formatting import listed, number, percent
from tasks.reporting.measures import MEASURES
from tasks.reporting.svg import ACCENT, INK, MUTED, PAPER, SECOND, STYLE, canvas, inline

FADED = 0.45  # opacity of a bar that is not among the full ones
LOG_FROM = 4.0  # largest over smallest perplexity from which on the axis is logarithmic
STEPS = [1, 2, 2.5, 5, 10]  # round numbers for ticks
LABEL = (92.0, 16.0)  # width and height that a point's label needs, in units
FIGURES = {
    "probability": "probability of a token, geometric mean",
    "exact_memorisation": "exact memorisation, share of tokens",
    "extraction_strength": "extraction strength, share of tokens",
    "rouge_l_recall": "ROUGE-L recall of greedy answers",
}
SHADES = ListedColormap([to_rgba(ACCENT, 0.1 + 0.09 * tenth) for tenth in range(10)])


@dataclass(frozen=True)
class Plot:
    """A plot for the page.

    Attributes:
        name: of its table, and in its ids.
        caption: says what it shows; its accessible name, too.
        svg: empty where there is nothing to draw.
    """

    name: str
    title: str
    caption: str
    svg: str = ""


@rc_context(STYLE)
def layer_sparsity(table: pd.DataFrame) -> Plot:
    """Fields as `_fields` draws them: the deeper the colour, the more weights are gone.

    Args:
        table: columns layer, block, checkpoint, sparsity. The last checkpoint in it is drawn.
    """
    name, title = "layer_sparsity", "Sparsity of every layer"
    if table.empty:
        return Plot(name, title, "No checkpoint has a mask: nothing was pruned.")
    drawn = table[table["checkpoint"] == table["checkpoint"].iloc[-1]]
    figure = _fields(drawn, "sparsity", 1, [0, 0.5, 1], PercentFormatter(1, 0))
    least, most = percent(drawn["sparsity"].min()), percent(drawn["sparsity"].max())
    spread = f"{least} in every layer" if least == most else f"from {least} to {most} a layer"
    return Plot(name, title, f"Share of a layer's weights that are gone: {spread}.", inline(figure, name))


@rc_context(STYLE)
def pruning_costs(table: pd.DataFrame) -> Plot:
    """Fields as `_fields` draws them: the deeper the colour, the more was expected to be lost with what went.

    Args:
        table: columns layer, block, cost; a row at least.
    """
    name, most, worst = "pruning_costs", table["cost"].max(), table["layer"].iloc[table["cost"].argmax()]
    deepest = most or 1.0  # nothing went
    figure = _fields(table, "cost", deepest, [0, deepest / 2, deepest], FormatStrFormatter("%.2g"))
    total = number(table["cost"].sum(), 3)
    caption = (
        f"Loss increase that was predicted for what went from a layer, in nats a token: {total} in all, most in "
        f"{worst} with {most:.3g}. What a hidden unit or a head costs stands at the layer that reads it."
    )
    return Plot(name, "What pruning was expected to cost", caption, inline(figure, name))


@rc_context(STYLE)
def sensitivity(table: pd.DataFrame, fine: Collection[int], bits: int) -> Plot:
    """Rows of bars, a bar a block: the measure of sensitivity that ran, and the outlier ratio.

    Args:
        table: columns block, measure (of MEASURES, or empty), sensitivity, outlier_ratio (a share).
        fine: blocks that quantisation kept at `bits` bits, more than the others; drawn in full colour.
    """
    rows = [("outlier_ratio", "outlier ratio", SECOND, "Outlier ratio: weights whose |W|·‖X‖ towers above their layer")]
    if ran := MEASURES.get(table["measure"].iloc[0]):
        rows.insert(0, ("sensitivity", ran.label, ACCENT, ran.meaning))
    rows = [row for row in rows if table[row[0]].notna().any()]
    opacities = [1.0 if not fine or block in fine else FADED for block in table["block"]]
    figure, panels = canvas(60 + 150 * len(rows), len(rows), 1)
    captions = []
    for axes, (column, label, paint, meaning) in zip(panels, rows, strict=True):
        axes.bar(table["block"], table[column], 0.72, color=[to_rgba(paint, opacity) for opacity in opacities])
        axes.set_title(label)
        axes.grid(axis="y")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=STEPS))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
        axes.margins(x=0.01)
        worst = table["block"].iloc[table[column].argmax()]
        captions.append(f"{meaning}; most in block {worst} with {table[column].max():.3g}.")
    panels[-1].set_xlabel("block")
    if fine:
        captions.append(f"Full colour: the blocks that quantisation kept at {bits} bits.")
    return Plot("sensitivity", "Sensitivity of every block", " ".join(captions), inline(figure, "sensitivity"))


@rc_context(STYLE)
def perplexity_bytes(table: pd.DataFrame) -> Plot:
    """A panel a text, a point a checkpoint: what its weights take on disk against its perplexity.

    Args:
        table: columns checkpoint, text, perplexity, bytes; the rows are in the order of the stages.
    """
    name, title = "perplexity_bytes", "Perplexity against size"
    if table.empty:
        return Plot(name, title, "No perplexity is known.")
    texts = {str(text): rows.assign(mb=rows["bytes"] / 1e6) for text, rows in table.groupby("text", sort=False)}
    logarithmic = table["perplexity"].max() / table["perplexity"].min() > LOG_FROM
    columns = min(len(texts), 2)
    rows = math.ceil(len(texts) / columns)
    figure, panels = canvas(50 + 330 * rows, rows, columns)
    for axes, (text, points) in zip(panels, texts.items(), strict=False):
        _scatter(axes, points, logarithmic)
        axes.set_title(f"{text}: perplexity" + (", logarithmic" if logarithmic else ""))
        axes.set_xlabel("megabytes on disk")
    for axes in panels[len(texts) :]:
        axes.set_axis_off()
    figure.draw_without_rendering()  # settles the layout, on which the place of the labels hangs
    for axes, points in zip(panels, texts.values(), strict=False):
        _label(axes, points)
    caption = "Down and to the left is better: less perplexity from fewer bytes. The line follows the stages."
    return Plot(name, title, caption, inline(figure, name))


@rc_context(STYLE)
def losses(table: pd.DataFrame) -> Plot:
    """A panel a stage that trained, a line a curve.

    Args:
        table: columns stage, curve, step, loss.
    """
    if table.empty:
        return Plot("losses", "Loss while training", "No stage trained anything.")
    stages = {str(stage): steps for stage, steps in table.groupby("stage", sort=False)}
    figure, panels = canvas(260, 1, 2)
    for axes, (stage, steps) in zip(panels, stages.items(), strict=False):
        for (curve, line), paint in zip(steps.groupby("curve", sort=False), (ACCENT, SECOND), strict=False):
            axes.plot(line["step"], line["loss"], color=paint, linewidth=1.8, label=curve)
        axes.set_title(f"{stage}: loss, nats a token")
        axes.set_xlabel("step")
        axes.grid(axis="y")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=STEPS))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=STEPS))
        axes.legend(labelcolor=INK)
    for axes in panels[len(stages) :]:
        axes.set_axis_off()
    caption = f"What {listed(list(stages))} saw at every step, each on another few sequences."
    return Plot("losses", "Loss while training", caption, inline(figure, "losses"))


@rc_context(STYLE)
def forgetting(table: pd.DataFrame) -> Plot:
    """A panel a figure, a line for the text to forget and one for the control text, along the checkpoints.

    Args:
        table: columns checkpoint, figure, role, value; the rows are in the order of the stages.
    """
    name, title = "forgetting", "What is known by heart"
    if table.empty:
        return Plot(name, title, "Nothing is known of what the checkpoints remember.")
    figures = {str(figure): rows for figure, rows in table.groupby("figure", sort=False)}
    names = list(dict.fromkeys(table["checkpoint"]))
    columns = min(len(figures), 2)
    rows = math.ceil(len(figures) / columns)
    figure, panels = canvas(30 + 220 * rows, rows, columns)
    for axes, (which, own) in zip(panels, figures.items(), strict=False):
        for (role, line), paint in zip(own.groupby("role", sort=False), (ACCENT, SECOND), strict=False):
            places = [names.index(one) for one in line["checkpoint"]]
            axes.plot(places, line["value"], "o-", color=paint, linewidth=1.8, markersize=6, mec=PAPER, label=role)
        axes.set_title(FIGURES[which])
        axes.set_xticks(range(len(names)), names)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=STEPS))
        axes.legend(labelcolor=INK)
    for axes in panels[len(figures) :]:
        axes.set_axis_off()
    caption = "Unlearning should bring the text to forget down to the control text, and leave that one where it is."
    return Plot(name, title, caption, inline(figure, name))


def _fields(table: pd.DataFrame, column: str, most: float, ticks: list[float], form: Formatter) -> Figure:
    """A field a layer, a column a block, from 0 in the lightest colour to `most` in the deepest.

    Args:
        table: columns layer, block and `column`.
        ticks, form: of the key beside them.
    """
    kinds = table["layer"].str.replace(r"^.*?\.\d+\.", "", regex=True).str.replace(r"\.\d+", ".*", regex=True)
    grid = table.assign(kind=kinds).pivot_table(column, "kind", "block", sort=False)  # experts share a field
    figure, (axes,) = canvas(96 + 26 * len(grid), 1, 1)
    fields = axes.pcolormesh(grid, cmap=SHADES, vmin=0, vmax=most, edgecolors=PAPER, linewidth=3)
    axes.set_yticks([row + 0.5 for row in range(len(grid))], grid.index)
    axes.invert_yaxis()
    shown = range(0, grid.shape[1], math.ceil(grid.shape[1] / 16))
    axes.set_xticks([place + 0.5 for place in shown], [str(grid.columns[place]) for place in shown])
    axes.set_xlabel("block")
    axes.spines[:].set_visible(False)
    key = figure.colorbar(fields, ax=axes, format=form, ticks=ticks, aspect=12, pad=0.01)
    key.outline.set_visible(False)
    return figure


def _scatter(axes: Any, points: pd.DataFrame, logarithmic: bool) -> None:
    axes.plot(points["mb"], points["perplexity"], color=to_rgba(MUTED, FADED), linewidth=1.4, zorder=2)
    axes.plot(points["mb"], points["perplexity"], "o", color=ACCENT, markersize=9, mec=PAPER, mew=1.5, zorder=3)
    # From zero on, so that lengths along the axis compare; the right end is room for the labels.
    right = points["mb"].max()
    axes.set_xlim(0, right * 1.42)
    ticks = MaxNLocator(nbins=6, steps=STEPS).tick_values(0, right)
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if tick <= right * 1.1]))
    axes.margins(y=0.15)
    axes.grid(axis="y")
    if logarithmic:
        axes.set_yscale("log")
        wide = points["perplexity"].max() / points["perplexity"].min() > 100
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 1.5, 2, 3, 5, 7), numticks=12))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _label(axes: Any, points: pd.DataFrame) -> None:
    """The checkpoints' names to the right of their points, moved up until no two overlap."""
    placed: list[tuple[float, float]] = []
    where = axes.transData.transform(points[["mb", "perplexity"]].to_numpy())
    for (x, y), name in sorted(zip(where, points["checkpoint"], strict=True), key=lambda one: float(one[0][1])):
        up = 0.0
        while any(abs(x - a) < LABEL[0] and abs(y + up - b) < LABEL[1] for a, b in placed):
            up += 1.0
        placed.append((x, y + up))
        place = axes.transData.inverted().transform((x + 11, y + up))
        # The paper behind the name hides the line, not the points (2 < 2.5 < 3).
        behind = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.0}
        axes.text(*place, name, va="center", fontsize=12, zorder=2.5, bbox=behind)
