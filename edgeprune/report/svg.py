"""Static SVG of matplotlib's figures for the pages: text stays text, and colours are those of the page's theme.

It does not know what is drawn. Texts of users may stand in a plot: they are shown as they are, and never as markup.
"""

from __future__ import annotations

import io
import logging
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 440  # px: a phone shows it at three quarters of that
LINE = 17  # px from one line of text to the next
CHARACTERS = 52  # of a line of text as wide as a plot
# These three stand for the page's own colours, which differ between light and dark; the others are seen on both and
# with any colour vision.
INK, SOFT, GRID = "#1c2430", "#5b6678", "#e3e7ee"
DENSE, FITTED, LIMIT = "#9aa4b5", "#3b78e7", "#d9480f"
PALETTE = (FITTED, "#12a594", "#e5a000", "#b45bcf", DENSE)

_PAGE_COLOURS = {INK: "var(--ink)", SOFT: "var(--soft)", GRID: "var(--grid)"}
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 12.5,
    "text.color": SOFT,
    "axes.labelcolor": SOFT,
    "axes.labelsize": 12.5,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 12.5,
    "lines.linewidth": 1.6,
    "hatch.linewidth": 1.2,
}


@contextmanager
def drawing() -> Iterator[None]:
    """Draws in the pages' style, whatever the user's own settings of matplotlib are, and without its warnings."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # first: its import may warn of a home without a cache
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of characters that its font lacks: the reader's own has them
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


@dataclass
class Plot:
    """A figure with one pair of axes, and what appears when one points at its parts."""

    figure: Figure
    axes: Axes
    tips: dict[str, tuple[str, dict[str, str]]] = field(default_factory=dict)

    def tip(self, artist: Artist, text: str, **attributes: str) -> None:
        """Shows a text where the reader points at an artist, whose element gets the attributes."""
        gid = f"tip-{len(self.tips)}"
        artist.set_gid(gid)
        self.tips[gid] = (text, attributes)

    def legend(self, columns: int = 2) -> None:
        """Adds a legend above the axes."""
        handles, labels = self.axes.get_legend_handles_labels()
        if handles:
            self.figure.legend(handles, labels, loc="outside upper left", ncols=columns, columnspacing=1.2)

    def svg(self, name: str, label: str) -> str:
        """Returns the plot as an element for a page. name: unique on the page; label: what it shows, in words."""
        import matplotlib

        file = io.BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": name}):  # ids are unique on the page, and the same in each run
            self.figure.savefig(file, format="svg", metadata={"Date": None})
        return _inlined(ElementTree.fromstring(file.getvalue()), name, shown(label), self.tips)


def new_plot(height: float, width: float = WIDTH) -> Plot:
    """Returns an empty plot of a size in px; within `drawing`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    return Plot(figure, figure.add_subplot())


def shown(text: str) -> str:
    """Returns a text on one line for a plot, without what XML cannot hold; never empty."""
    printable = "".join(c if c.isprintable() or c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return " ".join(printable.split()) or "–"


def lines_of(text: str, characters: int = CHARACTERS) -> list[str]:
    """Returns a text in lines that are as wide as a plot: nothing of it is cut."""
    return textwrap.wrap(shown(text), characters, break_on_hyphens=False) or ["–"]


def whole_ticks(axes: Axes) -> None:
    """Puts ticks at whole numbers alone along the horizontal axis: layers have no halves."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))


def is_drawable(values: Sequence[float]) -> bool:
    """Returns whether a plot can hold all of these values."""
    return all(abs(value) < 1e300 for value in values)  # neither infinite nor nan


def reaches(intervals: Sequence[tuple[float | None, float, float | None]]) -> list[list[float]]:
    """Returns how far the bounds of intervals (low, value, high) reach below and above their values.

    It is 0 where a bound is missing, not finite, or on the other side of its value, as rounding and bootstraps give.
    """

    def distance(near: float | None, far: float | None) -> float:
        if near is None or far is None or not is_drawable((near, far)):
            return 0.0
        return max(0.0, far - near)

    return [
        [distance(low, value) for low, value, _ in intervals],
        [distance(value, high) for _, value, high in intervals],
    ]


def _inlined(svg: ElementTree.Element, name: str, label: str, tips: dict[str, tuple[str, dict[str, str]]]) -> str:
    """Returns matplotlib's document as an element of a page: without what repeats, in the page's font and colours."""
    # The page scales it: the box alone keeps the proportions.
    for size in ("width", "height"):
        del svg.attrib[size]
    svg.attrib |= {"id": f"plot-{name}", "role": "img", "aria-label": label}
    for parent in list(svg.iter()):
        for child in list(parent):
            if child.tag.endswith("}metadata") or child.find(f"{{{_SVG}}}style") is not None:
                parent.remove(child)
    # Only an id that something refers to stays; an artist with a tip has its text and attributes instead.
    text = ElementTree.tostring(svg, encoding="unicode")
    referred = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text))
    referred_ids = {name for pair in referred for name in pair if name}
    for element in svg.iter():
        _restyle(element)
        element.text, element.tail = (text if (text or "").strip() else None for text in (element.text, element.tail))
        gid = element.get("id", "")
        if gid in tips:
            words, attributes = tips[gid]
            title = ElementTree.Element(f"{{{_SVG}}}title")
            title.text = "\n".join(shown(line) for line in words.splitlines())
            element.insert(0, title)
            element.attrib |= attributes
        if element is not svg and gid not in referred_ids:
            element.attrib.pop("id", None)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    return ElementTree.tostring(svg, encoding="unicode")


def _restyle(element: ElementTree.Element) -> None:
    """Puts the page's font and colours in the place of the figure's."""
    if "d" in element.attrib:
        element.set("d", " ".join(element.get("d", "").split()))
    if style := element.get("style"):
        style = re.sub(r"font-family: [^;]*;? ?", "", style)
        for colour, own in _PAGE_COLOURS.items():
            style = style.replace(colour, own)
        element.set("style", style)
    if element.get("transform", "").startswith(("rotate(-0 ", "rotate(0 ")):
        del element.attrib["transform"]
