"""Throughput of training compensators on a GPU, with the kernels' noise and with torch's."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from correctnet.bench import gpu_timing as on
from correctnet.bench.workloads import SIGMA, Log, Row, Workload
from correctnet.crossbar.layers import crossbar_layers
from correctnet.devices.lognormal import LogNormalVariation
from correctnet.errors import one_line
from correctnet.methods import compensation, compensation_training
from correctnet.networks.vgg import vgg16
from correctnet.noise import device as gpu
from correctnet.settings import Compensate
from correctnet.training.loop import train_only


@dataclass(frozen=True)
class Way:
    """A way to train compensators with a fresh chip each batch.

    Attributes:
        noise: what draws the noise, the CUDA "kernels" or "torch".
        compiled: whether the network, and torch's noise, use torch.compile.
        graph: whether a step is one CUDA graph.
    """

    noise: Literal["kernels", "torch"]
    compiled: bool = False
    graph: bool = False

    def __str__(self) -> str:
        whose = "the kernels' noise" if self.noise == "kernels" else "torch's noise"
        how = ["torch.compile"] * self.compiled + ["CUDA graph"] * self.graph
        return f"{whose}, {', '.join(how) or 'eager'}"


class Trainer:
    """Training of the compensators of `network` under bfloat16 autocast, without host synchronisation.

    Each step overwrites the weights of a digital network with those of a fresh chip; the chip's number and the noise
    are on the device.
    """

    def __init__(self, network: nn.Module, filters: dict[str, int], x: Tensor, y: Tensor, way: Way, seed: int):
        self._x, self._y = x.to(on.DEVICE).contiguous(memory_format=torch.channels_last), y.to(on.DEVICE)
        self._way = way
        self.network = compensation.compensate(network, filters, seed=seed).eval()
        self.network.to(on.DEVICE, memory_format=torch.channels_last)
        self.parameters = compensation.compensation_parameters(self.network)
        train_only(self.network, self.parameters)
        self.weights = [layer.weight for _, layer in crossbar_layers(self.network)]
        self._nominal = [w.detach().clone(memory_format=torch.preserve_format) for w in self.weights]
        self._seed = torch.full((), seed, dtype=torch.int64, device=on.DEVICE)
        self.chip = torch.zeros(1, dtype=torch.int64, device=on.DEVICE)
        self._optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, capturable=way.graph)
        self._forward = torch.compile(self.network, dynamic=False) if way.compiled else self.network
        self._draw = self._kernels if way.noise == "kernels" else self._torch
        if way.compiled and way.noise == "torch":
            self._draw = torch.compile(self._torch, dynamic=False)
        self._graph = None
        if way.graph:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # warm-up: lazy initialisation must not be captured
                for _ in range(3):
                    self._step()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._step()
        else:
            for _ in range(3):
                self._step()

    def _kernels(self) -> None:
        self.chip += 1
        for i, (weight, nominal) in enumerate(zip(self.weights, self._nominal, strict=True)):
            weight.copy_(gpu.noisy_weight(nominal, self._seed, self.chip, i, SIGMA)[0])

    def _torch(self) -> None:
        for weight, nominal in zip(self.weights, self._nominal, strict=True):
            weight.normal_(0, SIGMA).exp_().mul_(nominal)

    def _step(self) -> None:
        with torch.no_grad():
            self._draw()
        with torch.autocast(on.DEVICE, torch.bfloat16):
            logits = self._forward(self._x)
        loss = F.cross_entropy(logits.float(), self._y)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()

    def run(self, steps: int) -> None:
        """Take `steps` training steps."""
        for _ in range(steps):
            self._graph.replay() if self._graph else self._step()


def training_rows(
    seed: int, rounds: int, log: Log, compiles: bool = True, batch: int = 128, steps: int = 20
) -> list[Row]:
    """Measure the training of VGG16's compensators (six convolutions, S = 1) with a fresh chip each batch.

    Each way with the kernels' noise is compared with the fastest with torch's; "fit" is that of
    `correctnet.training.loop.fit`.
    """
    workload = Workload("training", vgg16, (3, 32, 32), 1, batch)
    x, y = workload.data(seed)
    network = workload.network(seed)
    filters = {f"conv{i}.layer": network.get_submodule(f"conv{i}.layer").out_channels for i in range(1, 7)}
    runs: dict[str, Callable[[int], None]] = {"fit": _fit(network, filters, x, y, seed)}
    ours, failed = ["fit"], {}
    torch._dynamo.reset()  # dynamo stops compiling a function after too many variants
    noises: tuple[Literal["kernels", "torch"], ...] = ("kernels", "torch")
    for noise, compiled, graph in itertools.product(
        noises, sorted({False, compiles}), sorted({False, on.DEVICE == "cuda"})
    ):
        way = Way(noise, compiled, graph)
        try:
            runs[str(way)] = Trainer(network, filters, x, y, way, seed).run
        except Exception as error:  # of the compiler or the capture; the other ways are measured
            failed[str(way)] = one_line(error, 160)
            log(f"training, {way}: does not work here: {failed[str(way)]}")
            continue
        ours += [str(way)] * (noise == "kernels")
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            taken[name].append(on.seconds(lambda run=run: run(steps)) / steps)
        log(f"training, round {i} of {rounds}: " + ", ".join(f"{n}: {1 / t[-1]:.1f} steps/s" for n, t in taken.items()))
    rates = {name: 1 / median(t[1:]) for name, t in taken.items()}
    theirs = {name: rate for name, rate in rates.items() if name not in ours}
    best = max(theirs, key=theirs.__getitem__)
    return [
        {
            "work": "training",
            "precision": "bf16",
            "way": name,
            "against": best,
            "ratio": rates[name] / rates[best],
            "steps_per_s": rates[name],
            "plain_steps_per_s": rates[best],
            "plain": theirs,
            "failed": failed,
            "batch": batch,
            "rounds": rounds,
        }
        for name in ours
    ]


def _fit(network: nn.Module, filters: dict[str, int], x: Tensor, y: Tensor, seed: int) -> Callable[[int], None]:
    """Make the training steps of `correctnet.training.loop.fit`, without reading the loss."""
    section = Compensate(precision="bfloat16")
    analog, _, hooks = compensation_training.prepare(network, filters, section, LogNormalVariation(SIGMA), seed)
    analog = analog.to(on.DEVICE, memory_format=torch.channels_last)
    x, y = x.to(on.DEVICE).contiguous(memory_format=torch.channels_last), y.to(on.DEVICE)
    parameters = compensation.compensation_parameters(analog)
    train_only(analog, parameters)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    drawn = itertools.count()

    def run(steps: int) -> None:
        for _ in range(steps):
            hooks.before_batch(next(drawn))
            with torch.autocast(on.DEVICE, torch.bfloat16):
                loss = F.cross_entropy(analog(x).float(), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return run
