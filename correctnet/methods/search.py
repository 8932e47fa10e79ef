"""Where to compensate, and with how many filters: the reinforcement-learning search of the paper (Fig. 6, (12)).

The state is S_1..S_n, S_i = generator filters / filters of the i-th candidate layer, 0 for no compensation. An LSTM
policy emits the n actions one after the other, each a choice among the `ratios` that still fit the limit, and REINFORCE
raises the probability of sequences whose reward is above a moving average of the rewards:

    R = acc_avg - acc_std - overhead   if overhead <= limit        (12)
        -overhead                      otherwise, and nothing is trained

    grad J = E[ (R - baseline) / spread grad log pi(A_1..A_n) ] + entropy_weight * grad H(pi)

with the standard deviation of the rewards of all states so far for the spread. Two things make it do at least as well
as random search (docs/settings.md). Sequences over the limit are not drawn: (12) falls by more than half a unit there,
and a policy that learns from that flees to states that cost nothing. And the policy starts as the uniform distribution
over the sequences that fit, whatever layers come first (`Room`): what it draws before it has learnt is random search.

The whole search is a function of its seed and of the accuracies: to resume it is to replay it, with the accuracies of
the states that were explored before taken from the log. So its states can be trained elsewhere, too, a population at a
time: whoever replays the search finds out which states come next (`Pending`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from correctnet.errors import UserError, one_line
from correctnet.files import storage
from correctnet.noise.streams import global_generators, numpy_generator, torch_generator
from correctnet.report.tables import best_state
from correctnet.settings import search_rounds

Filters = tuple[int, ...]
COLUMNS = ["evaluation", "episode", "filters", "ratios", "layers", "overhead", "mean", "std", "reward", "seconds"]


@dataclass(frozen=True)
class Problem:
    """What is searched.

    Attributes:
        widths: filters n_i of each candidate layer.
        ratios: the values that S_i may take, 0 among them.
        limit: the overhead allowed, a fraction; that of the state without compensation is within it.
        overhead: of a state, given the generator filters of each candidate.
        score: trains and evaluates a state: (mean, standard deviation) of its accuracy. The expensive part; None where
            others do it.
    """

    widths: tuple[int, ...]
    ratios: tuple[float, ...]
    limit: float
    overhead: Callable[[Filters], float]
    score: Callable[[Filters], tuple[float, float]] | None

    def filters(self, actions: Sequence[int]) -> Filters:
        """The generator filters of each candidate: m_i = round(S_i n_i), at least 1 for S_i > 0."""
        chosen = (self.ratios[a] for a in actions)
        return tuple(max(1, round(s * n)) if s > 0 else 0 for s, n in zip(chosen, self.widths, strict=True))


class Room:
    """What still fits the limit behind the first actions of a sequence, and how many ways there are to go on.

    Drawing every action with a probability proportional to the number of complete sequences that it leaves draws
    uniformly from all sequences that fit. The numbers take the overhead for a sum over the layers and round each
    layer's to 1 / `STEPS` of the limit; whether an action is offered at all goes by the exact overhead of the sequence
    so far, without compensation in the layers behind it.
    """

    STEPS = 4096

    def __init__(self, problem: Problem):
        self.problem = problem
        self._none = problem.ratios.index(0.0)
        self._overheads: dict[Filters, float] = {}
        self._logs: dict[tuple[int, ...], np.ndarray] = {}
        empty = self.overhead([])
        self._room = max(problem.limit - empty, 0.0)
        # _ways[i][b]: log of how many sequences of the layers from i on take b steps of the limit, or fewer.
        self._ways = [np.zeros(self.STEPS + 1)]
        for i in reversed(range(len(problem.widths))):
            behind, ways = self._ways[0], np.full(self.STEPS + 1, -np.inf)
            for a in range(len(problem.ratios)):
                taken = self._steps(self.overhead([*[self._none] * i, a]) - empty)
                if taken <= self.STEPS:
                    ways[taken:] = np.logaddexp(ways[taken:], behind[: self.STEPS + 1 - taken])
            self._ways.insert(0, ways)

    def _steps(self, overhead: float) -> int:
        if overhead <= 0:
            return 0
        return self.STEPS + 1 if overhead >= 2 * self._room else round(overhead / self._room * self.STEPS)

    def overhead(self, prefix: Sequence[int]) -> float:
        """Of a sequence that begins with `prefix` and compensates no layer behind it."""
        filters = self.problem.filters([*prefix, *[self._none] * (len(self.problem.widths) - len(prefix))])
        if filters not in self._overheads:
            self._overheads[filters] = self.problem.overhead(filters)
        return self._overheads[filters]

    def log_probabilities(self, prefix: Sequence[int]) -> np.ndarray:
        """(ratios,) float64: of the next action behind `prefix`, for uniform sequences; -inf where it does not fit.

        If none fits, not even no compensation, that one is certain.
        """
        key = tuple(prefix)
        if key not in self._logs:
            ways = np.full(len(self.problem.ratios), -np.inf)
            for a in range(len(ways)):
                left = self.problem.limit - self.overhead([*key, a])
                if left >= 0:
                    ways[a] = max(0.0, self._ways[len(key) + 1][min(self._steps(left), self.STEPS)])
            if ways.max() == -np.inf:
                ways[self._none] = 0.0
            self._logs[key] = ways - np.logaddexp.reduce(ways)
        return self._logs[key]

    def offer(self, prefixes: Tensor) -> Tensor:
        """(rows, ratios) float32: `log_probabilities` of each row of (rows, i) actions, -1e9 for -inf."""
        found = np.array([self.log_probabilities(row) for row in prefixes.tolist()])
        return torch.from_numpy(np.maximum(found, -1e9)).float()


@dataclass(frozen=True)
class Explored:
    """One explored state; `mean` and `std` are None where the overhead was above the limit."""

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


def reward(mean: float | None, std: float | None, overhead: float, limit: float) -> float:
    """(12) of the paper; accuracies and overhead are fractions."""
    if overhead > limit or mean is None or std is None:
        return -overhead
    return mean - std - overhead


class Pending(Exception):
    """A search cannot go on before others have trained `states`."""

    def __init__(self, states: Sequence[Filters]):
        super().__init__(f"{len(states)} states have to be trained first")
        self.states = tuple(states)


class Log:
    """Every explored state, rewritten as a CSV (atomically) after each; what an earlier run left there is reused.

    `known`: states that were scored elsewhere.
    """

    def __init__(self, problem: Problem, path: Path | None = None, known: Iterable[Explored] = ()):
        self.problem, self.path = problem, path
        self.states: dict[Filters, Explored] = {}
        self.known = {s.filters: s for s in known}
        self.known |= {s.filters: s for s in storage.resume(path, read_log, [])}

    @property
    def evaluations(self) -> int:
        """States that were trained and evaluated. The one without compensation trains nothing, and is not counted."""
        return sum(s.mean is not None and any(s.filters) for s in self.states.values())

    def new(self, states: Iterable[Filters]) -> list[Filters]:
        """Those within the limit that were not explored, each once."""
        limit = self.problem.limit
        return [f for f in dict.fromkeys(states) if f not in self.states and self.problem.overhead(f) <= limit]

    def explore_all(self, states: Sequence[Filters], episode: int) -> None:
        """Explore states that are new. Raises Pending where others have to train some of them first."""
        missing = [f for f in states if f not in self.known]
        if missing and self.problem.score is None:
            raise Pending(missing)
        for filters in states:
            self.explore(filters, episode)

    def explore(self, filters: Filters, episode: int) -> Explored:
        """The state's accuracy and reward, from memory, from an earlier run's log, or by training it."""
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
        value = reward(mean, std, overhead, self.problem.limit)
        number = self.evaluations + (fits and any(filters))
        self.states[filters] = Explored(number, episode, filters, overhead, mean, std, value, seconds)
        if self.path is not None and (fits or filters not in self.known):
            self.write(self.path)
        return self.states[filters]

    def write(self, path: Path) -> None:
        """Write the log. States of an earlier run that the replay has not reached yet are kept."""
        ahead = [s for f, s in self.known.items() if f not in self.states]
        storage.write_csv(path, self.table(ahead))

    def table(self, ahead: Iterable[Explored] = ()) -> pd.DataFrame:
        """The states in the order in which they were explored, and those `ahead` behind them, a row each."""
        rows = [s.row(self.problem.widths) for s in [*self.states.values(), *ahead]]
        return pd.DataFrame(rows, columns=COLUMNS)

    def best(self) -> Explored:
        """The state within the limit with the best mean accuracy; of equals the one of less overhead."""
        scored = [s for s in self.states.values() if s.mean is not None]
        return scored[best_state([s.mean for s in scored], [s.overhead for s in scored])]


def read_log(path: Path) -> list[Explored]:
    """The states in a log. Raises UserError where it is not one."""
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
        raise UserError(f"{path}: not a search log ({one_line(error)}); delete it to begin anew") from error


class Policy(nn.Module):
    """An LSTM that emits one action a candidate layer, given the action before and which layer it is.

    Its input at step i is the one-hot of A_{i-1} (none at i = 1) and the one-hot of i; its output, through a linear
    layer, what is added to the log-probabilities that `Room` offers, to be the logits.
    """

    def __init__(self, layers: int, actions: int, hidden: int = 32):
        super().__init__()
        self.layers, self.actions = layers, actions
        self.cell = nn.LSTMCell(actions + layers, hidden)
        self.head = nn.Linear(hidden, actions)
        nn.init.zeros_(self.head.weight)  # what is offered decides alone at the start
        nn.init.zeros_(self.head.bias)

    def forward(
        self, offered: Callable[[Tensor], Tensor], generator: torch.Generator, rollouts: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw `rollouts` sequences: actions (rollouts, n) int64, log-probabilities and entropies (rollouts,).

        `offered` gives the log-probabilities (rollouts, ratios) to start from of the next actions, given those so far
        (rollouts, i).
        """
        state = None
        before = torch.zeros(rollouts, self.actions)
        drawn = torch.zeros(rollouts, 0, dtype=torch.int64)
        logs, entropy = torch.zeros(rollouts), torch.zeros(rollouts)
        for i in range(self.layers):
            where = torch.zeros(rollouts, self.layers)
            where[:, i] = 1
            state = self.cell(torch.cat([before, where], dim=1), state)
            log_p = (self.head(state[0]) + offered(drawn)).log_softmax(1)
            action = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
            logs = logs + log_p.gather(1, action).squeeze(1)
            entropy = entropy - (log_p.exp() * log_p).sum(1)
            before = torch.zeros(rollouts, self.actions).scatter_(1, action, 1.0)
            drawn = torch.cat([drawn, action], dim=1)
        return drawn, logs, entropy


