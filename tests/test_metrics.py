"""Metrics against scikit-learn and numpy in float64; evaluations, results and files with another metric."""

import math
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics as reference
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from correctnet import (
    LogNormalVariation,
    Metric,
    Result,
    UserError,
    chip,
    clean_accuracy,
    clean_value,
    convert,
    evaluate,
    metrics,
)
from correctnet.evaluation.montecarlo import EngineWarning, OutputWarning

HALF = LogNormalVariation(0.5)
ENGINES = ("auto", "torch")


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 9)).eval()


def regression(out=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, out)).eval()


def segmentation():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()


def squared(outputs, targets):
    return reference.mean_squared_error(targets.double(), outputs.double().reshape(targets.shape))


def absolute(outputs, targets):
    return reference.mean_absolute_error(targets.double(), outputs.double().reshape(targets.shape))


def top3(outputs, targets):
    return reference.top_k_accuracy_score(targets, outputs.double(), k=3, labels=range(9))


def iou(outputs, targets, ignore=-100):
    known = targets != ignore
    found, wanted = outputs.argmax(1)[known].numpy(), targets[known].numpy()
    present = sorted({*found.tolist(), *wanted.tolist()})
    return reference.jaccard_score(wanted, found, labels=present, average="macro")


def pixels(outputs, targets):
    return reference.accuracy_score(targets.flatten(), outputs.argmax(1).flatten())


