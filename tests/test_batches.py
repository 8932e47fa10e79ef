"""The contract for data: what is accepted gives the same counts by every engine, the rest is refused in one line."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from correctnet import LogNormalVariation, UserError, convert, evaluate
from correctnet.datasets.batches import Data, DataWarning, looks_across
from correctnet.evaluation.montecarlo import EngineWarning, OutputWarning, clean_accuracy
from correctnet.noise import core

HALF = LogNormalVariation(0.5)
LITTLE = 1 << 20  # bytes; the images of `Changing` take more
ENGINES = ("auto", "torch")


def data(count: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, 8, 8, generator=generator)
    return x, torch.randint(0, 10, (count,), generator=generator)


def network(classes: int = 10, *after: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, classes), *after).eval()


def counts(model: nn.Module, given: object, engine: str) -> list[int]:
    return evaluate(convert(model, HALF), given, 5, engine=engine, progress=False).table.correct.tolist()


def test_forms_of_the_same_data_give_the_same_counts():
    (x, y), model = data(), network()
    wanted = counts(model, (x, y), "torch")
    forms = {
        "pair": (x, y),
        "list": [x, y],
        "int32": (x, y.int()),
        "uint8": (x, y.to(torch.uint8)),
        "float": (x, y.float()),
        "channels_last": (x.to(memory_format=torch.channels_last), y),
        "not contiguous": (x.repeat_interleave(2, 0)[::2], y),
        "requires grad": (x.clone().requires_grad_(), y),
        "loader": DataLoader(TensorDataset(x, y), batch_size=64),
        "a batch each": DataLoader(TensorDataset(x, y), batch_size=1),
        "shuffled": DataLoader(TensorDataset(x, y), batch_size=48, shuffle=True),
        "batches": list(zip(x.split(7), y.split(7), strict=True)),
        "dict": {"image": x, "label": y},
        "dicts": [{"x": a, "y": b} for a, b in zip(x.split(70), y.split(70), strict=True)],
        "tuples of one": [((a,), b) for a, b in zip(x.split(70), y.split(70), strict=True)],
        "lists": [list(b) for b in zip(x.split(70), y.split(70), strict=True)],
    }
    digests = set()
    for name, form in forms.items():
        for engine in ENGINES:
            assert counts(model, form, engine) == wanted, (name, engine)
        digests |= {evaluate(convert(model, HALF), form, 1, progress=False).table["data"].iloc[0]}
        assert clean_accuracy(model, form) == clean_accuracy(model, (x, y))
    assert len(digests) == 1, "the same images, whatever their order and batches"
    assert Data((x[:199], y[:199])).digest not in digests
    assert Data((x, y.roll(1))).digest not in digests
    assert Data((x + 1e-3, y)).digest not in digests


class Rows(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return {"image": torch.zeros(3, 8, 8), "kind": 0}


BAD_DATA = {
    "labels (N, 1)": (
        lambda x, y: (x, y[:, None]),
        r"labels \(N,\), one an image, are expected, not \(200, 1\); squeeze",
    ),
    "one-hot labels": (lambda x, y: (x, torch.eye(10)[y]), r"not \(200, 10\); of one-hot rows take"),
    "maps of labels": (lambda x, y: (x, y[:, None, None].expand(-1, 8, 8)), r"not \(200, 8, 8\)"),
    "fewer labels": (lambda x, y: (x, y[:150]), "200 images and 150 labels"),
    "fewer images": (lambda x, y: (x[:150], y), "150 images and 200 labels"),
    "fractions": (lambda x, y: (x, y + 0.5), "whole numbers; these are float32"),
    "complex": (lambda x, y: (x, y.to(torch.complex64)), "whole numbers; these are complex64"),
    "negative": (lambda x, y: (x, y - 1), "from 0 on; there is a -1"),
    "too large": (lambda x, y: (x, y + 1), "a label 10, and the network has 10 classes"),
    "none": (lambda x, y: (x[:0], y[:0]), "holds no images"),
    "no batches": (lambda x, y: [], "holds no images"),
    "scalars": (lambda x, y: (x[0, 0, 0], y[:8]), r"images \(N, ...\) are expected, not a tensor of shape \(8,\)"),
    "triples": (
        lambda x, y: [(x, y, y)],
        r"cannot run on input 0 of shape \(\d+, 3, 8, 8\) and type float32; input 1 of",
    ),
    "dicts without labels": (lambda x, y: [{"x": x, "z": y}], "a batch must be .*not a dict of 'x', 'z'"),
    "a dict without labels": (lambda x, y: {"x": x, "z": y}, "a pair of tensors .*not a dict of 'x', 'z'"),
    "a loader of dicts": (lambda x, y: DataLoader(Rows()), "a batch must be .*not a dict of 'image', 'kind'"),
    "numpy": (lambda x, y: (x.numpy(), y.numpy()), "a batch must be .*not a ndarray"),
    "a data set": (lambda x, y: TensorDataset(x, y), "wrap a Dataset in a DataLoader"),
    "images alone": (lambda x, y: x, r"not a tensor of shape \(200, 3, 8, 8\)"),
    "a generator": (lambda x, y: zip(x.split(10), y.split(10), strict=True), "iterated over once"),
    "none at all": (lambda x, y: None, "not a NoneType"),
    "a batch of fewer labels": (lambda x, y: [(x[:9], y[:9]), (x[:9], y[:8])], "9 images and 8 labels"),
    "wrong channels": (lambda x, y: (x[:, :2], y), r"cannot run on images of shape \(\d+, 2, 8, 8\)"),
    "infinite labels": (
        lambda x, y: (x, torch.where(y == 3, torch.inf, y.float())),
        "whole numbers; these are float32",
    ),
    "sparse": (lambda x, y: (x.flatten(1).to_sparse(), y), "dense tensors are expected"),
    "nested": (lambda x, y: (torch.nested.nested_tensor([*x]), y), "dense tensors are expected"),
    "single images": (lambda x, y: DataLoader(TensorDataset(x, y), None), r"not \(\); give batches"),
    "integers": (lambda x, y: (x.to(torch.uint8), y), "cannot run on images of shape .* type uint8"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_data_that_are_refused(name, capfd):
    (make, message), (x, y), model = BAD_DATA[name], data(), network()
    for call in (
        lambda given: counts(model, given, "auto"),
        lambda given: counts(model, given, "torch"),
        lambda given: clean_accuracy(model, given),
    ):
        with pytest.raises(UserError, match=message) as caught:
            call(make(x, y))
        assert len(str(caught.value).splitlines()) == 1
    assert "Traceback" not in "".join(capfd.readouterr())


class Giving(nn.Module):
    """A network that gives something else than logits."""

    def __init__(self, what):
        super().__init__()
        self.body, self.what = network(), what

    def forward(self, x):
        return self.what(self.body(x), x)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda h, x: h[:, :, None, None], r"not \(\d+, 10, 1, 1\) float32"),
        (lambda h, x: h[:, :1], r"2 classes or more.*not \(\d+, 1\)"),
        (lambda h, x: h[:, 0], r"not \(\d+,\)"),
        (lambda h, x: h.argmax(1), r"not \(\d+,\) int64"),
        (lambda h, x: h > 0, r"not \(\d+, 10\) bool"),
        (lambda h, x: h.repeat(2, 1), r"not \(\d+, 10\)"),
        (lambda h, x: h.mean(), r"not \(\)"),
        (lambda h, x: ("a", h), "not a tuple of 2"),
        (lambda h, x: [], "not a list of 0"),
        (lambda h, x: {"a": h, "b": h}, "not a dict of 'a', 'b'"),
        (lambda h, x: type("Output", (), {"scores": h})(), "not a Output"),
    ],
)
def test_outputs_that_are_refused(what, message):
    model = Giving(what)
    for call in (
        lambda: counts(model, data(), "auto"),
        lambda: counts(model, data(), "torch"),
        lambda: clean_accuracy(model, data()),
    ):
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert len(str(caught.value).splitlines()) == 1


# ---- numbers that are not finite ------------------------------------------------------------------------------------


def not_finite(where: str, value: float) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 10)).eval()
    with torch.no_grad():
        if where == "first":
            model[0].weight[2, 1, 1, 1] = value
        elif where == "bias":
            model[0].bias[3] = value
        elif where == "last":
            model[4].weight[3] = value
        else:
            model[4].bias[0] = value
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["first", "bias", "last", "last bias"])
def test_numbers_that_are_not_finite_are_counted_alike_and_said(where, value):
    model, (x, y), found = not_finite(where, value), data(), []
    with torch.no_grad():
        plain = model(x)
    for engine in ENGINES:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found.append(counts(model, (x, y), engine))
        said = any(w.category is OutputWarning and "NaN or infinite" in str(w.message) for w in caught)
        assert said != bool(plain.isfinite().all())
    assert found[0] == found[1]
    wrong = int(((plain.argmax(1) == y) & ~plain.isnan().any(1)).sum())
    assert clean_accuracy(model, (x, y)) == wrong / 200


def test_images_that_are_not_finite():
    model, (x, y) = network(), data()
    x[17], x[18, 0, 0, 0], x[19] = float("nan"), float("inf"), 3e38
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert counts(model, (x, y), "auto") == counts(model, (x, y), "torch")


# ---- the same images for every chip ---------------------------------------------------------------------------------


class Changing:
    """A loader that yields other images in each pass."""

    def __init__(self, change: str):
        self.change, self.passes = change, 0
        self.x, self.y = data(2000)

    def __iter__(self):
        self.passes += 1
        generator = torch.Generator().manual_seed(self.passes)
        x, y = self.x, self.y
        if self.change == "augmented":
            x = x + 0.5 * torch.randn(x.shape, generator=generator)
        elif self.change == "dropped":
            order = torch.randperm(len(x), generator=generator)[:1920]
            x, y = x[order], y[order]
        else:
            order = torch.randperm(len(x), generator=generator)
            x, y = x[order], y[order]
        return zip(x.split(100), y.split(100), strict=True)


@pytest.mark.parametrize("change", ["augmented", "dropped"])
def test_a_loader_that_gives_other_images_at_each_pass(change):
    model = network()
    for engine in ENGINES:
        loader = Changing(change)
        with pytest.warns(DataWarning, match="other images in each pass"):
            kept = evaluate(convert(model, HALF), loader, 5, engine=engine, progress=False)
        with pytest.raises(UserError, match="yields other images in each pass"):
            evaluate(convert(model, HALF), loader, 5, engine=engine, memory=LITTLE, chunk=1, progress=False)
        with pytest.warns(DataWarning):
            again = evaluate(convert(model, HALF), loader, 5, engine=engine, progress=False)
        with pytest.raises(UserError):
            kept.minus(again)


def test_a_loader_that_only_shuffles_is_read_anew_where_it_does_not_fit():
    model, loader = network(), Changing("shuffled")
    wanted = counts(model, data(2000), "torch")
    for engine in ENGINES:
        found = evaluate(convert(model, HALF), loader, 5, engine=engine, memory=LITTLE, chunk=2, progress=False)
        assert found.table.correct.tolist() == wanted


def test_pieces_of_a_loader_fit_the_memory():
    (x, y), size = data(), 200 * (3 * 8 * 8 * 4 + 8)
    loader = DataLoader(TensorDataset(x, y), batch_size=10)
    (whole,) = Data(loader, memory=size).pieces()
    assert len(whole) == 20
    for memory, count in ((size - 1, 3), (size // 2, 4), (1, 20)):
        pieces = list(Data(loader, memory=memory).pieces())
        assert len(pieces) == count
        assert torch.equal(torch.cat([images for piece in pieces for images, _ in piece]), x)
        assert all(
            sum(len(labels) for _, labels in piece) * size // 200 <= max(memory // 2, size // 20) for piece in pieces
        )


@pytest.mark.parametrize("engine", ENGINES)
def test_images_of_several_sizes(engine):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()
    batches = [(torch.randn(10, 3, n, n), torch.randint(0, 10, (10,))) for n in (8, 9, 12)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EngineWarning)
        parts = [counts(model, [batch], "torch") for batch in batches]
        assert counts(model, batches, engine) == np.sum(parts, axis=0).tolist()


def test_looking_across_a_batch():
    x = torch.randn(8, 4)
    for across in (lambda t: t - t.mean(0), lambda t: t / len(t), lambda t: t.view(8, 4)):
        assert looks_across(across, x, across(x))
    assert not looks_across(lambda t: t @ torch.ones(4, 3), x, x @ torch.ones(4, 3))
    assert not looks_across(lambda t: t - t.mean(0), x[:1], x[:1])


# ---- what save= holds -----------------------------------------------------------------------------------------------


def slower(model: nn.Module) -> nn.Module:
    """The same tensors, another network."""
    model[2] = nn.LeakyReLU(0.5)
    return model


def biased(bias: float) -> nn.Module:
    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network()
            self.register_buffer("bias", torch.full((10,), bias), persistent=False)

        def forward(self, x):
            return self.body(x) + self.bias

    return Biased()


def changed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model[1].weight[0, 0] += 1
    return model


@pytest.mark.parametrize(
    ("what", "other"),
    [
        ("seed", lambda: {"analog": convert(network(), HALF, seed=1)}),
        ("device", lambda: {"analog": convert(network(), LogNormalVariation(0.4))}),
        ("device", lambda: {"analog": convert(network(), LogNormalVariation(0.5, "mean"))}),
        ("model", lambda: {"analog": convert(changed(network()), HALF)}),
        ("model", lambda: {"analog": convert(network(), HALF, exclude=["1"])}),
        ("model", lambda: {"analog": convert(slower(network()), HALF)}),
        ("images", lambda: {"given": data(150)}),
        ("data", lambda: {"given": (data()[0] + 1, data()[1])}),
        ("data", lambda: {"given": (data()[0], 9 - data()[1])}),
        ("settings", lambda: {"first_layer": 1}),
        ("settings", lambda: {"precision": "bfloat16"}),
        ("settings", lambda: {"engine": "torch"}),
        ("settings", lambda: {"prepare": lambda model: None}),
    ],
)
def test_saved_chips_of_another_simulation_are_refused(tmp_path, monkeypatch, what, other):
    monkeypatch.setattr(core, "multiplies_bfloat16", lambda: True)  # slowly, on some CPUs
    usual = {"analog": convert(network(), HALF), "given": data()}

    def run(chips: int, analog: nn.Module, given: object, **options: object) -> list[float]:
        return evaluate(analog, given, chips, save=tmp_path / "a.b.csv", progress=False, **options).accuracies.tolist()

    first = run(3, **usual)
    before = (tmp_path / "a.b.csv").read_bytes()
    with pytest.raises(UserError, match=rf"a\.b\.csv holds chips of another simulation \({what}: "):
        run(4, **{**usual, **other()})
    assert (tmp_path / "a.b.csv").read_bytes() == before
    assert run(4, **usual)[:3] == first


def test_buffers_that_are_not_saved_belong_to_the_network(tmp_path):
    evaluate(convert(biased(0.0), HALF), data(), 2, save=tmp_path / "a.csv", progress=False)
    with pytest.raises(UserError, match=r"another simulation \(model: "):
        evaluate(convert(biased(1.0), HALF), data(), 2, save=tmp_path / "a.csv", progress=False)


def test_the_columns_of_a_result():
    result = evaluate(convert(network(), HALF, seed=3), data(), 4, start=2, progress=False)
    table = result.table
    assert list(table.columns) == ["sample", "correct", "images", "accuracy", "seed", "data", "device", "model"]
    assert table["sample"].tolist() == [2, 3, 4, 5]
    assert (table["accuracy"] == table["correct"] / 200).all()
    assert set(table["device"]) == {"lognormal(on=weight, sigma=0.5, centre=median, resample=chip)"}
    assert table[["data", "model"]].nunique().tolist() == [1, 1]
    assert np.isfinite(table["accuracy"]).all()
    assert set(itertools.chain(table["seed"])) == {3}