def _draw(
    problem: Problem, policy: Policy, room: Room, generator: torch.Generator, settings: Any, log: Log
) -> tuple[list[Filters], Tensor, Tensor]:
    """The states of an episode, their sequences' log-probabilities and entropies.

    `rollouts` sequences; with a population sequence after sequence until they hold so many new states, at most fifty
    times `rollouts`.
    """
    found: list[Filters] = []
    parts: list[tuple[Tensor, Tensor]] = []
    for _ in range(50 if settings.population else 1):
        actions, *part = policy(room.offer, generator, settings.rollouts)
        found += [problem.filters(sequence) for sequence in actions.tolist()]
        parts.append(tuple(part))
        new = log.new(found)
        if settings.population and len(new) >= settings.population:
            found = found[: found.index(new[settings.population - 1]) + 1]
            break
    logs, entropies = (torch.cat(part)[: len(found)] for part in zip(*parts, strict=True))
    return found, logs, entropies


def reinforce(problem: Problem, settings: Any, seed: int, log: Log) -> Iterator[int]:
    """REINFORCE until `settings.evaluations` states are trained or `settings.episodes` episodes are over.

    With a population it also ends with an episode that finds no new state.
    An episode draws sequences from the policy, looks up or trains their states, and makes one step of Adam. Yields the
    number of evaluations after each episode.
    """
    with global_generators(seed, "policy", float(problem.limit)):
        policy = Policy(len(problem.widths), len(problem.ratios))
    generator = torch_generator(seed, "actions", float(problem.limit))
    optimizer = torch.optim.Adam(policy.parameters(), lr=settings.learning_rate)
    room = Room(problem)
    baseline: float | None = None
    for episode in range(1, settings.episodes + 1):
        states, logs, entropy = _draw(problem, policy, room, generator, settings, log)
        new, left = log.new(states), settings.evaluations - log.evaluations
        if settings.population and (not new or episode > search_rounds(settings)):
            return
        log.explore_all(new[:left], episode)
        if len(new) > left:
            return
        r = torch.tensor([log.explore(filters, episode).reward for filters in states])
        baseline = r.mean().item() if baseline is None else baseline
        # Of all states so far, not of this episode's: where those are all alike, what is left is the noise.
        spread = np.std([state.reward for state in log.states.values()])
        advantage = (r - baseline) / float(spread or 1.0)
        loss = -(advantage * logs).mean() - settings.entropy * entropy.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        baseline = settings.baseline * baseline + (1 - settings.baseline) * r.mean().item()
        yield log.evaluations


