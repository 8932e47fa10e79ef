"""On a GPU, or a modelled one as in test_gpu.py: tensors that kernels cannot take as they are, and no memory left."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from correctnet import LogNormalVariation, convert
from correctnet.crossbar import kernels
from correctnet.engine.engine import Engine
from correctnet.errors import UserError
from correctnet.networks.building import build
from correctnet.noise import device as gpu

MODELLED = gpu.status().usable and not torch.cuda.is_available()
DEVICE = torch.device("cpu" if MODELLED else "cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not gpu.status().usable, reason=gpu.status().reason)]

GEOMETRY = (1, 1), (1, 1), (1, 1), 1


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(DEVICE)


def shifted(tensor: Tensor) -> Tensor:
    """The same numbers one behind a multiple of 16 bytes: contiguous, or a map's in the order that the kernels read."""
    maps = tensor.dim() > 3
    ordered = tensor.movedim(-3, -1) if maps else tensor
    view = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)[1:].view(ordered.shape)
    view.copy_(ordered)
    assert view.is_contiguous()
    assert view.data_ptr() % 16 == tensor.element_size()
    return view.movedim(-1, -3) if maps else view


def convolve(x: Tensor, weight: Tensor, chips: int = 3, size: tuple[int, int] | None = None) -> Tensor:
    geometry = ((1, 1), (0, 0), (1, 1), 1) if weight.shape[-1] == 1 else GEOMETRY
    seed, samples = torch.tensor(11), torch.arange(chips)
    return kernels.convolve(x, weight, None, seed, samples, 2, 0.5, -0.125, geometry, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "kernel"), [((5, 32, 1, 1), (16, 32, 1, 1)), ((2, 8, 4, 4), (16, 8, 3, 3))])
def test_views_that_begin_anywhere(dtype: torch.dtype, shape: tuple[int, ...], kernel: tuple[int, ...]) -> None:
    x, weight = normal(*shape).to(dtype), normal(*kernel).to(dtype)
    wanted = convolve(x, weight)
    assert torch.equal(convolve(shifted(x), weight), wanted)
    assert torch.equal(convolve(x, shifted(weight)), wanted)
    gradient = normal(*wanted.shape).to(dtype)
    back = convolve(gradient, weight, size=shape[-2:])
    assert torch.equal(convolve(shifted(gradient), shifted(weight), size=shape[-2:]), back)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", [(3, 3), ()])
def test_weights_that_begin_anywhere(dtype: torch.dtype, kernel: tuple[int, ...]) -> None:
    weight, seed, samples = normal(6, 8, *kernel).to(dtype), torch.tensor(11), torch.arange(3)
    wanted = gpu.noisy_weight(weight, seed, samples, 2, 0.5)
    assert torch.equal(gpu.noisy_weight(shifted(weight), seed, samples, 2, 0.5), wanted)


def test_no_chips() -> None:
    assert convolve(normal(1, 4, 1, 1), normal(4, 4, 1, 1), 0).shape == (0, 1, 4, 1, 1)
    nothing = gpu.noisy_weight(normal(4, 4), torch.tensor(11), torch.arange(0), 2, 0.5)
    assert nothing.shape == (0, 4, 4)


@pytest.mark.skipif(MODELLED, reason="minutes on a modelled device; csrc/tests/test_cuda.cpp lowers the limit instead")
def test_more_chips_than_a_grid_counts() -> None:
    x, weight, chips = normal(1, 4, 1, 1), normal(4, 4, 1, 1), 70000
    some = [0, 65534, 65535, 69999]
    seed, samples = torch.tensor(11), torch.arange(chips)
    factors = gpu.noisy_weight(weight, seed, samples, 2, 0.5)
    assert torch.equal(factors[some], gpu.noisy_weight(weight, seed, torch.tensor(some), 2, 0.5))
    alone = kernels.convolve(x, weight, None, seed, torch.tensor(some), 2, 0.5, -0.125, ((1, 1), (0, 0), (1, 1), 1))
    assert torch.equal(convolve(x, weight, chips)[some], alone)


# ---- memory ---------------------------------------------------------------------------------------------------------


def analog() -> torch.nn.Module:
    return convert(build("lenet5", 10, 1), LogNormalVariation(0.5)).eval().to(DEVICE)


@pytest.mark.parametrize(
    ("what", "work"),
    [
        ("convolution", lambda: convolve(normal(1, 4, 1, 1), normal(4, 4, 1, 1))),
        ("noisy weights", lambda: gpu.noisy_weight(normal(4, 4), torch.tensor(11), torch.arange(2), 2, 0.5)),
    ],
)
def test_tensors_without_memory(what: str, work: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    work()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", full)
        with pytest.raises(UserError, match=rf"^{what}: the device has no memory left .*torch\.cuda\.empty_cache\(\)$"):
            work()
    work()


@pytest.mark.skipif(not MODELLED, reason="only a modelled device runs out of memory at will")
def test_a_network_without_memory() -> None:
    images = normal(2, 1, 32, 32)
    wanted = Engine(analog(), images).outputs(images, range(2))
    gpu.kernels().out_of_memory("cudaMalloc")
    with pytest.raises(UserError, match=r"no memory left for the network's weights; .*torch\.cuda\.empty_cache\(\)$"):
        Engine(analog(), images)
    assert Engine(analog(), images).outputs(images, range(2)).shape == wanted.shape
