"""What several test files use."""

import pytest
import torch
from torch import nn

from correctnet import models
from correctnet.data import Split


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    # Two pools of threads on two cores are slower than none, and one thread's sums are reproducible.
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)


@pytest.fixture
def lenet() -> nn.Module:
    return models.build("lenet5", classes=10, channels=1, seed=1).eval()


@pytest.fixture
def tiny() -> nn.Module:
    """A small network with a convolution, BatchNorm and two linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        models.Block(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        models.Block(nn.Linear(64, 8)),
        nn.Linear(8, 3),
    ).eval()


@pytest.fixture
def blobs() -> Split:
    """300 images of 3 classes that a small network can tell apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    patterns = torch.randn(3, 1, 8, 8, generator=generator)
    images = patterns[labels] + 0.7 * torch.randn(300, 1, 8, 8, generator=generator)
    return Split(images, labels)
