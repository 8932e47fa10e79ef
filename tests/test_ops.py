"""The operators against float64 and the specification of the noise."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from correctnet import native, reference
from correctnet.ops import noisy_conv2d, noisy_linear, noisy_weight

SEED, LAYER, SIGMA = 2**63 + 12345, 7, 0.5


def tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def specified(weight: torch.Tensor, sample: int, sigma: float = SIGMA) -> torch.Tensor:
    """The noisy weights in float32, by the specification in numpy."""
    out, channels, *kernel = weight.shape
    factor = reference.lognormal(SEED, LAYER, sample, weight.numel(), sigma, 0.0)
    return weight.float() * torch.from_numpy(factor).view(out, *kernel, channels).movedim(-1, 1)


# (N, C, H, W), (out, in / groups, kh, kw), options
CONVOLUTIONS = {
    "5x5": ((17, 1, 12, 12), (7, 1, 5, 5), {}),
    "3x3 padded": ((3, 6, 9, 7), (13, 6, 3, 3), {"padding": 1}),
    "one image, one pixel": ((1, 5, 1, 1), (2, 5, 1, 1), {}),
    "strided, uneven": ((5, 3, 11, 10), (8, 3, 3, 2), {"stride": (2, 3), "padding": (2, 0)}),
    "dilated": ((2, 4, 13, 12), (6, 4, 3, 3), {"dilation": (2, 3), "padding": 2}),
    "depthwise": ((4, 9, 8, 8), (9, 1, 3, 3), {"groups": 9, "padding": 1}),
    "grouped": ((16, 12, 6, 6), (9, 4, 3, 3), {"groups": 3}),
    "wide": ((33, 20, 5, 5), (70, 20, 3, 3), {"padding": 1}),
}
needs_core = pytest.mark.skipif(not native.status().built, reason="the C++ core was not built")


@pytest.fixture(params=native.status().available or ["numpy"])
def isa(request: pytest.FixtureRequest):
    """Each instruction set that this machine has, in turn."""
    if request.param == "numpy":
        yield "numpy"
        return
    from correctnet import _native

    before = _native.isa()
    _native.select_isa(request.param)
    yield request.param
    _native.select_isa(before)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv2d(name: str, per_sample: bool, isa: str) -> None:
    x_shape, w_shape, options = CONVOLUTIONS[name]
    samples = [0, 137, 2**32 - 1]
    x = tensor(*([3] if per_sample else []), *x_shape)
    weight, bias = tensor(*w_shape, seed=1), tensor(w_shape[0], seed=2)
    y = noisy_conv2d(x, weight, bias, seed=SEED, samples=samples, layer=LAYER, sigma=SIGMA, **options)
    half = [t.bfloat16() for t in (x, weight, bias)]
    low = noisy_conv2d(*half, seed=SEED, samples=samples, layer=LAYER, sigma=SIGMA, **options)
    assert low.dtype == torch.bfloat16
    for i, sample in enumerate(samples):
        x_i, w_i = x[i] if per_sample else x, specified(weight, sample)
        wanted = F.conv2d(x_i.double(), w_i.double(), bias.double(), **options)
        plain = (F.conv2d(x_i, w_i, bias, **options) - wanted).abs().max()
        assert (y[i] - wanted).abs().max() <= 2 * plain + 1e-6 * wanted.abs().max()
        # Inputs and noisy weights rounded to bfloat16, the sum in float32 and rounded at the end.
        rounded = specified(half[1], sample).bfloat16()
        x_i = half[0][i] if per_sample else half[0]
        wanted = F.conv2d(x_i.double(), rounded.double(), half[2].double(), **options)
        magnitude = F.conv2d(x_i.double().abs(), rounded.double().abs(), half[2].double().abs(), **options)
        assert ((low[i] - wanted).abs() <= 2**-8 * wanted.abs() + 1e-5 * magnitude).all()


@pytest.mark.parametrize(("images", "inputs", "outputs"), [(1, 1, 1), (17, 33, 7), (40, 400, 120), (5, 6, 131)])
@pytest.mark.parametrize("per_sample", [False, True])
def test_linear(images: int, inputs: int, outputs: int, per_sample: bool, isa: str) -> None:
    samples = torch.tensor([4, 1])
    x = tensor(*([2] if per_sample else []), images, inputs)
    weight, bias = tensor(outputs, inputs, seed=1), tensor(outputs, seed=2)
    y = noisy_linear(x, weight, bias, seed=SEED, samples=samples, layer=LAYER)
    assert y.shape == (2, images, outputs)
    for i, sample in enumerate(samples.tolist()):
        x_i, w_i = x[i] if per_sample else x, specified(weight, sample)
        wanted = F.linear(x_i.double(), w_i.double(), bias.double())
        plain = (F.linear(x_i, w_i, bias) - wanted).abs().max()
        assert (y[i] - wanted).abs().max() <= 2 * plain + 1e-6 * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_identity_gives_back_the_noisy_weights(dtype: torch.dtype, isa: str) -> None:
    """Bit by bit, so no weight has another one's noise, whatever its place in the packed order."""
    samples = [5, 70_000]
    for outputs, inputs in ((1, 1), (7, 13), (37, 50), (130, 3)):
        weight = tensor(outputs, inputs, dtype=dtype)
        y = noisy_linear(torch.eye(inputs, dtype=dtype), weight, seed=SEED, samples=samples, layer=LAYER)
        for i, sample in enumerate(samples):
            assert torch.equal(y[i].T, specified(weight, sample).to(dtype))
    for outputs, channels, kh, kw, groups in ((1, 1, 1, 1, 1), (7, 5, 3, 3, 1), (6, 3, 5, 2, 3), (33, 17, 3, 3, 1)):
        weight = tensor(outputs, channels, kh, kw, dtype=dtype)
        total = groups * channels
        # One image for each weight of an output, one everywhere else than there being zero.
        x = torch.eye(total * kh * kw, dtype=dtype).view(-1, total, kh, kw)
        y = noisy_conv2d(x, weight, seed=SEED, samples=samples, layer=LAYER, groups=groups)
        for i, sample in enumerate(samples):
            wanted = specified(weight, sample).to(dtype)
            found = y[i, :, :, 0, 0].T.reshape(outputs, total, kh, kw)
            for o in range(outputs):
                group = o // (outputs // groups)
                assert torch.equal(found[o, group * channels : (group + 1) * channels], wanted[o])
                assert found[o].count_nonzero() == wanted[o].count_nonzero()


