"""The operators against float64 layers whose weights the specification made, on every instruction set that is there."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_profile import examples
from torch import Tensor
from torch.library import opcheck

from correctnet.crossbar import kernels
from correctnet.crossbar import operators as ops
from correctnet.crossbar.arguments import DTYPES
from correctnet.crossbar.operators import noisy_conv2d, noisy_linear
from correctnet.noise import core, draw, specification
from correctnet.noise import device as gpu

OPS = torch.ops.correctnet
SEED, LAYER, SIGMA, SHIFT = 11, 3, 0.5, -0.125
NOISE = {"seed": SEED, "layer": LAYER, "sigma": SIGMA, "shift": SHIFT}
SAMPLES = [0, 137, 2**32 - 1]
NUMBERS = torch.tensor(SEED), torch.tensor(SAMPLES), LAYER, SIGMA, SHIFT

needs_core = pytest.mark.skipif(not core.status().built, reason="the C++ core was not built")


@pytest.fixture(params=["numpy", *core.status().available])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each set of instructions in turn, and the operators as they are without the core."""
    if request.param == "numpy":
        monkeypatch.setattr(core, "extension", None)
        yield request.param
        return
    before = core.status().isa
    core.extension.select_isa(request.param)
    yield request.param
    core.extension.select_isa(before)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chip_weight(weight: Tensor, sample: int, noise: dict[str, Any] = NOISE) -> Tensor:
    """By the definition, in the dtype of `weight`: elements count in the order (out, *kernel, in)."""
    out, channels, *kernel = weight.shape
    flat = specification.lognormal(
        noise["seed"], noise["layer"], sample, weight.numel(), noise["sigma"], noise.get("shift", 0.0)
    )
    factor = torch.from_numpy(flat).view(out, *kernel, channels).movedim(-1, 1)
    if weight.dtype == torch.float64:
        return weight * factor
    return (weight.float() * factor).to(weight.dtype)


def by_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    samples: list[int],
    dtype: torch.dtype = torch.float64,
    **geometry: Any,
) -> Tensor:
    """The layer by torch, computed in `dtype` from the weights that the chips have in the dtype of `weight`."""
    bias = None if bias is None else bias.to(dtype)
    outputs = []
    for s, sample in enumerate(samples):
        own = (x if x.dim() == weight.dim() else x[s]).to(dtype)
        noisy = chip_weight(weight, sample).to(dtype)
        outputs.append(F.linear(own, noisy, bias) if x.dim() < 4 else F.conv2d(own, noisy, bias, **geometry))
    return torch.stack(outputs)


def layer_of(x: Tensor) -> Callable[..., Tensor]:
    return noisy_linear if x.dim() < 4 else noisy_conv2d


def check(x: Tensor, weight: Tensor, bias: Tensor | None, samples: list[int], **geometry: Any) -> None:
    """In each dtype the layer, in training and without, is as near to the exact result as the dtype allows."""
    for dtype in DTYPES:
        tensors = [None if t is None else t.to(dtype) for t in (x, weight, bias)]
        wanted = by_torch(*tensors, samples, **geometry)
        if dtype == torch.float64:  # the same sums, perhaps in another order
            limit = 1e-13 * wanted.abs().max()
        elif dtype == torch.float32:
            plain = by_torch(*tensors, samples, torch.float32, **geometry)
            limit = 2 * (plain - wanted).abs().max() + 1e-6 * wanted.abs().max()
        else:
            # One rounding to eight places, of a float32 sum of products. That is off by 2^-24 of the sum of their
            # magnitudes for every term, and there are at most 1,000 here.
            magnitude = by_torch(*(None if t is None else t.abs() for t in tensors), samples, **geometry)
            limit = 2**-8 * wanted.abs() + 1000 * 2**-24 * magnitude
        for trained in (False, True):
            tensors[1] = tensors[1].detach().requires_grad_(trained)
            found = layer_of(x)(*tensors, samples=samples, **NOISE, **geometry).detach()
            assert found.dtype == dtype
            assert found.is_contiguous()
            assert ((found.double() - wanted).abs() <= limit).all()


# ---- against torch --------------------------------------------------------------------------------------------------

