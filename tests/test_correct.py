"""`correctnet.correct`: the whole method in one call, against the chain by hand and against the workflow's stages."""

import base64
import copy
import re
import signal
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from stopping import Stopped, stopping_loss
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from correctnet import (
    Device,
    LogNormalVariation,
    UserError,
    Variation,
    clean_accuracy,
    compensate,
    convert,
    correct,
    evaluate,
    find_candidates,
    fit_compensators,
    overhead,
    search,
    suppress,
)
from correctnet.datasets.base import Split
from correctnet.evaluation.montecarlo import EngineWarning
from correctnet.files import storage
from correctnet.methods.compensation import compensation_modules
from correctnet.methods.compensation_training import CompensationWarning
from correctnet.pipeline.models import read_network
from correctnet.pipeline.runtime import Runtime
from correctnet.pipeline.stages import compensate as compensate_stage
from correctnet.pipeline.stages import evaluate_chips, pretrain
from correctnet.pipeline.stages import search as search_stage
from correctnet.pipeline.stages import suppress as suppress_stage
from correctnet.pipeline.stages import sweep as sweep_stage
from correctnet.settings import Settings, Training
from correctnet.training.loop import fit

HALF, WIDE = LogNormalVariation(0.5), LogNormalVariation(1.0)
OPTIONS = {
    "suppress": {"epochs": 1, "batch": 50, "beta": 1e-3},
    "sweep": {"threshold": 1.0, "chips": 3, "images": 50},
    "search": {"strategy": "greedy", "ratios": (0.0, 0.5)},
    "compensate": {"epochs": 2, "batch": 50},
}
TRIED = {**OPTIONS, "search": {"evaluations": 2, "episodes": 3, "chips": 2, "images": 50, "train_images": 100}}


@pytest.fixture
def trained(tiny, blobs):
    fit(tiny, blobs, Training(epochs=6, batch=32), seed=0, quiet=True)
    return tiny


@pytest.fixture
def parts(blobs):
    """Training, validation and test images."""
    return [Split(blobs.images[a:b], blobs.labels[a:b]) for a, b in ((0, 150), (150, 220), (220, 300))]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def called(network, parts, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompensationWarning)
        return correct(network, *parts, **{"limit": 0.5, "chips": 4, "progress": False, **OPTIONS, **options})


@pytest.mark.parametrize(
    ("options", "device"),
    [(OPTIONS, WIDE), (TRIED, WIDE), (TRIED, Device.preset("pcm-hermes-1", time=3600.0).stuck(off=0.1).at(3.0))],
    ids=["greedy", "reinforce", "measured"],
)
def test_it_is_the_chain_by_hand(trained, parts, options, device):
    train, validation, test = parts
    before = copy.deepcopy(trained.state_dict())
    found = called(trained, parts, variation=device, seed=7, **options)
    assert same(before, trained.state_dict()), "the network is left as it was"
    quiet = {"seed": 7, "progress": False}
    suppressed = suppress(trained, train, device, **quiet, **options["suppress"])
    few = {k: v for k, v in options["sweep"].items() if k != "images"}
    swept = find_candidates(suppressed, validation.take(50), device, original=trained, **quiet, **few)
    built = {"batch": 50}
    placed = search(
        suppressed, swept.candidates, *parts[:2], device, limit=0.5, compensate=built, **quiet, **options["search"]
    )
    assert found.candidates == swept.candidates
    assert found.candidates, "something is searched"
    assert (found.search.filters, found.search.mean) == (placed.filters, placed.mean)
    assert found.search.log.drop(columns="seconds").equals(placed.log.drop(columns="seconds"))
    pd.testing.assert_frame_equal(found.sweep.table(), swept.table())
    corrected = suppressed
    if placed.filters:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CompensationWarning)
            corrected = fit_compensators(
                suppressed, placed.filters, train.images, train.labels, device, validation=validation,
                stage="compensate", seed=7, quiet=True, **options["compensate"],
            )  # fmt: skip
    assert same(found.network.state_dict(), corrected.state_dict())
    assert same(found.suppressed.state_dict(), suppressed.state_dict())
    for row, network in (("unprotected", trained), ("suppressed", suppressed), ("corrected", corrected)):
        expected = evaluate(convert(network, device, 7), test, 4, progress=False)
        pd.testing.assert_frame_equal(found.results[row].table, expected.table)
        line = found.table.set_index("row").loc[row]
        accuracies = expected.accuracies
        assert line["clean"] == found.clean[row] == clean_accuracy(network, test)
        assert (line["mean"], line["std"]) == pytest.approx((accuracies.mean(), accuracies.std(ddof=1)))
        assert line["yield"] == np.mean(accuracies >= 1.0 * clean_accuracy(trained, test))
        assert (line["chips"], line["images"]) == (4, 80)
        assert line["ci_low"] < line["mean"] < line["ci_high"]
    assert list(found.table["overhead"]) == [0, 0, overhead(suppressed, placed.filters)]
    assert list(found.table["layers"]) == [0, 0, len(placed.filters)]


