"""Plans and convolutions of many chip samples on a CUDA device (csrc/cuda), on torch's tensors and streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from correctnet.errors import UserError
from correctnet.noise import device as gpu

Method = Literal["fused", "materialise"]
METHODS: tuple[Method, ...] = get_args(Method)


class Plan:
    """A plan of the C++ core on a CUDA device.

    Args:
        plan: a finished `correctnet._native.Plan`; its weights are copied to the device.
        device: the CUDA device.
        method: "fused" makes weights noisy while a kernel loads them; "materialise" first writes the noisy weights of
            some chips to memory, which can be faster for very many images a chip. Same results.

    Raises:
        UserError: a device that the kernels cannot use, or that has no memory left for the weights.
    """

    def __init__(self, plan: Any, device: torch.device, method: Method = "fused"):
        if method not in METHODS:
            raise UserError(f"engine: method must be one of {', '.join(METHODS)}, not {method!r}")
        kernels = gpu.kernels()
        if kernels is None or not gpu.reaches(device):
            raise UserError(f"the CUDA kernels do not compute on {device}: {gpu.status().reason}")
        self.device, self._materialise = device, method == "materialise"
        with gpu.memory_errors("engine", "memory left for the network's weights"):
            self._engine = kernels.Engine(plan, gpu.number(device))

    def workspace(self, count: int, samples: int) -> int:
        """Return the bytes of workspace with which `count` images run on `samples` chips at once."""
        return self._engine.workspace(count, samples, self._materialise)

    def outputs(self, images: Tensor, seed: int | Tensor, samples: Sequence[int] | Tensor, memory: int) -> Tensor:
        """Return the plan's outputs (S, N, C, H, W), float32, for images (N, C, H, W) on the same device.

        Seed and samples given as int64 tensors () and (S,) on the device are read when the kernels run: a CUDA graph
        that captured the call can be replayed with other values in them. The workspace is at most `memory` bytes;
        chips are processed in as many groups as that requires.
        """
        shape = self._engine.output_shape
        with gpu.memory_errors("engine", "memory left for the outputs"):
            outputs = torch.empty(len(samples), len(images), *shape, device=images.device)
        self._run(images, seed, samples, memory, outputs=outputs)
        return outputs

    def count_correct(
        self, images: Tensor, labels: Tensor, seed: int | Tensor, samples: Sequence[int] | Tensor, memory: int
    ) -> Tensor:
        """Return the first row of `count`, (S,) int64 on the device."""
        return self.count(images, labels, seed, samples, memory)[0]

    def count(
        self, images: Tensor, labels: Tensor, seed: int | Tensor, samples: Sequence[int] | Tensor, memory: int
    ) -> Tensor:
        """Return `PlanStep.count` (`correctnet.engine.lowering`) as a tensor (2, S), int64, on the device."""
        counts = torch.zeros(2, len(samples), dtype=torch.int64, device=images.device)
        labels = labels.to(device=images.device, dtype=torch.int64).contiguous()
        self._run(images, seed, samples, memory, labels=labels, correct=counts[0], nonfinite=counts[1])
        return counts

    def _run(
        self, images: Tensor, seed: int | Tensor, samples: Sequence[int] | Tensor, memory: int, **tensors: Tensor
    ) -> None:
        with gpu.memory_errors("engine", f"{4 * images.numel() >> 20} MiB left"):
            images = images.detach().contiguous()
        least, all_of_them = self.workspace(len(images), 1), self.workspace(len(images), len(samples))
        if least > memory:
            raise UserError(
                f"engine: {len(images)} images on one chip take {least >> 20} MiB on the device, more than the "
                f"{memory >> 20} MiB allowed; allow more memory"
            )
        size = min(all_of_them, memory)
        with gpu.memory_errors("engine", f"{size >> 20} MiB left"):
            workspace = torch.empty(size, dtype=torch.uint8, device=images.device)
        numbers = gpu.on_device(seed, images.device)
        chips = gpu.on_device(samples, images.device).to(torch.uint32)
        self._engine.run(
            images=images.data_ptr(),
            count=len(images),
            seed=numbers.data_ptr(),
            samples=chips.data_ptr(),
            sample_count=len(samples),
            workspace=workspace.data_ptr(),
            workspace_bytes=size,
            stream=gpu.stream(images.device),
            materialise=self._materialise,
            **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        )