# x (N, C, H, W), weight (O, C / groups, kh, kw), what else: shapes that no tile divides
CONVOLUTIONS = [
    ((1, 1, 5, 5), (1, 1, 5, 5), {}),
    ((17, 1, 9, 8), (7, 1, 5, 5), {"padding": 2}),
    ((3, 6, 14, 14), (16, 6, 5, 5), {}),
    ((2, 3, 8, 7), (7, 3, 3, 3), {"stride": 2, "padding": 1}),
    ((2, 4, 9, 9), (6, 4, 3, 2), {"stride": (3, 1), "padding": (0, 2), "dilation": (2, 1)}),
    ((17, 6, 6, 6), (9, 2, 3, 3), {"groups": 3, "padding": 1}),
    ((2, 5, 7, 7), (5, 1, 3, 3), {"groups": 5, "stride": (1, 2)}),
    ((2, 6, 5, 5), (4, 3, 1, 1), {"groups": 2}),
    ((1, 3, 4, 4), (2, 3, 3, 3), {"padding": 5, "dilation": 2}),
    ((2, 2, 1, 11), (3, 2, 1, 4), {"dilation": (1, 3), "stride": [1, 2]}),
    ((1, 66, 3, 3), (35, 66, 3, 3), {"padding": 1}),
]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("x", "weight", "geometry"), CONVOLUTIONS)
def test_convolution(
    x: tuple[int, ...], weight: tuple[int, ...], geometry: dict[str, Any], biased: bool, isa: str
) -> None:
    own = x if biased else (len(SAMPLES), *x)
    check(normal(*own), normal(*weight, seed=1), normal(weight[0], seed=2) if biased else None, SAMPLES, **geometry)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    ("x", "weight"), [((1, 1), (1, 1)), ((17, 400), (7, 400)), ((3, 5), (120, 5)), ((65, 33), (10, 33))]
)
def test_linear(x: tuple[int, ...], weight: tuple[int, ...], biased: bool, isa: str) -> None:
    own = x if biased else (len(SAMPLES), *x)
    check(normal(*own), normal(*weight, seed=1), normal(weight[0], seed=2) if biased else None, SAMPLES)


@examples(60)
@given(data=st.data())
def test_any_convolution(data: st.DataObject) -> None:
    small = st.integers(1, 4)
    groups, stride, dilation, kernel = data.draw(small), *(data.draw(st.tuples(small, small)) for _ in range(3))
    padding = data.draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    spans = [dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i] for i in range(2)]
    size = [max(1, span) + data.draw(st.integers(0, 5)) for span in spans]
    channels, outputs = data.draw(small), data.draw(small)
    own = data.draw(st.sampled_from([(), (len(SAMPLES),)]))
    check(
        normal(*own, data.draw(st.integers(1, 18)), groups * channels, *size),
        normal(groups * outputs, channels, *kernel, seed=1),
        normal(groups * outputs, seed=2) if data.draw(st.booleans()) else None,
        SAMPLES,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(10, 84), (1, 1), (7, 1, 5, 5), (6, 3, 3, 2), (5, 3, 7)])
def test_noisy_weight(shape: tuple[int, ...], dtype: torch.dtype, isa: str) -> None:
    weight = normal(*shape).to(dtype)
    for same in (weight, weight.t() if weight.dim() == 2 else weight.transpose(1, -1)):
        found = OPS.noisy_weight(same, *NUMBERS)
        assert torch.equal(found, torch.stack([chip_weight(same, sample) for sample in SAMPLES]))
        assert found.dtype == dtype
        assert found.is_contiguous()


