"""Torchvision's networks, also where its wheel was built for another torch than the one that is installed."""

import pytest
import torch


def models():
    """`torchvision.models`; skips the test where torchvision is not installed."""
    try:
        import torchvision
    except ModuleNotFoundError:
        pytest.skip("torchvision is not installed")
    except RuntimeError:  # a wheel for CUDA beside a torch for CPUs: two operators are looked for when it is imported
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        models.library = library  # as long as it is needed
        import torchvision
    return torchvision.models
