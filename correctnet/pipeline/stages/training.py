"""The stages that train a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from correctnet import devices
from correctnet.crossbar.convert import convert, program
from correctnet.datasets.base import DataSet
from correctnet.devices.straight import with_gradient
from correctnet.errors import UserError
from correctnet.evaluation.montecarlo import clean_accuracy
from correctnet.evaluation.simulation import Simulation
from correctnet.files import storage
from correctnet.methods import compensation, compensation_training
from correctnet.methods.distillation import learn_from
from correctnet.methods.moments import MomentsNetwork, moments_hooks
from correctnet.methods.multiteacher import train_teachers, with_chips
from correctnet.methods.search_log import best_state
from correctnet.methods.selection import protected_weights
from correctnet.methods.sidepaths import (
    add_side_paths,
    masked,
    side_hooks,
    side_layers,
    side_parameters,
    side_share,
)
from correctnet.methods.suppression_training import regularised
from correctnet.networks.building import check_fits, load_weights
from correctnet.noise import streams
from correctnet.pipeline.config import network_mistake, sizes_mistake
from correctnet.pipeline.models import (
    are_filters,
    build_described,
    check_uncompensated,
    describe_network,
    expect,
    image_shape,
    is_number,
    read_network,
    write_network,
)
from correctnet.pipeline.runtime import Runtime, digital_layers, give_converters, split_seed, stage_identity
from correctnet.pipeline.specs import STAGES, Stage
from correctnet.settings import Settings
from correctnet.training.loop import Checkpoint, Hooks, fit


def _train(
    stage: Stage,
    model: nn.Module,
    base: dict[str, Any],
    data: DataSet,
    settings: Settings,
    hooks: Hooks,
    out: Path,
    runtime: Runtime,
    inputs: Sequence[Path] = (),
    parameters: Sequence[nn.Parameter] | None = None,
    judge: Callable[[], dict[str, Any]] = dict,
    network: nn.Module | None = None,
) -> None:
    """Train a stage's model, resumably, and write it, or the `network` in it, with its log, to `out`.

    `judge` is called after the training and may change the model; what it returns is added to the model's history.
    """
    s = STAGES[stage].read(settings)
    hooks.augment = s.data.augment
    # A checkpoint is valid for these settings, images and inputs only.
    identity = stage_identity(stage, settings, base, *inputs)
    checkpoint = Checkpoint(runtime.work / f"{stage}.safetensors", identity) if runtime.work else None
    rows = fit(
        model,
        data.train,
        getattr(s, stage),
        s.seed,
        stage=stage,
        parameters=parameters,
        hooks=hooks,
        validate=lambda: clean_accuracy(model, data.validation),
        checkpoint=checkpoint,
        log=out / "log.csv",
        title=stage,
        quiet=runtime.quiet,
    )
    metrics = {"epochs": len(rows), **judge()}
    metrics["validation"] = clean_accuracy(model, data.validation)
    write_network(out, network or model, base, stage, settings, metrics)
    if checkpoint:
        checkpoint.discard()


def pretrain(settings: Settings, out: Path, runtime: Runtime) -> None:
    """Train the original network, without any method. Writes out/model.{safetensors,json} and out/log.csv.

    With `network.weights` it is taken as it is, and not trained.
    """
    s = STAGES["pretrain"].read(settings)
    if mistake := network_mistake(settings):
        raise UserError(mistake)
    if s.network.digest not in (None, s.network.found_digest()):
        raise UserError("network: the source of its factory, or its weights, have changed since the settings were made")
    data = runtime.load(s)
    network = describe_network(s.network, data)
    model = build_described(network, s.seed, "pretrain").to(runtime.device)
    channels, height, width = image_shape(network)
    if "height" in network and "name" in network:
        check_fits(model, data.classes, image_shape(network), f"network.name: {network['name']}")
    for side in sorted({*s.pretrain.sizes} - {height, width}) if "factory" in network else ():
        check_fits(model, data.classes, (channels, side, side), "pretrain.sizes")
    if s.network.weights is not None:
        load_weights(model, s.network.weights)
        metrics = {"epochs": 0, "validation": clean_accuracy(model, data.validation)}
        write_network(out, model, {"network": network}, "pretrain", settings, metrics)
        storage.write_text(out / "log.csv", "epoch\n")
        return
    _train("pretrain", model, {"network": network}, data, settings, Hooks(sizes=s.pretrain.sizes), out, runtime)


def suppress(settings: Settings, pretrained: Path, out: Path, runtime: Runtime) -> None:
    """Train under the Lipschitz regulariser (11), from the pre-trained weights or from scratch.

    From scratch, only the architecture of the pre-trained network is used.
    """
    s = STAGES["suppress"].read(settings)
    model, base = read_network(pretrained, runtime.device)
    check_uncompensated("suppress", pretrained, base)
    if mistake := sizes_mistake(s, "suppress", base["network"].get("name")):
        raise UserError(mistake)
    if s.suppress.start == "scratch":
        model = build_described(base["network"], s.seed, "suppress").to(runtime.device)
        base = {"network": base["network"], "data": storage.training_data(base)}
    hooks = regularised(model, s.suppress, devices.make(s.variation))
    # From scratch, the pre-trained weights are not used.
    inputs = [] if s.suppress.start == "scratch" else [storage.model_files(pretrained)[0]]
    data = runtime.load(s, base, pretrained)
    _train("suppress", model, base, data, settings, hooks, out, runtime, inputs)


def inject(settings: Settings, pretrained: Path, out: Path, runtime: Runtime) -> None:
    """Variation-aware training, after [11]: a baseline without overhead, with a fresh chip sample for each batch."""
    _train_with_variation("inject", settings, pretrained, out, runtime)


def distil(settings: Settings, pretrained: Path, out: Path, runtime: Runtime) -> None:
    """Variation-aware training that also learns from the pre-trained network, after [8]; without overhead."""
    _train_with_variation("distil", settings, pretrained, out, runtime)


def moments(settings: Settings, pretrained: Path, out: Path, runtime: Runtime) -> None:
    """Training with the moments of what variation does, after [10], or of the last layer alone, after [7]."""
    s = STAGES["moments"].read(settings)
    model, base = read_network(pretrained, runtime.device)
    check_uncompensated("moments", pretrained, base)
    data, own = runtime.load(s, base, pretrained), s.moments
    trained = MomentsNetwork(model, devices.make(s.variation), own.layers, digital_layers(s, model, data.train))
    weights, _ = storage.model_files(pretrained)
    hooks = moments_hooks(own.layers, own.gamma)
    _train("moments", trained, base, data, settings, hooks, out, runtime, [weights], network=model)


def sidepath(settings: Settings, base: Path, out: Path, runtime: Runtime) -> None:
    """Train digital paths beside the layers of the model at `base`, with a fresh chip sample for each batch.

    All else is frozen. Writes a model, whose description has the arguments of `add_side_paths`, and its log to `out`.
    """
    s = STAGES["sidepath"].read(settings)
    own = s.sidepath
    model, described = read_network(base, runtime.device)
    check_uncompensated("sidepath", base, described)
    data, device = runtime.load(s, described, base), devices.make(s.variation)
    digital = digital_layers(s, model, data.train)
    masks = {}
    if own.path == "sparse":
        known = data.train.take(own.select_images)
        masks = protected_weights(model, own.fraction, own.select, data=known, exclude=digital, seed=s.seed)
    names = list(side_layers(model, digital))
    plan = {"path": own.path, "rank": own.rank, "layers": names, "seed": s.seed}
    sided = add_side_paths(model, **plan, masks=masks)
    analog = convert(sided, device, s.seed, digital)
    _equip(s, analog, data, described)
    described |= {"sidepath": plan, "overhead": described.get("overhead", 0.0) + side_share(sided)}
    weights, _ = storage.model_files(base)
    parameters = side_parameters(analog)
    with masked(analog):
        _train("sidepath", analog, described, data, settings, side_hooks(analog), out, runtime, [weights], parameters)


def _equip(settings: Settings, analog: nn.Module, data: DataSet, described: dict[str, Any]) -> None:
    """Give a converted network the converters of the settings, and note them in place of an earlier training's."""
    described.pop("converters", None)
    if converters := give_converters(settings, analog, data.train):
        described["converters"] = converters