# ---- bit for bit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_identity_gives_the_weights_of_the_specification(dtype: torch.dtype, isa: str) -> None:
    for out, features in ((7, 1), (10, 84), (35, 129)):
        weight = normal(out, features).to(dtype)
        found = noisy_linear(torch.eye(features, dtype=dtype), weight, samples=SAMPLES, **NOISE)
        assert torch.equal(found.mT, torch.stack([chip_weight(weight, sample) for sample in SAMPLES]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "groups", "dilation"),
    [((6, 1, 5, 5), 1, 1), ((7, 5, 3, 3), 1, 2), ((9, 2, 3, 2), 3, 1), ((4, 1, 3, 3), 4, 1), ((70, 67, 1, 1), 1, 1)],
)
def test_images_of_one_pixel_give_the_weights_of_the_specification(
    shape: tuple[int, ...], groups: int, dilation: int, dtype: torch.dtype, isa: str
) -> None:
    weight = normal(*shape).to(dtype)
    out, channels, kh, kw = shape
    # Image (c, i, j) is 1 where the tap (i, j) of channel c lies, so that the only pixel of its result is that weight.
    taps = channels * groups * kh * kw
    images = torch.zeros(taps, channels * groups, dilation * (kh - 1) + 1, dilation * (kw - 1) + 1, dtype=dtype)
    images[:, :, ::dilation, ::dilation] = torch.eye(taps, dtype=dtype).view(taps, -1, kh, kw)
    found = noisy_conv2d(images, weight, samples=SAMPLES, dilation=dilation, groups=groups, **NOISE)
    wanted = torch.zeros(len(SAMPLES), out, groups, channels, kh, kw, dtype=dtype)
    for s, sample in enumerate(SAMPLES):
        for group, weights in enumerate(chip_weight(weight, sample).chunk(groups)):
            rows = slice(group * out // groups, (group + 1) * out // groups)
            wanted[s, rows, group] = weights
    assert torch.equal(found[..., 0, 0].mT, wanted.flatten(2))


def layers(dtype: torch.dtype) -> Iterator[tuple[Callable[..., Tensor], Tensor]]:
    """Two layers as functions of x and samples, and an x each."""
    weight, bias = normal(9, 2, 3, 3, seed=1).to(dtype), normal(9, seed=2).to(dtype)
    yield (
        lambda x, samples: noisy_conv2d(x, weight, bias, samples=samples, groups=3, padding=1, **NOISE),
        normal(90, 6, 7, 7).to(dtype),
    )
    matrix = normal(33, 70, seed=1).to(dtype)
    yield lambda x, samples: noisy_linear(x, matrix, samples=samples, **NOISE), normal(90, 70).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chip_is_the_same_in_any_company(dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    chips = range(130, 145)
    for layer, x in layers(dtype):
        many = layer(x, chips)
        assert not torch.equal(many[6], many[7])
        for number in (1, 2, 3):
            threads(number)
            if dtype == torch.float64:  # by torch, whose sums may depend on its threads
                many = layer(x, chips)
            assert torch.equal(layer(x, chips), many)
            assert torch.equal(layer(x, [137])[0], many[7])
            assert torch.equal(layer(x, torch.tensor([144, 137])), many[[14, 7]])
            assert torch.equal(layer(x.expand(15, *x.shape), chips), many)
            assert torch.equal(layer(x[:1], [137])[0], many[7, :1]) or dtype == torch.float64


def test_defaults_are_chip_0_and_no_shift() -> None:
    x, weight = normal(4, 5), normal(3, 5, seed=1)
    found = noisy_linear(x, weight, seed=SEED, layer=LAYER, sigma=SIGMA)
    wanted = x @ chip_weight(weight, 0, {"seed": SEED, "layer": LAYER, "sigma": SIGMA}).T
    assert found.shape == (1, 4, 3)
    torch.testing.assert_close(found[0], wanted)
    assert torch.equal(noisy_linear(x, weight, seed=0, layer=0, sigma=0)[0], F.linear(x, weight))


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63, 2**64 - 1])
def test_seeds_are_64_bits(seed: int) -> None:
    weight = normal(3, 5).float()
    found = noisy_linear(torch.eye(5), weight, seed=seed, layer=0, sigma=0.5)[0].T
    assert torch.equal(found, chip_weight(weight, 0, {"seed": seed, "layer": 0, "sigma": 0.5}))
    bits = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
    assert torch.equal(found, noisy_linear(torch.eye(5), weight, seed=bits, layer=0, sigma=0.5)[0].T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_memory_order_will_do(dtype: torch.dtype) -> None:
    x, weight = normal(5, 4, 8, 9).to(dtype), normal(6, 4, 3, 3, seed=1).to(dtype)
    wide_x, wide_weight = normal(10, 4, 8, 18).to(dtype), normal(12, 8, 3, 3, seed=1).to(dtype)
    wide_x[::2, :, :, 1::2], wide_weight[1::2, ::2] = x, weight
    wanted = noisy_conv2d(x, weight, samples=SAMPLES, **NOISE)
    for a in (x.contiguous(memory_format=torch.channels_last), wide_x[::2, :, :, 1::2], -x.neg()):
        for w in (weight.contiguous(memory_format=torch.channels_last), wide_weight[1::2, ::2]):
            found = noisy_conv2d(a, w, samples=SAMPLES, **NOISE)
            assert found.is_contiguous()
            if dtype == torch.float64:  # by torch, which may take another kernel
                torch.testing.assert_close(found, wanted)
            else:
                assert torch.equal(found, wanted)
    matrix = normal(4, 6).to(dtype)
    found = noisy_linear(x[:, :, 0, 0], matrix.T, **NOISE)
    torch.testing.assert_close(found, noisy_linear(x[:, :, 0, 0].clone(), matrix.T.contiguous(), **NOISE))
    negative = torch.complex(matrix.double(), matrix.double()).conj().imag.to(dtype)  # negation that is put off
    torch.testing.assert_close(noisy_linear(x[:, :, 0, 0], negative.T, **NOISE), -found)


@needs_core
def test_denormals_that_are_flushed_change_nothing() -> None:
    for layer, x in [*layers(torch.float32), *layers(torch.bfloat16)]:
        wanted = layer(x, SAMPLES)
        torch.set_flush_denormal(True)
        try:
            assert torch.equal(layer(x, SAMPLES), wanted)
        finally:
            torch.set_flush_denormal(False)


def test_autocast_does_not_reach_in(isa: str) -> None:
    x, weight, matrix = normal(4, 3, 6, 6).float(), normal(5, 3, 3, 3, seed=1).float(), normal(7, 6, seed=2).float()

    def results() -> list[Tensor]:
        return [
            noisy_conv2d(x, weight, samples=SAMPLES, **NOISE),
            noisy_linear(x[:, 0, 0], matrix, samples=SAMPLES, **NOISE),
            OPS.noisy_linear(x[:, 0, 0], matrix, None, *NUMBERS),
        ]

    for trained in (False, True):
        leaves = weight.requires_grad_(trained), matrix.requires_grad_(trained), matrix
        wanted = results()
        with torch.autocast("cpu", torch.bfloat16):
            found = results()
        for f, w, leaf in zip(found, wanted, leaves, strict=True):
            assert f.dtype == torch.float32
            assert torch.equal(f, w)
            if trained:
                gradients = [torch.autograd.grad(output.sum(), leaf)[0] for output in (f, w)]
                assert torch.equal(*gradients)


# ---- gradients ------------------------------------------------------------------------------------------------------

GEOMETRY = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2}


