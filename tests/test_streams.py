"""One stream of randomness for each purpose, and chips of their own for all that trains, chooses and reports."""

import hashlib
import itertools
import json

import by_hand
import numpy as np
import pandas as pd
import pytest
import torch

from correctnet.devices.lognormal import LogNormalVariation
from correctnet.engine.engine import Engine
from correctnet.errors import UserError
from correctnet.evaluation import montecarlo
from correctnet.files import storage
from correctnet.methods import compensation_training, placement
from correctnet.noise import streams
from correctnet.pipeline.stages import evaluation
from correctnet.pipeline.stages import training as training_stages
from correctnet.training import loop as training


def test_a_seed_is_the_hash_of_where_it_is_used():
    digest = hashlib.sha256(b'[3, "batches", "pretrain", 7]').hexdigest()
    assert streams.seed_of(3, "batches", "pretrain", 7) == int(digest[:16], 16) // 2
    assert streams.seed_of(np.int64(3), "batches", "pretrain", 7) == streams.seed_of(3, "batches", "pretrain", 7)
    seeds = {
        streams.seed_of(seed, purpose, *where)
        for seed in (0, 1)
        for purpose in streams.PURPOSES
        for where in ((), ("a",), ("b",), ("a", 0), ("a", 1), (0.01,))
    }
    assert len(seeds) == 2 * len(streams.PURPOSES) * 6
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generators_begin_at_the_seed():
    seed = streams.seed_of(1, "split", "digits")
    expected = torch.rand(3, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(torch.rand(3, generator=streams.torch_generator(1, "split", "digits")), expected)
    assert streams.numpy_generator(1, "split", "digits").random() == np.random.default_rng(seed).random()


@pytest.mark.parametrize("use", [streams.seed_of, streams.torch_generator, streams.numpy_generator])
def test_a_purpose_that_is_not_registered(use):
    with pytest.raises(ValueError, match=r"no stream has the purpose 'batch' .known: .*batches"):
        use(0, "batch")


@pytest.mark.parametrize("where", [None, True, ("a",), float("nan"), torch.tensor(1)])
def test_a_place_that_has_no_text_of_its_own(where):
    with pytest.raises(ValueError, match="strings and finite numbers"):
        streams.seed_of(0, "batches", where)
    with pytest.raises(TypeError):
        streams.seed_of(0.5, "batches")


def test_global_generators_are_lent():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with streams.global_generators(0, "dropout", "fit", 0):
        drawn = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn, torch.rand(4, generator=streams.torch_generator(0, "dropout", "fit", 0)))
    with pytest.raises(KeyError), streams.global_generators(0, "dropout", "fit", 0):
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


def test_ranges_of_chips():
    assert streams.first_chip("test") == 0, "the chips of Table I are 0, 1, ..."
    ranges = [streams.chips(purpose, 2**28) for purpose in streams.CHIPS]
    assert len({r.start >> 28 for r in ranges}) == len(ranges) <= 16
    for a, b in itertools.combinations(ranges, 2):
        assert a.stop <= b.start or b.stop <= a.start
    assert max(r.stop for r in ranges) <= 2**32
    assert streams.chips("sweep", 3, 5) == range(streams.first_chip("sweep") + 5, streams.first_chip("sweep") + 8)
    assert streams.chip("train-inject", 2**28 - 1) == streams.first_chip("train-inject") + 2**28 - 1


@pytest.mark.parametrize(("count", "start"), [(2**28 + 1, 0), (1, 2**28), (2, 2**28 - 1), (1, -1)])
def test_a_range_of_chips_ends(count, start):
    with pytest.raises(UserError, match="for sweep: there are 268435456 for each purpose"):
        streams.chips("sweep", count, start)


def test_a_purpose_of_chips_that_is_not_there():
    with pytest.raises(ValueError, match="no chips have the purpose 'training'"):
        streams.chip("training", 0)


class Record:
    """What a run draws, by the command that runs and whether it trains at that moment."""

    def __init__(self, monkeypatch):
        self.command = self.training = ""
        self.chips: dict[str, set[tuple[int, int]]] = {}
        self.streams: list[tuple[str, int, tuple[object, ...]]] = []
        self.orders: dict[str, list[tuple[int, ...]]] = {}
        self._patch = monkeypatch

    def watch(self):
        """Listen to every draw: seeds of generators, chips through torch and through the core, orders of images."""
        seed_of, sample, randperm, fit = streams.seed_of, LogNormalVariation.sample, torch.randperm, training.fit

        def seeds(seed, purpose, *where):
            self.streams.append((self.command, seed_of(seed, purpose, *where), (seed, purpose, *where)))
            return seed_of(seed, purpose, *where)

        def through_torch(variation, weight, seed, layer, number):
            self.note(seed, [number])
            return sample(variation, weight, seed, layer, number)

        def permuted(*args, **kwargs):
            order = randperm(*args, **kwargs)
            self.orders.setdefault(self.command, []).append(tuple(order.tolist()))
            return order

        def fitted(*args, **kwargs):
            self.training = "train-"
            try:
                return fit(*args, **kwargs)
            finally:
                self.training = ""

        self._patch.setattr(streams, "seed_of", seeds)
        self._patch.setattr(LogNormalVariation, "sample", through_torch)
        self._patch.setattr(torch, "randperm", permuted)
        for module in (training_stages, placement, compensation_training):
            self._patch.setattr(module, "fit", fitted)
        for name in ("outputs", "count"):
            self._patch.setattr(Engine, name, self._through_core(getattr(Engine, name)))

    def _through_core(self, method):
        def counted(engine, *args):
            self.note(engine._chip.seed, args[-1])
            return method(engine, *args)

        return counted

    def note(self, seed, numbers):
        self.chips.setdefault(self.training + self.command, set()).update((seed, n) for n in numbers)


# What the chips of each command are for. Searching trains, and scores; compensating trains, and judges.
TRAINING = ("train-inject", "train-distil", "train-sidepath", "train-search", "train-compensate", "train-finetune")
VALIDATION = ("sweep", "search", "compensate", "sensitivity", "evaluate validation")
TEST = ("evaluate",)


def test_no_two_purposes_of_a_whole_run_draw_the_same(tmp_path, monkeypatch):
    record = Record(monkeypatch)
    succeed = by_hand.succeed

    def named(name, *arguments):
        validation = " validation" if "validation" in arguments else ""
        record.command = name + validation
        return succeed(name, *arguments)

    monkeypatch.setattr(by_hand, "succeed", named)
    record.watch()
    by_hand.every_stage(tmp_path, "--dataset", "digits")
    few = ["--quiet", "--threads", "1", "--images", 20, "--chips", 2, "--sigma", 0.5]
    by_hand.succeed("evaluate", *few, "--model", tmp_path / "inject", "--split", "validation", "--out", tmp_path / "v")
    _check_chips(record.chips)
    _check_streams(record)


def _check_chips(chips):
    assert set(chips) == {*TRAINING, *VALIDATION, *TEST}
    assert all(chips.values())
    for a, b in itertools.combinations(chips, 2):
        assert not chips[a] & chips[b], f"{a} and {b} see the same chips"
    assert chips["evaluate"] == {(0, n) for n in range(3)}
    assert len(chips["train-inject"]) == 21, "1,294 images in batches of 64"


def _check_streams(record):
    used: dict[tuple[object, ...], set[str]] = {}
    seeds: dict[int, set[tuple[object, ...]]] = {}
    for command, seed, where in record.streams:
        # The images that are held out are the same in all stages, and a file's weights take the place of "restore".
        if where[1] != "split" and "restore" not in where:
            used.setdefault(where, set()).add(command)
        seeds.setdefault(seed, set()).add(where)
    assert all(len(places) == 1 for places in seeds.values()), "two streams with one seed"
    assert all(len(commands) == 1 for commands in used.values()), "two stages with one stream"
    purposes = {where[1] for where in used}
    assert {"network", "compensators", "batches", "dropout"} <= purposes
    trained = ("pretrain", "suppress", "inject", "distil", "moments", "sidepath", "search", "compensate", "finetune")
    orders = {name: set(record.orders[name]) for name in trained}
    assert len(orders["pretrain"]) == 4, "an epoch has an order of its own"
    for a, b in itertools.combinations(trained, 2):
        assert not orders[a] & orders[b], f"{a} and {b} see the same batches"


def test_simulated_chips_of_recalibration_are_its_own(tmp_path, monkeypatch):
    record = Record(monkeypatch)
    network = ["--network", "vgg16", "--widths", ",".join(["2"] * 14), "--epochs", 0]
    few = ["--quiet", "--threads", "1", "--dataset", "digits"]
    by_hand.succeed("pretrain", *few, *network, "--out", tmp_path / "pretrain")
    record.watch()
    record.command = "evaluate"
    programmed, outputs = [], montecarlo.simulate

    def evaluated(*args, **kwargs):
        programmed.append(set(record.chips["evaluate"]))
        return outputs(*args, **kwargs)

    monkeypatch.setattr(evaluation, "simulate", evaluated)
    options = ["--recalibrate", "simulated", "--recalibrate-images", 4, "--images", 4, "--chips", 2]
    by_hand.succeed("evaluate", *few, *options, "--model", tmp_path / "pretrain", "--out", tmp_path / "e.csv")
    recalibrated = {n for _, n in programmed[0]} - {0}  # that variation reaches all layers is looked at on chip 0
    assert recalibrated == set(streams.chips("recalibration", 20))
    assert set(pd.read_csv(tmp_path / "e.csv")["sample"]) == {0, 1}


def test_suppression_from_scratch_begins_with_weights_of_its_own(tmp_path):
    few = ["--quiet", "--threads", "1", "--dataset", "digits", "--epochs", 0]
    by_hand.succeed("pretrain", *few, "--out", tmp_path / "a")
    scratch = [*few, "--start", "scratch", "--pretrained", tmp_path / "a"]
    by_hand.succeed("suppress", *scratch, "--out", tmp_path / "b")
    first, second = (storage.read_model(tmp_path / name)[0]["linear1.layer.weight"].flatten() for name in "ab")
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 5 / len(first) ** 0.5
    assert json.loads((tmp_path / "b" / "model.json").read_text())["network"]["name"] == "lenet5"
