"""NaN and infinity go through the core as they go through torch, on every instruction set, and no image that has one
among its outputs is lost: it is counted."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from correctnet import LogNormalVariation, convert
from correctnet.crossbar.convert import programmed
from correctnet.engine.engine import Engine
from correctnet.noise import core

pytestmark = pytest.mark.skipif(not core.status().built, reason="the C++ core was not built")

CHIP = 5


@pytest.fixture(params=core.status().available)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = core.status().isa
    core.extension.select_isa(request.param)
    yield request.param
    core.extension.select_isa(before)


class Pools(nn.Module):
    """Pools of every kind, fused with a convolution and alone, behind BatchNorms with scales of both signs and zero."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(3, 7, 3, padding=1), nn.BatchNorm2d(7)
        self.two, self.norm2 = nn.Conv2d(7, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.three, self.norm3 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.norm1(self.one(x)), 2, 2))  # 12 x 12
        x = F.max_pool2d(F.relu(self.norm2(self.two(x))), 3, 2, 1)  # 6 x 6
        x = F.max_pool2d(self.norm3(F.relu(self.three(x))), 2, 2)  # 3 x 3
        return self.head(F.max_pool2d(x, 2, 1).flatten(1))


class Shortcuts(nn.Module):
    """Additions, a concatenation, average pools, ReLU alone."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6)
        self.two, self.norm2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.three, self.norm3 = nn.Conv2d(12, 4, 1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.one(x)))
        y = F.relu(self.norm2(self.two(x)) + x)
        z = F.relu(F.avg_pool2d(torch.cat([x, y], 1), 2))
        z = F.relu(self.norm3(self.three(z)))
        return self.head(F.adaptive_avg_pool2d(z, 1).flatten(1))


def network(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(4)
    model = kind()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
    return model.eval()


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(3))


def kinds(x: Tensor) -> Tensor:
    """0 for a number, 1 for NaN, 2 and 3 for the infinities."""
    return torch.where(x.isnan(), 1, torch.where(x.isposinf(), 2, torch.where(x.isneginf(), 3, 0)))


PLACES = ["input", "one.weight", "two.weight", "three.weight", "head.weight", "one.bias", "two.bias", "head.bias"]
PLACES += [f"norm{i}.{name}" for i in (1, 2, 3) for name in ("weight", "bias", "running_mean", "running_var")]


def spoiled(kind: type[nn.Module], place: str, value: float, count: int) -> tuple[nn.Module, Tensor]:
    """The network, and images of which the fourth has `value` in some places, or a network that has it in one.

    A weight in the middle of its kernel: what padding would multiply is skipped.
    """
    model, x = network(kind), images(count)
    if place == "input":
        x[3, 1, 9, 10] = x[3, 0, 0, 23] = value
        return model, x
    tensor = model.state_dict()[place]
    if tensor.dim() == 4:
        tensor[2, 1, tensor.shape[2] // 2, tensor.shape[3] // 2] = value
    else:
        tensor[(1,) * tensor.dim()] = value
    return model, x


def on_chip(analog: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad(), programmed(analog, CHIP):
        return analog(x)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", [Pools, Shortcuts])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_nan_and_infinity_go_through_as_in_torch(isa: str, precision: str, kind: type[nn.Module], value: float) -> None:
    there = {"input", *network(kind).state_dict()}
    counts = itertools.cycle([5, 70, 20])  # images in 1, 5 and 2 vectors: other tiles
    for place, count in zip([p for p in PLACES if p in there], counts, strict=False):
        model, x = spoiled(kind, place, value, count)
        analog = convert(model, LogNormalVariation(0.5))
        engine = Engine(analog, images(4), precision=precision)
        assert engine.whole
        found, wanted = engine.outputs(x, [CHIP])[0], on_chip(analog, x)
        if isa == "amx" and precision == "bfloat16" and not math.isnan(value):
            # Zero weights that fill a tile meet pixels that they have nothing to do with: see csrc/plan/plan.h.
            assert torch.equal(found.isfinite().all(1), wanted.isfinite().all(1)), place
        else:
            assert torch.equal(kinds(found), kinds(wanted)), (place, count)
        if place == "input":
            clean = engine.outputs(images(count), [CHIP])[0]
            others = torch.arange(count) != 3
            assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_image_with_a_nan_is_wrong_and_one_that_is_not_finite_is_counted(isa: str, precision: str) -> None:
    class Spoiling(nn.Module):
        """Logits with -inf, inf or NaN, or several, according to the image's first number."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)
            nn.init.eye_(self.layer.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    n, i = math.nan, math.inf
    rows = [[1, 2, 0, 1], [n, 0, 0, 0], [3, n, 0, 0], [0, 0, 1, n], [n, n, n, n], [2, 2, 1, 1]]
    x = torch.tensor(rows * 5, dtype=torch.float32)
    engine = Engine(convert(Spoiling(), LogNormalVariation(0.0)), torch.ones(2, 4), precision=precision)
    step, labels = engine._whole, torch.tensor([1, 0, 0, 2, 0, 0] * 5)
    assert step.count(x, labels, 0, [0, 7], 1 << 20) == ([10, 10], [20, 20])
    assert step.count_correct(x, labels, 0, [0, 7], 1 << 20) == [10, 10]
    # An infinity, times the zeros of the other rows, is NaN; in a layer of one input it stays what it is.
    one = nn.Linear(1, 3)
    one.weight.data, one.bias.data = torch.tensor([[1.0], [-1.0], [0.5]]), torch.zeros(3)
    step = Engine(convert(one, LogNormalVariation(0.0)), torch.ones(2, 1), precision=precision)._whole
    x = torch.tensor([[i], [-i], [1.0], [n]])
    # (inf, -inf, inf), (-inf, inf, -inf), (1, -1, 0.5), NaN
    assert step.count(x, torch.tensor([0, 1, 0, 0]), 0, [3], 1 << 20) == ([3], [3])
    assert step.count(x, torch.tensor([2, 0, 1, 2]), 0, [3], 1 << 20) == ([0], [3])


def test_counting_is_what_outputs_say_for_any_threads_and_memory() -> None:
    model, x = spoiled(Shortcuts, "input", math.inf, 200)
    x[[40, 190], 2] = math.nan
    analog = convert(model, LogNormalVariation(0.5))
    chips = [0, 1, 2, 77]
    labels = torch.arange(200) % 5
    engine = Engine(analog, images(4))
    outputs = engine.outputs(x, chips)
    right = (outputs.argmax(2) == labels) & ~outputs.isnan().any(2)
    wanted = right.sum(1).tolist(), (~outputs.isfinite().all(2)).sum(1).tolist()
    assert min(wanted[1]) > 0
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert engine._whole.count(x, labels, engine._chip.seed, chips, 1 << 30) == wanted
    finally:
        torch.set_num_threads(before)


def test_a_chip_that_overflows_leaves_the_others_alone(isa: str) -> None:
    model = network(Pools)
    for precision in ("float32", "bfloat16"):
        analog = convert(copy.deepcopy(model), LogNormalVariation(0.5))
        engine = Engine(analog, images(4), precision=precision)
        x = images(40)
        alone = engine.outputs(x[:20], [9])[0]
        x[20:] = 3e38
        both = engine.outputs(x, [9, 9])
        assert not both[:, 20:].isfinite().all(2).any()
        assert torch.equal(both[0, :20], alone)
        assert torch.equal(both[1, :20], alone)
