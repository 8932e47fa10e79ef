import copy
import platform
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_profile import examples
from torch import nn

from correctnet import precision as arithmetic
from correctnet.datasets.base import Split
from correctnet.precision import available, products, weight_gradient
from correctnet.settings import Training
from correctnet.training.loop import fit


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the weights whose gradient `weight_gradient` computed."""
    seen, original = [], weight_gradient

    def counted(x, gradient, kernel, padding):
        seen.append((gradient.shape[1], x.shape[1], *kernel))
        return original(x, gradient, kernel, padding)

    monkeypatch.setattr(arithmetic, "weight_gradient", counted)
    return seen


@examples(150)
@given(
    st.integers(1, 3),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.randoms(use_true_random=False),
)
def test_the_gradient_of_the_weights_is_autograds(images, channels, size, kernel, padding, random):
    if any(s + 2 * p < k for s, p, k in zip(size, padding, kernel, strict=True)):
        return  # no output
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x, weight = draw(images, channels[0], *size), draw(channels[1], channels[0], *kernel).requires_grad_()
    y = F.conv2d(x, weight, padding=padding)
    gradient = draw(*y.shape)
    y.backward(gradient)
    found = weight_gradient(x, gradient, kernel, padding)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, weight.grad, rtol=1e-12, atol=1e-12)


def gradients(model, x, precision=None):
    model, x = copy.deepcopy(model).to(x.dtype), x.clone().requires_grad_()
    if precision is None:
        y = model(x)
    else:
        with products(precision, "cpu"):
            y = model(x)
    y.sigmoid().sum().backward()
    return [y, x.grad, *[p.grad for p in model.parameters()]]


@pytest.mark.parametrize("size", [1, 2, 5, 8])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_convolutions_in_float32_are_those_of_float64(calls, size, bias, memory_format):
    torch.manual_seed(size)
    model = nn.Sequential(nn.Conv2d(128, 130, 3, padding=1, bias=bias), nn.Conv2d(130, 128, 3, padding="same"))
    model.to(memory_format=memory_format)
    x = torch.randn(3, 128, size, size).to(memory_format=memory_format)
    found, wanted = gradients(model, x, "float32"), gradients(model, x.double())
    assert calls == [(130, 128, 3, 3)]  # the second has padding by name, which is left to torch
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv2d(128, 128, 3, padding=1), 9),  # a larger map
        (nn.Conv2d(127, 128, 3, padding=1), 4),  # fewer channels
        (nn.Conv2d(128, 127, 3, padding=1), 4),
        (nn.Conv2d(128, 128, 1), 4),
        (nn.Conv2d(128, 128, 3, stride=2), 4),
        (nn.Conv2d(128, 128, 3, dilation=2, padding=2), 4),
        (nn.Conv2d(256, 256, 3, groups=2), 4),
        (nn.Conv2d(128, 128, 3, padding=1).requires_grad_(False), 4),  # frozen: its gradient is nobody's
        (nn.Conv2d(128, 128, 3, padding=1).double(), 4),
    ],
)
def test_all_others_are_torchs(calls, layer, size):
    x = torch.randn(2, layer.in_channels, size, size, dtype=layer.weight.dtype)
    for a, b in zip(gradients(layer, x, "float32"), gradients(layer, x), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert calls == []


def test_without_gradients_torch_convolves(calls):
    layer, x = nn.Conv2d(128, 128, 3, padding=1), torch.randn(2, 128, 4, 4)
    with torch.no_grad(), products("float32", "cpu"):
        assert torch.equal(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1))
    assert calls == []


def test_a_second_derivative_is_refused_rather_than_wrong():
    layer, x = nn.Conv2d(128, 128, 3, padding=1), torch.randn(1, 128, 2, 2, requires_grad=True)
    with products("float32", "cpu"):
        y = layer(x).square().sum()
    (first,) = torch.autograd.grad(y, layer.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists() or platform.machine() != "x86_64", reason="x86-64 Linux only")
def test_what_the_cpu_has_is_what_the_kernel_says():
    flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())
    assert arithmetic._has_bfloat16("cpu") == (flags >= {"avx512bw", "avx512vl", "avx512dq"})  # oneDNN's condition


def test_training_multiplies_in_here(calls, monkeypatch):
    model = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), nn.Flatten(), nn.Linear(128 * 4, 2))
    images = Split(torch.randn(8, 128, 2, 2), torch.arange(8) % 2)
    fit(model, images, Training(epochs=1, batch=4), seed=0, quiet=True)
    assert calls == [(128, 128, 3, 3)] * 2, "once a batch"
    for has, more in ((True, 0), (False, 2)):
        calls.clear()
        monkeypatch.setattr(arithmetic, "_has_bfloat16", lambda kind, has=has: has)
        fit(model, images, Training(epochs=1, batch=4, precision="bfloat16"), seed=0, quiet=True)
        assert len(calls) == more


def test_bfloat16_where_there_are_no_instructions_for_it(monkeypatch, capsys):
    monkeypatch.setattr(arithmetic, "_has_bfloat16", lambda kind: kind != "cpu")
    arithmetic.say_once.cache_clear()
    assert available("bfloat16", "cpu") == "float32" == available("bfloat16", torch.device("cpu"))
    assert available("bfloat16", "cuda:1") == "bfloat16"
    said = capsys.readouterr()
    assert (said.out + said.err).count("no instructions for bfloat16") == 1
    with products("bfloat16", "cpu"):
        assert nn.Linear(3, 2)(torch.ones(1, 3)).dtype == torch.float32


def test_bfloat16_where_there_are(monkeypatch, capsys):
    monkeypatch.setattr(arithmetic, "_has_bfloat16", lambda kind: True)
    arithmetic.say_once.cache_clear()
    with products("bfloat16", "cpu"):
        assert nn.Linear(3, 2)(torch.ones(1, 3)).dtype == torch.bfloat16
    with products("float32", "cpu"):
        assert nn.Linear(3, 2)(torch.ones(1, 3)).dtype == torch.float32
    said = capsys.readouterr()
    assert said.out + said.err == ""