MASKS = torch.randint(0, 4, (30, 8, 8), generator=torch.Generator().manual_seed(2))
SPARSE = torch.where(torch.rand(30, 8, 8, generator=torch.Generator().manual_seed(3)) < 0.3, 255, MASKS)
CASES = {
    "top-3": (classifier, (30, 12), torch.arange(30) % 9, metrics.top_k(3), top3),
    "squared": (regression, (30, 12), numbers(30, seed=1), metrics.mean_squared_error(), squared),
    "squared, columns": (
        lambda: regression(3), (30, 12), numbers(30, 3, seed=1), metrics.mean_squared_error(), squared
    ),
    "squared, column of doubles": (
        regression, (30, 12), numbers(30, 1, seed=1).double(), metrics.mean_squared_error(), squared
    ),
    "squared, whole": (regression, (30, 12), torch.arange(30), metrics.mean_squared_error(), squared),
    "absolute": (regression, (30, 12), numbers(30, seed=1), metrics.mean_absolute_error(), absolute),
    "iou": (segmentation, (30, 3, 8, 8), MASKS, metrics.mean_iou(), iou),
    "iou, two classes": (segmentation, (30, 3, 8, 8), MASKS % 2, metrics.mean_iou(), iou),
    "iou, 8 bits and ignored": (
        segmentation, (30, 3, 8, 8), SPARSE.to(torch.uint8), metrics.mean_iou(ignore=255),
        lambda o, t: iou(o, t, 255),
    ),
    "pixels": (segmentation, (30, 3, 8, 8), MASKS, metrics.pixel_accuracy(), pixels),
    "own": (
        regression, (30, 12), numbers(30, seed=1),
        Metric("root", lambda o, t: ((o[:, 0] - t) ** 2).sum(), lambda s, n: math.sqrt(s / n), higher=False),
        lambda o, t: math.sqrt(squared(o, t)),
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The number of unique classes")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_values_are_the_reference_s_on_every_chip(name, engine):
    make, shape, targets, metric, expected = CASES[name]
    images, model = numbers(*shape), make()
    analog = convert(model, HALF, seed=5)
    loader = DataLoader(TensorDataset(images, targets), batch_size=7)
    for data in ((images, targets), loader):
        found = evaluate(analog, data, 4, start=2, engine=engine, metric=metric, batch=11, progress=False)
        with torch.no_grad():
            wanted = [expected(chip(analog, sample)(images), targets) for sample in range(2, 6)]
            clean = expected(model(images), targets)
        np.testing.assert_allclose(found.values, wanted, rtol=1e-5)
        assert clean_value(model, data, metric=metric) == pytest.approx(clean, rel=1e-6)
        assert clean_value(analog, data, metric=metric) == pytest.approx(clean, rel=1e-6)
        assert found.mean == pytest.approx(np.mean(wanted), rel=1e-5)
        assert found.std == pytest.approx(np.std(wanted, ddof=1), rel=1e-3)
        assert list(found.table.columns[:5]) == ["sample", "value", "images", "metric", "seed"]
        assert set(found.table["metric"]) == {metric.name}
        assert found.table["sample"].tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("engine", ENGINES)
def test_accuracy_as_a_metric_of_its_own_is_the_accuracy(engine):
    own = Metric("own", lambda o, t: (o.argmax(1) == t).sum(), fraction=True, targets="classes")
    analog, data = convert(classifier(), HALF), (numbers(30, 12), torch.arange(30) % 9)
    found, default = (evaluate(analog, data, 5, engine=engine, metric=m, progress=False) for m in (own, None))
    assert found.values.tolist() == default.values.tolist() == default.accuracies.tolist()
    given = evaluate(analog, data, 5, engine=engine, metric=metrics.ACCURACY, progress=False)
    assert given.table.equals(default.table)
    assert list(default.table.columns[:5]) == ["sample", "correct", "images", "accuracy", "seed"]
    assert str(default).startswith("accuracy ")
    assert clean_value(analog, data) == clean_accuracy(analog, data) == clean_value(analog, data, metric=own)


@pytest.mark.parametrize("memory", [16 << 20, 2 << 30])
def test_outputs_of_many_chips_need_not_fit_the_memory(memory):
    images, targets = numbers(40, 3, 64, 64), torch.zeros(40, 64, 64, dtype=torch.int64)
    analog = convert(segmentation(), HALF)
    data, how = (images, targets), {"metric": metrics.pixel_accuracy(), "progress": False}
    found = evaluate(analog, data, 9, memory=memory, **how)
    np.testing.assert_allclose(found.values, evaluate(analog, data, 9, engine="torch", **how).values, rtol=1e-5)


def test_nan_is_no_class():
    outputs = torch.tensor([[1.0, math.nan, 0.0], [5.0, 1.0, 1.0]])
    total, count = metrics.top_k(2).batch(outputs, torch.tensor([0, 1]), "t")
    assert (total.item(), count) == (1, 2), "equal outputs: the first is the larger"
    scores = torch.tensor([[[2.0, math.nan], [1.0, 0.0]]])  # (1, 2 classes, 2 pixels)
    total, count = metrics.mean_iou().batch(scores, torch.tensor([[0, 0]]), "t")
    assert total.tolist() == [[1, 0], [2, 0]]
    assert count == 2


def made(values, metric=None, **columns):
    metric = metric or metrics.mean_squared_error()
    rows = {"sample": range(len(values)), "value": values, "images": 10, "metric": metric.name, "seed": 0}
    return Result(pd.DataFrame({**rows, **columns}), metric)


def test_yield_follows_the_direction():
    values = [0.5, 2.0, 3.0, 4.0]
    assert made(values).yield_at(2.0).estimate == 0.5, "errors of at most 2"
    likes = Metric("likes", lambda o, t: o.sum())
    assert made(values, likes).yield_at(2.0).estimate == 0.75
    with pytest.raises(UserError, match="finite number, not nan"):
        made(values).yield_at(math.nan)
    with pytest.raises(UserError, match=r"0.9, not 90"):
        made([0.5, 0.6], metrics.mean_iou()).yield_at(90)


def test_a_result_of_another_metric(tmp_path):
    metric = metrics.mean_squared_error()
    first, second = made([0.5, 2.0, 3.5]), made([1.0, 2.0, 3.0])
    assert str(first).startswith("mean squared error 2 +- 1.5 (mean +- standard deviation; 95 % CI ")
    assert first.minus(second).estimate == 0
    with pytest.raises(UserError, match="holds no accuracies, but the mean squared error; read its values"):
        _ = first.accuracies
    first.to_csv(tmp_path / "a.csv")
    again = Result.from_csv(tmp_path / "a.csv", metric)
    assert again.table.equals(first.table)
    assert again.metric == metric
    with pytest.raises(UserError, match="values of the mean squared error, not of the accuracy; give the metric"):
        Result.from_csv(tmp_path / "a.csv")
    both = Result.concatenate([first, made([4.0], sample=9)])
    assert both.values.tolist() == [0.5, 2.0, 3.5, 4.0]
    assert both.metric == metric
    other = made([1.0, 2.0, 3.0], metrics.mean_absolute_error())
    for call in (lambda: first.minus(other), lambda: Result.concatenate([first, other])):
        with pytest.raises(UserError, match=r"metric.*mean squared error.*mean absolute error"):
            call()
    a, b = (made([0.1, 0.2], metrics.mean_iou(ignore)) for ignore in (1, 2))
    with pytest.raises(UserError, match=r"of one metric: mean IoU \(ignore 1\) against mean IoU \(ignore 2\)"):
        a.minus(b)
    assert first.plot().get_xlabel() == "mean squared error"
    assert first.percentile(50) == 2.0


def test_saved_chips_are_those_of_one_metric(tmp_path):
    analog, data = convert(regression(), HALF), (numbers(30, 12), numbers(30, seed=1))
    how = {"save": tmp_path / "a.csv", "progress": False}
    first = evaluate(analog, data, 3, metric=metrics.mean_squared_error(), **how)
    text = (tmp_path / "a.csv").read_text()
    again = evaluate(analog, data, 5, metric=metrics.mean_squared_error(), **how)
    assert (tmp_path / "a.csv").read_text().startswith(text), "finished chips are not evaluated again"
    assert again.values[:3].tolist() == first.values.tolist()
    with pytest.raises(UserError, match="another simulation"):
        evaluate(analog, data, 3, metric=metrics.mean_absolute_error(), **how)
    with pytest.raises(UserError, match="something else than chips"):
        evaluate(convert(classifier(), HALF), (data[0], torch.zeros(30)), 3, **how)
    coarse = Metric("iou", metrics.mean_iou(1).function, metrics.mean_iou().finish, targets="pixels")
    assert metrics.mean_iou(1).describe() != metrics.mean_iou(2).describe() != coarse.describe()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (Metric("broken", lambda o, t: o.sum() * math.nan), "evaluate: on chip 0: broken is nan$"),
        (Metric("broken", lambda o, t: (o.sum(), 0)), "broken is nan; it counted nothing"),
        (Metric("huge", lambda o, t: 1.0, lambda s, n: math.inf), "huge is inf"),
        (Metric("share", lambda o, t: 2 * len(t), fraction=True), "share is 2, and was said to be a fraction"),
        (Metric("rows", lambda o, t: o[:, 0]), r"sums of one shape, not \(20,\) and then \(10,\)"),
        (Metric("columns", lambda o, t: o.sum(0).repeat(2)), r"columns sums to a tensor of shape \(2,\); give it"),
        (Metric("text", lambda o, t: "a"), "text must give a sum, or .*not a str"),
        (Metric("none", lambda o, t: None), "none must give a sum"),
        (Metric("fails", lambda o, t: o[:, 5].sum()), r"fails cannot be computed from outputs \(\d+, 1\).*IndexError"),
        (Metric("ends", lambda o, t: 1, lambda s, n: 1 / 0), "ends: finish fails: ZeroDivisionError"),
        (metrics.mean_iou(), "labels are classes, whole numbers; these are float32"),
        (metrics.top_k(), "labels are classes, whole numbers.*mean_squared_error"),
        (lambda o, t: 1, r"a function becomes one as correctnet.Metric\('its name', function"),
        ("mse", "metric is a correctnet.Metric, not 'mse'"),
    ],
)
def test_metrics_that_cannot_be_used(metric, message, engine):
    analog, data = convert(regression(), HALF), (numbers(30, 12), numbers(30, seed=1))
    loader = [(data[0][:20], data[1][:20]), (data[0][20:], data[1][20:])]
    with pytest.raises(UserError, match=message) as caught:
        evaluate(analog, loader, 2, engine="torch" if "one shape" in message else engine, metric=metric, progress=False)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", len), "name is a text"),
        (("a\nb", len), "name is a text of one line"),
        (("accuracy", len), "'accuracy' is taken"),
        (("a", 3), "function is a function, not 3"),
        (("a", len, None), "finish is a function"),
        (("a", len, len, "up"), "higher is True or False"),
        (("a", len, len, True, 1), "fraction is True or False"),
        (("a", len, len, True, True, "labels"), "targets is one of classes, pixels, numbers, any"),
        (("a", len, len, True, True, "any", 3), "loss is a function"),
    ],
)
def test_metrics_that_cannot_be_made(arguments, message):
    with pytest.raises(UserError, match=message):
        Metric(*arguments)


