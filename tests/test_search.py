import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import search_budgets
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis_profile import examples

from correctnet.crossbar.layers import crossbar_layers
from correctnet.errors import UserError
from correctnet.methods import compensation
from correctnet.methods import search as searching
from correctnet.methods.search import search
from correctnet.methods.search_log import Explored, Log, Pending, Problem, read_log, reward
from correctnet.methods.search_policy import Policy, Room
from correctnet.networks.blocks import parameter_count
from correctnet.networks.vgg import vgg16
from correctnet.settings import Search, search_rounds

WIDTHS = (64, 64, 128, 128, 256, 256)
RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
# What one filter of a layer costs and what compensating it fully brings: the early layers matter, as in the paper.
GAIN = np.array([0.20, 0.16, 0.10, 0.05, 0.01, 0.01])


def settings(**changes):
    return Search(**changes)


def synthetic(limit=0.02, calls=None):
    """A search with a known optimum: accuracy saturates in S, overhead grows with filters x width."""

    def overhead(filters):
        return sum(m * n for m, n in zip(filters, WIDTHS, strict=True)) / 3e6

    def score(filters):
        if calls is not None:
            calls.append(filters)
        s = np.array(filters) / np.array(WIDTHS)
        return 0.45 + float((GAIN * (1 - (1 - s) ** 3)).sum()), 0.01

    return Problem(WIDTHS, RATIOS, limit, overhead, score)


def optimum(problem):
    """The best mean over all 5^6 states, by brute force."""
    states = np.stack(np.meshgrid(*[range(5)] * 6, indexing="ij"), -1).reshape(-1, 6)
    fitting = (problem.filters(a) for a in states.tolist())
    return max(problem.score(f)[0] for f in fitting if problem.overhead(f) <= problem.limit)


@pytest.mark.parametrize(
    ("mean", "std", "overhead", "expected"),
    [(0.67, 0.01, 0.02, 0.64), (0.67, 0.01, 0.03, 0.63), (None, None, 0.031, -0.031), (0.9, 0.0, 0.5, -0.5)],
)
def test_reward_is_equation_12(mean, std, overhead, expected):
    assert reward(mean, std, overhead, limit=0.03) == pytest.approx(expected)


@pytest.mark.parametrize("evaluations", [12, 24, pytest.param(150, marks=pytest.mark.slow)])
def test_reinforce_is_not_worse_than_random_search_and_better_with_more_than_a_few_evaluations(evaluations):
    differences = search_budgets.differences("six layers", 0.002, evaluations, seeds=40)
    mean, low, high = search_budgets.interval(differences)
    assert (high if evaluations == 12 else low) > 0, f"{mean:.4f} ({low:.4f} to {high:.4f})"


def test_reinforce_finds_the_known_optimum():
    wanted = settings(evaluations=150)
    found = [search(synthetic(), wanted, seed, progress=False).best().mean for seed in range(3)]
    top = optimum(synthetic())
    assert max(found) > top - 0.005
    assert min(found) > top - 0.02


def test_the_policy_learns(monkeypatch):
    # The states that it draws late are far better than those that it draws first; all of them fit.
    drawn = []
    explore = Log.explore

    def recording(log, filters, episode):
        drawn.append(explore(log, filters, episode).reward)
        return explore(log, filters, episode)

    monkeypatch.setattr(Log, "explore", recording)
    search(synthetic(), settings(evaluations=10**6, episodes=100, rollouts=8), 0, progress=False)
    assert np.mean(drawn[-80:]) > np.mean(drawn[:80]) + 0.08


def test_what_does_not_fit_is_never_drawn_and_nothing_is_trained_twice():
    calls = []
    problem = synthetic(limit=0.005, calls=calls)
    log = search(problem, settings(evaluations=40, episodes=100, rollouts=8), 0, progress=False)
    assert len(calls) == len(set(calls)) == len(log.states)
    assert all(problem.overhead(f) <= 0.005 for f in calls)
    assert calls[0] == (0,) * 6
    assert log.evaluations == 40 == len(calls) - 1


@pytest.mark.parametrize("strategy", ["reinforce", "random"])
@pytest.mark.parametrize("population", [None, 2])
def test_the_state_that_trains_nothing_is_not_counted(strategy, population):
    calls = []
    wanted = settings(strategy=strategy, evaluations=10, population=population)
    log = search(synthetic(calls=calls), wanted, 0, progress=False)
    trained = [f for f in calls if any(f)]
    assert len(trained) == log.evaluations == 10
    assert len(calls) == 11
    assert [s.evaluation for s in log.states.values()] == list(range(11))


