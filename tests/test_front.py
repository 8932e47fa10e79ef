"""Layers in digital hardware: which ones, what they cost, and every stage of the method behind them."""

import json

import pandas as pd
import pytest
import torch
from by_hand import run, succeed
from torch import nn

from correctnet.crossbar.convert import convert
from correctnet.devices.lognormal import LogNormalVariation
from correctnet.errors import UserError
from correctnet.evaluation.montecarlo import evaluate
from correctnet.evaluation.simulation import Simulation
from correctnet.methods.candidates import find_candidates, sensitivity, sweep
from correctnet.methods.compensation import compensate, cost
from correctnet.methods.compensation_training import fit_compensators, prepare
from correctnet.methods.front import digital_share, front_layers
from correctnet.methods.placement import make_problem, search
from correctnet.pipeline.specs import STAGES
from correctnet.settings import Compensate, Search, Settings

SILENT, DEVICE = Simulation(progress=False), LogNormalVariation(0.5)
FIRST, SECOND, LAST = "0.layer", "3.layer", "4"  # of the fixture `tiny`
PARAMETERS = 4 * 9 + 4 + 8 + 64 * 8 + 8 + 8 * 3 + 3


class Backwards(nn.Module):
    """Registers its layers in another order than it runs them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.body, self.stem = nn.Linear(6, 3), nn.Linear(8, 6), nn.Linear(64, 8)

    def forward(self, x):
        return self.head(self.body(self.stem(x.flatten(1)).relu()).relu())


def test_layers_are_counted_in_the_order_in_which_they_run(tiny, blobs):
    assert [front_layers(tiny, blobs, k) for k in (0, 1, 2)] == [(), (FIRST,), (FIRST, SECOND)]
    assert front_layers(Backwards(), blobs, 2) == ("stem", "body")
    assert front_layers(convert(tiny, DEVICE), blobs, 1) == (FIRST,)
    for count in (-1, 3):
        with pytest.raises(UserError, match=f"0 to 2 can be digital, .* not {count}"):
            front_layers(tiny, blobs, count)


@pytest.mark.parametrize("count", [1, 2])
def test_variation_begins_after_the_digital_layers(tiny, blobs, count):
    """The same chips as in the sweep of Fig. 9, whose first layers are nominal."""
    front = convert(tiny, DEVICE, exclude=front_layers(tiny, blobs, count))
    found = evaluate(front, blobs, 4, progress=False)
    expected = evaluate(convert(tiny, DEVICE), blobs, 4, first_layer=count, progress=False)
    assert found.table["correct"].tolist() == expected.table["correct"].tolist()
    assert found.table["correct"].nunique() > 1


def test_the_share_of_digital_layers(tiny):
    assert digital_share(tiny, ()) == 0
    assert digital_share(tiny, FIRST) == 36 / PARAMETERS
    assert digital_share(tiny, ["0", LAST]) == (36 + 24) / PARAMETERS, "a module stands for the layers in it"
    assert digital_share(tiny, [FIRST, FIRST, "0"]) == 36 / PARAMETERS, "no layer counts twice"
    for network in (convert(tiny, DEVICE), compensate(tiny, {FIRST: 2}), convert(compensate(tiny, {FIRST: 2}), DEVICE)):
        assert digital_share(network, "0") == 36 / PARAMETERS
    with pytest.raises(UserError, match="the network has no layer '5' "):
        digital_share(tiny, ["5"])


def test_the_share_of_single_weights():
    lstm = nn.Sequential(nn.LSTM(3, 4))
    assert digital_share(lstm, ["0.weight_hh_l0"]) == 4 * 4 * 4 / sum(p.numel() for p in lstm.parameters())


def test_digital_layers_are_no_candidates(tiny, blobs):
    whole = sweep(convert(tiny, DEVICE), blobs, 1.0, 1.0, chips=3, simulation=SILENT)
    assert whole.candidates == (FIRST, SECOND, LAST)
    assert whole.digital == ()
    found = find_candidates(tiny, blobs, DEVICE, original=1.0, threshold=1.0, chips=3, exclude="0", simulation=SILENT)
    expected = sweep(convert(tiny, DEVICE, exclude=[FIRST]), blobs, 1.0, 1.0, chips=3, simulation=SILENT)
    assert found.names == expected.names == whole.names
    assert found.digital == (FIRST,)
    assert found.candidates == expected.candidates == (SECOND, LAST)
    assert sorted(found.results) == [2, 3]
    for i in (2, 3):  # with variation from layer i on, the first one is nominal in any case
        assert expected.results[i].table["correct"].tolist() == whole.results[i].table["correct"].tolist()
    assert set(expected.table()["name"]) == {SECOND, LAST}


def test_a_digital_layer_in_the_middle(tiny, blobs):
    found = sweep(convert(tiny, DEVICE, exclude=[SECOND]), blobs, 1.0, 1.0, chips=3, simulation=SILENT)
    assert found.candidates == (FIRST, LAST)
    assert sorted(found.results) == [1, 3]
    alone = evaluate(convert(tiny, DEVICE, exclude=[SECOND]), blobs, 3, progress=False)
    assert found.results[1].table["correct"].tolist() == alone.table["correct"].tolist()


def test_the_cost_of_each_other_layer(tiny, blobs):
    whole = sensitivity(tiny, blobs, DEVICE, chips=2, progress=False)
    found = sensitivity(tiny, blobs, DEVICE, chips=2, exclude=[SECOND], progress=False)
    kept = whole[whole["name"] != SECOND].reset_index(drop=True)
    columns = ["layer", "name", "weights", "sample", "correct"]
    pd.testing.assert_frame_equal(found[columns], kept[columns])


def test_compensators_train_behind_digital_layers(tiny, blobs):
    analog, _, hooks = prepare(tiny, {SECOND: 2}, Compensate(), DEVICE, 0, exclude=[FIRST])
    hooks.before_batch(0)
    assert torch.equal(analog[0].layer.weight, tiny[0].layer.weight), "exact on the chip of the batch"
    assert not torch.equal(analog[3].layer.original.weight, tiny[3].layer.weight)
    images, labels = blobs.images, blobs.labels
    how = {"validation": blobs, "epochs": 1, "batch": 50, "quiet": True}
    found = [fit_compensators(tiny, {SECOND: 2}, images, labels, DEVICE, exclude=e, **how) for e in ((), FIRST)]
    weights = [model[3].layer.generator.weight for model in found]
    assert not torch.equal(*weights), "the compensators have seen other chips"


def test_the_limit_holds_for_digital_layers_and_compensators_together(tiny, blobs):
    def problem(limit):
        how = Search(), Compensate(), DEVICE, 0, lambda: (blobs, blobs), SILENT
        return make_problem(tiny, [SECOND, LAST], limit, *how, digital=(FIRST,))

    share = 36 / PARAMETERS
    assert problem(0.5).overhead((0, 0)) == share
    assert problem(0.5).overhead((2, 0)) == pytest.approx(share + cost(tiny[3].layer, 2) / PARAMETERS)
    with pytest.raises(UserError, match=r"the digital layers 0\.layer are 6\.05% of the network.* of 6\.00%"):
        problem(0.06)
    how = {"exclude": FIRST, "limit": 0.2, "strategy": "greedy", "progress": False}
    found = search(tiny, [SECOND, LAST], blobs, blobs, DEVICE, **how)
    own = sum(cost(layer, found.filters.get(name, 0)) for name, layer in ((SECOND, tiny[3].layer), (LAST, tiny[4])))
    assert own
    assert found.overhead == pytest.approx(share + own / PARAMETERS)
    assert found.overhead <= 0.2


def test_settings_without_digital_layers_are_what_they_were():
    """Canonical strings are what stages rerun by."""
    front = Settings.model_validate({"digital": {"front": 1}})
    for stage, spec in STAGES.items():
        assert "digital" not in json.loads(spec.canonical(Settings()))
        found = json.loads(spec.canonical(front)).get("digital")
        assert found == (None if stage in ("pretrain", "suppress") else {"front": 1})
        assert spec.canonical(spec.parse(spec.canonical(front), stage)) == spec.canonical(front)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A network for the digits."""
    folder = tmp_path_factory.mktemp("front")
    succeed("pretrain", "--quiet", "--threads", 1, "--epochs", 3, "--batch", 64, "--out", folder / "pretrain")
    return folder


