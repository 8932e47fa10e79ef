"""Cost model of the stages in seconds of one thread, for estimates and for the time limits of jobs.

Imports no torch, so that a workflow that only plans stays quick.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from correctnet.datasets import Facts
from correctnet.settings import JUDGED_CHIPS, SEARCHING, Inject, Resized, Settings

# Of data that a function returns, which is not called before its images are needed. For estimates alone.
ASSUMED = Facts("", train=50000, test=10000, channels=3, classes=10)


@dataclass(frozen=True)
class Costs:
    """Seconds on one thread, and the number of analog layers they hold for."""

    train: float
    """an image trained: forward and backward"""
    test: float
    """an image on one chip, its share of drawing the chip included"""
    sample: float
    """a chip drawn for training"""
    layers: int
    """analog layers"""


def facts(s: Settings) -> Facts:
    """Numbers and sizes of the images."""
    return s.data.facts() or ASSUMED


def training_images(s: Settings) -> tuple[int, int]:
    """Numbers of images that are trained on and held out for validation."""
    images = facts(s).train
    validation = round(s.data.validation * images)
    return images - validation, validation


def training(s: Settings, section: Resized, cost: Costs) -> float:
    """A training without variation, some of its epochs on smaller images; none where weights are given."""
    if section is s.pretrain and s.network.weights is not None:
        return 0.0
    whole = math.sqrt(facts(s).height * facts(s).width)
    sides = [*section.sizes, *[whole] * section.epochs][: section.epochs]
    return sum((side / whole) ** 2 for side in sides) * training_images(s)[0] * cost.train


def training_with_variation(s: Settings, section: Inject, cost: Costs) -> float:
    """A training of all weights on a fresh chip a batch."""
    return section.epochs * training_images(s)[0] * (cost.train + cost.sample / section.batch)


def distil(s: Settings, cost: Costs) -> float:
    """A training with variation in which the teacher also sees each image; several are trained before."""
    teachers, images = len(s.distil.teachers), s.distil.epochs * training_images(s)[0]
    drawn = teachers * cost.sample / s.distil.batch
    trained = (1 + teachers) * training_with_variation(s, s.distil, cost)
    return trained + images * (max(1, teachers) * cost.test + drawn)


def moments(s: Settings, cost: Costs) -> float:
    """A training in which each layer is applied to means and to variances."""
    return 2 * s.moments.epochs * training_images(s)[0] * cost.train


def sidepath(s: Settings, cost: Costs) -> float:
    """A training of digital paths; of sparse ones after a pass that says where they are."""
    own = s.sidepath
    known = own.path == "sparse" and own.select in ("fisher", "sampled")
    found = min(own.select_images or training_images(s)[0], training_images(s)[0]) * 2 * cost.train if known else 0.0
    return found + own.epochs * training_images(s)[0] * (cost.train + cost.sample / own.batch)


def layer_by_layer(s: Settings, chips: int, images: int | None, cost: Costs) -> float:
    """`chips` for each layer, on validation images."""
    return chips * cost.layers * (images or training_images(s)[1]) * cost.test


def search(s: Settings, cost: Costs) -> float:
    """A search within one limit."""
    if s.search.strategy not in SEARCHING:
        return 0.0
    # The state without compensation is evaluated, too, and not trained.
    return s.search.evaluations * search_state(s, cost) + _scoring(s, cost)


def search_state(s: Settings, cost: Costs) -> float:
    """One state of a search, trained and evaluated."""
    images = s.search.train_epochs * (s.search.train_images or training_images(s)[0])
    return images * _compensating(s, cost) + _scoring(s, cost)


def compensate(s: Settings, cost: Costs) -> float:
    """Compensators trained, then judged with and without."""
    train, validation = training_images(s)
    return s.compensate.epochs * train * _compensating(s, cost) + 2 * JUDGED_CHIPS * validation * cost.test


def evaluate(s: Settings, chips: int, cost: Costs) -> float:
    """`chips` on the images of an evaluation."""
    all_images = facts(s).test if s.evaluate.split == "test" else training_images(s)[1]
    images = s.evaluate.images or all_images
    return chips * (images * cost.test + adaptation(s, cost) + calibration(s, cost)) + importance(s, cost)


def adaptation(s: Settings, cost: Costs) -> float:
    """Training of the protected weights on a chip, which is drawn in each step."""
    images = min(s.adapt.images or training_images(s)[0], training_images(s)[0])
    return s.adapt.passes * images * (cost.train + cost.sample / s.adapt.batch)


def calibration(s: Settings, cost: Costs) -> float:
    """Forward passes of a few images on a chip, one for each layer and a clean one."""
    return s.calibrate.images * (cost.layers + 1) * cost.test


def importance(s: Settings, cost: Costs) -> float:
    """Importance of the weights, image by image, where weights are protected by it."""
    own = s.protect
    if not own.fraction or (own.select in ("random", "magnitude") and own.allocation != "weighted"):
        return 0.0
    return min(own.images or training_images(s)[0], training_images(s)[0]) * 2 * cost.train


def _scoring(s: Settings, cost: Costs) -> float:
    """One state of a search, evaluated."""
    return s.search.chips * (s.search.images or training_images(s)[1]) * cost.test


def _compensating(s: Settings, cost: Costs) -> float:
    """An image while compensators train: a chip a batch (or several) is drawn on top of its step."""
    return s.compensate.chips_per_batch * (cost.train + cost.sample / s.compensate.batch)
