"""Digital paths beside analog layers, trained offline: z = layer(x) + path(x).

The layer stays on its crossbar, with the weights that it has; only the path, which is digital and hence exact, is
trained, with a fresh chip sample each batch. One path serves all chips: nothing is measured or trained on a chip. A
path sees the layer's input and not its output, unlike a compensator (`correctnet.methods.compensation`), so it cannot
know what the chip at hand has got wrong.

The kinds of paths are in `PATHS`, a file each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from correctnet.crossbar.convert import check_plain, convert, copy_model, program
from correctnet.crossbar.kinds import crossbars
from correctnet.datasets.batches import Batches
from correctnet.devices.base import Variation
from correctnet.errors import UserError, whole
from correctnet.methods import work as folder
from correctnet.methods.compensation import compensable, compensation_modules
from correctnet.metrics import ACCURACY, Loss, Metric, checked
from correctnet.networks.blocks import original_parameters
from correctnet.noise import streams
from correctnet.sections import validate
from correctnet.settings import PATHS, SidePath
from correctnet.training.loop import Hooks, fit


class Beside(nn.Module):
    """`original`, with the digital `path` beside it: z = original(x) + path(x).

    `weight` and `bias` are those of the original layer, for code that reads a layer's attributes.
    """

    digital_children = ("path",)  # not part of the original network, never analog

    def __init__(self, original: nn.Module, path: nn.Module):
        super().__init__()
        self.original, self.path = original, path

    @property
    def weight(self) -> Tensor:
        """The original layer's weight."""
        return self.original.weight

    @property
    def bias(self) -> Tensor | None:
        """The original layer's bias."""
        return self.original.bias

    def forward(self, x: Tensor) -> Tensor:
        """x -> original(x) + path(x)."""
        return self.original(x) + self.path(x)


def side_paths(model: nn.Module) -> dict[str, Beside]:
    """The layers of a model that have a path beside them, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Beside)}


def side_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all paths that are trained."""
    found = (p for m in side_paths(model).values() for p in m.path.parameters())
    return [p for p in found if p.requires_grad]


def side_share(model: nn.Module) -> float:
    """Overhead of the paths of a model: digital weights that they store / parameters of the original network."""
    return sum(m.path.stored for m in side_paths(model).values()) / original_parameters(model)


def side_layers(network: nn.Module, exclude: Iterable[str] = ()) -> dict[str, nn.Module]:
    """The layers that get a path, by name: convolutions and linear layers, without those that are digital."""
    names, layers = compensable(network), {each.name: each.module for each in crossbars(network)}
    skipped = tuple(exclude)
    return {
        name: layers[name]
        for name in names
        if not any(not own or name == own or name.startswith(f"{own}.") for own in skipped)
    }


