"""Figures as SVG inside the page: in the page's own colours, the same bytes for the same numbers."""

import io
import re
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

# What matplotlib paints with, and the page's variable that takes its place: so that the plots follow light and
# dark mode and print.
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
STYLE = {
    "svg.fonttype": "none",  # text stays text: it can be read out, searched and set in the page's font
    "svg.hashsalt": "pareline",
    "text.parse_math": False,  # a text called `$x$` is a name, not a formula
    "font.size": 12,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.linewidth": 1.0,
    "axes.spines.left": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": 12,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


def canvas(height: float, rows: int, columns: int) -> tuple[Figure, list[Any]]:
    """A figure as wide as the page, and its axes."""
    layout = ConstrainedLayoutEngine(w_pad=8 / 72, h_pad=6 / 72, hspace=0.05, wspace=0.04)
    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72, layout=layout)
    FigureCanvasSVG(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def inline(figure: Figure, name: str) -> str:
    """The figure as an <svg> without metadata, a style sheet or a size of its own; `name` is in all its ids."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, facecolor="none")
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", buffer.getvalue(), flags=re.S)
    body = svg[svg.index(">", svg.index("<svg")) + 1 :].replace("xlink:href", "href")
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", body)
    body = re.sub(r"(fill|stroke): (#[0-9a-f]{6})", lambda hit: f"{hit[1]}: {PAINTS.get(hit[2], hit[2])}", body)
    body = re.sub(r"\n\s*", "\n", body).strip()
    height = round(figure.get_figheight() * 72)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="{name}-caption">\n{body}'
