"""On a GPU: the chips, outputs and gradients of the CPU.

    pytest -m gpu                     skipped, with the reason, where there is no GPU or no CUDA kernels

In a build that models the device (csrc/cuda/model/shim.h) the same tests run on the CPU, all but those of torch's
runtime; tests/test_cuda_build.py makes one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from correctnet import Converters, LogNormalVariation, add_converters, convert, evaluate, metrics, protect
from correctnet.crossbar import operators as ops
from correctnet.crossbar.convert import program, programmed
from correctnet.crossbar.layers import analog_layers
from correctnet.datasets.base import Split
from correctnet.devices.base import Variation
from correctnet.devices.device import Device, Gain
from correctnet.engine import cuda
from correctnet.engine.engine import Engine, Unsupported
from correctnet.engine.lowering import METHODS
from correctnet.errors import UserError
from correctnet.evaluation.montecarlo import EngineWarning
from correctnet.methods import compensation
from correctnet.networks.building import build
from correctnet.noise import arrays, draw
from correctnet.noise import device as gpu
from correctnet.precision import full_float32
from correctnet.settings import Training
from correctnet.training.loop import fit

MODELLED = gpu.status().usable and not torch.cuda.is_available()
DEVICE = torch.device("cpu" if MODELLED else "cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not gpu.status().usable, reason=gpu.status().reason)]
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

SEED, SIGMA = 11, 0.5


@pytest.fixture(autouse=True)
def _float32_is_float32() -> Iterator[None]:
    # Where torch computes (a gradient with respect to weights, layers whose weights are made first) cuDNN would round
    # to TF32's ten bits, as it does by default in any network: these tests are about our arithmetic.
    with full_float32(DEVICE):
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def residual() -> nn.Module:
    """A shortcut, a concatenation, pools, strides, groups and dilation."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8)
            self.second = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2)
            self.third = nn.Conv2d(8, 20, 5, stride=2, padding=1)
            self.pool = nn.AvgPool2d(3, 1, padding=1)
            self.last = nn.Linear(40, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.norm(self.first(x)))
            x = x + self.second(x)
            x = F.max_pool2d(torch.relu(self.third(x)), 2)
            x = torch.cat([x, self.pool(x)], 1)
            return self.last(F.adaptive_avg_pool2d(x, 1).flatten(1))

    return Net()


def compensated() -> nn.Module:
    network = build("lenet5", 10, 1, seed=2)
    made = compensation.compensate(network, {"conv1.layer": 3, "conv2.layer": 5}, seed=1, init="random")
    return made


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "lenet5": (lambda: build("lenet5", 10, 1, seed=1), (1, 32, 32)),
    "residual": (residual, (3, 13, 13)),
    "compensated": (compensated, (1, 32, 32)),
    "linear": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 3)), (3, 2, 2)),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    """A network of `NETWORKS` with trained-like BatchNorm, converted, and 37 images."""
    maker, shape = NETWORKS[name]
    torch.manual_seed(3)
    network = maker().eval()
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean, -0.5, 0.5)
            nn.init.uniform_(m.running_var, 0.5, 2)
    return convert(network, LogNormalVariation(SIGMA), SEED), normal(37, *shape)


def by_torch(analog: nn.Module, images: Tensor, samples: list[int]) -> Tensor:
    """Each chip by torch on the CPU, in float64, with the weights of the specification."""
    outputs = []
    for sample in samples:
        with programmed(analog, sample), torch.no_grad():
            double = {
                f"{name}.weight": layer.chip_weight().double()
                for name, layer in analog.named_modules()
                if layer in analog_layers(analog)
            }
        with programmed(analog, None), torch.no_grad():
            parameters = {k: v.double() for k, v in (*analog.named_parameters(), *analog.named_buffers())}
            outputs.append(torch.func.functional_call(analog, {**parameters, **double}, (images.double(),)))
    return torch.stack(outputs)


