"""Training that a kill does not undo.

All that is random in an epoch (the order of the images, augmentation, dropout, the chips) is a function of (seed,
stage, epoch, step), and the learning rate one of the step, so the state after an epoch is the weights, the optimizer's
moments and the epoch's number. It is saved after every epoch; a run that is killed goes on from there and ends with
the same weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from correctnet import precision as arithmetic
from correctnet.crossbar.probe import modes_kept
from correctnet.datasets.base import Split
from correctnet.datasets.batches import check_batch, check_outputs
from correctnet.datasets.transforms import augment, resize
from correctnet.errors import UserError, one_line
from correctnet.files import storage
from correctnet.noise import streams

# Batches between two looks at whether the loss is finite.
CHECK_EVERY = 20


@dataclass
class Hooks:
    """What a stage adds to plain training."""

    before_batch: Callable[[int], None] = lambda draw: None
    """called before each forward pass with the number of the draw (a fresh chip is programmed there)"""
    penalty: Callable[[], Tensor] | None = None
    """an extra term of the loss"""
    penalty_weight: Callable[[float], float] = lambda progress: 1.0
    """its factor, given the fraction of the steps done"""
    temperature: float = 1.0
    """the logits are divided by this in the loss"""
    draws_per_batch: int = 1
    """forward and backward passes a batch, over which the gradient is averaged"""
    dropout: bool = True
    """whether all but BatchNorm is in training mode: layers of dropout drop"""
    update_batchnorm: bool = True
    """whether BatchNorm normalises with each batch and updates its statistics, or normalises with those it has"""
    augment: str = "none"
    """how images are varied, as `data.augment`"""
    sizes: Sequence[int] = ()
    """side that images are resized to in the first epochs, a value an epoch"""


@dataclass
class Checkpoint:
    """Where a training can be resumed from, and what it must be for.

    `identity` is any text that names the training (its settings, its inputs); a checkpoint of another identity is
    left behind by an earlier version of the run, and is not used.
    """

    path: Path
    identity: str
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        self.fingerprint = hashlib.sha256(self.identity.encode()).hexdigest()

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, log: list[dict[str, Any]]) -> None:
        """Write the state after `epoch` epochs, atomically."""
        tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
        storage.write_tensors(self.path, tensors, {"fingerprint": self.fingerprint, "epoch": epoch, "log": log})

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, list[dict[str, Any]]]:
        """Restore the state; gives (finished epochs, their log), (0, []) where there is nothing to resume."""
        if not self.path.exists():
            return 0, []
        try:
            tensors, metadata = storage.read_tensors(self.path)
            found = metadata["fingerprint"], metadata["epoch"], metadata["log"]
        except (UserError, KeyError, TypeError) as error:
            # Only time is lost by beginning again, and the checkpoint is replaced by the next one.
            tqdm.write(f"warning: {self.path}: not a usable checkpoint; training starts from its beginning ({error})")
            return 0, []
        if found[0] != self.fingerprint:
            return 0, []
        model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, i, key = name.split(".", 2)
                state.setdefault(int(i), {})[key] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        for parameter, restored in optimizer.state.items():
            for key, value in restored.items():
                if value.shape == parameter.shape:  # in the parameter's memory order, as a run without a break has it
                    restored[key] = torch.empty_like(parameter).copy_(value)
        return found[1], found[2]

    def discard(self) -> None:
        """Delete it, and its folder if that is empty now: the training's result is safe."""
        self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """One cycle: up linearly over the first `warmup` of the steps, then down to 0 along a cosine."""
    rise = warmup * steps
    if step < rise:
        return peak * (step + 1) / (rise + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1.0, steps - rise)))


def make_optimizer(parameters: Sequence[nn.Parameter], settings: Any) -> torch.optim.Optimizer:
    """The optimizer that a training section asks for; vectors (biases, BatchNorm) are not decayed."""
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    # Fused: one pass over the weights (AdamW on VGG16's: 16 ms instead of 95, one Zen 3, 2 threads). It goes through
    # memory, and autograd gives a gradient its weight's memory order.
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=0.9, nesterov=True, fused=True)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)


