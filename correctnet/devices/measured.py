"""Files of measurements as devices: CSV in three forms, told apart by their header.

    summary    level,mean,std[,count]                      one line a level; NeuroSim's states,mean,std (in S)
    samples    target,measured[,device][,time]             one line a device; or one column a target
    curve      g,std[,mean]                                points of a figure, linear between them

A summary has levels: nothing else can be programmed, and a weight is mapped to the level with the nearest mean. The
other two are continuous. Units are in the header (`mean_uS`, `measured (nA)`) or given; they are never guessed.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pandas as pd

from correctnet.devices.programming import UNITS, Table, seconds, time_text, unit_named
from correctnet.errors import UserError
from correctnet.files import csvfile
from correctnet.files.csvfile import Column

FEW = 30
"""samples a level below which its standard deviation is uncertain by more than 13 %"""

RESISTANCES = {"ohm": ("S", 1.0), "kohm": ("mS", 1.0), "Mohm": ("uS", 1.0)}
"""units of resistances, with the unit of the conductance and the factor of 1 / R"""

FORMS = "level,mean,std (a summary), target,measured (samples), g,std (a curve), or one column of samples a target"


class MeasurementWarning(UserWarning):
    """Measurements that can be used, but with less certainty than they seem to have."""


@dataclass(frozen=True)
class _Header:
    """Names of columns without units, and the unit that they state."""

    names: tuple[str, ...]
    unit: str | None


def read(path: str | Path, unit: str | None = None, time: float | str | None = None) -> Table:
    """Read a file of measurements.

    Args:
        path: a CSV file of one of the forms of this module.
        unit: of the states, one of `correctnet.devices.programming.UNITS`, or of resistances, one of `RESISTANCES`;
            None: it is in the header.
        time: which of several times after programming to take, see `seconds`; only for samples with a column `time`,
            in seconds.

    Returns:
        Mean and standard deviation by target.

    Raises:
        UserError: the file is absent, empty, or holds pulse trains, I-V sweeps or something else; no unit, an unknown
            one, or two; levels that are out of order or there twice, deviations that are negative.

    Warns:
        MeasurementWarning: few samples a level, or moments of resistances.
    """
    checked = csvfile.read(path, known={})
    header = _header(path, list(checked.table.columns), unit)
    _refuse_other_kinds(path, header.names)
    table = _numbers(checked, header.names)
    names = set(header.names)
    if time is not None and not {"target", "measured", "time"} <= names:
        raise UserError(f"{path}: time: the file has no column `time`, so it is of one time")
    if {"mean", "std"} <= names and names & {"level", "state", "states"}:
        stated = header.unit or ("S" if "states" in names else None)
        made = _summary(path, table, _unit(path, stated))
    elif {"target", "measured"} <= names:
        made = _samples(path, table, _unit(path, header.unit), time)
    elif {"g", "std"} <= names:
        made = _curve(path, table, _unit(path, header.unit))
    elif all(_is_number(name) for name in header.names):
        long = table.melt(var_name="target", value_name="measured").dropna().astype(float)
        made = _samples(path, long, _unit(path, header.unit), None)
    else:
        raise UserError(f"{path}: line 1: columns {', '.join(header.names)}; {FORMS} is expected")
    return made


def _header(path: str | Path, columns: Sequence[str], given: str | None) -> _Header:
    """Divide the names of columns into names and a unit, which all that state one share."""
    names, units = [], set()
    for column in columns:
        found = re.fullmatch(r"\s*(.+?)\s*(?:_|\(|\[|\s)\s*([A-Za-zµ]+)\s*[)\]]?\s*", column)
        stated = found is not None and (found[2] in UNITS or found[2] in RESISTANCES)
        names.append((found[1] if stated else column).strip())
        if stated:
            units.add(UNITS.get(found[2], found[2]))
    if given is not None:
        units.add(given if given in RESISTANCES else unit_named(given))
    if len(units) > 1:
        raise UserError(f"{path}: units {' and '.join(sorted(units))}; all states have to be in one")
    names = [name.lower() if not _is_number(name) else name for name in names]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"{path}: line 1: two columns are named {twice[0]!r}")
    return _Header(tuple(names), units.pop() if units else None)


def _refuse_other_kinds(path: str | Path, names: Sequence[str]) -> None:
    need = "what is needed is the state after programming: for each target, its mean and deviation over devices"
    if any("pulse" in name or "rmp" in name for name in names):
        raise UserError(f"{path}: a pulse train says how devices are updated; {need}")
    volts = [name for name in names if re.match(r"v(meas|oltage)?(ch)?\d*$", name)]
    amperes = [name for name in names if re.match(r"i(meas)?(ch)?\d*$|current", name)]
    if volts and amperes:
        raise UserError(f"{path}: an I-V sweep says how a device conducts; {need}")


def _unit(path: str | Path, unit: str | None) -> str:
    if unit is None:
        raise UserError(f"{path}: no unit: name it in the header, as in mean_uS, or with unit= (--unit uS)")
    return unit


def _numbers(checked: csvfile.Checked, names: Sequence[str]) -> pd.DataFrame:
    """The table with its plain names; cells of all columns but `device` are numbers."""
    columns: dict[str, Any] = {}
    wide = all(_is_number(name) for name in names)
    if not len(checked.table):
        raise UserError(f"{checked.path}: cannot be read (it has a header and nothing else)")
    for name, column in zip(names, checked.table.columns, strict=True):
        cells = checked.table[column]
        if name == "device":
            continue
        kind = Column(float, empty=wide)
        values = []
        for row, cell in enumerate(cells):
            missing = cell is None or cell is pd.NA or cell == "" or (isinstance(cell, float) and math.isnan(cell))
            value = math.nan
            if not missing or not wide:
                try:
                    value = float(str(cell))
                except ValueError:
                    value = math.nan
                if not math.isfinite(value):
                    checked.refuse(row, str(column), f"{kind} is expected; {'' if missing else cell!r} was found")
            values.append(value)
        columns[name] = values
    return pd.DataFrame(columns)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text)) and "_" not in text
    except ValueError:
        return False


def _table(path: str | Path, unit: str, targets: Any, means: Any, stds: Any, discrete: bool = False) -> Table:
    try:
        return Table.of(unit, list(targets), list(means), list(stds), discrete)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _conductances(path: str | Path, unit: str, values: Sequence[float]) -> list[float]:
    for value in values:
        if not value > 0:
            raise UserError(f"{path}: a resistance must be above 0, not {value:g} {unit}")
    return [RESISTANCES[unit][1] / value for value in values]


def _summary(path: str | Path, table: pd.DataFrame, unit: str) -> Table:
    means, stds = table["mean"].tolist(), table["std"].tolist()
    if "count" in table and (few := table["count"].min()) < FEW:
        _warn_few(path, few)
    if unit in RESISTANCES:
        means, stds, unit = _from_resistance(path, unit, means, stds)
    return _table(path, unit, means, means, stds, discrete=True)


def _curve(path: str | Path, table: pd.DataFrame, unit: str) -> Table:
    targets, stds = table["g"].tolist(), table["std"].tolist()
    if unit in RESISTANCES:
        raise UserError(f"{path}: a curve over g is one of conductances or currents, not in {unit}")
    return _table(path, unit, targets, table["mean"].tolist() if "mean" in table else targets, stds)


def _from_resistance(
    path: str | Path, unit: str, means: list[float], stds: list[float]
) -> tuple[list[float], list[float], str]:
    """Conductances of moments of resistances, to first order; in ascending order."""
    warnings.warn(
        f"{path}: mean and deviation of resistances were converted to first order, as g = 1 / R and std R / R^2; "
        "samples would be converted one by one",
        MeasurementWarning,
        stacklevel=5,
    )
    states = _conductances(path, unit, means)
    converted = [std * state / mean for std, state, mean in zip(stds, states, means, strict=True)]
    ascending = len(means) > 1 and means[0] > means[-1]
    order = slice(None) if ascending else slice(None, None, -1)
    return states[order], converted[order], RESISTANCES[unit][0]


def _samples(path: str | Path, table: pd.DataFrame, unit: str, time: float | str | None) -> Table:
    time_seconds = None
    if "time" in table:
        times = sorted(table["time"].unique().tolist())
        listed = ", ".join(time_text(t) for t in times)
        if time is None and len(times) > 1:
            raise UserError(f"{path}: samples of several times, {listed}; choose one with time= (--time)")
        time_seconds = times[0] if time is None else seconds(time)
        if time_seconds not in times:
            raise UserError(f"{path}: no samples after {time_text(time_seconds)}; there are {listed}")
        table = table[table["time"] == time_seconds]
    targets, measured = table["target"].tolist(), table["measured"].tolist()
    if unit in RESISTANCES:
        targets, measured, unit = (
            _conductances(path, unit, targets),
            _conductances(path, unit, measured),
            RESISTANCES[unit][0],
        )
    levels: dict[float, list[float]] = {}
    for target, value in zip(targets, measured, strict=True):
        levels.setdefault(target, []).append(value)
    for target, values in levels.items():
        if len(values) < 2:
            raise UserError(f"{path}: one sample for target {target:g}; a deviation needs at least two")
    if (few := min(map(len, levels.values()))) < FEW:
        _warn_few(path, few)
    ordered = sorted(levels)
    stds = [stdev(levels[target]) for target in ordered]
    made = _table(path, unit, ordered, [fmean(levels[target]) for target in ordered], stds)
    return made if time_seconds is None else replace(made, time_seconds=time_seconds)


def _warn_few(path: str | Path, few: float) -> None:
    error = 100 / math.sqrt(2 * (few - 1)) if few > 1 else math.inf
    warnings.warn(
        f"{path}: a level has only {few:g} samples, so its deviation is known to {error:.0f} %",
        MeasurementWarning,
        stacklevel=5,
    )
