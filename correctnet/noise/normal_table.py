"""Fits of the polynomials in `correctnet.noise.specification`; not needed at run time.

`python -m correctnet.noise.normal_table` fits the octave table and rewrites `normal_table.inc`: 6 x 32 coefficients as
hexadecimal floats, a form that Python parses and C++ includes. Neither includes files of the other, so the file exists
twice, here and in csrc/noise; a test compares both.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from correctnet.noise.specification import DEGREE, NORMAL_PATH, OCTAVES, horner

CSRC_PATH = Path(__file__).parents[2] / "csrc" / "noise" / NORMAL_PATH.name


def fit_normal() -> NDArray[np.float32]:
    """Fit z = ndtri(p) on the octaves [2^-(k+2), 2^-(k+1)), k = 0..31, by quintics in t = p 2^(k+2) - 3/2.

    Each quintic interpolates at Chebyshev nodes stretched so that the outermost two are the octave's edges: the best
    choice of nodes that meets at the edges, its error about 1.23 times the minimax one (5.7e-6 in octave 0, less in
    the others). Rounding to float32 can still lift an octave above its upper neighbour by a unit in the last place;
    its constant term is then lowered until the values at the edge, as float32 arithmetic gives them, ascend. Within an
    octave they ascend because the last multiply-add does: its factor is rounded by less than its step.

    Returns:
        (DEGREE + 1, OCTAVES): row j holds the coefficients of t^j.
    """
    cosines = np.cos((2 * np.arange(DEGREE + 1) + 1) * np.pi / (2 * DEGREE + 2))
    nodes = 0.5 * cosines / cosines[0]
    powers = np.vander(nodes, increasing=True)
    table = np.empty((DEGREE + 1, OCTAVES), np.float32)
    first, last = np.float32([-0.5]), np.float32([0.5 - 2.0**-23])
    ceiling = np.float32(0)
    for octave in range(OCTAVES):
        p = (nodes + 1.5) * 2.0 ** -(octave + 2)
        column = np.linalg.solve(powers, ndtri(p)).astype(np.float32)
        while horner(column, last)[0] > ceiling:
            column[0] = np.nextafter(column[0], np.float32(-np.inf))
        ceiling = horner(column, first)[0]
        table[:, octave] = column
    return table


def fit_exp2() -> NDArray[np.float32]:
    """Fit 2^r on [-1/2, 1/2] by 1 + r ln 2 + c2 r^2 + ... + c5 r^5, absolute error 1e-7 before rounding.

    The first two terms are those of the Taylor series, so that 2^0 is 1. The remainder has a factor r^2; the other four
    coefficients interpolate at the r where it also has the r^2 of stretched Chebyshev nodes on [0, 1/4], which makes
    it the least that a double zero at 0 allows.
    """
    edge = np.cos(np.pi / 6)
    squares = 0.25 * (np.array([0.0, edge]) + edge) / (1 + edge)
    nodes = np.concatenate([-np.sqrt(squares), np.sqrt(squares)])
    rest = (2.0**nodes - 1 - nodes * np.log(2)) / nodes**2
    higher = np.linalg.solve(np.vander(nodes, increasing=True), rest)
    return np.concatenate([[1, np.log(2)], higher]).astype(np.float32)


def main() -> None:
    """Fit the octave table and write both copies."""
    lines = ["// Octave table of the inverse normal distribution: coefficient of t^j in octave k at row j, column k."]
    lines += [
        "// Written by `python -m correctnet.noise.normal_table`, where the fit is described; read by C++ and Python."
    ]
    for row in fit_normal():
        words = [float(value).hex() + "," for value in row]
        lines += [" ".join(words[i : i + 4]) for i in range(0, OCTAVES, 4)]
    for path in NORMAL_PATH, CSRC_PATH:
        path.write_text("\n".join(lines) + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
