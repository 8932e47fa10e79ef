"""Resumable training loop.

Everything random in an epoch (the order of the images, augmentation, dropout, the chips) is a function of (seed, stage,
epoch, step), and the learning rate is one of the step, so the state after an epoch is the weights, the optimizer's
moments and the number of the epoch. With a checkpoint it is saved after every epoch; a run that is killed and resumed
ends with the same weights.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from correctnet.crossbar.probe import modes_kept, run
from correctnet.datasets.batches import Batches, check_outputs
from correctnet.datasets.inputs import Inputs, described
from correctnet.datasets.transforms import augment, resize
from correctnet.errors import UserError
from correctnet.files import storage
from correctnet.metrics import ACCURACY, Loss, Metric, loss_of, main_output
from correctnet.noise import streams
from correctnet.precision import products
from correctnet.progress import ProgressBar
from correctnet.settings import Training
from correctnet.training.checkpoint import Checkpoint
from correctnet.training.feeding import LoaderFeed, TensorFeed, feed

# Batches between two checks that the loss is finite: a check makes a GPU wait.
CHECK_EVERY = 20


@dataclass
class Hooks:
    """Additions of a stage to plain training."""

    before_epoch: Callable[[], None] = lambda: None
    """called before each epoch"""
    before_batch: Callable[[int], None] = lambda draw: None
    """called before each forward pass with the number of the draw, e.g. to program a fresh chip"""
    penalty: Callable[[], Tensor] | None = None
    """an additional term of the loss"""
    penalty_weight: Callable[[float], float] = lambda progress: 1.0
    """factor of the penalty, given the fraction of completed steps"""
    temperature: float = 1.0
    """divisor of the logits in the loss"""
    draws_per_batch: int = 1
    """forward and backward passes a batch, over which the gradient is averaged"""
    dropout: bool = True
    """whether modules other than BatchNorm are in training mode, so that dropout layers drop"""
    update_batchnorm: bool = True
    """whether BatchNorm normalises with each batch and updates its running statistics, or normalises with these"""
    augment: str = "none"
    """augmentation of the images, as the setting `data.augment`"""
    sizes: Sequence[int] = ()
    """side to which images are resized in the first epochs, one value an epoch"""
    loss: Loss | None = None
    """loss of a batch, a mean over its images; None: that of the metric, else the cross entropy"""
    metric: Metric = ACCURACY
    """what the outputs are judged by, which says what labels are"""
    loss_weight: float = 1.0
    """factor of the loss of the labels, where there is a `term` beside it"""
    term: Callable[[Tensor | Inputs, Any], Tensor] | None = None
    """a further term of a batch's loss, of the images as they are trained on and the network's outputs"""


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """One-cycle schedule: a linear rise over the first `warmup` of the steps, then a cosine decay to 0."""
    rise = warmup * steps
    if step < rise:
        return peak * (step + 1) / (rise + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1.0, steps - rise)))


def make_optimizer(parameters: Sequence[nn.Parameter], settings: Training) -> torch.optim.Optimizer:
    """The optimizer of a training section; without weight decay for vectors (biases, BatchNorm)."""
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    # Fused: one pass over the weights (AdamW on those of VGG16: 16 ms instead of 95, AMD Zen 3, 2 threads). It walks
    # through memory linearly, which is correct because autograd gives a gradient the memory order of its weight.
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=0.9, nesterov=True, fused=True)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)


def train_only(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Set `requires_grad` for these parameters, and clear it for all others of the model."""
    trained = {id(p) for p in parameters}
    for p in model.parameters():
        p.requires_grad_(id(p) in trained)