def test_numbers_of_shipped_metrics():
    for call in (lambda: metrics.top_k(0), lambda: metrics.top_k(1.5), lambda: metrics.mean_iou("255")):
        with pytest.raises(UserError, match="must be"):
            call()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("make", "shape", "targets", "metric", "message"),
    [
        (regression, (30, 12), numbers(30, 2), metrics.mean_squared_error(), r", 1\) and targets \(16, 2\) differ"),
        (lambda: regression(3), (30, 12), numbers(30), metrics.mean_squared_error(), "differ in shape"),
        (regression, (30, 12), numbers(30) / 0, metrics.mean_squared_error(), "finite numbers, not 30 that are not"),
        (regression, (30, 12), numbers(29), metrics.mean_squared_error(), "30 images and 29 labels"),
        (segmentation, (30, 3, 8, 8), MASKS + 1, metrics.mean_iou(), "a label 4, and the network has 4 classes"),
        (segmentation, (30, 3, 8, 8), MASKS - 1, metrics.mean_iou(), "a label -1, .*label ignore, -100 here"),
        (segmentation, (30, 3, 8, 8), MASKS[:, 1:], metrics.mean_iou(), r"labels \(\d+, 7, 8\)"),
        (segmentation, (30, 3, 8, 8), MASKS * 0 - 100, metrics.mean_iou(), "mean IoU is nan; it counted nothing"),
        (segmentation, (30, 3, 8, 8), MASKS, None, "metric=correctnet.metrics.mean_iou"),
        (segmentation, (30, 3, 8, 8), MASKS[:, 0, 0], None, "float32; for labels per pixel, give metric=correctnet"),
        (regression, (30, 12), MASKS[:, 0, 0], None, "float32; for a regression, give metric=correctnet"),
        (classifier, (30, 12), torch.arange(30) % 9, metrics.mean_iou(), r"\(N, classes, height, width\)"),
        (classifier, (30, 12), torch.arange(30) % 9, metrics.top_k(9), "has 9 classes, so every image is among"),
        (classifier, (30, 12), torch.arange(30) % 10, metrics.top_k(3), "a label 9, and the network has 9 classes"),
    ],
)  # fmt: skip
def test_data_that_a_metric_cannot_judge(make, shape, targets, metric, message, engine):
    with pytest.raises(UserError, match=message) as caught:
        evaluate(convert(make(), HALF), (numbers(*shape), targets), 2, engine=engine, metric=metric, progress=False)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_outputs_that_are_not_finite(engine):
    images = numbers(30, 12)
    images[3], images[8] = math.nan, math.nan
    analog = convert(regression(), HALF)
    with pytest.raises(UserError, match=r"on chip 0, with 2 outputs that are not finite: mean squared error is nan"):
        evaluate(analog, (images, numbers(30)), 2, engine=engine, metric=metrics.mean_squared_error(), progress=False)
    capped = Metric("capped", lambda o, t: (o[:, 0] - t).abs().nan_to_num(9).clamp(max=9).sum(), higher=False)
    with pytest.warns(OutputWarning, match=r"on 2 of 2 chips \(0, 1\), for up to 2 of 30 images$"):
        evaluate(analog, (images, numbers(30)), 2, engine=engine, metric=capped, progress=False)


