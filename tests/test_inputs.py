"""Networks of several inputs, batches that are dicts and tuples: all forms against chips evaluated by hand."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from correctnet import (
    LogNormalVariation,
    UserError,
    check_coverage,
    chip,
    clean_accuracy,
    convert,
    correct,
    evaluate,
    fit_compensators,
    metrics,
)
from correctnet.crossbar.layers import CoverageWarning
from correctnet.datasets.batches import Data
from correctnet.datasets.inputs import Inputs, as_inputs
from correctnet.evaluation.montecarlo import EngineWarning
from correctnet.methods import work

HALF = LogNormalVariation(0.5)
ENGINES = ("auto", "torch")


class Joined(nn.Module):
    """A classifier of rows and tokens, with an optional mask of the tokens."""

    def __init__(self):
        super().__init__()
        self.words, self.rows, self.head = nn.Embedding(20, 8), nn.Linear(5, 8), nn.Linear(8, 3)

    def features(self, rows, tokens, mask=None):
        words = self.words(tokens) if mask is None else self.words(tokens) * mask[..., None]
        return self.head((self.rows(rows) + words.mean(1)).relu())

    def forward(self, rows, tokens, mask=None):
        return self.features(rows, tokens, mask)


class OfDict(Joined):
    def forward(self, batch):
        batch["rows"] *= 2.0  # in place, on a copy
        batch["rows"] /= 2.0
        return SimpleNamespace(logits=self.features(**batch), attentions=None)


class OfTuple(Joined):
    def forward(self, batch):
        return self.features(*batch), batch[0]


def made(kind=Joined):
    torch.manual_seed(0)
    return kind().eval()


def data(count=90):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(count, 5, generator=generator)
    tokens = torch.randint(0, 20, (count, 7), generator=generator)
    labels = (rows[:, 0] > 0).long() + (tokens[:, 0] > 12).long()
    return rows, tokens, labels


class Items(Dataset):
    def __init__(self, rows, tokens, labels):
        self.parts = rows, tokens, labels

    def __len__(self):
        return len(self.parts[0])

    def __getitem__(self, i):
        return dict(zip(("rows", "tokens", "labels"), (part[i] for part in self.parts), strict=True))


ROWS, TOKENS, LABELS = data()
PARTS = list(zip(ROWS.split(20), TOKENS.split(20), LABELS.split(20), strict=True))
FORMS = {
    "triple": (ROWS, TOKENS, LABELS),
    "tuple and labels": ((ROWS, TOKENS), LABELS),
    "dict and labels": ({"tokens": TOKENS, "rows": ROWS}, LABELS),
    "dict": {"rows": ROWS, "labels": LABELS, "tokens": TOKENS},
    "loader of triples": DataLoader(TensorDataset(ROWS, TOKENS, LABELS), batch_size=32),
    "loader of dicts": DataLoader(Items(ROWS, TOKENS, LABELS), batch_size=32, shuffle=True),
    "loader of pairs": [({"rows": a, "tokens": b}, y) for a, b, y in PARTS],
}


def counted(model, inputs, labels):
    analog = convert(model, HALF)
    found = []
    with torch.no_grad():
        for k in range(4):
            outputs = chip(analog, k)(*inputs)
            outputs = getattr(outputs, "logits", outputs[0] if isinstance(outputs, tuple) else outputs)
            found.append(int((outputs.argmax(1) == labels).sum()))
    return found


@pytest.mark.filterwarnings("ignore:.*cannot carry variation:UserWarning")
@pytest.mark.filterwarnings("ignore::correctnet.crossbar.layers.CoverageWarning")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_several_inputs(form, engine):
    expected = counted(made(), (ROWS, TOKENS), LABELS)
    assert len(set(expected)) > 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="everything runs through torch")
        found = evaluate(convert(made(), HALF), FORMS[form], 4, engine=engine, progress=False)
        assert found.table.correct.tolist() == expected
        wrapped = made(OfDict) if "dict" in form or "pairs" in form else made(OfTuple)
        found = evaluate(convert(wrapped, HALF), FORMS[form], 4, engine=engine, progress=False)
        assert found.table.correct.tolist() == expected, "one dict or tuple, if the network takes no more"
    assert clean_accuracy(made(), FORMS[form]) == (made()(ROWS, TOKENS).argmax(1) == LABELS).double().mean()


class Deciding(Joined):
    def forward(self, rows, tokens):
        return self.features(rows, tokens) if rows.sum() > -1e9 else self.features(-rows, tokens)


@pytest.mark.filterwarnings("ignore::correctnet.crossbar.layers.CoverageWarning")
def test_the_engine_says_what_it_runs():
    with pytest.warns(EngineWarning, match="2 of 2 .* through torch: words .Embedding., mean .mean., add .add."):
        evaluate(convert(made(), HALF), FORMS["triple"], 1, progress=False)
    with pytest.warns(EngineWarning, match="everything runs through torch: torch.fx cannot trace it"):
        found = evaluate(convert(made(Deciding), HALF), FORMS["triple"], 4, progress=False)
    assert found.table.correct.tolist() == counted(made(Deciding), (ROWS, TOKENS), LABELS)


@pytest.mark.filterwarnings("ignore::correctnet.crossbar.layers.CoverageWarning")
@pytest.mark.filterwarnings("ignore:not all of the network runs:correctnet.evaluation.montecarlo.EngineWarning")
def test_more_items_than_the_engine_takes_at_once():
    rows, tokens, labels = data(2100)
    whole = {"tokens": tokens, "rows": rows, "y": labels}
    parts = [{name: tensor[i : i + 300] for name, tensor in whole.items()} for i in range(0, 2100, 300)]
    expected = counted(made(), (rows, tokens), labels)
    for given in (parts, (rows, tokens, labels)):
        found = evaluate(convert(made(), HALF), given, 4, progress=False).table.correct
        assert (found - expected).abs().max() <= 1, "up to an image with nearly equal outputs"


def test_one_input_in_a_dict_runs_in_the_engine():
    torch.manual_seed(0)
    model, (images, labels) = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), (ROWS, LABELS)
    expected = counted(model, (images,), labels)
    loader = [{"pixel_values": x, "label": y} for x, y in zip(images.split(40), labels.split(40), strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", EngineWarning)
        assert evaluate(convert(model, HALF), loader, 4, progress=False).table.correct.tolist() == expected


def test_data_are_told_apart_by_all_inputs():
    first = {"rows": ROWS, "tokens": TOKENS, "labels": LABELS}
    digests = [Data(FORMS[f]).digest for f in ("dict", "loader of dicts", "loader of pairs")]
    assert len({*digests, Data(first).digest}) == 1, "the order of items and batches does not matter"
    changed = TOKENS.clone()
    changed[3, 2] += 1
    assert Data({**first, "tokens": changed}).digest != digests[0]
    assert Data({"other": ROWS, "tokens": TOKENS, "labels": LABELS}).digest != digests[0]
    assert work.identity("a", data=(first["rows"], TOKENS, LABELS)) != work.identity("a", data=(ROWS, changed, LABELS))
    assert work.identity("a", data=first) != work.identity("a", data={**first, "tokens": changed})


@pytest.mark.filterwarnings("ignore::correctnet.crossbar.layers.CoverageWarning")
def test_a_loader_of_several_inputs_that_does_not_fit_the_memory():
    expected = evaluate(convert(made(), HALF), FORMS["triple"], 20, engine="torch", progress=False)

    class Loader:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter(PARTS)

    loader = Loader()
    found = evaluate(convert(made(), HALF), loader, 20, engine="torch", memory=2000, progress=False)
    assert found.table.equals(expected.table)
    assert loader.passes == 3, "one that checks the data, and one for 16 chips"


@pytest.mark.filterwarnings("ignore::correctnet.crossbar.layers.CoverageWarning")
def test_coverage_of_several_inputs():
    model = made()
    assert check_coverage(model, convert(model, HALF), {"rows": ROWS, "tokens": TOKENS}) == ["rows", "head"]
    assert check_coverage(model, convert(model, HALF), (ROWS, TOKENS)) == ["rows", "head"]
    with pytest.raises(UserError, match="a tensor, or a dict or tuple of them, not a str"):
        check_coverage(model, convert(model, HALF), "rows")


@pytest.mark.filterwarnings("ignore::correctnet.evaluation.montecarlo.EngineWarning")
@pytest.mark.filterwarnings("ignore::correctnet.crossbar.layers.CoverageWarning")
@pytest.mark.filterwarnings("ignore::correctnet.methods.compensation_training.CompensationWarning")
@pytest.mark.parametrize("kind", [Joined, OfDict])
def test_the_whole_method_on_a_loader_of_dicts(kind, tmp_path):
    parts = data(300)
    train, validation, test = (Items(*(part[a:b] for part in parts)) for a, b in ((0, 150), (150, 220), (220, 300)))
    torch.manual_seed(0)
    network = kind().eval()
    options = {
        "suppress": {"epochs": 2, "learning_rate": 1e-2},
        "sweep": {"threshold": 1.0, "chips": 2, "images": 50},
        "search": {"strategy": "greedy", "ratios": (0.0, 0.5)},
        "compensate": {"epochs": 1},
    }
    loaders = DataLoader(train, 30, shuffle=True), DataLoader(validation, 30), DataLoader(test, 30)
    how = {"limit": 0.9, "chips": 3, "progress": False, "work": tmp_path / "work", **options}
    found = correct(network, *loaders, HALF, **how)
    rows, tokens, labels = (part[220:] for part in parts)
    with torch.no_grad():
        analog = convert(found.network, HALF)
        given = (rows, tokens) if kind is Joined else ({"rows": rows, "tokens": tokens},)
        outputs = [chip(analog, k)(*given) for k in range(3)]
    expected = [(getattr(o, "logits", o).argmax(1) == labels).double().mean() for o in outputs]
    np.testing.assert_allclose(found.results["corrected"].values, expected)
    assert found.clean["suppressed"] > found.clean["unprotected"], "the suppressed network was trained"
    assert correct(network, *loaders, HALF, **how).table.equals(found.table)


@pytest.mark.filterwarnings("ignore::correctnet.crossbar.layers.CoverageWarning")
@pytest.mark.filterwarnings("ignore::correctnet.methods.compensation_training.CompensationWarning")
def test_compensators_of_a_network_of_several_inputs():
    how = {"epochs": 1, "quiet": True, "seed": 3}
    first = fit_compensators(made(), {"rows": 4}, {"rows": ROWS, "tokens": TOKENS}, LABELS, HALF, **how)
    second = fit_compensators(made(), {"rows": 4}, (ROWS, TOKENS, LABELS), variation=HALF, **how)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert first(ROWS, TOKENS).shape == (90, 3)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((ROWS, TOKENS[:80], LABELS), r"different numbers of items: 0 \(90, 5\), 1 \(80, 7\)"),
        (((ROWS, TOKENS), LABELS[:80]), "90 images and 80 labels"),
        ({"rows": ROWS, "tokens": TOKENS}, "a pair of tensors .*not a dict of 'rows', 'tokens'"),
        ([{"rows": ROWS, "ids": ["a"], "labels": LABELS}], "a batch must be .*not a dict of 'rows', 'ids', 'labels'"),
        ([{"rows": ROWS, "tokens": TOKENS, "labels": LABELS.tolist()}], "a batch must be .*not a dict"),
        ([{"labels": LABELS}], "a batch must be .*not a dict of 'labels'"),
        (
            {"rows": ROWS, "words": TOKENS, "labels": LABELS},
            r"cannot run on input rows of shape \(\d+, 5\) and type float32; input words of .*type int64: TypeError",
        ),
        ({"rows": ROWS, "tokens": TOKENS.to_sparse(), "labels": LABELS}, "dense tensors are expected"),
    ],
)
def test_inputs_that_are_refused(given, message, engine):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)
        analog = convert(made(), HALF)
    with pytest.raises(UserError, match=message) as caught:
        evaluate(analog, given, 2, engine=engine, progress=False)
    assert len(str(caught.value).splitlines()) == 1


def test_inputs_are_cut_copied_and_moved_together():
    inputs = as_inputs({"a": torch.arange(6.0), "b": torch.arange(12).view(6, 2)})
    assert len(inputs) == 6
    assert [len(part) for part in inputs.split(4)] == [4, 2]
    assert inputs[torch.tensor([3, 1])].tensors["b"].tolist() == [[6, 7], [2, 3]]
    copied = inputs.clone()
    copied.tensors["a"].zero_()
    assert inputs.tensors["a"].sum() == 15
    assert inputs.to("cpu").device == torch.device("cpu")
    assert as_inputs((torch.zeros(2),)).shape == (2,)
    assert as_inputs([torch.zeros(2), "a"]) is None
    assert as_inputs({}) is None
    with pytest.raises(UserError, match="different numbers of items"):
        Inputs([torch.zeros(2), torch.zeros(())])


@pytest.mark.filterwarnings("ignore::correctnet.crossbar.layers.CoverageWarning")
@pytest.mark.parametrize("engine", ENGINES)
def test_another_metric_of_several_inputs(engine):
    analog = convert(made(), HALF)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="everything runs through torch")
        how = {"engine": engine, "progress": False}
        found = evaluate(analog, FORMS["loader of dicts"], 2, metric=metrics.top_k(2), **how)
    with torch.no_grad():
        best = [chip(analog, k)(ROWS, TOKENS).topk(2).indices for k in range(2)]
    assert found.values.tolist() == [(b == LABELS[:, None]).any(1).double().mean().item() for b in best]