def random_search(problem: Problem, settings: Any, seed: int, log: Log) -> Iterator[int]:
    """`settings.evaluations` different states within the limit, drawn uniformly; the rival of `reinforce`."""
    rng = numpy_generator(seed, "random-search", float(problem.limit))
    room, layers = Room(problem), len(problem.widths)
    misses = 0
    # States that repeat cost nothing; a thousand in a row and hardly any can be left.
    while log.evaluations < settings.evaluations and misses < 1000:
        together = min(settings.population or 1, settings.evaluations - log.evaluations)
        states: list[Filters] = []
        while len(states) < together and misses < 1000:
            actions: list[int] = []
            while len(actions) < layers:
                probabilities = np.exp(room.log_probabilities(actions))
                actions.append(int(rng.choice(len(probabilities), p=probabilities / probabilities.sum())))
            filters = problem.filters(actions)
            fresh = filters not in states and log.new([filters])
            misses = 0 if fresh else misses + 1
            states += [filters] if fresh else []
        log.explore_all(states, log.evaluations + 1)
        yield log.evaluations


def greedy(problem: Problem) -> Filters:
    """No search: the candidates from the first one on, each with the largest ratio that keeps within the limit."""
    chosen = [problem.ratios.index(0.0)] * len(problem.widths)
    by_size = sorted(range(len(problem.ratios)), key=lambda a: -problem.ratios[a])
    for i in range(len(chosen)):
        for action in by_size:
            chosen[i] = action
            if problem.overhead(problem.filters(chosen)) <= problem.limit:
                break
    return problem.filters(chosen)


