"""The network: any function that returns an nn.Module with outputs (N, classes)."""

from torch import nn


def small_cnn(classes: int, channels: int, width: int = 16) -> nn.Module:
    """A small convolutional network for images of any size.

    `classes` and `channels` are found from the data, `width` is in config.yaml. A function that names neither is given
    what `network.options` says alone; `shape` would be (channels, height, width) of the images.
    """
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(2 * width * 16, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )
