"""Matplotlib as every picture of this project uses it: no window, one style."""

from __future__ import annotations

from typing import Any

from delib_fast.config import ConfigError


def pyplot(what: str, extra: str) -> Any:
    """matplotlib.pyplot, ready to draw PNGs in the common style.

    Raises:
        ConfigError: matplotlib is not installed: says that `what` needs it, and which extra brings it.
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

    plt.rcParams.update(
        {
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": "#8a95a1",
            "axes.grid": True,
            "grid.color": "#e6eaee",
            "axes.axisbelow": True,
            "figure.facecolor": "white",
            "font.family": "DejaVu Sans",
        }
    )
    return plt