# ---- noise ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(6, 1, 5, 5), (16, 6, 5, 5), (70, 67, 3, 3), (8, 16, 1, 1), (3, 4, 1, 7), (10, 84), (1, 1), (257, 5, 2, 2)],
)
def test_noise_has_the_bits_of_the_cpu(shape: tuple[int, ...], last: bool, dtype: torch.dtype) -> None:
    weight = normal(*shape)
    if last and len(shape) == 4:
        weight = weight.contiguous(memory_format=torch.channels_last)
    samples = [0, 137, 2**32 - 1]
    got = gpu.noisy_weight(
        weight.to(DEVICE), torch.tensor(-5), torch.tensor(samples), 7, SIGMA, -0.125, dtype=dtype
    ).cpu()
    for found, sample in zip(got, samples, strict=True):
        wanted = draw.noisy_weight(weight, 2**64 - 5, 7, sample, SIGMA, -0.125, dtype=dtype)
        assert torch.equal(found, wanted)


def test_noise_of_many_weights_has_the_moments_of_its_distribution() -> None:
    factors = gpu.noisy_weight(
        torch.ones(1000, 1000, device=DEVICE), torch.tensor(1), torch.tensor([3]), 0, SIGMA
    )[0].double().log()  # fmt: skip
    assert abs(factors.mean().item()) < 5 * SIGMA / 1000
    assert factors.std().item() == pytest.approx(SIGMA, rel=0.005)


# ---- the engine -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fused", "materialise", "library"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_those_of_the_chips(name: str, precision: Any, method: Any) -> None:
    analog, images = made(name)
    samples = [0, 137, 9]
    wanted = by_torch(analog, images, samples)
    engine = Engine(analog.to(DEVICE), images[:2].to(DEVICE), precision=precision, method=method)
    assert engine.on_gpu
    assert (engine.report.unfused == ()) == (method != "library")
    assert engine.library == engine.report.library == (method == "library")
    got = engine.outputs(images.to(DEVICE), samples).double().cpu()
    scale = wanted.abs().max().item()
    # float32: sums of at most 400 products. bfloat16: 2^-9 of each number, over three to six layers.
    tolerance = 2e-6 if precision == "float32" else 0.04
    if method == "library":  # which may take Winograd's way in float32, and rounds each operation's output in bfloat16
        tolerance = 2e-5 if precision == "float32" else 0.08
    assert (got - wanted).abs().max().item() < tolerance * scale


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_methods_chunks_and_single_chips_agree_to_the_bit(precision: Any) -> None:
    analog, images = made("lenet5")
    analog, images = analog.to(DEVICE), images.to(DEVICE)
    samples = list(range(130, 140))
    engine = Engine(analog, images[:2], precision=precision)
    whole = engine.outputs(images, samples)
    assert torch.equal(engine.outputs(images, [137])[0], whole[7])
    assert torch.equal(
        Engine(analog, images[:2], precision=precision, method="materialise").outputs(images, samples), whole
    )
    (step,) = engine._steps
    least = step.gpu.workspace(len(images), 1)
    assert torch.equal(step.gpu.outputs(images, SEED, samples, least).view_as(whole), whole), "chip by chip"
    assert torch.equal(torch.cat([engine.outputs(images[:5], samples), engine.outputs(images[5:], samples)], 1), whole)


@pytest.mark.parametrize("method", METHODS)
def test_counts_are_those_of_the_outputs(method: Any) -> None:
    analog, images = made("lenet5")
    engine = Engine(analog.to(DEVICE), images[:2].to(DEVICE), method=method)
    labels = torch.arange(37) % 10
    outputs = engine.outputs(images, range(6))
    assert engine.count_correct(images, labels, range(6)) == (outputs.argmax(2).cpu() == labels).sum(1).tolist()


