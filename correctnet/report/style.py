"""What all figures share: colours, markers, and matplotlib's settings."""

from __future__ import annotations

import textwrap

# The colour-blind-safe palette of Okabe and Ito.
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#555555"
YELLOW, SKY = "#E69F00", "#56B4E9"
RETRAINED = "correctnet-sigma-"
ROW_STYLE = {
    "unprotected": (ORANGE, "s", "original network"),
    "correctnet": (BLUE, "o", "CorrectNet"),
    RETRAINED: (GREEN, "^", "CorrectNet, trained for each σ"),
}
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.hashsalt": "correctnet",  # the same data give the same file
    "figure.constrained_layout.use": True,
    # Names and labels are plain text: "$" and "\\" have no special meaning.
    "text.parse_math": False,
    "text.usetex": False,
}


def wrapped(text: str, width: int) -> str:
    """Text wrapped to at most three lines of `width` characters."""
    return "\n".join(textwrap.wrap(text, width, max_lines=3, placeholder=" …"))
