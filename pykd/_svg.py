"""How figures look: as SVG, the same data give the same bytes; they stand on a white ground of their own."""

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe & Ito's colours, which colour-blind readers can tell, with a mark each for those who see none.
LOOKS = list(zip(("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"), "osD^vPX", strict=True))
STYLE = {
    "svg.hashsalt": "pykd",
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # and a name with dollars in it a name
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def svg(size: tuple[float, float], draw: "Callable[[Figure], None]") -> bytes:
    """The file of a figure of so many inches, which ``draw`` fills.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError("figures need matplotlib: run pip install 'pykd[report]'") from error
    stream = io.BytesIO()
    with style.context(["default", STYLE]):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(stream, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    return stream.getvalue()