def test_every_stage_behind_digital_layers(trained):
    few, pre = ["--quiet", "--threads", 1, "--front", 1], trained / "pretrain"
    chips = [*few, "--chips", 3, "--images", 50]
    share = 6 * 25 / (6 * 25 + 6 + 16 * 150 + 16 + 120 * 400 + 120 + 84 * 120 + 84 + 840 + 10)

    def table(model, *options):
        out = trained / "found.csv"
        succeed(
            "evaluate",
            "--quiet",
            "--threads",
            1,
            "--chips",
            3,
            "--images",
            50,
            *options,
            "--model",
            model,
            "--out",
            out,
        )
        return pd.read_csv(out)

    front = table(pre, "--front", 1)
    assert front["overhead"].tolist() == [share] * 3
    macs = [28 * 28 * 150, 100 * 2400, 48000, 120 * 84, 840]
    assert front["digital_macs"].tolist() == [macs[0] / sum(macs)] * 3
    assert "digital_macs" not in table(pre)
    named = table(pre, "--layers", "conv1")
    assert named["correct"].tolist() == front["correct"].tolist()
    assert table(pre)["correct"].tolist() != front["correct"].tolist()
    both = table(pre, "--front", 1, "--layers", "conv1,linear3")
    assert both["overhead"][0] == pytest.approx(share * (150 + 840) / 150)
    assert table(pre, "--front", 1, "--sigma", 0)["correct"][0] == table(pre, "--sigma", 0)["correct"][0]

    succeed("inject", *few, "--epochs", 1, "--batch", 64, "--pretrained", pre, "--out", trained / "inject")
    succeed("inject", *few[:-2], "--epochs", 1, "--batch", 64, "--pretrained", pre, "--out", trained / "whole")
    weights = [(trained / name / "model.safetensors").read_bytes() for name in ("inject", "whole")]
    assert weights[0] != weights[1]

    out = ["--pretrained", pre, "--base", pre, "--out", trained / "sweep"]
    succeed("sweep", *chips, "--threshold", 1, *out)
    found = json.loads((trained / "sweep" / "candidates.json").read_text())
    assert "conv1.layer" not in found["accuracy"]
    assert len(found["accuracy"]) == 4
    (trained / "candidates.json").write_text('{"candidates": ["conv2.layer"]}')
    place = ["--base", pre, "--candidates", trained / "candidates.json"]
    options = [*chips, "--strategy", "greedy", "--ratios", "0,0.5", *place]
    succeed("search", *options, "--limit", 0.03, "--out", trained / "search")
    best = json.loads((trained / "search" / "best.json").read_text())
    own = cost(nn.Conv2d(6, 16, 5), 8) / (150 / share)
    assert best["overhead"] == pytest.approx(share + own)
    refused = run("search", *options, "--limit", 0.002, "--out", trained / "none")
    assert refused.exit_code
    assert "the digital layers conv1.layer are 0.24% of the network" in refused.output
    train = [*few, "--batch", 64, "--epochs", 1]
    succeed("compensate", *train, "--base", pre, "--found", trained / "search" / "best.json", "--out", trained / "c")
    assert table(trained / "c", "--front", 1)["overhead"].tolist() == pytest.approx([share + own] * 3)
    assert table(trained / "c")["overhead"].tolist() == pytest.approx([own] * 3)
    succeed("sensitivity", *chips, "--model", trained / "c", "--out", trained / "s.csv")
    assert sorted(set(pd.read_csv(trained / "s.csv")["layer"])) == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("option", "said"), [(("--front", 5), "0 to 4 can be digital"), (("--layers", "conv3"), "no layer 'conv3'")]
)
def test_digital_layers_that_the_network_has_not(trained, option, said):
    result = run(
        "evaluate", "--quiet", *option, "--chips", 1, "--model", trained / "pretrain", "--out", trained / "x.csv"
    )
    assert result.exit_code
    assert said in result.output