class Wrapped(nn.Module):
    """A network that gives its outputs in something."""

    def __init__(self, network, what):
        super().__init__()
        self.body, self.what = network, what

    def forward(self, x):
        return self.what(self.body(x))


FORMS = {
    "tuple": lambda h: (h, h + 1),
    "list": lambda h: [h],
    "nested": lambda h: (h, {"features": h.relu()}),
    "out": lambda h: {"aux": h + 1, "out": h},
    "logits": lambda h: {"loss": None, "logits": h},
    "ordered": lambda h: OrderedDict(hidden=h.relu(), logits=h),
    "only": lambda h: {"prediction": h},
    "object": lambda h: SimpleNamespace(logits=h, hidden=None),
}


@pytest.mark.filterwarnings("error:everything runs through torch")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", FORMS)
def test_outputs_that_are_not_one_tensor(form, engine):
    images, labels = numbers(30, 12), torch.arange(30) % 9
    plain = evaluate(convert(classifier(), HALF), (images, labels), 4, engine=engine, progress=False)
    wrapped = convert(Wrapped(classifier(), FORMS[form]), HALF)
    found = evaluate(wrapped, (images, labels), 4, engine=engine, progress=False)
    assert found.table.correct.tolist() == plain.table.correct.tolist()
    assert clean_accuracy(wrapped, (images, labels)) == clean_accuracy(classifier(), (images, labels))
    error = metrics.mean_squared_error()
    wrapped, plain = (convert(m, HALF) for m in (Wrapped(regression(), FORMS[form]), regression()))
    values = [
        evaluate(m, (images, numbers(30)), 4, engine=engine, metric=error, progress=False).values
        for m in (wrapped, plain)
    ]
    np.testing.assert_allclose(*values, rtol=1e-5)