def test_a_chip_is_the_same_in_any_company(threads) -> None:
    x, weight = tensor(70, 6, 9, 9), tensor(16, 6, 5, 5, seed=1)
    many = noisy_conv2d(x, weight, seed=1, samples=range(130, 145))
    assert torch.equal(noisy_conv2d(x, weight, seed=1, samples=[137])[0], many[7])
    assert torch.equal(noisy_conv2d(x.expand(15, *x.shape), weight, seed=1, samples=range(130, 145)), many)
    for number in (1, 2, 3):
        threads(number)
        assert torch.equal(noisy_conv2d(x, weight, seed=1, samples=range(130, 145)), many)
    flushed = torch.set_flush_denormal(True)
    try:
        assert torch.equal(noisy_conv2d(x, weight, seed=1, samples=[137])[0], many[7])
    finally:
        assert flushed
        torch.set_flush_denormal(False)


def test_any_memory_order_will_do() -> None:
    x, weight = tensor(9, 6, 8, 8), tensor(4, 6, 3, 3)
    y = noisy_conv2d(x, weight, samples=[1, 2])
    last = torch.channels_last
    assert torch.equal(noisy_conv2d(x.to(memory_format=last), weight.to(memory_format=last), samples=[1, 2]), y)
    a, b = tensor(20, 12), tensor(6, 20)
    assert torch.equal(
        noisy_linear(a.T, b.T.contiguous().T, samples=[1]), noisy_linear(a.T.contiguous(), b, samples=[1])
    )


def test_sigma_0_is_the_plain_layer() -> None:
    x, weight = tensor(9, 5), tensor(4, 5)
    y = noisy_linear(x, weight, samples=[0, 1], sigma=0.0)
    torch.testing.assert_close(y, F.linear(x, weight).expand(2, 9, 4))


# ---- gradients -------------------------------------------------------------------------------------------------------


def address() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(99), torch.tensor([3, 11])


