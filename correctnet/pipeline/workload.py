"""How much work a stage is, as seconds of one thread: for estimates, and for the time limits that jobs ask for.

Needs no torch, so that a workflow that only plans stays quick.
"""

from __future__ import annotations

from dataclasses import dataclass

from correctnet.pipeline.config import SIZES
from correctnet.settings import JUDGED_CHIPS, SEARCHING, Settings, Stage

SIDE = 32  # pixels; all data sets are brought to it


@dataclass(frozen=True)
class Costs:
    """Seconds on one thread, and the analog layers they hold for."""

    train: float
    """an image trained: forward and backward"""
    test: float
    """an image on one chip, its share of drawing the chip included"""
    sample: float
    """a chip drawn for training"""
    layers: int
    """analog layers"""


def stage_seconds(stage: Stage, s: Settings, cost: Costs, chips: int | None = None) -> float:
    """Seconds of one thread that one job of `stage` takes: all epochs, a search within one limit, `chips` evaluated."""
    train_images, test_images = SIZES[s.data.dataset]
    validation = round(s.data.validation * train_images)
    train_images -= validation
    match stage:
        case "pretrain" | "suppress":
            section = getattr(s, stage)
            sides = [*section.sizes, *[SIDE] * section.epochs][: section.epochs]
            return sum((side / SIDE) ** 2 for side in sides) * train_images * cost.train
        case "inject" | "finetune":
            section = getattr(s, stage)
            return section.epochs * train_images * (cost.train + cost.sample / section.batch)
        case "sweep":
            return s.sweep.chips * cost.layers * (s.sweep.images or validation) * cost.test
        case "search":
            if s.search.strategy not in SEARCHING:
                return 0.0
            # The state without compensation is evaluated, too, and not trained.
            return s.search.evaluations * state_seconds(s, cost) + _scoring(s, cost)
        case "compensate":
            judged = 2 * JUDGED_CHIPS * validation * cost.test  # with the compensators and without
            return s.compensate.epochs * train_images * _compensating(s, cost) + judged
        case "evaluate":
            images = s.evaluate.images or (test_images if s.evaluate.split == "test" else validation)
            return (chips or s.evaluate.chips) * images * cost.test
        case "sensitivity":
            return s.sensitivity.chips * cost.layers * (s.sensitivity.images or validation) * cost.test


def state_seconds(s: Settings, cost: Costs) -> float:
    """Seconds of one thread to train and evaluate one state of a search."""
    train_images, _ = SIZES[s.data.dataset]
    validation = round(s.data.validation * train_images)
    images = s.search.train_epochs * (s.search.train_images or train_images - validation)
    return images * _compensating(s, cost) + _scoring(s, cost)


def _scoring(s: Settings, cost: Costs) -> float:
    """Seconds to evaluate one state of a search."""
    validation = round(s.data.validation * SIZES[s.data.dataset][0])
    return s.search.chips * (s.search.images or validation) * cost.test


def _compensating(s: Settings, cost: Costs) -> float:
    """Seconds an image while compensators train: a chip a batch (or several) is drawn on top of its step."""
    return s.compensate.chips_per_batch * (cost.train + cost.sample / s.compensate.batch)