def finetune(settings: Settings, compensated: Path, out: Path, runtime: Runtime) -> None:
    """Train analog weights and compensators of a compensated network together, with variation; beyond the paper.

    They minimise the cross entropy, each batch on a fresh chip sample. Writes a model and its log to `out`. Raises
    UserError where `compensated` is no compensated model, or the loss is not finite.
    """
    _train_with_variation("finetune", settings, compensated, out, runtime)


def _train_with_variation(
    stage: Literal["inject", "distil", "finetune"], settings: Settings, path: Path, out: Path, runtime: Runtime
) -> None:
    """Train all parameters of the model at `path`, with a fresh chip sample for each batch."""
    s = STAGES[stage].read(settings)
    model, base = read_network(path, runtime.device)
    split_seed(s, base, path)  # mistakes are found before any work
    if stage != "finetune":
        check_uncompensated(stage, path, base)
    elif "compensation" not in base:
        raise UserError(f"finetune: {path} is no model of `compensate`; `inject` trains one that is not compensated")
    data = runtime.load(s, base, path)
    digital = digital_layers(s, model, data.train)
    device = with_gradient(devices.make(s.variation), getattr(s, stage).gradient)
    analog = convert(model, device, s.seed, digital)
    _equip(s, analog, data, base)
    hooks = Hooks(
        before_batch=lambda draw: program(analog, streams.chip(f"train-{stage}", draw)),
        update_batchnorm=getattr(s, stage).batchnorm == "updated",
    )
    weights, _ = storage.model_files(path)
    saved: list[Checkpoint] = []
    if stage == "distil" and s.distil.teachers:

        def checkpoint(name: str) -> Checkpoint | None:
            if runtime.work:
                identity = stage_identity(stage, settings, base, weights)
                saved.append(Checkpoint(runtime.work / f"{name}.safetensors", identity))
            return saved[-1] if saved else None

        how = {"exclude": digital, "augment": s.data.augment, "checkpoint": checkpoint, "quiet": runtime.quiet}
        teachers = train_teachers(model, data.train, devices.make(s.variation), s.distil, s.seed, **how)
        with_chips(hooks, teachers)
        learn_from(teachers, hooks, s.distil)
    elif stage == "distil":
        learn_from(model, hooks, s.distil)
    _train(stage, analog, base, data, settings, hooks, out, runtime, [weights])
    for each in saved:
        each.discard()