def add_side_paths(
    network: nn.Module,
    path: str,
    rank: int = 4,
    *,
    layers: Iterable[str] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Return a copy of a network with untrained paths beside its layers; it computes what the network does.

    Args:
        network: the original network, neither converted nor compensated.
        path: a key of `PATHS`.
        rank: of a path through a low-rank product.
        layers: names of the layers; None: all convolutions and linear layers.
        masks: of a sparse path, by name of the layer, where it may have weights; None: anywhere, as before loading.
        seed: of the initial weights.

    Raises:
        UserError: an unknown path, a rank below 1, layers that the network has not, or that cannot have the path.
    """
    if path not in PATHS:
        raise UserError(f"side paths: no path {path!r} (paths: {', '.join(PATHS)})")
    rank, seed = whole(rank, "side paths: the rank"), whole(seed, "side paths: the seed")
    if rank < 1:
        raise UserError(f"side paths: the rank is at least 1, not {rank}")
    if side_paths(network) or compensation_modules(network):
        raise UserError("side paths: the network has digital paths or compensation already")
    copied = copy_model(network, "side paths")
    found = side_layers(copied)
    names = list(found) if layers is None else list(layers)
    if unknown := [name for name in names if name not in found]:
        raise UserError(f"side paths: the network has no layer {unknown[0]!r} (layers: {', '.join(found)})")
    for name in names:
        if not isinstance(found[name], nn.Linear | _ConvNd) or isinstance(found[name], _ConvTransposeNd):
            raise UserError(f"side paths: {name} is a {type(found[name]).__name__}, which can have none")
    module, _, kind = PATHS[path].partition(":")
    make = getattr(import_module(f"correctnet.methods.{module}"), kind).beside
    made = make({name: found[name] for name in names}, rank=rank, masks=masks or {}, seed=seed)
    replaced = {id(found[name]): Beside(found[name], own) for name, own in made.items()}
    if id(copied) in replaced:
        return replaced[id(copied)]
    for parent in [m for m in copied.modules() if not isinstance(m, Beside)]:
        for name, child in parent._modules.items():
            if id(child) in replaced:  # a layer may have several names
                parent._modules[name] = replaced[id(child)]
    return copied


def fit_side_paths(
    network: nn.Module,
    train: Batches,
    variation: Variation,
    *,
    masks: Mapping[str, Tensor] | None = None,
    exclude: Iterable[str] | str = (),
    loss: Loss | None = None,
    metric: Metric | None = None,
    seed: int = 0,
    work: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> nn.Module:
    """Train digital paths beside the layers of a network, with a fresh chip sample each batch.

    All else is frozen. BatchNorm normalises with the stored statistics, and dropout is off.

    Args:
        network: a trained network that `correctnet.convert` accepts, with outputs (N, classes). It is left unchanged.
        train: training images (N, ...) and labels (N,), as for `correctnet.distil`.
        variation: the device model.
        masks: of a sparse path, by name of the layer, bool tensors of where it may have weights, as
            `correctnet.protected_weights` chooses them; needed for that path.
        exclude: names of layers that are digital, as for `correctnet.convert`; they get no path.
        loss: replaces the cross entropy: a function of outputs and labels that returns the mean over the images.
        metric: a `correctnet.Metric`, which says what labels are, and may have a loss; None: the accuracy.
        seed: of the initial weights, the batches and the chips.
        work: a folder. A call that was stopped continues from its last epoch when it is repeated.
        progress: show a progress bar.
        settings: fields of `correctnet.settings.SidePath`, e.g. path="lora", rank=8, epochs=5.

    Returns:
        A copy of the network with trained paths, a plain network in evaluation mode. `side_share` is its overhead.

    Raises:
        UserError: a network that is converted, compensated or has paths, a sparse path without masks, data, outputs or
            a loss that are not those of a classifier, an unknown setting, or a loss that is not finite.
    """
    section = validate(SidePath, settings, "fit_side_paths")
    seed, metric = whole(seed, "fit_side_paths: the seed"), checked(metric, "fit_side_paths")
    check_plain(network, "fit_side_paths")
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    names = list(side_layers(network, exclude))
    if section.path == "sparse" and masks is None:
        raise UserError("fit_side_paths: a sparse path needs masks, where it may have weights; see protected_weights")
    sided = add_side_paths(network, section.path, section.rank, layers=names, masks=masks, seed=seed)
    analog = convert(sided, variation, seed, exclude)
    parts = {"network": network, "train": train, "variation": variation, "seed": seed, "masks": masks}
    parts |= folder.judged_by(metric) | {"loss": loss, "exclude": exclude}
    text = "" if work is None else folder.identity("sidepath", **parts, settings=section)
    with masked(analog):
        fit(
            analog,
            train,
            section,
            seed,
            stage="sidepath",
            parameters=side_parameters(analog),
            hooks=side_hooks(analog, loss, metric),
            checkpoint=folder.checkpoint(work, "sidepath", text),
            title="sidepath",
            quiet=not progress,
        )
    sided.load_state_dict(analog.state_dict())
    return sided.eval()


def side_hooks(analog: nn.Module, loss: Loss | None = None, metric: Metric = ACCURACY) -> Hooks:
    """Hooks of a training of paths: a fresh chip each batch, dropout off, and BatchNorm frozen."""
    return Hooks(
        before_batch=lambda draw: program(analog, streams.chip("train-sidepath", draw)),
        dropout=False,
        update_batchnorm=False,
        loss=loss,
        metric=metric,
    )


@contextmanager
def masked(model: nn.Module) -> Iterator[None]:
    """Train only the weights in the masks of sparse paths, for the length of a block."""
    pairs = [pair for m in side_paths(model).values() for pair in getattr(m.path, "trained", {}).items()]
    hooks = [weight.register_hook(lambda gradient, mask=mask: gradient * mask) for weight, mask in pairs]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
