"""The matplotlib set-up of every picture of this project: backend, fonts, colours and resolution."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from delib_fast.config import ConfigError
from delib_fast.data.disk_cache import cache_folder
from delib_fast.files import locked, write_atomic

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
        with _own_font_cache():
            import matplotlib
            import matplotlib.font_manager
    except ImportError:
        raise ConfigError(
            f"{what} with matplotlib, which is not installed: pip install 'delib-fast[{extra}]'"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import matplotlib.ticker

    plt.rcParams.update(_STYLE)
    return plt


@contextlib.contextmanager
def _own_font_cache() -> Iterator[None]:
    """Keep matplotlib's list of fonts in this project's cache folder, unless $MPLCONFIGDIR says where.

    A process that is killed while matplotlib writes that list leaves a lock file, for which every later one waits
    5 s. In a folder of our own, and under a lock that the kernel releases, such a file is known to be stale.
    """
    if "MPLCONFIGDIR" in os.environ or "matplotlib" in sys.modules:
        yield
        return
    with contextlib.ExitStack() as stack:
        with cache_folder(None) as cache:
            folder = cache / "matplotlib"
        with contextlib.suppress(OSError):  # matplotlib then uses a temporary folder
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / "fonts.lock"))
            for stale in folder.glob("*.matplotlib-lock"):
                stale.unlink(missing_ok=True)
            os.environ["MPLCONFIGDIR"] = str(folder)
        yield


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG or SVG, by the suffix of `path`, without a date or version, and close it."""
    import matplotlib.pyplot as plt

    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.removeprefix("."), dpi=DPI, metadata=metadata)
    write_atomic(path, picture.getvalue())
    plt.close(figure)