def compensate(settings: Settings, base: Path, found: Sequence[Path], out: Path, runtime: Runtime) -> None:
    """Train the compensators of the best state that the searches found. Writes a model and its log to `out`.

    The network with trained compensators is compared with the one without, under variation on validation images. The
    better one is written, with both accuracies in its history (`judged`); a warning is given if it is the latter.

    Args:
        settings: settings of `compensate`.
        base: the model to compensate.
        found: best.json of each limit; the one with the best mean validation accuracy is used, of equals the one with
            the least overhead. Without candidate layers, the result is the network at `base`.
        out: folder of the result.
        runtime: where and how the stage runs.
    """
    s = STAGES["compensate"].read(settings)
    results = [_read_best(path) for path in found]
    means = [1.0 if r["mean"] is None else r["mean"] for r in results]
    best = results[best_state(means, [r["overhead"] for r in results])]
    model, described = read_network(base, runtime.device)
    check_uncompensated("compensate", base, described)
    data, device = runtime.load(s, described, base), devices.make(s.variation)
    digital = digital_layers(s, model, data.train)
    how = {"exclude": digital, "equip": lambda analog: _equip(s, analog, data, described)}
    analog, plan, hooks = compensation_training.prepare(
        model, best["filters"], s.compensate, device, s.seed, "compensate", **how
    )
    described |= {"compensation": plan, "overhead": compensation.overhead(model, plan["filters"]), "search": best}
    parameters = compensation_training.trained_parameters(analog, s.compensate)
    if not parameters:
        metrics = {"epochs": 0, "validation": clean_accuracy(analog, data.validation)}
        write_network(out, analog, described, "compensate", settings, metrics)
        storage.write_text(out / "log.csv", "epoch\n")
        return
    inputs = [storage.model_files(base)[0], *found]

    def judge() -> dict[str, Any]:
        simulation = Simulation(memory=runtime.memory)
        kept = compensation_training.keep_better(analog, model, plan, data.validation, s.seed, "compensate", simulation)
        return {"judged": kept}

    _train("compensate", analog, described, data, settings, hooks, out, runtime, inputs, parameters, judge)


def _read_best(path: Path) -> dict[str, Any]:
    """Read the result of a search."""
    best = storage.read_json(path)
    if not isinstance(best, dict) or not {"filters", "mean", "overhead"} <= set(best):
        raise UserError(f"{path}: not what a search found (its best.json)")
    expect(path, "filters", are_filters(best["filters"]), "a number of filters for each layer", best["filters"])
    holds = best["mean"] is None or is_number(best["mean"], 0, 1)
    expect(path, "mean", holds, "a fraction between 0 and 1, or null", best["mean"])
    expect(path, "overhead", is_number(best["overhead"]), "a number that is at least 0", best["overhead"])
    return best
