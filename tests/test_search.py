from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from correctnet import compensation, models
from correctnet import search as searching
from correctnet.analog import crossbar_layers
from correctnet.config import Search, search_rounds
from correctnet.errors import UserError
from correctnet.search import Explored, Log, Pending, Policy, Problem, read_log, reward, search

WIDTHS = (64, 64, 128, 128, 256, 256)
RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
# What one filter of a layer costs and what compensating it fully brings: the early layers matter, as in the paper.
GAIN = np.array([0.20, 0.16, 0.10, 0.05, 0.01, 0.01])


def settings(**changes):
    return SimpleNamespace(**{**Search().model_dump(), **changes})


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


def test_reinforce_finds_the_known_optimum_and_does_better_than_chance():
    best = {"reinforce": [], "random": []}
    for seed in range(3):
        for strategy, found in best.items():
            problem = synthetic()
            wanted = settings(strategy=strategy, evaluations=150, episodes=400, rollouts=8)
            log = search(problem, wanted, seed, progress=False)
            assert log.evaluations <= 150
            found.append(log.best().mean)
    top = optimum(synthetic())
    assert max(best["reinforce"]) > top - 0.005
    assert np.mean(best["reinforce"]) > np.mean(best["random"])


def test_the_policy_learns(monkeypatch):
    # The states that it draws late are far better than those that it draws first.
    drawn = []
    explore = Log.explore

    def recording(log, filters, episode):
        drawn.append(explore(log, filters, episode).reward)
        return explore(log, filters, episode)

    monkeypatch.setattr(Log, "explore", recording)
    search(synthetic(), settings(evaluations=10**6, episodes=100, rollouts=8), 0, progress=False)
    assert np.mean(drawn[-80:]) > np.mean(drawn[:80]) + 0.15


def test_what_does_not_fit_is_never_trained_and_nothing_is_trained_twice():
    calls = []
    problem = synthetic(limit=0.005, calls=calls)
    log = search(problem, settings(evaluations=40, episodes=100, rollouts=8), 0, progress=False)
    assert len(calls) == len(set(calls)) == log.evaluations == 40
    assert all(problem.overhead(f) <= 0.005 for f in calls)
    above = [s for s in log.states.values() if s.overhead > 0.005]
    assert above
    assert all(s.mean is None and s.reward == -s.overhead for s in above)


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
    assert len(calls) + len(again) == 15, "evaluations are not done again"
    assert not set(calls) & set(again)
    assert resumed.best() == pytest.approx(whole.best()) or resumed.best().filters == whole.best().filters
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
    assert len(others) == search_rounds(wanted) == -(-13 // population)
    assert all(n == population for n in others[:-1])


def test_a_population_larger_than_what_fits_ends_with_what_there_is():
    problem = Problem((2, 2), (0.0, 0.5), 1.0, lambda f: sum(f) / 100, lambda f: (0.5, 0.0))
    for strategy in ("reinforce", "random"):
        log = search(problem, settings(strategy=strategy, evaluations=50, population=8), 0, progress=False)
        assert log.evaluations == 4


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
    offered = torch.ones(layers, 3, dtype=torch.bool)
    offered[0, 1] = False
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
            p = policy.head(state[0])[0].masked_fill(~offered[i], -torch.inf).softmax(0)
            total += p[action].log().item()
            before = torch.nn.functional.one_hot(action, 3).float()[None]
        assert log.item() == pytest.approx(total, abs=1e-4)


def test_the_start_is_uniform_over_the_offered_actions():
    policy = Policy(2, 4)
    offered = torch.tensor([[True, True, True, True], [True, False, False, True]])
    actions, _, _ = policy(offered, torch.Generator().manual_seed(0), 4000)
    shares = [torch.bincount(actions[:, i], minlength=4) / 4000 for i in range(2)]
    assert torch.allclose(shares[0], torch.full((4,), 0.25), atol=0.04)
    assert torch.allclose(shares[1], torch.tensor([0.5, 0, 0, 0.5]), atol=0.04)


def test_greedy_takes_the_first_layers_as_far_as_the_limit_goes():
    # VGG16 for 100 classes, counted by hand from Fig. 5: generator (in + out) m + m, compensator (out + m) out + out
    # parameters. Five convolutions in full are 382,400 of 15,038,116; a sixth and the wide ones behind it take more
    # than is left of 3 %, and the last layer has room for 0.75: 75 filters.
    network = models.vgg16(100)
    layers = dict(crossbar_layers(network))
    widths = tuple(layer.weight.shape[0] for layer in layers.values())
    problem = Problem(
        widths, RATIOS, 0.03, lambda f: compensation.overhead(network, dict(zip(layers, f, strict=True))), None
    )
    first = sum((i + o) * o + o + (o + o) * o + o for i, o in ((3, 64), (64, 64), (64, 128), (128, 128), (128, 256)))
    last = 612 * 75 + 75 + 175 * 100 + 100
    filters = searching.greedy(problem)
    assert filters == (64, 64, 128, 128, 256, *[0] * 9, 75)
    assert problem.overhead(filters) == pytest.approx((first + last) / models.parameter_count(network))


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