def test_it_gives_the_numbers_of_the_workflow(tmp_path):
    settings = Settings.model_validate(
        {
            "seed": 3,
            "data": {"dataset": "digits", "validation": 0.15},
            "pretrain": {"epochs": 2},
            "suppress": {"epochs": 1},
            "sweep": {"threshold": 1.0, "chips": 2, "images": 50},
            "search": {"evaluations": 2, "episodes": 3, "train_images": 64, "chips": 2, "images": 50},
            "compensate": {"epochs": 1},
            "evaluate": {"images": 60},
        }
    )
    runtime = Runtime(quiet=True)
    out = {name: tmp_path / name for name in ("pretrain", "suppress", "sweep", "search", "compensate")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompensationWarning)
        pretrain(settings, out["pretrain"], runtime)
        suppress_stage(settings, out["pretrain"], out["suppress"], runtime)
        sweep_stage(settings, out["pretrain"], out["suppress"], out["sweep"], runtime)
        best = search_stage(settings, out["suppress"], out["sweep"] / "candidates.json", 0.2, out["search"], runtime)
        compensate_stage(settings, out["suppress"], [out["search"] / "best.json"], out["compensate"], runtime)
    network, _ = read_network(out["pretrain"])
    data = runtime.load(settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompensationWarning)
        found = correct(
            network,
            data.train,
            data.validation,
            data.test.take(60),
            limit=0.2,
            chips=3,
            seed=3,
            suppress={"epochs": 1},
            sweep={"threshold": 1.0, "chips": 2, "images": 50},
            search={"evaluations": 2, "episodes": 3, "train_images": 64, "chips": 2, "images": 50},
            compensate={"epochs": 1},
            progress=False,
        )
    assert found.search.summary() == best
    for row, stage in (("unprotected", "pretrain"), ("suppressed", "suppress"), ("corrected", "compensate")):
        result = evaluate_chips(settings, out[stage], tmp_path / f"{row}.csv", runtime, chips=3)
        assert found.results[row].table["correct"].tolist() == result.table["correct"].tolist()
    assert same(found.network.state_dict(), read_network(out["compensate"])[0].state_dict())


@pytest.mark.parametrize("when", [2, 5, 8])  # in suppression, in the search, in the training of the compensators
def test_a_call_that_was_stopped_is_continued(trained, parts, tmp_path, when):
    whole = called(trained, parts, **TRIED)
    stopping, calls = stopping_loss(at=when)
    with pytest.raises(Stopped):
        called(trained, parts, loss=stopping, work=tmp_path, **TRIED)
    resumed = called(trained, parts, loss=stopping, work=tmp_path, **TRIED)
    assert same(whole.network.state_dict(), resumed.network.state_dict())
    pd.testing.assert_frame_equal(whole.table, resumed.table)
    assert whole.search.log.drop(columns="seconds").equals(resumed.search.log.drop(columns="seconds"))
    before, files = len(calls), sorted(path.name for path in tmp_path.rglob("*"))
    again = called(trained, parts, loss=stopping, work=tmp_path, **TRIED)
    assert len(calls) == before, "a finished call trains nothing"
    assert sorted(path.name for path in tmp_path.rglob("*")) == files
    assert same(again.network.state_dict(), whole.network.state_dict())
    other = called(trained, parts, work=tmp_path, **{**TRIED, "compensate": {"epochs": 1, "batch": 50}})
    fresh = called(trained, parts, **{**TRIED, "compensate": {"epochs": 1, "batch": 50}})
    assert same(other.network.state_dict(), fresh.network.state_dict())


