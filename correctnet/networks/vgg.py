"""VGG16 for 32 x 32 images."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from torch import nn

from correctnet.networks.blocks import Block

POOLED = (1, 3, 6, 9, 12)  # convolutions followed by a 2 x 2 max-pool


def vgg16(
    classes: int = 10,
    channels: int = 3,
    batchnorm: Literal["before", "after", "none"] = "before",
    dropout: float = 0.0,
    widths: tuple[int, ...] = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512, 512),
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
        if i in POOLED:
            # Rounded up, so that maps of smaller images (correctnet.settings.Resized.sizes) do not vanish.
            parts[f"pool{POOLED.index(i) + 1}"] = nn.MaxPool2d(2, ceil_mode=True)
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