def test_a_metric_reads_all_outputs():
    both = Metric("sum of two errors", lambda o, t: (o["a"] - t).square().sum() + (o["b"] - t).square().sum())
    twice = Wrapped(regression(2), lambda h: {"a": h[:, 0], "b": h[:, 1]})
    images, targets = numbers(30, 12), numbers(30)
    analog = convert(twice, HALF)
    with pytest.warns(EngineWarning, match="everything runs through torch: it returns more than one tensor"):
        found = evaluate(analog, (images, targets), 2, metric=both, progress=False)
    with torch.no_grad():
        outputs = [chip(analog, k)(images) for k in range(2)]
    wanted = [squared(o["a"], targets) + squared(o["b"], targets) for o in outputs]
    np.testing.assert_allclose(found.values, wanted, rtol=1e-5)


class Counted:
    """A loader that counts its passes."""

    def __init__(self, images, labels):
        self.batches, self.passes = list(zip(images.split(7), labels.split(7), strict=True)), 0

    def __iter__(self):
        self.passes += 1
        return iter(self.batches)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("metric", [None, metrics.top_k(3)])
def test_a_loader_is_read_once_a_chunk_of_chips(engine, metric):
    images, labels = numbers(30, 12), torch.arange(30) % 9
    analog = convert(classifier(), HALF)
    kept = evaluate(analog, (images, labels), 20, engine=engine, metric=metric, progress=False)
    for chunk, passes in ((None, 3 if engine == "torch" else 2), (5, 5), (20, 2)):
        loader = Counted(images, labels)
        how = {"memory": 1 << 9, "engine": "torch"} if engine == "torch" else {"memory": 1 << 20}
        if engine == "auto":  # more than the core needs, less than the loader's images
            loader = Counted(images.repeat(1000, 1), labels.repeat(1000))
        found = evaluate(analog, loader, 20, metric=metric, chunk=chunk, progress=False, **how)
        assert loader.passes == passes, "one that checks the data, and one a chunk"
        assert found.values.tolist() == pytest.approx(kept.values.tolist(), abs=1e-12)


def test_what_prepare_makes_is_made_once_a_chip():
    images, labels = numbers(30, 12), torch.arange(30) % 9
    calls, analog = [], convert(classifier(), HALF)
    prepare = lambda model: calls.append(model)  # noqa: E731
    loader = Counted(images, labels)
    evaluate(analog, loader, 3, engine="torch", memory=1 << 9, prepare=prepare, progress=False)
    assert (len(calls), loader.passes) == (3, 4)
