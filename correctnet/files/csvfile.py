"""Validated reads of CSV files: a cell of the wrong kind is reported by file, line and column."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pandas as pd

from correctnet.errors import UserError, one_line
from correctnet.files.storage import unreadable


@dataclass(frozen=True)
class Column:
    """The kind and range of a column's cells."""

    kind: type
    """int, float (finite) or str"""
    low: float = -math.inf
    high: float = math.inf
    empty: bool = False
    """whether a cell may be empty"""

    def __str__(self) -> str:
        if (self.kind, self.low, self.high) == (float, 0, 1):
            return "a fraction between 0 and 1"
        name = {int: "an integer", float: "a number", str: "a text"}[self.kind]
        if self.high < math.inf:
            return f"{name} from {self.low:g} to {self.high:g}"
        return name if self.low == -math.inf else f"{name} that is at least {self.low:g}"


COUNT, FRACTION, SHARE, TEXT = Column(int, 0), Column(float, 0, 1), Column(float, 0), Column(str)
MAYBE_FRACTION, MAYBE_SHARE, MAYBE_TEXT = (
    Column(float, 0, 1, empty=True),
    Column(float, 0, empty=True),
    Column(str, empty=True),
)
# By name: columns of an evaluation's file, and columns of the other stages' files.
EVALUATION = {
    **dict.fromkeys(("sample", "correct", "seed", "layers"), COUNT),
    "images": Column(int, 1),
    "accuracy": FRACTION,
    "value": Column(float),
    "metric": TEXT,
    **dict.fromkeys(("sigma", "level", "overhead"), SHARE),
    **dict.fromkeys(("factor_mean", "factor_cv"), MAYBE_SHARE),
    **dict.fromkeys(("pair", "row", "network", "dataset", "split", "centre"), TEXT),
    **dict.fromkeys(("epochs", "variation", "on", "resample", "data", "device", "model"), MAYBE_TEXT),
    **dict.fromkeys(
        ("trained_sigma", "prefixes", "cell", "unit", "scale", "time", "measurement", "masks", "mapping"), MAYBE_TEXT
    ),
    **dict.fromkeys(
        ("digital_macs", "pilot", "protected", "adapt_images", "adapt_passes", "adapt_seconds", "calibrate_images"),
        Column(float, 0, empty=True),
    ),
    **dict.fromkeys(("dac_bits", "adc_bits"), Column(float, 2, 16, empty=True)),
    "clipped": MAYBE_FRACTION,
}
COLUMNS = {
    **EVALUATION,
    **dict.fromkeys(("evaluation", "episode"), COUNT),
    **dict.fromkeys(("layer", "weights"), Column(int, 1)),
    **dict.fromkeys(("original", "threshold", "clean"), FRACTION),
    **dict.fromkeys(("mean", "std"), MAYBE_FRACTION),
    "seconds": SHARE,
    "reward": Column(float),
    **dict.fromkeys(("name", "stage"), TEXT),
    **dict.fromkeys(("filters", "ratios", "candidates"), MAYBE_TEXT),
}


@dataclass(frozen=True)
class Checked:
    """A table, and the lines of its rows in the file."""

    path: str | Path
    table: pd.DataFrame
    lines: Sequence[int]
    """line of each row, counted from 1"""

    def refuse(self, row: int, column: str, what: str) -> NoReturn:
        """Raise a UserError about a cell."""
        raise UserError(f"{self.path}: line {self.lines[row]}: {column}: {what}")


def read(path: str | Path, required: Sequence[str] = (), known: Mapping[str, Column] = COLUMNS) -> Checked:
    """Read a CSV file whose first line names its columns, and check each cell of the known columns.

    Floats are read to the last bit. An unknown column holds numbers where all of its cells do (an empty cell is a
    missing number), else texts.

    Args:
        path: the file.
        required: columns that it must have.
        known: kinds of columns, by name.

    Raises:
        UserError: the file is absent or cut short (its last line has no line break), lacks a required column, has a
            duplicate column, a line with another number of fields, or a cell of the wrong kind. The message names file,
            line and column, and what was found.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from error
    if not text.strip():
        raise UserError(f"{path}: cannot be read (it is empty)")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows, lines = [], []
    try:
        header = next(reader)
        _check_header(path, header, required)
        for cells in reader:
            if cells:  # not a blank line
                rows.append(cells)
                lines.append(reader.line_num)
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num}: not CSV ({error})") from error
    if not text.endswith("\n"):
        raise UserError(f"{path}: line {reader.line_num}: no line break: the file was cut short, or edited")
    for cells, line in zip(rows, lines, strict=True):
        if len(cells) != len(header):
            raise UserError(f"{path}: line {line}: {len(cells)} cells where the header has {len(header)} columns")
    columns = {}
    for i, name in enumerate(header):
        cells = [row[i] for row in rows]
        columns[name] = _values(path, name, known[name], cells, lines) if name in known else _guessed(cells)
    return Checked(path, pd.DataFrame(columns, columns=header), lines)


def _check_header(path: str | Path, header: Sequence[str], required: Sequence[str]) -> None:
    missing = [name for name in required if name not in header]
    if missing:
        raise UserError(f"{path}: no column {missing[0]!r}")
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise UserError(f"{path}: line 1: two columns are named {twice[0]!r}")


def _values(path: str | Path, name: str, column: Column, cells: Sequence[str], lines: Sequence[int]) -> pd.Series:
    """Values of a known column, each cell checked."""
    values = []
    for cell, line in zip(cells, lines, strict=True):
        try:
            values.append(_value(column, cell))
        except ValueError:
            found = f"{cell!r} was found" if cell else "the cell is empty"
            raise UserError(f"{path}: line {line}: {name}: {column} is expected; {found}") from None
    kind = {int: None if values else "int64", float: "float64", str: "str"}[column.kind]
    return pd.Series(values, dtype=kind)


def _value(column: Column, cell: str) -> int | float | str:
    """Value of a cell. Raises ValueError where it is not of the column's kind."""
    if not cell.strip():
        if not column.empty:
            raise ValueError
        return "" if column.kind is str else math.nan
    if column.kind is str:
        return cell
    if column.kind is int:
        if not re.fullmatch(r"[+-]?[0-9]+", cell):
            raise ValueError
        value: int | float = int(cell)
        if abs(value) >= 2**64:
            raise ValueError
    else:
        value = _float(cell)
    if not column.low <= value <= column.high:  # false for NaN, too
        raise ValueError
    if not math.isfinite(value):
        raise ValueError
    return value


def _float(cell: str) -> float:
    if "_" in cell:  # Python's digits may be grouped by it; a file's are not
        raise ValueError
    return float(cell)


def _guessed(cells: Sequence[str]) -> pd.Series:
    """Values of an unknown column: numbers where all cells are written as Python writes numbers, else texts.

    A text that only resembles a number (007, 12e5, nan) stays a text: it would be written differently than it was read.
    """
    for kind, dtype in ((int, "Int64"), (float, "float64")):
        try:
            values = [kind(cell) if cell else None for cell in cells]
            if all(value is None or repr(value) == cell for cell, value in zip(cells, values, strict=True)):
                finite = [value for value in values if value is not None and math.isfinite(value)]
                if len(finite) == len(values):
                    return pd.Series(finite)
                if len(finite) == len(values) - values.count(None):
                    return pd.Series(values, dtype=dtype)
        except (ValueError, OverflowError):
            continue
    return pd.Series(list(cells), dtype="str")