def operands(*own: int, dtype: torch.dtype = torch.float64) -> Iterator[tuple[list[Tensor], dict[str, Any]]]:
    """x, weight and bias of a convolution and of a linear layer, and what else it takes."""
    for shapes, geometry in (
        (((*own, 2, 4, 4, 3), (4, 2, 3, 2), (4,)), GEOMETRY),
        (((*own, 3, 5), (4, 5), (4,)), {}),
    ):
        yield [normal(*s, seed=i).to(dtype).requires_grad_() for i, s in enumerate(shapes)], geometry


def operator_of(x: Tensor, geometry: dict[str, Any]) -> Callable[..., Tensor]:
    op = OPS.noisy_linear if x.dim() < 4 else OPS.noisy_conv2d
    return lambda *tensors: op(*tensors, *NUMBERS, *geometry.values())


@pytest.mark.parametrize("own", [(), (3,)], ids=["shared", "own"])
def test_gradients_are_those_of_the_function(own: tuple[int, ...]) -> None:
    for tensors, geometry in operands(*own):
        operator = operator_of(tensors[0], geometry)
        function = layer_of(tensors[0])
        assert torch.autograd.gradcheck(operator, tensors)
        assert torch.autograd.gradcheck(
            lambda *t, f=function, g=geometry: f(*t, samples=SAMPLES, **NOISE, **g), tensors, fast_mode=True
        )
        assert torch.autograd.gradgradcheck(operator, tensors, fast_mode=True)
    weight = tensors[1]
    assert torch.autograd.gradcheck(lambda w: OPS.noisy_weight(w, *NUMBERS), weight)
    assert torch.autograd.gradgradcheck(lambda w: OPS.noisy_weight(w, *NUMBERS), weight)


