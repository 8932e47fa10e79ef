"""LeNet-5 for 32 x 32 images."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from correctnet.networks.blocks import Block


def lenet5(
    classes: int = 10, channels: int = 1, widths: tuple[int, ...] = (6, 16, 120, 84), dropout: float = 0.0
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