def test_loaders_without_suppression_and_with_a_device_of_one_s_own(trained, parts):
    class Additive(Variation):
        """A device that does not give its moments."""

        def sample(self, weight, seed, layer, sample):
            generator = torch.Generator().manual_seed(hash((seed, layer, sample)))
            return weight + 0.2 * torch.randn(weight.shape, generator=generator)

        def describe(self):
            return {"model": "additive", "sigma": 0.2}

    train, validation, test = (TensorDataset(part.images, part.labels) for part in parts)
    loaders = [DataLoader(train, 50, shuffle=True), DataLoader(validation, 32), DataLoader(test, 32)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # devices without a kernel run through torch
        found = called(trained, loaders, variation=Additive(), suppress=False)
    assert list(found.results) == ["unprotected", "corrected"]
    assert found.suppressed is None
    expected = evaluate(convert(trained, Additive()), parts[2], 4, engine="torch", progress=False)
    assert found.results["unprotected"].table["correct"].tolist() == expected.table["correct"].tolist()
    assert list(compensation_modules(found.network)) == list(found.search.filters)
    assert found.search.filters


def test_the_caller_s_generators_are_left_as_they_were(trained, parts):
    class Unsized:
        def __init__(self, part):
            self.loader = DataLoader(TensorDataset(part.images, part.labels), 50)

        def __iter__(self):
            yield from self.loader  # draws a seed for workers in each pass

    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = called(trained, [Unsized(part) for part in parts])
    assert found.search.filters
    assert torch.equal(torch.get_rng_state(), before)


class Smooth(nn.Module):
    """An activation that the core does not run."""

    def forward(self, x):
        return torch.atan(x)


@pytest.mark.filterwarnings("default::UserWarning")
def test_warnings_are_given_once(parts):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), Smooth(), nn.Linear(8, 3), nn.PReLU(3))
    network.table = nn.Parameter(torch.zeros(2, 2))  # a matrix that cannot carry variation
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", CompensationWarning)
        correct(network, *parts, limit=0.5, chips=2, progress=False, **OPTIONS)
    assert sum("no variation on table" in str(w.message) for w in caught) == 1
    assert sum(w.category is EngineWarning for w in caught) == 1


def test_without_candidates_the_corrected_network_is_the_suppressed_one(trained, parts):
    found = called(trained, parts, sweep={"threshold": 0.01, "chips": 2}, **{"variation": LogNormalVariation(0.01)})
    assert found.candidates == ()
    assert found.search.filters == {}
    assert same(found.network.state_dict(), found.suppressed.state_dict())
    assert found.judged is None
    assert "compensated: no layer" in str(found)


def test_the_report_and_the_plot_show_the_table(trained, parts, tmp_path):
    found = called(trained, parts, **TRIED)
    found.report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page)
    for line in found.table.to_dict("records"):
        for key in ("clean", "mean"):
            assert any(f"{line[key]:.2%}" in cell for cell in cells)
        assert f"{line['yield']:.1%}" in cells
        assert f"{line['chips']} × {line['images']}" in cells
    assert ", ".join(found.candidates) in page
    pictures = re.findall(r'src="data:image/svg\+xml;base64,([^"]*)"', page)
    assert len(pictures) == 3
    assert all(b"</svg>" in base64.b64decode(picture) for picture in pictures)
    assert not re.search(r'(?:src|href)="(?!data:)', page), "it needs no other file"
    ax = found.plot()
    means = {round(float(x), 9) for line in ax.lines for x in line.get_xdata() if len(line.get_xdata()) == 1}
    assert {round(r.mean, 9) for r in found.results.values()} <= means
    assert [text.get_text() for text in ax.get_yticklabels()] == ["unprotected", "suppressed", "corrected (CorrectNet)"]
    swept, searched = found.plot(what="candidates"), found.plot(what="search")
    means = found.sweep.table().groupby("layer")["accuracy"].mean()
    assert swept.lines[0].get_ydata().tolist() == means.tolist()
    assert searched.containers[0].lines[0].get_ydata().tolist() == found.search.log["mean"].tolist()
    with pytest.raises(UserError, match="plot: what must be 'rows', 'candidates' or 'search', not 'layers'"):
        found.plot(what="layers")
    with pytest.raises(UserError, match=r"an HTML file is written; end the name with \.html"):
        found.report(tmp_path / "report.pdf")


def test_one_chip_has_no_interval(trained, parts, tmp_path):
    found = called(trained, parts, chips=1)
    assert found.table["std"].isna().all()
    found.report(tmp_path / "report.html")
    assert "1 chip, no interval" in (tmp_path / "report.html").read_text()


BAD = [
    ({"limit": 3}, "correct: limit is a fraction above 0 and at most 1 (0.03, not 3), not 3"),
    ({"chips": 0}, "correct: chips must be at least 1, not 0"),
    ({"seed": 1.5}, "correct: the seed must be a whole number, not 1.5"),
    ({"suppress": 3}, "correct: suppress is True, False or settings by name, not 3"),
    ({"suppress": {"epoch": 3}}, "correct: suppress: epoch: unknown key (did you mean 'epochs'?)"),
    ({"sweep": 5}, "correct: sweep is settings by name, such as {'chips': 20}, not 5"),
    ({"search": {"limits": [0.1]}}, "correct: search: limits: one search has one; give it as limit"),
    ({"compensate": {"epochs": "5"}}, "correct: compensate: epochs: a number is expected (write 5), not '5'"),
    ({"variation": 0.5}, "convert: a device model such as LogNormalVariation(0.5) is expected, not 0.5"),
]


