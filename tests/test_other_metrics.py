"""The whole method by other metrics than the accuracy: a regression on a table, and labels per pixel."""

import math
import re
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics as reference
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from correctnet import (
    LogNormalVariation,
    Metric,
    UserError,
    chip,
    convert,
    correct,
    find_candidates,
    fit_compensators,
    metrics,
    search,
    sensitivity,
    suppress,
)
from correctnet.datasets.base import Split
from correctnet.methods import search_log
from correctnet.methods.compensation_training import CompensationWarning
from correctnet.settings import Training
from correctnet.training.loop import Hooks, fit

HALF, WIDE = LogNormalVariation(0.5), LogNormalVariation(0.8)
OPTIONS = {
    "suppress": {"epochs": 2, "batch": 50, "beta": 1e-3},
    "sweep": {"threshold": 0.95, "chips": 3, "images": 80},
    "search": {"evaluations": 2, "episodes": 3, "chips": 3, "images": 60, "train_images": 100, "train_epochs": 2},
    "compensate": {"epochs": 3, "batch": 50},
}


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompensationWarning)
        yield


def called(network, parts, **options):
    return correct(network, *parts, WIDE, **{"limit": 0.5, "chips": 5, "progress": False, **OPTIONS, **options})


def parts_of(images, labels):
    """Training, validation and test items."""
    return [(images[a:b], labels[a:b]) for a, b in ((0, 200), (200, 300), (300, 400))]


@pytest.fixture
def table(tmp_path):
    """A regression from a CSV file: (network, parts)."""
    rng = np.random.default_rng(0)
    columns = rng.normal(size=(400, 6)).astype(np.float32)
    target = np.sin(columns[:, 0]) + 0.5 * columns[:, 1] * columns[:, 2] + 0.1 * rng.normal(size=400)
    frame = pd.DataFrame(columns, columns=[f"x{i}" for i in range(6)]).assign(y=target)
    frame.to_csv(tmp_path / "table.csv", index=False)
    read = pd.read_csv(tmp_path / "table.csv")
    images = torch.tensor(read.drop(columns="y").to_numpy(np.float32))
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(6, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 1)
    ).eval()
    parts = parts_of(images, torch.tensor(read["y"].to_numpy()))
    error = metrics.mean_squared_error()
    fit(network, parts[0], Training(epochs=15, batch=25), seed=0, hooks=Hooks(metric=error), quiet=True)
    return network, parts


@pytest.fixture
def masks():
    """Images of discs and squares, with labels per pixel and an unlabelled border: (network, parts)."""
    generator = torch.Generator().manual_seed(0)
    at = torch.randint(2, 7, (400, 2, 1, 1), generator=generator)
    y, x = torch.meshgrid(torch.arange(10), torch.arange(10), indexing="ij")
    far = torch.stack([(y - at[:, 0]).abs(), (x - at[:, 1]).abs()])
    kind = torch.arange(400)[:, None, None] % 2
    inside = torch.where(kind == 0, far.square().sum(0) <= 5, far.amax(0) <= 2)
    labels = inside * (1 + kind)
    labels[:, 0] = 255
    images = torch.stack([inside.float(), inside * kind.float()], 1) + 0.5 * torch.randn(
        400, 2, 10, 10, generator=generator
    )
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1)
    ).eval()
    parts = parts_of(images, labels.to(torch.uint8))
    hooks = Hooks(metric=metrics.mean_iou(255))
    fit(network, parts[0], Training(epochs=12, batch=20, learning_rate=1e-2), seed=0, hooks=hooks, quiet=True)
    return network, parts


def squared(outputs, targets):
    return reference.mean_squared_error(targets, outputs[:, 0].double())


def iou(outputs, targets):
    known = targets != 255
    return reference.jaccard_score(targets[known].long(), outputs.argmax(1)[known], average="macro")


