"""A folder of JPEG pictures made from CIFAR-10, for trying out what reads folders.

    python docs/pictures.py PICTURES [--train 45000] [--test 10000]

Writes PICTURES/train/CLASS/NUMBER.jpg and PICTURES/test/CLASS/NUMBER.jpg: the first images of each split, at quality
95. CIFAR-10 is looked for in $CORRECTNET_DATA, and downloaded if it is not there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from correctnet.datasets import facts
from correctnet.datasets.loading import fetch

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=45_000)
    parser.add_argument("--test", type=int, default=10_000)
    args = parser.parse_args()
    records = facts("cifar10").source().records(fetch("cifar10"))
    for part, (images, labels) in zip(("train", "test"), records, strict=True):
        for number in range(min(getattr(args, part), len(labels))):
            path = args.out / part / CLASSES[labels[number]] / f"{number:05}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[number].transpose(1, 2, 0)).save(path, quality=95)


if __name__ == "__main__":
    main()