def test_a_limit_that_not_even_no_compensation_keeps():
    problem = Problem((2, 2), (0.0, 0.5), 0.05, lambda f: 0.1 + sum(f), lambda f: (0.5, 0.0))
    with pytest.raises(ValueError, match=r"no state is within the limit of 0\.05"):
        search(problem, settings(), 0, progress=False)


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.lists(st.floats(0.01, 2.0), min_size=1, max_size=4, unique=True),
    st.floats(0.0, 1.5),
    st.integers(0, 2**32 - 1),
)
@example([1, 1], [0.5], 0.0, 0)
@examples(25)
def test_every_sequence_that_is_drawn_fits(widths, ratios, limit, seed):
    # Whatever the overhead of the other states is: here it is no sum over the layers.
    def overhead(filters):
        return (hash((filters, seed)) % 1000) / 1000 if any(filters) else 0.0

    problem = Problem(tuple(widths), (*ratios, 0.0), limit, overhead, lambda f: (0.5 + overhead(f), 0.0))
    policy = Policy(len(widths), len(ratios) + 1)
    torch.nn.init.normal_(policy.head.weight, std=10.0)
    generator = torch.Generator().manual_seed(seed)
    actions, logs, _ = policy(Room(problem).offer, generator, 20)
    assert all(problem.overhead(problem.filters(row)) <= limit for row in actions.tolist())
    assert torch.isfinite(logs).all()
    for strategy in ("reinforce", "random"):
        log = search(problem, settings(strategy=strategy, evaluations=3, episodes=2), seed, progress=False)
        assert all(s.overhead <= limit for s in log.states.values())


@given(
    st.lists(st.lists(st.integers(0, 64), min_size=2, max_size=2), min_size=1, max_size=4),
    st.data(),
)
def test_the_actions_of_uniform_sequences(costs, data):
    # Sixty-fourths of the limit are whole steps, so that the counts are exact.
    n = len(costs)
    table = [{0: 0, 2: a, 4: b} for a, b in costs]
    problem = Problem(
        (4,) * n, (0.5, 0.0, 1.0), 1.0, lambda f: sum(t[m] for t, m in zip(table, f, strict=True)) / 64, None
    )
    room = Room(problem)
    prefix = data.draw(st.lists(st.integers(0, 2), max_size=n - 1))
    sequences = itertools.product(range(3), repeat=n)
    fitting = [s for s in sequences if problem.overhead(problem.filters(s)) <= 1.0]
    expected = [sum(s[: len(prefix) + 1] == (*prefix, a) for s in fitting) for a in range(3)]
    if any(expected):
        assert np.exp(room.log_probabilities(prefix)) == pytest.approx(np.array(expected) / sum(expected))
    else:  # nothing fits behind so much
        assert room.log_probabilities(prefix).tolist() == [-np.inf, 0.0, -np.inf]


def small():
    """A problem of 27 states, of which some do not fit."""
    widths = (64, 64, 128)
    overhead = search_budgets.quadratic(widths)
    return Problem(widths, (0.0, 0.5, 1.0), 0.004, overhead, lambda filters: (0.5, 0.0))


def chi_square(problem, drawn, without=()):
    """How likely counts so uneven are where every state that fits is equally likely."""
    states = map(problem.filters, itertools.product(range(3), repeat=3))
    fitting = [f for f in states if problem.overhead(f) <= problem.limit and f not in without]
    assert 10 < len(fitting) < 26
    assert set(drawn) <= set(fitting)
    return scipy.stats.chisquare([drawn.count(f) for f in fitting]).pvalue


def test_the_start_is_uniform_over_the_sequences_that_fit():
    problem = small()
    room = Room(problem)
    actions, _, _ = Policy(3, 3)(room.offer, torch.Generator().manual_seed(0), 8000)
    assert chi_square(problem, [problem.filters(row) for row in actions.tolist()]) > 1e-3


def test_random_search_draws_uniformly():
    problem, first = small(), []
    for seed in range(1500):
        log = search(problem, settings(strategy="random", evaluations=1), seed, progress=False)
        first += [f for f in log.states if any(f)]  # the state without compensation is there already
    assert len(first) == 1500
    assert chi_square(problem, first, without=[(0, 0, 0)]) > 1e-3