@pytest.mark.parametrize(("change", "line"), BAD)
def test_bad_settings(trained, parts, change, line):
    with pytest.raises(UserError) as error:
        called(trained, parts, **change)
    assert str(error.value) == line


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda a, b, c: ([], b, c), "correct: train: the data holds no images"),
        (lambda a, b, c: (a, b, c.images), "correct: test: a pair of tensors (images, labels), or a loader that yields "
         "such pairs and can be iterated over many times, is expected, not a tensor of shape (80, 1, 8, 8); wrap a "
         "Dataset in a DataLoader"),
        (lambda a, b, c: (a, (b.images, b.labels + 1), c), "correct: validation: there is a label 3, and the network "
         "has 3 classes"),
        (lambda a, b, c: (Split(a.images, a.labels + 5), b, c), "correct: train: there is a label 7, and the network "
         "has 3 classes"),
        (lambda a, b, c: (a, b, (c.images, c.labels[:5])), "correct: test: 80 images and 5 labels"),
    ],
)  # fmt: skip
def test_data_that_are_refused_before_any_work(trained, parts, monkeypatch, change, line):
    with pytest.raises(UserError) as error:
        called(trained, change(*parts))
    assert str(error.value) == line


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda m: convert(m, HALF), "convert: the model carries variation already; convert the original one"),
        (lambda m: compensate(m, {"4": 2}), "correct: the network is compensated already; give the original one"),
        (lambda m: nn.Flatten(), "convert: the model has no layer left to convert"),
        (lambda m: "resnet18", "convert: a torch.nn.Module is expected, not a str"),
    ],
)
def test_networks_that_are_refused(trained, parts, make, line):
    with pytest.raises(UserError) as error:
        called(make(trained), parts)
    assert str(error.value) == line


def test_work_that_is_in_use_or_a_file(trained, parts, tmp_path):
    with storage.exclusive(tmp_path / "used"), pytest.raises(UserError, match="is already running this stage"):
        called(trained, parts, work=tmp_path / "used")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; the name of a folder is expected"):
        called(trained, parts, work=tmp_path / "file")


KILLED = """
import os, signal, sys
import torch
import torch.nn.functional as F
from torch import nn
from correctnet import LogNormalVariation, correct, save

when, work, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
torch.manual_seed(0)
labels = torch.arange(300) % 3
images = torch.randn(3, 20)[labels] + torch.randn(300, 20)
network = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3))
parts = [(images[a:b], labels[a:b]) for a, b in ((0, 150), (150, 220), (220, 300))]
optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
for _ in range(100):
    optimizer.zero_grad()
    F.cross_entropy(network(images), labels).backward()
    optimizer.step()
calls = 0

def loss(outputs, targets):
    global calls
    calls += 1
    if calls == when:
        os.kill(os.getpid(), signal.SIGKILL)
    return F.cross_entropy(outputs, targets)

found = correct(
    network, *parts, LogNormalVariation(1.0), limit=0.9, chips=3, loss=loss, work=work or None, progress=False,
    suppress={"epochs": 2, "batch": 50}, sweep={"threshold": 1.0, "chips": 2},
    search={"evaluations": 2, "episodes": 3, "chips": 2}, compensate={"epochs": 2, "batch": 50},
)
found.table.to_csv(out + ".csv")
save(found.network, out)
print(calls)
"""


@pytest.mark.slow
def test_a_process_that_is_killed_three_times_ends_with_the_same_files(tmp_path):
    def run(when, work, out):
        command = [sys.executable, "-W", "ignore", "-c", KILLED, str(when), str(work), str(tmp_path / out)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    whole = run(0, "", "whole")
    assert whole.returncode == 0, whole.stderr
    for when in (5, 4, 8):  # in the second epoch of suppression, then in the search, then in the compensators
        assert run(when, tmp_path / "work", "killed").returncode == -signal.SIGKILL
    last = run(0, tmp_path / "work", "killed")
    assert last.returncode == 0, last.stderr
    assert int(last.stdout) < int(whole.stdout) / 2
    for name in (".csv", "/model.safetensors"):
        assert (tmp_path / f"whole{name}").read_bytes() == (tmp_path / f"killed{name}").read_bytes()
