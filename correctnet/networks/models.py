"""LeNet-5 and VGG16 for 32 x 32 images, the networks of the paper.

Both are `nn.Sequential`s of blocks. A `Block` is one analog layer with the digital functions that follow it
(BatchNorm, ReLU, pooling), so that a compensator can stand behind the layer or behind its block's BatchNorm and ReLU.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Literal

from torch import nn

from correctnet import settings as config
from correctnet.errors import UserError
from correctnet.noise import streams

LENET5_WIDTHS = (6, 16, 120, 84)
VGG16_WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512, 512)
VGG16_POOLED = (1, 3, 6, 9, 12)  # convolutions followed by a 2 x 2 max-pool


class Block(nn.Sequential):
    """One conv or linear layer `layer`, and what follows it: `norm` and `relu`, in either order, and `dropout`."""

    def __init__(
        self,
        layer: nn.Module,
        norm: nn.Module | None = None,
        relu: bool = True,
        norm_first: bool = True,
        dropout: float = 0.0,
    ):
        after = [("norm", norm), ("relu", nn.ReLU() if relu else None)]
        parts = [("layer", layer), *(after if norm_first else reversed(after))]
        parts.append(("dropout", nn.Dropout(dropout) if dropout else None))
        super().__init__(OrderedDict((name, part) for name, part in parts if part is not None))


def lenet5(
    classes: int = 10, channels: int = 1, widths: tuple[int, ...] = LENET5_WIDTHS, dropout: float = 0.0
) -> nn.Sequential:
    """LeNet-5: conv 5x5, pool, conv 5x5, pool, three linear layers; ReLU, max-pooling.

    Args:
        classes: outputs.
        channels: of the (N, channels, 32, 32) input.
        widths: channels of the two convolutions, outputs of the two hidden linear layers (LeCun: 6, 16, 120, 84,
            61,706 parameters for MNIST).
        dropout: fraction of each hidden layer's outputs that training drops.
    """
    c1, c2, h1, h2 = widths
    return nn.Sequential(
        OrderedDict(
            conv1=Block(nn.Conv2d(channels, c1, 5), dropout=dropout),
            pool1=nn.MaxPool2d(2),
            conv2=Block(nn.Conv2d(c1, c2, 5), dropout=dropout),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            linear1=Block(nn.Linear(c2 * 5 * 5, h1), dropout=dropout),
            linear2=Block(nn.Linear(h1, h2), dropout=dropout),
            linear3=Block(nn.Linear(h2, classes), relu=False),
        )
    )


def vgg16(
    classes: int = 10,
    channels: int = 3,
    batchnorm: Literal["before", "after", "none"] = "before",
    dropout: float = 0.0,
    widths: tuple[int, ...] = VGG16_WIDTHS,
) -> nn.Sequential:
    """VGG16 for 32 x 32 images: 13 conv 3x3, five max-pools, linear 512-512, linear 512-classes.

    `widths` are the outputs of the thirteen convolutions and of the hidden linear layer. With BatchNorm before or after
    each hidden ReLU it is the network usually called VGG16 on CIFAR (15.04 M parameters for 100 classes); `none` leaves
    BatchNorm out. `dropout` is the fraction of each hidden layer's outputs that training drops. Weights start from He's
    normal initialisation, the last layer's with the gain of a layer without ReLU and its inputs counted: counted by its
    ten outputs, logits would start with a standard deviation of about 7.
    """

    def block(layer: nn.Conv2d | nn.Linear, width: int) -> Block:
        norm = nn.BatchNorm2d(width) if isinstance(layer, nn.Conv2d) else nn.BatchNorm1d(width)
        return Block(layer, norm if batchnorm != "none" else None, norm_first=batchnorm == "before", dropout=dropout)

    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for i, width in enumerate(widths[:-1]):
        parts[f"conv{i + 1}"] = block(nn.Conv2d(channels, width, 3, padding=1), width)
        channels = width
        if i in VGG16_POOLED:
            # Rounded up, so that maps of smaller images (correctnet.settings.Pretrain.sizes) do not vanish.
            parts[f"pool{VGG16_POOLED.index(i) + 1}"] = nn.MaxPool2d(2, ceil_mode=True)
    parts["flatten"] = nn.Flatten()
    parts["linear1"] = block(nn.Linear(channels, widths[-1]), widths[-1])
    parts["linear2"] = Block(nn.Linear(widths[-1], classes), relu=False)
    network = nn.Sequential(parts)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)
    nn.init.kaiming_normal_(parts["linear2"].layer.weight, nonlinearity="linear")
    return network


def build(
    name: str, classes: int, channels: int, seed: int = 0, stage: str = "build", **options: object
) -> nn.Sequential:
    """A network by name with weights drawn from `seed`, leaving torch's global generator as it was.

    `options`: `dropout`, `widths`, `batchnorm` for vgg16. Each `stage` that begins with new weights has others. Raises
    UserError for an unknown name.
    """
    makers = {"lenet5": lenet5, "vgg16": vgg16}
    if name not in makers:
        raise UserError(f"unknown network {name!r} (known: {', '.join(makers)})")
    with streams.global_generators(seed, "network", stage):
        return makers[name](classes, channels, **options)


def options(section: config.Network) -> dict[str, Any]:
    """What `build` takes of the settings' section `network`, beside its name."""
    widths = section.widths or {"lenet5": LENET5_WIDTHS, "vgg16": VGG16_WIDTHS}[section.name]
    own = {"batchnorm": section.batchnorm} if section.name == "vgg16" else {}
    return {"dropout": section.dropout, "widths": widths, **own}


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, weights and biases."""
    return sum(p.numel() for p in model.parameters())