@pytest.mark.parametrize("strategy", ["reinforce", "random"])
def test_searches_within_different_limits_draw_different_states(strategy):
    # Both limits have room for everything, so that the streams alone can differ.
    wanted = settings(strategy=strategy, evaluations=8)
    one, two = (list(search(synthetic(limit), wanted, 0, progress=False).states) for limit in (0.9, 1.0))
    assert one[0] == two[0]
    assert one[1:] != two[1:]


def test_a_population_ends_where_it_is_complete():
    # What is drawn behind the last of its new states is left out, known or new, so that no kind of state is preferred.
    problem, wanted = synthetic(), settings(population=5, rollouts=4)
    torch.manual_seed(0)
    policy, room = Policy(6, 5), Room(problem)
    log = Log(problem)
    log.explore((0,) * 6, 0)
    states, logs, entropies = searching.draw(problem, policy, room, torch.Generator().manual_seed(1), wanted, log)
    again = torch.Generator().manual_seed(1)
    drawn = [policy(room.offer, again, 4) for _ in range(4)]
    sequences = torch.cat([actions for actions, _, _ in drawn])
    assert states == [problem.filters(row) for row in sequences.tolist()][: len(states)]
    assert torch.equal(logs, torch.cat([part for _, part, _ in drawn])[: len(states)])
    assert len(entropies) == len(states)
    assert len(log.new(states)) == 5
    assert len(log.new(states[:-1])) == 4


def test_states_that_round_to_the_same_filters_are_one():
    calls = []

    def score(filters):
        calls.append(filters)
        return 0.5, 0.0

    problem = Problem((2, 2), (0.0, 0.4, 0.5, 0.6), 1.0, lambda f: sum(f) / 100, score)
    search(problem, settings(evaluations=50, episodes=50), 0, progress=False)
    assert sorted(calls) == [(0, 0), (0, 1), (1, 0), (1, 1)]


class Killed(Exception):
    pass


@pytest.mark.parametrize("strategy", ["reinforce", "random"])
@pytest.mark.parametrize("after", [1, 5, 12])
def test_a_killed_search_resumes_from_its_log(tmp_path, strategy, after):
    wanted = settings(strategy=strategy, evaluations=15, episodes=40)
    whole = search(synthetic(), wanted, 7, tmp_path / "whole.csv", progress=False)

    calls = []
    problem = synthetic(calls=calls)

    def dying(filters):
        if len(calls) == after:
            raise Killed
        return problem.score(filters)

    killed = Problem(problem.widths, problem.ratios, problem.limit, problem.overhead, dying)
    with pytest.raises(Killed):
        search(killed, wanted, 7, tmp_path / "log.csv", progress=False)
    again = []
    resumed = search(synthetic(calls=again), wanted, 7, tmp_path / "log.csv", progress=False)
    assert len(calls) + len(again) == 16, "evaluations are not done again"
    assert not set(calls) & set(again)
    assert resumed.best().filters == whole.best().filters
    columns = [c for c in searching.COLUMNS if c != "seconds"]
    logs = [pd.read_csv(tmp_path / name)[columns] for name in ("log.csv", "whole.csv")]
    pd.testing.assert_frame_equal(*logs)


@pytest.mark.parametrize("strategy", ["reinforce", "random"])
@pytest.mark.parametrize("population", [1, 3, 5])
def test_a_search_in_populations_is_the_same_whoever_trains_them(strategy, population):
    wanted = settings(strategy=strategy, evaluations=14, population=population)
    alone = search(synthetic(), wanted, 7, progress=False)
    assert alone.evaluations == 14

    problem, known, populations = synthetic(), [], []
    while True:
        try:
            log = search(replace(problem, score=None), wanted, 7, progress=False, known=known)
        except Pending as pending:
            populations.append(len(pending.states))
            known += [Explored(0, 0, f, 0.0, *problem.score(f), 0.0, 0.0) for f in pending.states]
        else:
            break
    columns = [c for c in searching.COLUMNS if c != "seconds"]
    tables = [pd.DataFrame([s.row(WIDTHS) for s in found.states.values()])[columns] for found in (log, alone)]
    pd.testing.assert_frame_equal(*tables)
    first, *others = populations
    assert first == 1, "the state without compensation"
    assert len(others) == search_rounds(wanted) == -(-14 // population)
    assert all(n == population for n in others[:-1])


def test_a_population_larger_than_what_fits_ends_with_what_there_is():
    problem = Problem((2, 2), (0.0, 0.5), 1.0, lambda f: sum(f) / 100, lambda f: (0.5, 0.0))
    for strategy in ("reinforce", "random"):
        log = search(problem, settings(strategy=strategy, evaluations=50, population=8), 0, progress=False)
        assert log.evaluations == 3


def test_log_columns(tmp_path):
    search(synthetic(), settings(evaluations=5), 0, tmp_path / "log.csv", progress=False)
    log = pd.read_csv(tmp_path / "log.csv")
    assert list(log.columns) == searching.COLUMNS
    first = log.iloc[0]
    assert (first["filters"], first["layers"], first["overhead"]) == ("0 0 0 0 0 0", 0, 0.0)
    trained = log.dropna(subset=["mean"])
    expected = trained["mean"] - trained["std"] - trained["overhead"]
    assert np.allclose(trained["reward"], expected)


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "evaluation,episode\n1,1\n"])
def test_a_damaged_log_is_named(tmp_path, text):
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(UserError, match=r"log\.csv: not a search log"):
        read_log(tmp_path / "log.csv")