@pytest.mark.parametrize("method", METHODS)
def test_sums_of_a_metric_are_those_of_the_outputs(method: Any) -> None:
    analog, images = made("lenet5")
    analog, labels = analog.to(DEVICE), torch.arange(37) % 10
    outputs = Engine(analog, images[:2].to(DEVICE), method=method).outputs(images, range(6)).cpu()
    expected = [(o.topk(3).indices == labels[:, None]).any(1).double().mean().item() for o in outputs]
    found = evaluate(analog, (images, labels), 6, gpu_method=method, metric=metrics.top_k(3), progress=False)
    assert found.values.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("first_layer", [0, 2])
def test_libraries_get_the_weights_of_the_chip(first_layer: int) -> None:
    """Layers in front of the first varied one, a device model of the user's own, a hook, an operation in place."""

    class Doubling(Variation):
        def sample(self, weight: Tensor, seed: int, layer: int, sample: int) -> Tensor:
            return weight * (2 + sample)

        def describe(self) -> dict[str, Any]:
            return {}

    analog, images = made("residual")
    analog, images = analog.to(DEVICE), images.to(DEVICE)
    analog.third.variation = Doubling()
    analog.second.register_forward_hook(lambda module, args, output: output * 3)
    analog.norm = nn.Sequential(analog.norm, nn.ReLU(inplace=True))
    program(analog, 5)  # what is programmed now has no say
    engine = Engine(analog, images[:2], first_layer, method="library")
    shared, sampled, weights = engine.cost
    assert (shared > 0) == (first_layer > 0)
    assert weights == sum(m.weight.numel() for m in analog_layers(analog)[first_layer:])
    assert sampled > 0
    got = engine.outputs(images, [0, 137])
    for found, sample in zip(got, [0, 137], strict=True):
        with programmed(analog, sample, first_layer), torch.no_grad():
            wanted = analog(images)
        assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()
    again = engine.outputs(images, [137])[0]
    assert (again - got[1]).abs().max() < 2e-5 * again.abs().max()


def test_libraries_take_as_many_images_as_fit() -> None:
    analog, images = made("lenet5")
    analog, images = analog.to(DEVICE), images.to(DEVICE)
    engine = Engine(analog, images[:2], memory=1 << 20, method="library")
    # An image, 6 x 28 x 28 numbers twice, and once more where an operation may make a copy of its input.
    assert engine._live == 4 * (32 * 32 + 3 * 6 * 28 * 28)
    assert engine.block(37, 2) == 16
    whole = Engine(analog, images[:2], method="library").outputs(images, [3])
    assert (engine.outputs(images, [3]) - whole).abs().max() < 2e-5 * whole.abs().max()


@pytest.mark.parametrize("method", METHODS)
def test_evaluate_gives_the_accuracies_of_the_cpu(method: Any) -> None:
    analog, images = made("lenet5")
    labels = torch.arange(37) % 10
    on_cpu = evaluate(analog, (images, labels), 12, engine="torch", progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EngineWarning)
        got = evaluate(analog.to(DEVICE), Split(images, labels), 12, gpu_method=method, progress=False)
    assert got.table["correct"].tolist() == on_cpu.table["correct"].tolist()


def test_too_little_memory_is_one_clear_line() -> None:
    analog, images = made("lenet5")
    engine = Engine(analog.to(DEVICE), images[:2].to(DEVICE))
    (step,) = engine._steps
    with pytest.raises(UserError, match=r"37 images on one chip take \d+ MiB on the device, more than the 0 MiB"):
        step.gpu.outputs(images.to(DEVICE), SEED, [0], 1000)


# ---- operators ------------------------------------------------------------------------------------------------------

