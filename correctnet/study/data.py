"""The images: a stub with scikit-learn's digits, which need no download.

Put your own here, or delete this file and name a folder of pictures or an .npz file in config.yaml (README.md).
"""

import numpy as np
from sklearn.datasets import load_digits


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W), (N, C, H, W) or (N, H, W, C), of 8 bits or floats, and labels (N,) from 0 on.

    A fifth of them, always the same, are the test images. ((images, labels), (images, labels)) gives test images of
    their own.
    """
    bunch = load_digits()
    return (bunch.images * (255 / 16)).round().astype(np.uint8), bunch.target
