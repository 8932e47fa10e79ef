"""Augmentation and resizing of batches of images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def augment(images: Tensor, generator: torch.Generator, padding: int = 4, flip: bool = True) -> Tensor:
    """Random crop after zero padding, and random horizontal flip, each image on its own; no loop over images.

    Args:
        images: (N, C, H, W).
        generator: a CPU generator; the same state gives the same crops.
        padding: pixels of zeros on each side before the crop back to H x W.
        flip: mirror half of the images.

    Returns:
        (N, C, H, W), a new tensor.
    """
    n, _, height, width = images.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=generator)
    rows = top + torch.arange(height)  # (N, H)
    columns = left + torch.arange(width)  # (N, W)
    if flip:
        mirrored = torch.rand(n, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(images, (padding,) * 4)
    device = images.device
    index = (torch.arange(n)[:, None, None].to(device), rows[:, :, None].to(device), columns[:, None, :].to(device))
    # Advanced indexing puts the indexed dimensions first: (N, H, W, C).
    return padded.permute(0, 2, 3, 1)[index].permute(0, 3, 1, 2).contiguous()


def resize(images: Tensor, side: int) -> Tensor:
    """(N, C, H, W) images as (N, C, side, side): bilinear, the filter as wide as the pixels that it averages."""
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True)
