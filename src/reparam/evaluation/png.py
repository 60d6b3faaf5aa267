"""Write figures as PNG files."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.text import Text

from reparam.io.staged import write_file


def write_png(figure: Figure, file: Path) -> None:
    """Write a matplotlib figure to a PNG file, atomically. Dollar signs in its texts are no formulas."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_file(file, buffer.getvalue())