# Sums in float32 are off by a few times 6e-8. In bfloat16 the weights, the gradients of a chip and the result are each
# rounded, by up to 2^-8 and at random.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("own", [(), (3,)], ids=["shared", "own"])
def test_gradients_of_other_dtypes_are_near_those_of_float64(
    own: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    for tensors, geometry in operands(*own, dtype=dtype):
        exact = [t.detach().double().requires_grad_() for t in tensors]
        operator, function = operator_of(tensors[0], geometry), layer_of(tensors[0])
        wanted = operator(*exact)
        upstream = normal(*wanted.shape, seed=9).to(dtype)
        wanted = torch.autograd.grad(wanted, exact, upstream.double())
        for output in (operator(*tensors), function(*tensors, samples=SAMPLES, **NOISE, **geometry)):
            found = torch.autograd.grad(output, tensors, upstream)
            for f, w in zip(found, wanted, strict=True):
                assert f.dtype == dtype
                assert (f.double() - w).norm() <= tolerance * w.norm()


def test_only_the_gradients_that_are_wanted() -> None:
    for tensors, geometry in operands():
        operator = operator_of(tensors[0], geometry)
        wanted = torch.autograd.grad(operator(*tensors).sum(), tensors)
        for i in range(3):
            some = [t.detach().requires_grad_(i == j) for j, t in enumerate(tensors)]
            torch.testing.assert_close(torch.autograd.grad(operator(*some).sum(), some[i])[0], wanted[i])


# ---- torch.library and torch.compile --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    for own in ((), (3,)):
        for tensors, geometry in operands(*own, dtype=dtype):
            op = OPS.noisy_conv2d if geometry else OPS.noisy_linear
            opcheck(op.default, (*tensors, *NUMBERS, *geometry.values()))
    # With defaults, without gradients, and with channels as the innermost axis.
    (x, weight, bias), _ = next(operands(dtype=dtype))
    x, weight = (t.detach().contiguous(memory_format=torch.channels_last) for t in (x, weight))
    opcheck(OPS.noisy_conv2d.default, (x, weight, None, *NUMBERS[:4]), {"groups": 2})
    opcheck(OPS.noisy_conv2d.default, (x, weight.requires_grad_(), bias, *NUMBERS, 1, 1, 1, 2))
    opcheck(OPS.noisy_weight.default, (weight, *NUMBERS))


def test_on_the_meta_device_there_are_only_shapes() -> None:
    for tensors, geometry in operands(3):
        meta = [t.detach().to("meta").requires_grad_() for t in tensors]
        wanted = operator_of(tensors[0], geometry)(*tensors).shape
        for found in (
            operator_of(meta[0], geometry)(*meta),
            layer_of(meta[0])(*meta, samples=SAMPLES, **NOISE, **geometry),
        ):
            assert found.is_meta
            assert found.shape == wanted
            found.sum().backward()
        with pytest.raises(ValueError, match="x must have"):
            operator_of(meta[0], geometry)(meta[0][..., :3] if not geometry else meta[0][:, :, :3], *meta[1:])


def through_functions(x: Tensor, weight: Tensor, matrix: Tensor, seed: Tensor, samples: Tensor) -> Tensor:
    y = noisy_conv2d(x, weight, seed=seed, samples=samples, layer=0, sigma=0.5, padding=1, groups=2)
    return noisy_linear(y.relu().mean((-1, -2)), matrix, seed=seed, samples=samples, layer=1, sigma=0.5)


def through_operators(x: Tensor, weight: Tensor, matrix: Tensor, seed: Tensor, samples: Tensor) -> Tensor:
    y = OPS.noisy_conv2d(x, weight, None, seed, samples, 0, 0.5, padding=1, groups=2)
    return OPS.noisy_linear(y.relu().mean((-1, -2)), matrix, None, seed, samples, 1, 0.5)


@pytest.mark.parametrize("network", [through_functions, through_operators])
def test_compiled_once_for_all_chips(network: Callable[..., Tensor]) -> None:
    x = normal(3, 4, 6, 5).float()
    parameters = [t.float().requires_grad_() for t in (normal(6, 2, 3, 3, seed=1), normal(5, 6, seed=2))]

    def step(function: Callable[..., Tensor], seed: int, samples: list[int]) -> list[Tensor]:
        y = function(x, *parameters, torch.tensor(seed), torch.tensor(samples))
        return [y, *torch.autograd.grad(y.square().sum(), parameters)]

    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(step(compiled, 1, [0, 1]), step(network, 1, [0, 1]), strict=True):
        assert torch.equal(found, wanted)
    with torch._dynamo.config.patch(error_on_recompile=True):
        first = step(compiled, 1, [0, 1])[0]
        for seed, samples in ((2, [0, 1]), (1, [137, 2**32 - 1]), (-(2**63), [5, 5])):
            found = step(compiled, seed, samples)
            assert not torch.equal(found[0], first)
            for f, w in zip(found, step(network, seed, samples), strict=True):
                assert torch.equal(f, w)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile wants a C++ compiler")
def test_compiled_to_machine_code() -> None:
    x, matrix = normal(4, 6).float(), normal(5, 6, seed=1).float().requires_grad_()

    def step(function: Callable[..., Tensor]) -> list[Tensor]:
        y = function(x * 2, matrix, None, *NUMBERS)
        return [y, *torch.autograd.grad(y.square().sum(), matrix)]

    torch._dynamo.reset()
    found = step(torch.compile(OPS.noisy_linear, fullgraph=True))
    torch.testing.assert_close(found, step(OPS.noisy_linear))


# ---- bad input ------------------------------------------------------------------------------------------------------

LINEAR = {"x": torch.ones(2, 3), "weight": torch.ones(4, 3), "bias": torch.ones(4), "seed": 0, "layer": 0, "sigma": 0.5}
CONV2D = LINEAR | {"x": torch.ones(2, 6, 5, 5), "weight": torch.ones(4, 3, 3, 3), "groups": 2}

BAD_OF_BOTH = [
    ("x", [[1.0]]),
    ("x", None),
    ("x", torch.ones(())),
    ("x", torch.ones(3)),
    ("x", torch.ones(2, 3, dtype=torch.float16)),
    ("x", torch.ones(2, 3, dtype=torch.int64)),
    ("x", torch.ones(2, 3).to_sparse()),
    ("weight", 1.0),
    ("weight", torch.ones(3)),
    ("weight", torch.ones(4, 3, 3)),
    ("weight", torch.ones(0, 3)),
    ("weight", torch.ones(4, 3, dtype=torch.float64)),
    ("weight", torch.ones(4, 3, device="meta")),
    ("bias", 1.0),
    ("bias", torch.ones(3)),
    ("bias", torch.ones(4, 1)),
    ("bias", torch.ones(4, dtype=torch.bfloat16)),
    ("seed", 1.5),
    ("seed", "0"),
    ("seed", 2**64),
    ("seed", -(2**63) - 1),
    ("seed", torch.tensor(1.5)),
    ("seed", torch.tensor([1])),
    ("samples", 5),
    ("samples", "5"),
    ("samples", []),
    ("samples", [-1]),
    ("samples", [0, 2**32]),
    ("samples", [0.5]),
    ("samples", torch.tensor([0.5])),
    ("samples", torch.tensor(3)),
    ("samples", torch.zeros(0, dtype=torch.int64)),
    ("sample", torch.tensor([0, 2**32])),
    ("sample", torch.tensor([-1])),
    ("layer", -1),
    ("layer", 2**32),
    ("layer", 10**30),
    ("layer", 0.5),
    ("sigma", -0.5),
    ("sigma", math.nan),
    ("sigma", math.inf),
    ("sigma", 14.0),
    ("sigma", "0.5"),
    ("sigma", torch.tensor(0.5)),
    ("sigma", 10**400),
    ("shift", math.nan),
    ("shift", 88.0),
]
BAD_LINEAR = [
    ("x", torch.ones(0, 3)),
    ("x", torch.ones(2, 0)),
    ("x", torch.ones(2, 4)),
    ("x", torch.ones(2, 2, 3)),
    ("x", torch.ones(1, 1, 2, 3)),
    ("weight", torch.ones(4, 3, 1, 1)),
]
BAD_CONV2D = [
    ("x", torch.ones(0, 6, 5, 5)),
    ("x", torch.ones(2, 6, 5, 0)),
    ("x", torch.ones(6, 5, 5)),
    ("x", torch.ones(2, 4, 5, 5)),
    ("x", torch.ones(2, 2, 6, 5, 5)),
    ("weight", torch.ones(4, 3, 6, 3)),
    ("weight", torch.ones(4, 3, 0, 3)),
    ("stride", 0),
    ("stride", (1, -1)),
    ("stride", (1, 1, 1)),
    ("stride", 1.5),
    ("stride", 2**64),
    ("padding", -1),
    ("padding", "same"),
    ("padding", 2**30),
    ("padding", 2**62),
    ("dilation", 0),
    ("dilation", (1, 2**31 - 1)),
    ("dilation", 3),
    ("groups", 0),
    ("groups", -2),
    ("groups", 3),
    ("groups", 1.0),
    ("groups", 2**70),
]


def refused(function: Callable[..., Tensor], good: dict[str, Any], name: str, value: Any) -> None:
    argument = "samples" if name == "sample" else name
    arguments = good | {argument: value}
    for gradient in (False, True):
        if isinstance(arguments["bias"], Tensor) and arguments["bias"].is_floating_point():
            arguments["bias"] = arguments["bias"].detach().clone().requires_grad_(gradient)
        with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
            function(**arguments)


@pytest.mark.parametrize(("name", "value"), BAD_OF_BOTH + BAD_LINEAR)
def test_bad_arguments_of_a_linear_layer_are_named(name: str, value: Any) -> None:
    refused(noisy_linear, LINEAR, name, value)


@pytest.mark.parametrize(("name", "value"), BAD_OF_BOTH + BAD_CONV2D)
def test_bad_arguments_of_a_convolution_are_named(name: str, value: Any) -> None:
    refused(noisy_conv2d, CONV2D, name, value)


NAMES = ["x", "weight", "bias", "seed", "samples", "sample", "layer", "sigma", "shift", "stride", "padding", "dilation"]
NAMES += ["groups"]


def right_or_refused(call: Callable[[], Tensor]) -> Tensor | None:
    """The result, or None where the arguments are refused and one of them is named."""
    try:
        return call()
    except ValueError as error:
        words = str(error).replace(":", " ").split()
    assert set(words) & set(NAMES), words
    return None


numbers = st.integers(-2, 5) | st.sampled_from([2**31 - 1, 2**31, -(2**31), 2**32, 2**63 - 1, -(2**63)])
dtypes = st.sampled_from([*DTYPES, torch.float32, torch.float32, torch.float16, torch.int64])
arrays = st.builds(lambda shape, dtype: torch.ones(shape, dtype=dtype), st.lists(st.integers(0, 4), max_size=6), dtypes)


ANYTHING = {
    "x": arrays,
    "weight": arrays,
    "bias": st.none() | arrays,
    "seed": arrays,
    "samples": st.lists(numbers, max_size=3).map(lambda s: torch.tensor(s, dtype=torch.int64)) | arrays,
    "layer": numbers,
    "sigma": st.floats(0, 1) | st.floats(),
    "shift": st.floats(-1, 1) | st.floats(),
    "stride": st.lists(numbers, max_size=3),
    "padding": st.lists(numbers, min_size=2, max_size=2),
    "dilation": st.lists(numbers, min_size=2, max_size=2),
    "groups": numbers,
}
NOISE_GIVEN = {"seed": torch.tensor(0), "samples": torch.tensor([0, 7]), "layer": 0, "sigma": 0.5, "shift": 0.0}
GIVEN = {
    "noisy_weight": {"weight": torch.ones(4, 3), **NOISE_GIVEN},
    "noisy_linear": {"x": torch.ones(2, 3), "weight": torch.ones(4, 3), "bias": torch.ones(4), **NOISE_GIVEN},
    "noisy_conv2d": {
        **{"x": torch.ones(2, 6, 5, 5), "weight": torch.ones(4, 3, 3, 3), "bias": torch.ones(4), **NOISE_GIVEN},
        **{"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 2},
    },
}
one_change = st.sampled_from(sorted(ANYTHING)).flatmap(lambda name: ANYTHING[name].map(lambda value: {name: value}))


@examples(500)
@given(st.sampled_from(sorted(GIVEN)), one_change | st.fixed_dictionaries({}, optional=ANYTHING))
def test_operators_refuse_anything_else_in_words(name: str, changes: dict[str, Any]) -> None:
    given = GIVEN[name]
    changes = {argument: value for argument, value in changes.items() if argument in given}
    found = right_or_refused(lambda: getattr(OPS, name)(**given | changes))
    if not changes:
        assert found is not None
    if found is not None:
        assert len(found) == len((given | changes)["samples"])
        assert found.isfinite().all()


@needs_core
@examples(150)
@given(
    changes=st.dictionaries(
        st.sampled_from(["stride", "padding", "dilation", "groups", "layer", "samples", "batch", "channels", "kernel"]),
        numbers,
        max_size=2,
    )
)
def test_a_convolution_is_right_or_refused(changes: dict[str, int]) -> None:
    """From a good one, one or two numbers changed: an error that names an argument, or the shape and value of torch."""
    sizes = {name: max(0, min(changes.pop(name, 2), 5)) for name in ("batch", "channels", "kernel")}
    x = torch.ones(sizes["batch"], sizes["channels"], 5, 6)
    weight = torch.ones(4, 2, sizes["kernel"], 2)
    if "samples" in changes:
        changes["samples"] = [changes["samples"]]
    noise = {"seed": 0, "layer": changes.pop("layer", 0), "sigma": 0.0}
    samples = {"samples": changes.pop("samples", [0])}
    found = right_or_refused(lambda: noisy_conv2d(x, weight, **noise, **samples, **changes))
    assert found is None or torch.equal(found[0], F.conv2d(x, weight, **changes))


# ---- without the core -----------------------------------------------------------------------------------------------


def test_without_the_core_the_values_are_the_same(tmp_path: Path) -> None:
    package = tmp_path / "correctnet"
    shutil.copytree(Path(ops.__file__).parents[1], package, ignore=shutil.ignore_patterns("_native*", "__pycache__"))
    # An editable installation would find the core in the checkout.
    code = """import sys
sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')]
import torch
from correctnet.crossbar import operators as ops
from correctnet.noise import core
assert not core.status().built
y = ops.noisy_linear(torch.eye(3), torch.ones(2, 3), seed=1, layer=2, samples=[5], sigma=0.5)
print(y[0].T.flatten().tolist())
"""
    keep = {name: value for name, value in os.environ.items() if name != "CORRECTNET_ISA"}
    done = subprocess.run([sys.executable, "-c", code], env=keep, cwd=tmp_path, capture_output=True, text=True)
    assert str(specification.lognormal(1, 2, 5, 6, 0.5).tolist()) in done.stdout, done.stderr


# ---- on a GPU -------------------------------------------------------------------------------------------------------


def test_numbers_on_a_device_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading one would wait for the device; tensors without memory show that nobody does."""
    seen = []
    monkeypatch.setattr(gpu, "reaches", lambda device: True)
    monkeypatch.setattr(gpu, "noisy_weight", lambda weight, *noise: seen.append(noise) or weight[None])
    monkeypatch.setattr(
        kernels, "convolve", lambda x, weight, bias, *noise: seen.append(noise) or x.new_ones(1, 5, 4, 1, 1)
    )
    seed, samples = torch.empty((), dtype=torch.int64, device="meta"), torch.empty(1, dtype=torch.int64, device="meta")
    x, weight = torch.ones(5, 3, requires_grad=True), torch.ones(4, 3, requires_grad=True)
    ops._weights(weight.detach(), seed, samples, 0, 0.5, 0.0)
    ops._forward(*ops._linear_arguments(x, weight, None, seed, samples, 0, 0.5, 0.0))
    assert [noise[0] is seed and noise[1] is samples for noise in seen] == [True, True]
    for address in ((seed, 0, samples[0]), (2**64 - 1, 0, 2**32 - 1)):
        draw.noisy_weight(weight.detach().to("meta"), *address, 0.5)
        assert [n.device.type for n in seen[-1][:2]] == ["meta", "meta"]
    with pytest.raises(ValueError, match="sample"):  # those at hand are checked
        ops._weights(weight.detach(), torch.tensor(0), torch.tensor([-1]), 0, 0.5, 0.0)
    with pytest.raises(ValueError, match="sample"):
        draw.noisy_weight(weight.detach().to("meta"), 0, 0, -1, 0.5)
