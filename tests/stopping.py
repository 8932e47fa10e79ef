"""A training that is stopped in its middle, for tests of what continues it."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


class Stopped(Exception):
    """What stops it."""


def stopping_loss(at: int) -> tuple[Callable[[Tensor, Tensor], Tensor], list[int]]:
    """The cross entropy as a loss that raises `Stopped` in call number `at`, once; and a list with an item a call."""
    calls: list[int] = []

    def stopping(outputs: Tensor, labels: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == at:
            raise Stopped
        return F.cross_entropy(outputs, labels)

    return stopping, calls