def search(
    problem: Problem,
    settings: Any,
    seed: int,
    log_path: Path | None = None,
    progress: bool = True,
    known: Iterable[Explored] = (),
) -> Log:
    """Explore states and give the log of all of them; `.best()` is the result.

    The state without compensation is always explored first: it is the least that a compensator must beat. It trains
    nothing, and is not one of `settings.evaluations`.

    Args:
        problem: what is searched.
        settings: a `correctnet.settings.Search` section; `strategy` "reinforce" or "random".
        seed: of the policy and its draws.
        log_path: CSV to write as the search goes; if it exists, the search is resumed from it.
        progress: show a progress bar.
        known: states that were scored elsewhere.

    Raises:
        Pending: `problem.score` is None, and a state is needed that is not known.
        ValueError: not even the state without compensation is within the limit.
    """
    log = Log(problem, log_path, known)
    none = (0,) * len(problem.widths)
    if not problem.overhead(none) <= problem.limit:
        raise ValueError(f"no state is within the limit of {problem.limit}, not even the one without compensation")
    log.explore(none, 0)
    strategy = {"reinforce": reinforce, "random": random_search}[settings.strategy]
    with tqdm(total=settings.evaluations, desc="search", unit="state", disable=not progress) as bar:
        if problem.widths:
            for done in strategy(problem, settings, seed, log):
                bar.update(done - bar.n)
                bar.set_postfix_str(f"best {log.best().mean:.4f}", refresh=False)
    return log
