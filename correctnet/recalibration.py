"""BatchNorm statistics estimated again under variation: a rival without overhead, for networks that have BatchNorm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from correctnet.analog import programmed
from correctnet.arithmetic import Precision, products
from correctnet.errors import UserError


@torch.no_grad()
def recalibrate(
    model: nn.Module, images: Tensor, samples: Sequence[int] | None = None, precision: Precision = "float32"
) -> None:
    """Replace the running mean and variance of every BatchNorm by those of `images`, in place.

    Args:
        model: from `correctnet.analog.convert`.
        images: (N, C, H, W), training images.
        samples: None: on the chip that is programmed now, which a real chip's owner can do only by measuring that
            chip; else the average over these simulated chips, which needs no chip.
        precision: of products, "float32" or "bfloat16"; a chip's batch takes half the time in the latter on CPUs that
            have it. Statistics are summed in float32.

    Raises:
        UserError: the model has no BatchNorm.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        raise UserError("recalibration: the network has no BatchNorm")
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # a cumulative average
        m.train()
    if images.dim() == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    with products(precision, images.device):
        if samples is None:
            model(images)
        else:
            for sample in samples:
                with programmed(model, sample):
                    model(images)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
        m.eval()