SHAPES = {
    "plain": ((2, 5, 9, 7), (6, 5, 3, 3), {}),
    "strided": ((1, 4, 11, 11), (8, 4, 5, 5), {"stride": (2, 3), "padding": (2, 1)}),
    "groups": ((3, 6, 8, 8), (9, 2, 3, 3), {"groups": 3, "padding": 1}),
    "dilated": ((2, 3, 12, 12), (10, 3, 3, 3), {"dilation": (2, 3), "padding": 2}),
}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_operators_and_their_gradients_are_those_of_the_specification(name: str, shared: bool) -> None:
    size, weight_size, geometry = SHAPES[name]
    samples = [0, 137]
    size = size if shared else (len(samples), *size)

    def tensors(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        made = normal(*size), normal(*weight_size, seed=1), normal(weight_size[0], seed=2)
        return [t.to(device, dtype).requires_grad_() for t in made]

    x, weight, bias = tensors(torch.float64, torch.device("cpu"))
    outputs = []
    for s, sample in enumerate(samples):
        factor = draw.noisy_weight(torch.ones(weight_size), SEED, 2, sample, SIGMA).double()
        outputs.append(F.conv2d(x if shared else x[s], weight * factor, bias, **geometry))
    wanted = torch.stack(outputs)
    wanted.square().sum().backward()
    references = [wanted, x.grad, weight.grad, bias.grad]

    op = torch.ops.correctnet.noisy_conv2d
    pairs = [geometry.get(key, default) for key, default in (("stride", 1), ("padding", 0), ("dilation", 1))]
    pairs = [[p, p] if isinstance(p, int) else list(p) for p in pairs]
    x, weight, bias = tensors(torch.float32, DEVICE)
    noise = torch.tensor(SEED), torch.tensor(samples), 2, SIGMA, 0.0
    fused = op(x, weight, bias, *noise, *pairs, geometry.get("groups", 1))
    fused.square().sum().backward()
    for got, exact in zip([fused, x.grad, weight.grad, bias.grad], references, strict=True):
        error = (got.detach().cpu().double() - exact.detach()).abs().max().item()
        assert error <= 3e-6 * exact.abs().max().item()
    y = ops.noisy_conv2d(x, weight, bias, seed=SEED, samples=samples, layer=2, sigma=SIGMA, **geometry)
    assert (y - fused).abs().max().item() <= 3e-6 * references[0].abs().max().item()


# ---- graphs ---------------------------------------------------------------------------------------------------------


def captured(work: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], object], tuple[Tensor, ...]]:
    """`work` as a CUDA graph: what replays it, and its results. A modelled device does the work again."""
    if MODELLED:
        results = work()

        def again() -> None:
            for result, new in zip(results, work(), strict=True):
                result.copy_(new)

        return again, results
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries choose their kernels, and allocate
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    return graph.replay, results


NUMBERS = [(1, [4, 9]), (2, [4, 9]), (2**40 + 2, [137, 2**32 - 1])]


@pytest.mark.parametrize("way", ["operator", "function"])
def test_layers_and_gradients_are_captured_in_a_graph(way: str) -> None:
    """With seed and samples on the device nothing waits for it, and a replay is about what stands in them then."""
    x, weight, bias = (t.to(DEVICE) for t in (normal(3, 6, 9, 8), normal(9, 2, 3, 3, seed=1), normal(9, seed=2)))
    tensors = [t.requires_grad_() for t in (x, weight, bias)]
    seed, samples = torch.zeros((), dtype=torch.int64, device=DEVICE), torch.tensor([0, 1]).to(DEVICE)

    def work(seed: Tensor = seed, samples: Tensor = samples) -> tuple[Tensor, ...]:
        if way == "operator":
            op = torch.ops.correctnet.noisy_conv2d
            y = op(x, weight, bias, seed, samples, 2, SIGMA, 0.0, [1, 1], [1, 1], [1, 1], 3)
        else:
            noise = {"seed": seed, "samples": samples, "layer": 2, "sigma": SIGMA}
            y = ops.noisy_conv2d(x, weight, bias, **noise, padding=1, groups=3)
        return y.detach(), *torch.autograd.grad(y.square().sum(), tensors)

    replay, results = captured(work)
    for number, chips in NUMBERS:
        seed.fill_(number)
        samples.copy_(torch.tensor(chips))
        replay()
        wanted = work(torch.tensor(number), torch.tensor(chips))
        for result, exact in zip(results, wanted, strict=True):
            assert (result - exact).abs().max() <= 3e-6 * exact.abs().max()