def test_no_candidates_is_a_result():
    problem = Problem((), RATIOS, 0.01, lambda f: 0.0, lambda f: (0.9, 0.01))
    best = search(problem, settings(), 0, progress=False).best()
    assert (best.filters, best.mean) == ((), 0.9)


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 6))
def test_log_probabilities_are_those_of_the_drawn_sequences(seed, layers, rollouts):
    torch.manual_seed(0)
    policy = Policy(layers, 3)
    torch.nn.init.normal_(policy.head.weight)

    def offered(before):
        weights = torch.ones(len(before), 3)
        weights[:, 0] = 1 + before.sum(1)  # depends on the actions so far
        weights[:, 1] *= before.shape[1] > 0  # action 1 is not offered first
        return weights.log().clamp_min(-1e9)

    actions, logs, entropy = policy(offered, torch.Generator().manual_seed(seed), rollouts)
    assert actions.shape == (rollouts, layers)
    assert (actions[:, 0] != 1).all(), "an action that is not offered is never drawn"
    assert ((entropy >= 0) & (entropy <= layers * np.log(3) + 1e-4)).all()
    # Every sequence's probability, by walking the LSTM by hand.
    for row, log in zip(actions, logs, strict=True):
        state, before, total = None, torch.zeros(1, 3), 0.0
        for i, action in enumerate(row):
            where = torch.zeros(1, layers)
            where[0, i] = 1
            state = policy.cell(torch.cat([before, where], 1), state)
            weights = torch.tensor([1.0 + sum(row[:i].tolist()), float(i > 0), 1.0])
            p = weights * policy.head(state[0])[0].exp()
            p = p / p.sum()
            total += p[action].log().item()
            before = torch.nn.functional.one_hot(action, 3).float()[None]
        assert log.item() == pytest.approx(total, abs=1e-4)


def test_greedy_takes_the_first_layers_as_far_as_the_limit_goes():
    # VGG16 for 100 classes, counted by hand from Fig. 5: generator (in + out) m + m, compensator (out + m) out + out
    # parameters. Five convolutions in full are 382,400 of 15,038,116; a sixth and the wide ones behind it take more
    # than is left of 3 %, and the last layer has room for 0.75: 75 filters.
    network = vgg16(100)
    layers = dict(crossbar_layers(network))
    widths = tuple(layer.weight.shape[0] for layer in layers.values())
    problem = Problem(
        widths, RATIOS, 0.03, lambda f: compensation.overhead(network, dict(zip(layers, f, strict=True))), None
    )
    first = sum((i + o) * o + o + (o + o) * o + o for i, o in ((3, 64), (64, 64), (64, 128), (128, 128), (128, 256)))
    last = 612 * 75 + 75 + 175 * 100 + 100
    filters = searching.greedy(problem)
    assert filters == (64, 64, 128, 128, 256, *[0] * 9, 75)
    assert problem.overhead(filters) == pytest.approx((first + last) / parameter_count(network))


@given(limit=st.floats(0.0, 0.1))
def test_greedy_keeps_the_limit_and_leaves_no_room(limit):
    problem = synthetic(limit)
    filters = searching.greedy(problem)
    assert problem.overhead(filters) <= limit
    for i, n in enumerate(WIDTHS):  # nothing larger fits where the layers before it are as they are, and none behind it
        for ratio in RATIOS:
            larger = (*filters[:i], round(ratio * n), *[0] * (len(WIDTHS) - i - 1))
            assert larger[i] <= filters[i] or problem.overhead(larger) > limit


def test_greedy_without_candidates():
    assert searching.greedy(Problem((), RATIOS, 0.03, lambda f: 0.0, None)) == ()
