"""The reinforcement-learning search for where to compensate and with how many filters (Fig. 6, (12) of the paper).

The state is S_1..S_n, S_i = generator filters / filters of the i-th candidate layer, 0 for no compensation. An LSTM
policy emits the n actions one after the other, each a choice among the `ratios` that still fit the limit, and REINFORCE
raises the probability of sequences whose reward exceeds a moving average of the rewards:

    R = acc_avg - acc_std - overhead   if overhead <= limit        (12)
        -overhead                      otherwise, and nothing is trained

    grad J = E[ (R - baseline) / spread grad log pi(A_1..A_n) ] + entropy_weight * grad H(pi)

where spread is the standard deviation of the rewards of all states so far. For metrics other than the accuracy, R is
that of `correctnet.methods.search_log.reward`. Two measures make REINFORCE at least as good as random search
(docs/settings.md). Sequences over the limit are not drawn: (12) falls by more than half a unit there,
and a policy that learns from such rewards retreats to states that cost nothing. And the policy starts as the uniform
distribution over the sequences that fit, in whatever order the layers come (`Room`): its first draws are those of a
random search.

A search is a function of its seed and of the accuracies. It is resumed by replaying it, with the accuracies of explored
states read from the log. Its states can therefore be scored by other processes, a population at a time: replaying the
search tells which states come next (`Pending`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from correctnet.methods.search_log import COLUMNS, Explored, Filters, Log, Pending, Problem
from correctnet.methods.search_policy import Policy, Room
from correctnet.noise.streams import global_generators, numpy_generator, torch_generator
from correctnet.progress import ProgressBar
from correctnet.settings import Search, search_rounds

__all__ = ["COLUMNS", "Explored", "Filters", "Log", "Pending", "Problem", "greedy", "search"]

DRAWS = 50
"""times `rollouts` sequences drawn for a population, at most"""
MISSES = 1000
"""states drawn in a row that are known already, after which random search ends: hardly any other can be left"""


def draw(
    problem: Problem, policy: Policy, room: Room, generator: torch.Generator, settings: Search, log: Log
) -> tuple[list[Filters], Tensor, Tensor]:
    """Draw the states of an episode: (states, log-probabilities, entropies) of their sequences.

    Without a population these are `settings.rollouts` sequences. With one, sequences are drawn until they hold
    `settings.population` new states, but at most `DRAWS` times `rollouts`.
    """
    found: list[Filters] = []
    parts: list[tuple[Tensor, Tensor]] = []
    for _ in range(DRAWS if settings.population else 1):
        actions, *part = policy(room.offer, generator, settings.rollouts)
        found += [problem.filters(sequence) for sequence in actions.tolist()]
        parts.append(tuple(part))
        new = log.new(found)
        if settings.population and len(new) >= settings.population:
            found = found[: found.index(new[settings.population - 1]) + 1]
            break
    logs, entropies = (torch.cat(part)[: len(found)] for part in zip(*parts, strict=True))
    return found, logs, entropies


def reinforce(problem: Problem, settings: Search, seed: int, log: Log) -> Iterator[int]:
    """REINFORCE until `settings.evaluations` states are trained or `settings.episodes` episodes are over.

    An episode draws sequences from the policy, looks up or trains their states, and makes one step of Adam. With a
    population the search also ends after an episode without a new state. Yields the number of evaluations after each
    episode.
    """
    with global_generators(seed, "policy", float(problem.limit)):
        policy = Policy(len(problem.widths), len(problem.ratios))
    generator = torch_generator(seed, "actions", float(problem.limit))
    optimizer = torch.optim.Adam(policy.parameters(), lr=settings.learning_rate)
    room = Room(problem)
    baseline: float | None = None
    for episode in range(1, settings.episodes + 1):
        states, logs, entropy = draw(problem, policy, room, generator, settings, log)
        new, left = log.new(states), settings.evaluations - log.evaluations
        if settings.population and (not new or episode > search_rounds(settings)):
            return
        log.explore_all(new[:left], episode)
        if len(new) > left:
            return
        r = torch.tensor([log.explore(filters, episode).reward for filters in states])
        baseline = r.mean().item() if baseline is None else baseline
        # Over all states so far: those of one episode may be so alike that their spread is noise of the scores.
        spread = np.std([state.reward for state in log.states.values()])
        advantage = (r - baseline) / float(spread or 1.0)
        loss = -(advantage * logs).mean() - settings.entropy * entropy.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        baseline = settings.baseline * baseline + (1 - settings.baseline) * r.mean().item()
        yield log.evaluations


def random_search(problem: Problem, settings: Search, seed: int, log: Log) -> Iterator[int]:
    """`settings.evaluations` distinct states within the limit, drawn uniformly; the baseline of `reinforce`."""
    rng = numpy_generator(seed, "random-search", float(problem.limit))
    room, layers = Room(problem), len(problem.widths)
    misses = 0
    while log.evaluations < settings.evaluations and misses < MISSES:
        together = min(settings.population or 1, settings.evaluations - log.evaluations)
        states: list[Filters] = []
        while len(states) < together and misses < MISSES:
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
    """A state without a search: each candidate in turn, first layer first, gets the largest ratio within the limit."""
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
    settings: Search,
    seed: int,
    log_path: Path | None = None,
    progress: bool = True,
    known: Iterable[Explored] = (),
) -> Log:
    """Explore states and return the log of all of them; `.best()` is the result.

    The state without compensation is always explored first: compensation must beat it. It trains nothing, and does not
    count as one of `settings.evaluations`.

    Args:
        problem: the search problem.
        settings: the section `search`; its `strategy` is "reinforce" or "random".
        seed: of the policy and its draws.
        log_path: CSV file that is rewritten during the search; if it exists, the search is resumed from it.
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
    with ProgressBar(total=settings.evaluations, desc="search", unit="state", disable=not progress) as bar:
        if problem.widths:
            for done in strategy(problem, settings, seed, log):
                bar.update(done - bar.n)
                bar.set_postfix_str(f"best {log.best().mean:.4f}", refresh=False)
    return log
