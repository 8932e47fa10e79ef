"""scikit-learn's 1,797 handwritten digits, upsampled to 32 x 32: real images without a download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from correctnet.datasets.base import TEST_SEED, Records, content_order, part_digest, permuted, record_digests
from correctnet.errors import UserError


@dataclass(frozen=True)
class Digits:
    """The digits; 20 % of them, always the same, are the test split. See `correctnet.datasets.base.Source`."""

    mean: tuple[float, ...] = (0.3050,)
    std: tuple[float, ...] = (0.3239,)
    digest: str = "a8a6179bbc606094d96d99d75837eb84"
    """`part_digest` of the 8 x 8 images"""

    def fetch(self, root: Path) -> Path:
        """Nothing to download: the images come with scikit-learn."""
        return root

    def records(self, root: Path) -> tuple[Records, Records]:
        """Training and test records: 8 x 8 images of 17 grey levels, upsampled bilinearly."""
        from sklearn.datasets import load_digits

        bunch = load_digits()
        found = part_digest(record_digests(bunch.images.astype(np.uint8), bunch.target.astype(np.uint8)))
        if found != self.digest:
            raise UserError("digits: scikit-learn's load_digits() gives other images than it should; reinstall it")
        small = torch.from_numpy(bunch.images).float().unsqueeze(1)
        large = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
        images = (large * (255 / 16)).round().to(torch.uint8).numpy()
        labels = bunch.target.astype(np.uint8)
        order = content_order(record_digests(images, labels))
        images, labels = permuted((images[order], labels[order]), np.random.default_rng(TEST_SEED))
        held_out = round(0.2 * len(labels))
        return (images[held_out:], labels[held_out:]), (images[:held_out], labels[:held_out])


DIGITS = Digits()