@pytest.mark.parametrize("method", cuda.METHODS)
def test_a_plan_is_captured_in_a_graph(method: Any) -> None:
    analog, images = made("lenet5")
    analog, images = analog.to(DEVICE), images.to(DEVICE)
    labels = (torch.arange(37) % 10).to(DEVICE)
    (step,) = Engine(analog, images[:2], method=method)._steps
    seed, samples = torch.zeros((), dtype=torch.int64, device=DEVICE), torch.tensor([0, 1]).to(DEVICE)
    memory = step.gpu.workspace(len(images), 1)  # for one chip after the other

    def work() -> tuple[Tensor, ...]:
        outputs = step.gpu.outputs(images, seed, samples, memory)
        return outputs, step.gpu.count_correct(images, labels, seed, samples, memory)

    replay, (outputs, correct) = captured(work)
    for number, chips in NUMBERS:
        seed.fill_(number)
        samples.copy_(torch.tensor(chips))
        replay()
        assert torch.equal(outputs, step.gpu.outputs(images, number, chips, memory))
        assert torch.equal(correct, step.gpu.count_correct(images, labels, number, chips, memory))


# ---- torch's runtime ------------------------------------------------------------------------------------------------


@on_a_gpu
def test_a_graph_is_replayed_with_another_seed_and_other_chips() -> None:
    weight = normal(16, 6, 5, 5).cuda()
    seed, samples = torch.tensor(1, device="cuda"), torch.tensor([4], device="cuda")
    for _ in range(2):
        gpu.noisy_weight(weight, seed, samples, 3, SIGMA)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gpu.noisy_weight(weight, seed, samples, 3, SIGMA)
    for number, chip in ((1, 4), (2, 4), (2, 137)):
        seed.fill_(number)
        samples.fill_(chip)
        graph.replay()
        assert torch.equal(out[0].cpu(), draw.noisy_weight(weight.cpu(), number, 3, chip, SIGMA))


