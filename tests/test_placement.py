"""`correctnet.search` on networks and data of the caller, against states that are trained one by one."""

import pytest
import torch
from stopping import Stopped, stopping_loss

from correctnet import LogNormalVariation, UserError, compensate, convert, search
from correctnet.evaluation.montecarlo import evaluate
from correctnet.methods import compensation, compensation_training
from correctnet.settings import Compensate
from correctnet.training.loop import fit

HALF = LogNormalVariation(0.5)
NAMES = ["0.layer", "3.layer"]
FEW = {"strategy": "random", "evaluations": 3, "chips": 3, "ratios": (0.0, 0.5), "train_images": 90, "images": 80}
QUICK = {"batch": 30}


def scored(network, filters, blobs, seed):
    """Accuracies of a state: a training of one epoch on chips of the search, then evaluation on others."""
    section = Compensate(batch=30, epochs=1)
    analog, _, hooks = compensation_training.prepare(network, filters, section, HALF, seed, "search")
    if filters:
        parameters = compensation_training.trained_parameters(analog, section)
        fit(analog, blobs.take(90), section, seed, stage="search", parameters=parameters, hooks=hooks, quiet=True)
    return evaluate(analog, blobs.take(80), 3, start=3 << 28, progress=False)  # the fourth purpose of chips


def test_every_state_is_trained_and_scored(tiny, blobs):
    found = search(tiny, NAMES, blobs, blobs, HALF, limit=1.0, seed=4, compensate=QUICK, progress=False, **FEW)
    assert found.log["filters"].iloc[0] == "0 0"
    assert found.evaluations == 3
    assert len(found.log) == 4
    best = None
    for row in found.log.to_dict("records"):
        filters = {name: int(m) for name, m in zip(NAMES, row["filters"].split(), strict=True) if m != "0"}
        result = scored(tiny, filters, blobs, 4)
        assert (row["mean"], row["std"]) == pytest.approx((result.mean, result.std))
        assert row["overhead"] == compensation.overhead(tiny, filters)
        if best is None or (result.mean, -row["overhead"]) > (best[1], -best[2]):
            best = filters, result.mean, row["overhead"]
    assert (found.filters, found.mean, found.overhead) == (best[0], pytest.approx(best[1]), best[2])
    assert compensate(tiny, found.filters) is not None
    where = ", ".join(f"{name} ({m} filters)" for name, m in best[0].items()) or "no layer"
    assert str(found).startswith(f"compensated: {where}; overhead {best[2]:.2%}, accuracy {best[1]:.2%}")


@pytest.mark.parametrize("strategy", ["all", "greedy"])
def test_without_a_search(tiny, blobs, strategy):
    limit = compensation.overhead(tiny, {"0.layer": 4})
    found = search(tiny, NAMES, blobs, blobs, HALF, limit=limit, strategy=strategy, progress=False)
    assert found.filters == ({"0.layer": 4} if strategy == "greedy" else {"0.layer": 4, "3.layer": 8})
    assert found.overhead == compensation.overhead(tiny, found.filters)
    assert (found.mean, found.evaluations, len(found.log)) == (None, 0, 0)


def test_a_search_on_loaders_that_was_stopped_is_continued(tiny, blobs, tmp_path):
    def loader():
        return list(zip(blobs.images.split(30), blobs.labels.split(30), strict=True))

    stopping, calls = stopping_loss(at=5)  # three batches a state

    def call(work, loss):
        return search(tiny, NAMES, loader(), loader(), HALF, limit=1.0, loss=loss, work=work, progress=False, **FEW)

    whole = call(None, None)
    with pytest.raises(Stopped):
        call(tmp_path, stopping)
    resumed = call(tmp_path, stopping)
    assert len(calls) == 5 + 6, "the first state is not trained again"
    assert resumed.log.drop(columns="seconds").equals(whole.log.drop(columns="seconds"))
    assert resumed.filters == whole.filters
    call(tmp_path, stopping)
    assert len(calls) == 11
    assert [path.suffix for path in tmp_path.iterdir()] == [".csv"]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"limit": 3}, "search: limit is a fraction above 0 and at most 1 (0.03, not 3), not 3"),
        ({"limit": 0}, "search: limit is a fraction above 0 and at most 1 (0.03, not 3), not 0"),
        ({"limits": (0.1,)}, "search: limits: one search has one; give it as limit"),
        ({"compensate": {"epochs": 3}}, "search: compensate: epochs: those of a state are train_epochs"),
        ({"compensate": {"pools": 3}}, "search: compensate: pools: unknown key (did you mean 'pool'?)"),
        ({"evaluation": 3}, "search: evaluation: unknown key (did you mean 'evaluations'?)"),
        ({"candidates": "4"}, "search: candidates are names of layers, a list, not '4'"),
        ({"candidates": ["4", "4"]}, "search: candidates: 4 is named twice"),
        ({"candidates": ["5"]}, "search: candidates: the network has no layer '5' (layers: 0.layer, 3.layer, 4)"),
        ({"seed": "x"}, "search: the seed must be a whole number, not 'x'"),
        ({"validation": []}, "search: validation: the data holds no images"),
    ],
)
def test_bad_calls(tiny, blobs, change, line):
    options = {"candidates": NAMES, "validation": blobs, **change}
    candidates, validation = options.pop("candidates"), options.pop("validation")
    with pytest.raises(UserError) as error:
        search(tiny, candidates, blobs, validation, HALF, progress=False, **options)
    assert str(error.value) == line


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda m: compensate(m, {"4": 2}), "search: the network is compensated already; give the one that was "
         "compensated"),
        (lambda m: convert(m, HALF), "convert: the model carries variation already; convert the original one"),
    ],
)  # fmt: skip
def test_networks_that_are_refused(tiny, blobs, make, line):
    with pytest.raises(UserError) as error:
        search(make(tiny), NAMES, blobs, blobs, HALF, progress=False, **FEW)
    assert str(error.value) == line


def test_the_network_is_left_as_it_was(tiny, blobs):
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    search(tiny, NAMES, blobs, blobs, HALF, limit=1.0, compensate=QUICK, progress=False, **FEW)
    assert all(torch.equal(value, tiny.state_dict()[name]) for name, value in before.items())
