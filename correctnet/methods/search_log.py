"""The search problem, its explored states with their rewards (12), and the log of a search.

Needs no torch, so that tables and figures can read logs without importing it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from correctnet.errors import UserError, one_line
from correctnet.files import storage

Filters = tuple[int, ...]
"""a state: the generator filters m_i of each candidate layer, 0 for no compensation"""
COLUMNS = ["evaluation", "episode", "filters", "ratios", "layers", "overhead", "mean", "std", "reward", "seconds"]


@dataclass(frozen=True)
class Problem:
    """A search problem.

    Attributes:
        widths: filters n_i of each candidate layer.
        ratios: the values that S_i may take, 0 among them.
        limit: the allowed overhead, a fraction; the state without compensation is within it.
        overhead: overhead of a state, a fraction.
        score: trains and evaluates a state: (mean, standard deviation) of its accuracy over chips. The expensive part;
            None where other processes score states.
        higher: whether larger values of what stands for the accuracy are better.
        fraction: whether they lie in 0 to 1, as an accuracy does.
    """

    widths: tuple[int, ...]
    ratios: tuple[float, ...]
    limit: float
    overhead: Callable[[Filters], float]
    score: Callable[[Filters], tuple[float, float]] | None
    higher: bool = True
    fraction: bool = True

    def filters(self, actions: Sequence[int]) -> Filters:
        """The state of a sequence of actions (indices of `ratios`): m_i = round(S_i n_i), at least 1 for S_i > 0."""
        chosen = (self.ratios[a] for a in actions)
        return tuple(max(1, round(s * n)) if s > 0 else 0 for s, n in zip(chosen, self.widths, strict=True))


@dataclass(frozen=True)
class Explored:
    """An explored state; `mean` and `std` are None if its overhead was above the limit."""

    evaluation: int
    episode: int
    filters: Filters
    overhead: float
    mean: float | None
    std: float | None
    reward: float
    seconds: float

    def row(self, widths: Sequence[int]) -> dict[str, Any]:
        """The state as a row of the log."""
        ratios = " ".join(f"{m / n:.4g}" for m, n in zip(self.filters, widths, strict=True))
        return {
            **{c: getattr(self, c, None) for c in COLUMNS},
            "filters": " ".join(map(str, self.filters)),
            "ratios": ratios,
            "layers": sum(m > 0 for m in self.filters),
        }


def reward(
    mean: float | None, std: float | None, overhead: float, limit: float, higher: bool = True, unit: float = 1.0
) -> float:
    """R = mean - std - overhead within the limit, else -overhead: (12) of the paper; all values are fractions.

    Of another metric than a fraction, mean and deviation are divided by `unit`, the mean of the state without
    compensation. Where smaller values are better, 1 - mean takes the place of the mean, as 1 - error of an accuracy:
    R = 1 - (mean + std) / unit - overhead.
    """
    if overhead > limit or mean is None or std is None:
        return -overhead
    return (mean / unit if higher else 1 - mean / unit) - std / unit - overhead


def best_state(means: Sequence[float], overheads: Sequence[float], higher: bool = True) -> int:
    """The index of the state that a search returns: the best mean accuracy; among equals the least overhead.

    Of states that are equal in both, the first. `higher`: whether larger means are better.
    """
    sign = 1 if higher else -1
    return max(range(len(means)), key=lambda i: (sign * means[i], -overheads[i]))


class Pending(Exception):
    """A search cannot continue before `states` are scored by other processes."""

    def __init__(self, states: Sequence[Filters]):
        super().__init__(f"{len(states)} states have to be trained first")
        self.states = tuple(states)


class Log:
    """All explored states, written as CSV (atomically) after each; states logged by an earlier run are reused.

    Args:
        problem: the search problem.
        path: the CSV file; None: nothing is written.
        known: states that were scored elsewhere.
    """

    def __init__(self, problem: Problem, path: Path | None = None, known: Iterable[Explored] = ()):
        self.problem, self.path = problem, path
        self.states: dict[Filters, Explored] = {}
        self.known = {s.filters: s for s in known}
        self.known |= {s.filters: s for s in storage.resume(path, read_log, [])}

    @property
    def evaluations(self) -> int:
        """Number of states that were trained and evaluated, without the uncompensated one, which trains nothing."""
        return sum(s.mean is not None and any(s.filters) for s in self.states.values())

    def new(self, states: Iterable[Filters]) -> list[Filters]:
        """The states within the limit that are not explored yet, each once."""
        limit = self.problem.limit
        return [f for f in dict.fromkeys(states) if f not in self.states and self.problem.overhead(f) <= limit]

    def explore_all(self, states: Sequence[Filters], episode: int) -> None:
        """Explore new states. Raises Pending if other processes have to score some of them first."""
        missing = [f for f in states if f not in self.known]
        if missing and self.problem.score is None:
            raise Pending(missing)
        for filters in states:
            self.explore(filters, episode)

    def explore(self, filters: Filters, episode: int) -> Explored:
        """The state's accuracy and reward: from memory, from the log of an earlier run, or by training it."""
        if filters in self.states:
            return self.states[filters]
        began = time.monotonic()
        overhead = self.problem.overhead(filters)
        mean = std = None
        fits = overhead <= self.problem.limit
        if filters in self.known:
            mean, std, seconds = self.known[filters].mean, self.known[filters].std, self.known[filters].seconds
        else:
            if fits:
                if self.problem.score is None:
                    raise Pending([filters])
                mean, std = self.problem.score(filters)
            seconds = round(time.monotonic() - began, 3)
        unit = 1.0 if self.problem.fraction else self._unit(filters, mean)
        value = reward(mean, std, overhead, self.problem.limit, self.problem.higher, unit)
        number = self.evaluations + (fits and any(filters))
        self.states[filters] = Explored(number, episode, filters, overhead, mean, std, value, seconds)
        if self.path is not None and (fits or filters not in self.known):
            self.write(self.path)
        return self.states[filters]

    def _unit(self, filters: Filters, mean: float | None) -> float:
        """The size of the mean of the state without compensation, which is explored first; 1 where it is 0."""
        none = self.states.get((0,) * len(filters))
        return abs((mean if none is None else none.mean) or 0.0) or 1.0

    def write(self, path: Path) -> None:
        """Write the log, including states of an earlier run that the replay has not reached yet."""
        ahead = [s for f, s in self.known.items() if f not in self.states]
        storage.write_csv(path, self.table(ahead))

    def table(self, ahead: Iterable[Explored] = ()) -> pd.DataFrame:
        """One row a state, in the order of exploration; the states `ahead` come last."""
        rows = [s.row(self.problem.widths) for s in [*self.states.values(), *ahead]]
        return pd.DataFrame(rows, columns=COLUMNS)

    def best(self) -> Explored:
        """The state within the limit with the best mean accuracy; among equals the one with the least overhead."""
        scored = [s for s in self.states.values() if s.mean is not None]
        return scored[best_state([s.mean for s in scored], [s.overhead for s in scored], self.problem.higher)]


def read_log(path: Path) -> list[Explored]:
    """The states in a log. Raises UserError for a file that is not a log."""
    try:
        table = storage.read_csv(path, text=("filters", "ratios"))
        states = []
        for row in table[COLUMNS].to_dict("records"):
            mean, std = (None if np.isnan(row[c]) else float(row[c]) for c in ("mean", "std"))
            filters = tuple(int(m) for m in row["filters"].split())
            numbers = int(row["evaluation"]), int(row["episode"])
            states.append(Explored(*numbers, filters, row["overhead"], mean, std, row["reward"], row["seconds"]))
        return states
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a search log ({one_line(error)}); delete it to start over") from error