def fit(
    model: nn.Module,
    train: Batches,
    settings: Training,
    seed: int,
    *,
    stage: str = "fit",
    parameters: Sequence[nn.Parameter] | None = None,
    hooks: Hooks | None = None,
    validate: Callable[[], float] | None = None,
    checkpoint: Checkpoint | None = None,
    log: Path | None = None,
    title: str = "training",
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Minimise the cross entropy, or another loss, (+ penalty) over `train`, in place.

    Weights and BatchNorm's running statistics change. The mode of each module, the parameters' `requires_grad` and
    memory order, and torch's global generators are the same afterwards.

    Args:
        model: any module whose output is (N, classes), unless the hooks' metric reads others.
        train: (N, ...) inputs and (N,) labels, on the model's device; or a loader of such batches, each of which is a
            step, whatever `settings.batch` says.
        settings: epochs, batch size, optimizer and its schedule.
        seed: of the batches, the augmentation and dropout.
        stage: the purpose of the training; with the same seed, each stage has its own order of batches
            (`correctnet.noise.streams`).
        parameters: the parameters to train; all others are frozen. None: all that require a gradient.
        hooks: additions of the stage.
        validate: returns the accuracy, or the metric's value, which is logged after each epoch.
        checkpoint: saved after each epoch; the training is resumed from it.
        log: CSV file with one row an epoch, rewritten after each.
        title: of the progress bar.
        quiet: show no progress bar.

    Returns:
        The log, a dict an epoch: epoch, loss and accuracy (means over the training batches of the epoch; no accuracy
        where labels are no classes), validation, learning_rate, seconds, process (1, and one more after each
        resumption).

    Raises:
        UserError: labels or outputs that are not those of a classifier, nothing to train, a loss that is no number or
            not finite, a loader that yields another number of batches in an epoch, or a file that cannot be written.
    """
    hooks = hooks or Hooks()
    if torch.is_inference_mode_enabled():
        raise UserError("training: there are no gradients in torch.inference_mode(); train outside of it")
    chosen = [p for p in model.parameters() if p.requires_grad] if parameters is None else list(parameters)
    if not chosen:
        raise UserError("training: no parameter of the network requires a gradient, so there is nothing to train")
    loss_of(hooks.metric, hooks.loss, "training")
    source = feed(train, settings.batch, chosen[0].device, hooks.metric.targets)
    with _restored(model), torch.enable_grad():
        train_only(model, chosen)
        # Convolutions in this memory order train up to 1.8 times faster on a CPU (VGG16 in bfloat16, batch 128, AMD
        # Zen 4: 182 images/s instead of 100; LeNet-5 in float32: 6,900 instead of 4,600).
        for p in model.parameters():
            if p.dim() == 4 and p.is_contiguous():
                p.data = p.data.contiguous(memory_format=torch.channels_last)
        optimizer = make_optimizer(chosen, settings)
        done, rows = checkpoint.load(model, optimizer) if checkpoint else (0, [])
        process = 1 + max((r["process"] for r in rows), default=0)
        per_epoch = source.steps
        steps = settings.epochs * per_epoch
        devices = {p.device for p in model.parameters()}

        bar = ProgressBar(
            total=steps, initial=done * per_epoch, desc=title, unit="batch", disable=quiet, mininterval=1.0
        )
        with bar:
            for epoch in range(done, settings.epochs):
                began = time.monotonic()
                _set_mode(model, hooks)
                hooks.before_epoch()
                # Dropout layers draw from torch's global generators.
                with streams.global_generators(seed, "dropout", stage, epoch, devices=devices):
                    where = seed, stage, epoch
                    loss, correct = _epoch(model, source, settings, where, optimizer, hooks, bar)
                model.eval()
                row = {
                    "epoch": epoch + 1,
                    "loss": loss,
                    "accuracy": correct,
                    "validation": validate() if validate else None,
                    "learning_rate": optimizer.param_groups[0]["lr"],
                    "seconds": round(time.monotonic() - began, 3),
                    "process": process,
                }
                rows.append(row)
                shown = "" if validate is None else f", validation {hooks.metric.text(row['validation'])}"
                bar.set_postfix_str(f"epoch {epoch + 1}, loss {loss:.4f}" + shown, refresh=False)
                if checkpoint:
                    checkpoint.save(model, optimizer, epoch + 1, rows)
                if log:
                    write_log(log, rows)
        optimizer.zero_grad(set_to_none=True)
    if log:  # again: a run that was killed after its last epoch may not have written it
        write_log(log, rows)
    return rows


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Restore modes, memory orders and `requires_grad` at the end of a block, also after an error."""
    flags = [(p, p.requires_grad, p.is_contiguous()) for p in model.parameters()]
    try:
        with modes_kept(model):
            yield
    finally:
        for p, flag, contiguous in flags:
            p.requires_grad_(flag)
            if contiguous and not p.is_contiguous():
                p.data = p.data.contiguous()


def write_log(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a training log as CSV."""
    columns = ["epoch", "loss", "accuracy", "validation", "learning_rate", "seconds", "process"]
    storage.write_csv(path, pd.DataFrame(rows, columns=columns))


def _set_mode(model: nn.Module, hooks: Hooks) -> None:
    """Set the training mode of each module as `hooks` asks."""
    model.train(hooks.dropout)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._NormBase):
            m.train(hooks.update_batchnorm)


def _outputs(model: nn.Module, images: Tensor | Inputs, count: int | None) -> Any:
    """The outputs on a batch of a data set of `count` images, where their number is known."""
    try:
        return run(model, images, "training")
    except UserError as error:
        if len(images) > 1 or not isinstance(error.__cause__, ValueError):
            raise
        # BatchNorm cannot normalise with a single value.
        alone = "an image" if count is None else f"the last of {count} images"
        raise UserError(f"{error}; {alone} is alone in its batch; choose another batch size") from error


def _loss(hooks: Hooks, outputs: Any, labels: Tensor) -> Tensor:
    """The loss of a batch. Raises UserError where the user's own gives no loss, or none of the outputs.

    It reads the scores, in float32 at least and divided by the temperature; one of the user's own reads what the
    network returns, where that is not one tensor.
    """
    own = loss_of(hooks.metric, hooks.loss, "training")
    if own is None or isinstance(outputs, Tensor):
        logits = main_output(outputs)
        scores = (logits if logits.dtype == torch.float64 else logits.float()) / hooks.temperature
        if own is None:
            return F.cross_entropy(scores, labels)
        outputs = scores
    elif hooks.temperature != 1:
        raise UserError("training: temperature divides the outputs, which must be one tensor with a loss of one's own")
    try:
        loss = own(outputs, labels)
    except UserError as error:
        raise UserError(f"training: loss: {error}") from error
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"type {type(loss).__name__}"
        raise UserError(f"training: loss must return one number for a batch, a tensor, not one of {found}")
    if not loss.requires_grad:
        raise UserError("training: loss has no gradient; compute it from the outputs, without detach() or no_grad()")
    return loss.reshape(())


def _epoch(
    model: nn.Module,
    source: TensorFeed | LoaderFeed,
    settings: Training,
    where: tuple[int, str, int],
    optimizer: torch.optim.Optimizer,
    hooks: Hooks,
    bar: tqdm,
) -> tuple[float, float | None]:
    """Mean loss and accuracy of one epoch, None where labels are no classes; `where`: seed, stage and epoch."""
    seed, stage, epoch = where
    crops = streams.torch_generator(seed, "augmentation", stage, epoch)
    steps = settings.epochs * source.steps
    # Kept on the device: reading them after every batch would synchronise a GPU.
    losses = torch.zeros((), dtype=torch.float64, device=optimizer.param_groups[0]["params"][0].device)
    correct = torch.zeros_like(losses)
    count, classes = 0, hooks.metric.targets == "classes"
    for i, (images, labels, largest) in enumerate(source.epoch(seed, stage, epoch)):
        step = epoch * source.steps + i
        count += len(labels)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, settings.learning_rate, settings.warmup)
        if hooks.augment != "none":
            if not isinstance(images, Tensor) or images.dim() != 4:
                raise UserError(f"training: only images (N, C, H, W) can be augmented, not {described(images)}")
            images = augment(images, crops, flip=hooks.augment == "crop-flip")
        if epoch < len(hooks.sizes):
            if not isinstance(images, Tensor):
                raise UserError(f"training: only images (N, C, H, W) can be resized, not {described(images)}")
            images = resize(images, hooks.sizes[epoch])
        if isinstance(images, Tensor) and images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad(set_to_none=True)
        for draw in range(hooks.draws_per_batch):
            hooks.before_batch(step * hooks.draws_per_batch + draw)
            with products(settings.precision, images.device):
                outputs = _outputs(model, images, source.images)
            check_outputs(outputs, images, largest, "training", hooks.metric)
            loss = _loss(hooks, outputs, labels)
            if hooks.term is not None:
                loss = hooks.loss_weight * loss + hooks.term(images, outputs)
            (loss / hooks.draws_per_batch).backward()
            losses += loss.detach().double() * len(labels) / hooks.draws_per_batch
            if classes:
                correct += (main_output(outputs).argmax(1) == labels).sum() / hooks.draws_per_batch
        if hooks.penalty is not None:
            term = hooks.penalty_weight(step / max(1, steps)) * hooks.penalty()
            term.backward()
            losses += term.detach().double() * len(labels)
        if (i % CHECK_EVERY == 0 or i == source.steps - 1) and not losses.isfinite():
            raise UserError(f"training: the loss is not finite in epoch {epoch + 1}; lower the learning rate or beta")
        if settings.clip:
            nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], settings.clip)
        optimizer.step()
        bar.update()
    return losses.item() / count, correct.item() / count if classes else None