@pytest.mark.parametrize("per_sample", [False, True])
def test_gradients_in_float64(per_sample: bool) -> None:
    def leaf(*shape: int, seed: int) -> torch.Tensor:
        return tensor(*shape, dtype=torch.float64, seed=seed).requires_grad_()

    seed, samples = address()
    lead = [2] if per_sample else []
    x, w, b = leaf(*lead, 3, 4, seed=1), leaf(5, 4, seed=2), leaf(5, seed=3)
    assert torch.autograd.gradcheck(lambda *t: noisy_linear(*t, seed=seed, samples=samples, layer=2), (x, w, b))
    x, w, b = leaf(*lead, 2, 4, 5, 4, seed=1), leaf(6, 2, 3, 2, seed=2), leaf(6, seed=3)
    options = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2}
    assert torch.autograd.gradcheck(lambda *t: noisy_conv2d(*t, seed=seed, samples=samples, **options), (x, w, b))
    assert torch.autograd.gradcheck(lambda t: noisy_weight(t, seed=seed, samples=samples), (w,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_against_float64(dtype: torch.dtype) -> None:
    seed, samples = address()
    low = [tensor(5, 3, 8, 8, dtype=dtype), tensor(4, 3, 3, 3, dtype=dtype, seed=1), tensor(4, dtype=dtype, seed=2)]
    high = [t.double() for t in low]
    for leaves in (low, high):
        for t in leaves:
            t.requires_grad_()
        y = noisy_conv2d(*leaves, seed=seed, samples=samples, padding=1)
        (y.double() * tensor(*y.shape, seed=3)).sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for a, b in zip(low, high, strict=True):
        assert a.grad.dtype == dtype
        assert (a.grad - b.grad).abs().max() <= tolerance * b.grad.abs().max()


OPERATORS = {
    "weight": lambda dtype: (torch.ops.correctnet.noisy_weight, (tensor(5, 4, 3, 2, dtype=dtype),), ()),
    "linear": lambda dtype: (
        torch.ops.correctnet.noisy_linear,
        (tensor(3, 4, dtype=dtype), tensor(5, 4, dtype=dtype), tensor(5, dtype=dtype)),
        (),
    ),
    "linear, x per sample": lambda dtype: (
        torch.ops.correctnet.noisy_linear,
        (tensor(2, 3, 4, dtype=dtype), tensor(5, 4, dtype=dtype), None),
        (),
    ),
    "conv2d": lambda dtype: (
        torch.ops.correctnet.noisy_conv2d,
        (tensor(3, 4, 7, 6, dtype=dtype), tensor(6, 2, 3, 3, dtype=dtype), tensor(6, dtype=dtype)),
        ([2, 1], [1, 0], [1, 2], 2),
    ),
    "conv2d, x per sample": lambda dtype: (
        torch.ops.correctnet.noisy_conv2d,
        (tensor(2, 3, 4, 7, 6, dtype=dtype), tensor(6, 4, 3, 3, dtype=dtype), None),
        ([1, 1], [1, 1], [1, 1], 1),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    operator, tensors, tail = OPERATORS[name](dtype)
    for t in tensors:
        if t is not None:
            t.requires_grad_()
    torch.library.opcheck(operator, (*tensors, *address(), 1, 0.5, 0.0, *tail))


def test_compiled_without_breaks_or_recompiles() -> None:
    weight, bias = tensor(6, 3, 3, 3).requires_grad_(), tensor(6).requires_grad_()
    head = tensor(4, 6).requires_grad_()

    def step(x: torch.Tensor, seed: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
        y = noisy_conv2d(x, weight, bias, seed=seed, samples=samples, layer=0, padding=1).relu()
        return noisy_linear(y.mean((3, 4)), head, seed=seed, samples=samples, layer=1).sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x = tensor(5, 3, 6, 6)
    for i, (seed, samples) in enumerate([(1, [0, 1]), (2, [0, 1]), (2**40, [7, 2**31])]):
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            found = compiled(x, torch.tensor(seed), torch.tensor(samples))
            grads = torch.autograd.grad(found, (weight, bias, head))
        wanted = step(x, torch.tensor(seed), torch.tensor(samples))
        torch.testing.assert_close(found, wanted)
        for a, b in zip(grads, torch.autograd.grad(wanted, (weight, bias, head)), strict=True):
            torch.testing.assert_close(a, b)
    torch._dynamo.reset()


# ---- bad input -------------------------------------------------------------------------------------------------------

GOOD_LINEAR = {"x": tensor(3, 4), "weight": tensor(5, 4), "bias": tensor(5), "seed": 1, "samples": [0]}
GOOD_CONV = {"x": tensor(3, 4, 6, 6), "weight": tensor(6, 2, 3, 3), "bias": tensor(6), "samples": [0], "groups": 2}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"x": tensor(4)}, "x"),
        ({"x": tensor(3, 5)}, "x"),
        ({"x": tensor(0, 4)}, "x"),
        ({"x": tensor(2, 3, 4)}, "x"),
        ({"x": tensor(3, 4).double()}, "x"),
        ({"x": tensor(3, 4).half(), "weight": tensor(5, 4).half()}, "weight"),
        ({"weight": tensor(4)}, "weight"),
        ({"weight": tensor(0, 4), "bias": None}, "weight"),
        ({"bias": tensor(4)}, "bias"),
        ({"bias": tensor(5).double()}, "bias"),
        ({"seed": -1}, "seed"),
        ({"seed": torch.tensor([1, 2])}, "seed"),
        ({"seed": torch.tensor(1.0)}, "seed"),
        ({"samples": []}, "samples"),
        ({"samples": [2**32]}, "samples"),
        ({"samples": [-1]}, "samples"),
        ({"layer": 2**32}, "layer"),
        ({"layer": -1}, "layer"),
        ({"sigma": math.nan}, "sigma"),
        ({"sigma": -0.1}, "sigma"),
        ({"sigma": 50.0}, "sigma"),
        ({"shift": math.inf}, "shift"),
    ],
)
def test_linear_names_the_bad_argument(change: dict[str, object], name: str) -> None:
    arguments = GOOD_LINEAR | change
    with pytest.raises(ValueError, match=f"^{name}\\b"):
        noisy_linear(arguments.pop("x"), arguments.pop("weight"), arguments.pop("bias"), **arguments)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"x": tensor(3, 5, 6, 6)}, "x"),
        ({"x": tensor(3, 4, 2, 6)}, "x"),
        ({"x": tensor(2, 3, 4, 6, 6)}, "x"),
        ({"weight": tensor(6, 2, 3)}, "weight"),
        ({"weight": tensor(6, 2, 0, 3)}, "weight"),
        ({"groups": 4}, "groups"),
        ({"groups": 0}, "groups"),
        ({"stride": 0}, "stride"),
        ({"stride": (1, 2, 3)}, "stride"),
        ({"padding": -1}, "stride, dilation: at least 1, padding"),
        ({"dilation": 0}, "stride, dilation"),
    ],
)
def test_conv2d_names_the_bad_argument(change: dict[str, object], name: str) -> None:
    arguments = GOOD_CONV | change
    with pytest.raises(ValueError, match=f"^{name}\\b"):
        noisy_conv2d(arguments.pop("x"), arguments.pop("weight"), arguments.pop("bias"), **arguments)