@pytest.mark.parametrize("kind", ["table", "masks"])
def test_the_whole_method_by_another_metric(kind, request, tmp_path):
    network, parts = request.getfixturevalue(kind)
    metric, expected = (metrics.mean_squared_error(), squared) if kind == "table" else (metrics.mean_iou(255), iou)
    found = called(network, parts, metric=metric, work=tmp_path / "work")
    (held, wanted), (images, targets) = parts[1:]
    networks = {"unprotected": network, "suppressed": found.suppressed, "corrected": found.network}
    with torch.no_grad():
        for row, model in networks.items():
            analog, line = convert(model, WIDE), found.table.set_index("row").loc[row]
            values = np.array([expected(chip(analog, k)(images), targets) for k in range(5)])
            np.testing.assert_allclose(found.results[row].values, values, rtol=1e-4)
            assert line["clean"] == pytest.approx(expected(model(images), targets), rel=1e-5)
            assert (line["mean"], line["std"]) == pytest.approx((values.mean(), values.std(ddof=1)), rel=1e-3)
            original = expected(network(images), targets)
            good = values <= original / 0.95 if kind == "table" else values >= 0.95 * original
            assert line["yield"] == good.mean()
        original = expected(network(held[:80]), wanted[:80])
    assert found.sweep.original == pytest.approx(original, rel=1e-5)
    means = np.array([found.sweep.results[i].mean for i in range(1, 4)])
    bad = means > original / 0.95 if kind == "table" else means < 0.95 * original
    assert bad.any(), "something is searched"
    names = [name for name, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert found.candidates == tuple(names[: bad.nonzero()[0].max() + 1])
    log = found.search.log
    none = log[log["layers"] == 0]["mean"].item()
    if kind == "table":
        assert log["reward"].tolist() == pytest.approx(1 - (log["mean"] + log["std"]) / none - log["overhead"])
        assert found.search.mean == log["mean"].min()
    else:
        assert log["reward"].tolist() == pytest.approx(log["mean"] - log["std"] - log["overhead"])
        assert found.search.mean == log["mean"].max()
    if found.judged is not None:
        sign = -1 if kind == "table" else 1
        assert found.judged["kept"] == (
            "with" if sign * (found.judged["with"] - found.judged["without"]) >= 0 else "without"
        )
    text = str(found)
    assert text.splitlines()[0] == metric.name
    assert ("<= " in text) == (kind == "table")
    found.report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert f"Yield: the fraction of chips of a {metric.name} of at {'most' if kind == 'table' else 'least'}" in page
    assert metric.text(found.table["mean"][2]) in page
    assert found.plot(what="candidates").get_ylabel() == metric.name
    again = called(network, parts, metric=metric, work=tmp_path / "work")
    assert again.table.equals(found.table)
    assert all(torch.equal(a, b) for a, b in zip(again.network.parameters(), found.network.parameters(), strict=True))


def test_a_metric_like_the_accuracy_decides_as_the_accuracy(tiny, blobs):
    fit(tiny, blobs, Training(epochs=4, batch=32), seed=0, quiet=True)
    parts = [Split(blobs.images[a:b], blobs.labels[a:b]) for a, b in ((0, 150), (150, 220), (220, 300))]
    own = Metric("own", lambda o, t: (o.argmax(1) == t).sum(), fraction=True, targets="classes")
    first, second = (called(tiny, parts, metric=metric) for metric in (None, own))
    assert first.candidates == second.candidates != ()
    assert first.search.filters == second.search.filters
    assert first.search.log.drop(columns="seconds").equals(second.search.log.drop(columns="seconds"))
    assert all(torch.equal(a, b) for a, b in zip(first.network.parameters(), second.network.parameters(), strict=True))
    assert first.table.equals(second.table)
    assert first.judged == second.judged


def test_the_rules_in_both_directions():
    up, down = Metric("up", len), Metric("down", len, higher=False)
    assert (up.bound(0.95, 0.8), down.bound(0.95, 0.76)) == pytest.approx((0.76, 0.8))
    assert [up.as_good(v, 0.5) for v in (0.4, 0.5, 0.6)] == [False, True, True]
    assert [down.as_good(v, 0.5) for v in (0.4, 0.5, 0.6)] == [True, True, False]
    accuracy, error = search_log.reward(0.9, 0.05, 0.02, 0.03), search_log.reward(0.1, 0.05, 0.02, 0.03, higher=False)
    assert accuracy == pytest.approx(error), "of errors the reward is that of 1 - error"
    assert search_log.reward(3.0, 1.0, 0.02, 0.03, False, 4.0) == pytest.approx(1 - 1 - 0.02)
    assert search_log.reward(3.0, 1.0, 0.02, 0.03, True, 4.0) == pytest.approx(0.5 - 0.02)
    assert search_log.reward(3.0, 1.0, 0.04, 0.03, False, 4.0) == -0.04
    assert search_log.best_state([3.0, 1.0, 1.0], [0.0, 0.2, 0.1], higher=False) == 2
    assert search_log.best_state([3.0, 1.0, 3.0], [0.2, 0.2, 0.1]) == 2


def test_stage_by_stage(table):
    network, parts = table
    error = metrics.mean_squared_error()
    how = {"metric": error, "progress": False}
    swept = find_candidates(network, parts[1], WIDE, chips=3, **how)
    assert swept.summary()["value"].keys() == {"0", "3", "5"}
    alone = sensitivity(network, parts[1], WIDE, chips=2, **how)
    assert set(alone["metric"]) == {"mean squared error"}
    assert (alone["value"] > 0).all()
    loader = DataLoader(TensorDataset(*parts[0]), batch_size=50, shuffle=True)
    suppressed = suppress(network, loader, WIDE, validation=parts[1], epochs=1, **how)
    placed = search(
        suppressed, swept.candidates, loader, parts[1], WIDE, limit=0.5, evaluations=1, train_epochs=1, chips=2, **how
    )
    assert "mean squared error" in str(placed)
    fitted = fit_compensators(suppressed, {"0": 4}, *parts[0], WIDE, metric=error, quiet=True, epochs=2)
    assert fitted(parts[0][0]).shape == (200, 1)


def test_compensators_that_raise_the_error_are_not_kept(table):
    network, parts = table
    how = {"metric": metrics.mean_squared_error(), "validation": parts[1], "quiet": True}
    with pytest.warns(CompensationWarning, match="a mean mean squared error of .* with them and of .* without"):
        bad = fit_compensators(network, {"0": 6}, *parts[0], WIDE, epochs=1, learning_rate=10.0, **how)
    torch.testing.assert_close(bad(parts[1][0]), network(parts[1][0]))


def test_the_loss_is_that_of_the_metric(table):
    network, parts = table
    images, targets = parts[0]
    for metric, loss in ((metrics.mean_squared_error(), F.mse_loss), (metrics.mean_absolute_error(), F.l1_loss)):
        section = Training(epochs=1, batch=200, learning_rate=1e-9)
        rows = fit(network, parts[0], section, seed=0, hooks=Hooks(metric=metric, update_batchnorm=False), quiet=True)
        with torch.no_grad():
            expected = loss(network(images)[:, 0], targets.float()).item()
        assert rows[0]["loss"] == pytest.approx(expected, rel=1e-4)
        assert rows[0]["accuracy"] is None


def test_unlabelled_pixels_are_left_out_of_the_loss():
    scores, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    labels[:, 1] = 255
    known = labels != 255
    expected = F.cross_entropy(scores.movedim(1, -1)[known], labels[known])
    torch.testing.assert_close(metrics.mean_iou(255).loss(scores, labels), expected)
    scores.requires_grad_()
    nothing = metrics.mean_iou(255).loss(scores, labels * 0 + 255)
    nothing.backward()
    assert (nothing.item(), scores.grad.abs().max().item()) == (0, 0)


def test_the_loss_of_a_metric_of_pixels_of_one_s_own(masks):
    network, (train, *_) = masks
    own = Metric("hits", lambda o, t: ((o.argmax(1) == t).sum(), (t != 255).sum()), fraction=True, targets="pixels")
    section = Training(epochs=1, batch=200, learning_rate=1e-9)
    with pytest.raises(UserError, match=r"training: loss: there is a label 255, and the network has 3 classes; pixels"):
        fit(network, train, section, seed=0, hooks=Hooks(metric=own), quiet=True)
    known = train[1].long().masked_fill(train[1] == 255, -100)
    (row,) = fit(network, (train[0], known), section, seed=0, hooks=Hooks(metric=own), quiet=True)
    with torch.no_grad():
        assert row["loss"] == pytest.approx(F.cross_entropy(network(train[0]), known).item(), rel=1e-4)


class Both(nn.Module):
    """Two outputs in a dict, of which a loss of the user's own reads both."""

    def __init__(self):
        super().__init__()
        self.body, self.heads = nn.Linear(6, 12), nn.ModuleList([nn.Linear(12, 1), nn.Linear(12, 1)])

    def forward(self, x):
        h = self.body(x).relu()
        return {"y": self.heads[0](h)[:, 0], "double": self.heads[1](h)[:, 0]}


@pytest.mark.filterwarnings("ignore:everything runs through torch")
def test_a_loss_and_a_metric_that_read_all_outputs(table):
    parts, network = table[1], Both().eval()

    def loss(outputs, targets):
        return F.mse_loss(outputs["y"], targets.float()) + F.mse_loss(outputs["double"], 2 * targets.float())

    def both(outputs, targets):
        return (outputs["y"] - targets).square().sum() + (outputs["double"] - 2 * targets).square().sum()

    metric = Metric("two errors", both, higher=False, targets="numbers")
    found = called(network, parts, metric=metric, loss=loss, suppress=False)
    images, targets = parts[2]
    with torch.no_grad():
        expected = both({k: v.double() for k, v in found.network(images).items()}, targets) / 100
    assert found.clean["corrected"] == pytest.approx(float(expected), rel=1e-5)
    assert (found.results["corrected"].values > 0).all()
    with pytest.raises(UserError, match="there is no loss for the two errors; give one as loss"):
        called(network, parts, metric=metric, suppress=False)
    with pytest.raises(UserError, match="temperature divides the outputs, which must be one tensor"):
        suppress(network, parts[0], WIDE, metric=metric, loss=loss, temperature=2.0, progress=False)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (Metric("nan", lambda o, t: math.nan, targets="numbers", loss=F.mse_loss), "nan is nan$"),
        (
            Metric("negative", lambda o, t: -(o[:, 0] - t).square().sum(), targets="numbers", loss=F.mse_loss),
            "original negative must be above 0, not -.*use a metric that is positive",
        ),
        (metrics.mean_iou(), "correct: validation: labels are classes, whole numbers; these are float64"),
        (None, "whole numbers; these are float64; for a regression, give metric=correctnet.metrics.mean_squ"),
        ("mse", "correct: metric is a correctnet.Metric, not 'mse'"),
        (
            Metric("wide", lambda o, t: o[:, 3].sum(), targets="numbers", loss=F.mse_loss),
            "correct: train: wide cannot be computed from",
        ),
    ],
)
def test_metrics_that_are_refused(table, metric, message):
    network, parts = table
    with pytest.raises(UserError, match=message) as caught:
        called(network, parts, metric=metric, suppress=False)
    assert len(str(caught.value).splitlines()) == 1


