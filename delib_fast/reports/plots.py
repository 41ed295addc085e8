"""The matplotlib set-up of every picture of this project: backend, fonts, colours and resolution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from delib_fast.config import ConfigError

# On white, each has a contrast of 4.5 or more, and they also differ in lightness.
COLOURS = ("#0b6e99", "#b8430d", "#2f7a3d", "#7a4fa3", "#8a6100", "#b0306a", "#444444")
NEUTRAL = "#5c6b7a"
"""The colour of a baseline, and of lines that mark something."""
DPI = 160
SMALL_FONT = 8
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "figure.facecolor": "white",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a95a1",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6eaee",
    "legend.frameon": False,
    "legend.fontsize": SMALL_FONT,
    "text.parse_math": False,  # a name with two $ is not a formula
    "svg.hashsalt": "delib_fast",  # the same figures give the same file
}


def pyplot(what: str, extra: str) -> Any:
    """Import matplotlib.pyplot and set it up; it opens no window.

    Args:
        what: the beginning of the error message, e.g. "the report draws its pictures".
        extra: the extra of this package that installs it.
    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError(
            f"{what} with matplotlib, which is not installed: pip install 'delib-fast[{extra}]'"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import matplotlib.ticker

    plt.rcParams.update(_STYLE)
    return plt


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG or SVG, by the suffix of `path`, without a date or version, and close it."""
    import matplotlib.pyplot as plt

    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    figure.savefig(path, dpi=DPI, metadata=metadata)
    plt.close(figure)