@on_a_gpu
def test_two_streams_do_not_disturb_each_other() -> None:
    analog, images = made("lenet5")
    analog, images = analog.cuda(), images.cuda()
    engines = [Engine(analog, images[:2]) for _ in range(2)]
    wanted = [engines[0].outputs(images, range(k, k + 20)) for k in (0, 20)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(5):
        got = []
        for i, (engine, stream) in enumerate(zip(engines, streams, strict=True)):
            with torch.cuda.stream(stream):
                got.append(engine.outputs(images, range(20 * i, 20 * i + 20)))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@on_a_gpu
def test_no_memory_left_is_one_clear_line() -> None:
    analog, images = made("lenet5")
    engine = Engine(analog.cuda(), images[:2].cuda(), memory=1 << 50)
    free, _ = torch.cuda.mem_get_info()
    hold = torch.empty(int(free * 0.98), dtype=torch.uint8, device="cuda")
    many = torch.zeros(1, 1, 32, 32, device="cuda").expand(4096, -1, -1, -1)
    with pytest.raises(UserError, match=r"the device has no .* MiB left; allow less memory"):
        engine.count_correct(many, torch.zeros(4096, dtype=torch.int64), range(2000))
    del hold
    torch.cuda.empty_cache()


@on_a_gpu
def test_a_stage_runs_on_the_device(tmp_path: Any) -> None:
    from click.testing import CliRunner

    from correctnet.cli import main

    command = f"pretrain --dataset digits --epochs 2 --device cuda --quiet --out {tmp_path / 'p'}"
    assert CliRunner().invoke(main, command.split(), catch_exceptions=False).exit_code == 0
    command = (
        f"evaluate --model {tmp_path / 'p'} --dataset digits --chips 3 --device cuda --quiet --out {tmp_path / 'e.csv'}"
    )
    assert CliRunner().invoke(main, command.split(), catch_exceptions=False).exit_code == 0
    assert math.isfinite(float((tmp_path / "e.csv").read_text().splitlines()[1].split(",")[-2] or 0))


@on_a_gpu
def test_dropout_is_a_function_of_the_seed_and_the_global_generators_are_left() -> None:
    images = Split(normal(64, 8).to(DEVICE), (torch.arange(64) % 3).to(DEVICE))
    found, settings = [], Training(epochs=2, batch=16)
    for outside in (1, 2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 3)).to(DEVICE)
        torch.manual_seed(outside)
        before = torch.cuda.get_rng_state(), torch.get_rng_state()
        fit(model, images, settings, seed=3, quiet=True)
        assert torch.equal(torch.cuda.get_rng_state(), before[0])
        assert torch.equal(torch.get_rng_state(), before[1])
        found.append([p.detach().cpu() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


# ---- devices of which moments are known -----------------------------------------------------------------------------


def measured() -> Device:
    return Device.preset("rram-wan-2022", gain=Gain(0.03, 0.02)).stuck(0.05, 0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(16, 6, 5, 5), (9, 33), (3, 1, 1, 1)])
def test_weights_from_arrays_have_the_bits_of_the_cpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    noise = measured().array_noise(normal(*shape).to(DEVICE), 2)
    wanted = torch.from_numpy(arrays.programmed(noise, 5, 2, 7)).movedim(-1, 1).to(dtype)
    assert torch.equal(draw.programmed(noise, 5, 2, 7, dtype).cpu(), wanted)
    several = gpu.programmed(noise, gpu.on_device(5, DEVICE), torch.tensor([1, 7]), 2).cpu()
    assert torch.equal(several[1], draw.programmed(noise, 5, 2, 7).cpu())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["fused", "materialise"])
def test_converters_are_those_of_the_cpu(method: str, precision: str) -> None:
    """Whole numbers, so that sums in any order are the same."""
    torch.manual_seed(2)
    layers = [torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Flatten()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(128, 4)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape))
    x = torch.randint(-9, 10, (21, 3, 8, 8)).float()
    analog = convert(model, LogNormalVariation(0.0), SEED).to(DEVICE)
    add_converters(analog, Converters(5, 6), ranges=dict.fromkeys(("0", "4"), (30.0, 124.0)))
    engine = Engine(analog, x[:2].to(DEVICE), method=method, precision=precision)
    assert engine.on_gpu
    assert engine.whole
    with programmed(analog, 9), torch.no_grad():
        wanted = analog(x.to(DEVICE))
    assert torch.equal(engine.outputs(x.to(DEVICE), [9])[0], wanted)
    with pytest.raises(Unsupported, match="method 'library' has no converters"):
        Engine(analog, x[:2].to(DEVICE), method="library")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("protected", [False, True])
def test_networks_on_measured_devices(method: str, protected: bool) -> None:
    """All methods give the outputs of torch with the same chip."""
    model, x = build("lenet5", 10, 1, seed=1).eval(), normal(5, 1, 32, 32)
    analog = convert(model, LogNormalVariation(SIGMA) if protected else measured(), SEED).to(DEVICE)
    if protected:
        layers = {n: m.nominal for n, m in analog.named_modules() if m in analog_layers(analog)}
        protect(analog, {name: weight.abs() > 0.05 for name, weight in layers.items()})
    engine = Engine(analog, x[:2].to(DEVICE), method=method)
    assert engine.on_gpu
    found = engine.outputs(x.to(DEVICE), [3, 9])[1].cpu()
    with programmed(analog, 9), torch.no_grad():
        wanted = analog(x.to(DEVICE)).cpu()
    assert (found - wanted).abs().max() <= 2e-5 * wanted.abs().max()