def test_a_network_whose_outputs_do_not_fit_is_found_before_any_work(table, tmp_path):
    network, parts = nn.Sequential(nn.Linear(6, 3)), table[1]
    with pytest.raises(UserError, match=r"correct: train: mean squared error: outputs \(8, 3\) and targets \(8,\)"):
        called(network, parts, metric=metrics.mean_squared_error(), work=tmp_path / "work")
    with pytest.raises(UserError, match=r"fit_compensators: mean squared error: outputs \(8, 3\) and targets \(8,\)"):
        fit_compensators(network, {"0": 2}, *parts[0], WIDE, metric=metrics.mean_squared_error(), quiet=True)


def test_the_example_of_a_csv_file_runs(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[1] / "docs/usage.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "read_csv" in block)
    rng = np.random.default_rng(0)
    columns = rng.normal(size=(1000, 5))
    price = np.tanh(columns[:, 0]) + 0.5 * columns[:, 1] * columns[:, 2] + 0.1 * rng.normal(size=1000)
    pd.DataFrame(columns, columns=list("abcde")).assign(price=price).to_csv(tmp_path / "houses.csv", index=False)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    exec(code, names)
    table = names["found"].table.set_index("row")
    assert table["mean"]["corrected"] < table["mean"]["unprotected"]
    assert "mean squared error" in capsys.readouterr().out
    assert (tmp_path / "report.html").stat().st_size > 10_000