sizes = st.integers(0, 5)
numbers = st.integers(-2, 4) | st.sampled_from([2**31, -(2**31), 2**62])


@settings(max_examples=150, deadline=None)
@given(
    x=st.lists(sizes, max_size=6),
    weight=st.lists(sizes, max_size=5),
    dtypes=st.tuples(
        *[st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.float16])] * 2
    ),
    samples=st.lists(st.integers(-1, 3), max_size=3),
    layer=numbers,
    sigma=st.floats() | st.just(0.5),
    pairs=st.tuples(numbers, numbers, numbers),
    groups=numbers,
)
def test_no_input_does_worse_than_an_error(x, weight, dtypes, samples, layer, sigma, pairs, groups) -> None:
    x, weight = torch.ones(x).to(dtypes[0]), torch.ones(weight).to(dtypes[1])
    address = (torch.tensor(1), torch.tensor(samples, dtype=torch.int64), layer, sigma, 0.0)
    tail = [[p, p] for p in pairs]
    for call in (
        lambda: torch.ops.correctnet.noisy_linear(x, weight, None, *address),
        lambda: torch.ops.correctnet.noisy_conv2d(x, weight, None, *address, *tail, groups),
    ):
        try:
            y = call()
        except (ValueError, TypeError, RuntimeError) as error:
            assert str(error)  # noqa: PT017 - any of them will do
        else:
            assert y.shape[0] == len(samples)
            assert torch.isfinite(y).all()


@settings(max_examples=40, deadline=None)
@given(
    images=st.integers(1, 20),
    channels=st.integers(1, 7),
    outputs=st.integers(1, 15),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    extra=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
)
def test_any_convolution_agrees_with_float64(images, channels, outputs, kernel, extra, stride, padding) -> None:
    x = tensor(images, channels, kernel[0] + extra[0], kernel[1] + extra[1])
    weight = tensor(outputs, channels, *kernel, seed=1)
    y = noisy_conv2d(x, weight, seed=SEED, samples=[9], layer=LAYER, stride=stride, padding=padding)[0]
    wanted = F.conv2d(x.double(), specified(weight, 9).double(), stride=stride, padding=padding)
    magnitude = F.conv2d(x.double().abs(), specified(weight, 9).double().abs(), stride=stride, padding=padding)
    assert ((y - wanted).abs() <= 1e-6 * magnitude + 1e-30).all()


@needs_core
def test_float32_and_numpy_draw_the_same() -> None:
    weight = tensor(9, 8, 3, 3)
    drawn = noisy_weight(weight, seed=SEED, samples=[3, 4], layer=LAYER)
    assert np.array_equal(drawn[1].numpy(), specified(weight, 4).numpy())