def train_only(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Ask for gradients of these parameters and of no other one of the model."""
    trained = {id(p) for p in parameters}
    for p in model.parameters():
        p.requires_grad_(id(p) in trained)


def fit(
    model: nn.Module,
    train: Split,
    settings: Any,
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
    """Minimise cross entropy (+ penalty) over `train`, in place.

    Weights and BatchNorm's statistics change. What else the caller may see is afterwards as it was: the mode of each
    module, which parameters require a gradient, the memory order of parameters, torch's global generators.

    Args:
        model: any module whose output is (N, classes).
        train: (N, ...) inputs and (N,) labels, on the model's device.
        settings: a `correctnet.settings.Training` section.
        seed: of the batches, the augmentation and dropout.
        stage: what the training is part of; with the same seed each has batches of its own (`correctnet.noise.streams`).
        parameters: what is trained; all others are frozen. None: all that require a gradient.
        hooks: what the stage adds.
        validate: an accuracy to log after each epoch.
        checkpoint: where to save after each epoch, and to resume from.
        log: CSV with one row an epoch, rewritten after each.
        title: of the progress bar.
        quiet: no progress bar.

    Returns:
        The log, a dict an epoch: epoch, loss, accuracy (both on the training batches as they came), validation,
        learning_rate, seconds, process (1, and one more after each resumption).

    Raises:
        UserError: labels or outputs that are no classification, nothing to train, the loss is not finite, or a file
            cannot be written.
    """
    hooks = hooks or Hooks()
    if torch.is_inference_mode_enabled():
        raise UserError("training: there are no gradients in torch.inference_mode(); train outside of it")
    train = Split(*check_batch((train.images, train.labels), "training"))
    if not len(train):
        raise UserError("training: there are no images")
    if hooks.augment != "none" and train.images.dim() != 4:
        raise UserError(f"training: only images (N, C, H, W) can be augmented, not {tuple(train.images.shape)}")
    chosen = [p for p in model.parameters() if p.requires_grad] if parameters is None else list(parameters)
    if not chosen:
        raise UserError("training: no parameter of the network requires a gradient, so that there is nothing to train")
    with _restored(model), torch.enable_grad():
        train_only(model, chosen)
        # Convolutions then train up to 1.8 times faster on a CPU (VGG16 in bfloat16, batch 128, one Zen 4: 182 images/s
        # instead of 100; LeNet-5 in float32: 6,900 instead of 4,600).
        for p in model.parameters():
            if p.dim() == 4 and p.is_contiguous():
                p.data = p.data.contiguous(memory_format=torch.channels_last)
        optimizer = make_optimizer(chosen, settings)
        done, rows = checkpoint.load(model, optimizer) if checkpoint else (0, [])
        process = 1 + max((r["process"] for r in rows), default=0)
        per_epoch = math.ceil(len(train) / settings.batch)
        steps = settings.epochs * per_epoch
        devices = {p.device for p in model.parameters()}

        bar = tqdm(total=steps, initial=done * per_epoch, desc=title, unit="batch", disable=quiet, mininterval=1.0)
        with bar:
            for epoch in range(done, settings.epochs):
                began = time.monotonic()
                _set_mode(model, hooks)
                # Layers of dropout take no generator.
                with streams.global_generators(seed, "dropout", stage, epoch, devices=devices):
                    where = seed, stage, epoch
                    loss, correct = _epoch(model, train, settings, where, steps, optimizer, hooks, bar)
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
                bar.set_postfix_str(f"epoch {epoch + 1}, loss {loss:.4f}" + _percent(row["validation"]), refresh=False)
                if checkpoint:
                    checkpoint.save(model, optimizer, epoch + 1, rows)
                if log:
                    write_log(log, rows)
        optimizer.zero_grad(set_to_none=True)
    if log:  # once more: of a run that was killed behind its last epoch there may be none
        write_log(log, rows)
    return rows


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Put modes, memory orders and `requires_grad` back as they were, also behind an error."""
    flags = [(p, p.requires_grad, p.is_contiguous()) for p in model.parameters()]
    try:
        with modes_kept(model):
            yield
    finally:
        for p, flag, contiguous in flags:
            p.requires_grad_(flag)
            if contiguous and not p.is_contiguous():
                p.data = p.data.contiguous()


def _percent(value: float | None) -> str:
    return "" if value is None else f", validation {value:.2%}"


def write_log(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a training log as CSV."""
    columns = ["epoch", "loss", "accuracy", "validation", "learning_rate", "seconds", "process"]
    storage.write_csv(path, pd.DataFrame(rows, columns=columns))


def _set_mode(model: nn.Module, hooks: Hooks) -> None:
    model.train(hooks.dropout)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._NormBase):
            m.train(hooks.update_batchnorm)


def _outputs(model: nn.Module, images: Tensor, count: int) -> Any:
    try:
        return model(images)
    except ValueError as error:  # BatchNorm's, which cannot normalise with a single number
        if len(images) > 1:
            raise
        raise UserError(
            f"training: {one_line(error)}: a batch of {count} images is a single one; choose another batch size"
        ) from error


def _epoch(
    model: nn.Module,
    train: Split,
    settings: Any,
    where: tuple[int, str, int],
    steps: int,
    optimizer: torch.optim.Optimizer,
    hooks: Hooks,
    bar: tqdm,
) -> tuple[float, float]:
    """Mean loss and accuracy of one pass; `where`: seed, stage and epoch."""
    seed, stage, epoch = where
    order = torch.randperm(len(train), generator=streams.torch_generator(seed, "batches", stage, epoch), device="cpu")
    order = order.to(train.images.device)
    crops = streams.torch_generator(seed, "augmentation", stage, epoch)
    largest = int(train.labels.max())
    per_epoch = math.ceil(len(train) / settings.batch)
    # Kept on the device: reading them after every batch would make a GPU wait for each.
    losses = torch.zeros((), dtype=torch.float64, device=train.images.device)
    correct = torch.zeros_like(losses)
    for i, batch in enumerate(order.split(settings.batch)):
        step = epoch * per_epoch + i
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, settings.learning_rate, settings.warmup)
        images, labels = train.images[batch], train.labels[batch]
        if hooks.augment != "none":
            images = augment(images, crops, flip=hooks.augment == "crop-flip")
        if epoch < len(hooks.sizes):
            images = resize(images, hooks.sizes[epoch])
        if images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad(set_to_none=True)
        for draw in range(hooks.draws_per_batch):
            hooks.before_batch(step * hooks.draws_per_batch + draw)
            with arithmetic.products(settings.precision, train.images.device):
                # A copy where they are read again: a network may write into its input.
                logits = _outputs(model, images.clone() if hooks.draws_per_batch > 1 else images, len(train))
            check_outputs(logits, images, largest, "training")
            scores = logits if logits.dtype == torch.float64 else logits.float()
            loss = F.cross_entropy(scores / hooks.temperature, labels)
            (loss / hooks.draws_per_batch).backward()
            losses += loss.detach().double() * len(batch) / hooks.draws_per_batch
            correct += (logits.argmax(1) == labels).sum() / hooks.draws_per_batch
        if hooks.penalty is not None:
            term = hooks.penalty_weight(step / max(1, steps)) * hooks.penalty()
            term.backward()
            losses += term.detach().double() * len(batch)
        if (i % CHECK_EVERY == 0 or i == per_epoch - 1) and not losses.isfinite():
            raise UserError(f"training: the loss is not finite in epoch {epoch + 1}; lower the learning rate or beta")
        if settings.clip:
            nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], settings.clip)
        optimizer.step()
        bar.update()
    return losses.item() / len(train), correct.item() / len(train)
