"""Types and options that several commands share: settings of a stage, where it runs, labels."""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import click

from correctnet.cli.process import end_with
from correctnet.devices.configuration import DeviceSettings
from correctnet.errors import UserError
from correctnet.files import storage
from correctnet.pipeline.config import Config
from correctnet.pipeline.specs import STAGES, Stage
from correctnet.progress import progress_lines
from correctnet.sections import Section, exact, members, unprintable, validate
from correctnet.settings import Settings, layered

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from correctnet.pipeline.runtime import Runtime


class FilePath(click.Path):
    """A path in which `~` is expanded, also where the shell does not (--out=~/x)."""

    def __init__(self) -> None:
        super().__init__(readable=False, path_type=Path)  # whoever reads the file reports that it is unreadable

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Expand `~` and refuse empty paths and unknown users."""
        expanded = os.path.expanduser(value)
        if not expanded:
            self.fail("a path is expected, not an empty text", param, ctx)
        if os.fspath(expanded).startswith("~"):
            self.fail(f"{value}: there is no such user; write ./{value} for a file of that name", param, ctx)
        return super().convert(expanded, param, ctx)


PATH = FilePath()


class OrNone(click.ParamType):
    """A value, or `none` for an optional setting."""

    def __init__(self, kind: Any):
        self.kind = click.types.convert_type(kind)
        self.name = f"{self.kind.name}|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Convert a value; `none` becomes NONE."""
        return NONE if value == "none" else self.kind.convert(value, param, ctx)


# The value of an option given as `none`; None is that of an option that was not given.
NONE = object()


def leaves(stage: Stage) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Yield (path, field) of every setting that a stage reads, e.g. (("suppress", "beta"), ...).

    Of a section of several kinds, as `variation`, the settings of all; one that two kinds have is one with both's
    choices.
    """
    for key in STAGES[stage].reads:
        path = tuple(key.split("."))
        field = _field(path)
        if not (kinds := members(field.annotation)):
            yield path, field
        found: dict[str, FieldInfo] = {}
        for kind in kinds:
            for name, own in kind.model_fields.items():
                found[name] = _joined(found[name], own) if name in found else own
        yield from (((*path, name), inner) for name, inner in found.items())


def _field(path: tuple[str, ...]) -> FieldInfo:
    """The field of a setting, or of a section."""
    kinds: list[type[Section]] = [Settings]
    for part in path[:-1]:
        kinds = [kind for outer in kinds for kind in members(outer.model_fields[part].annotation)]
    return next(kind.model_fields[path[-1]] for kind in kinds if path[-1] in kind.model_fields)


def _joined(field: FieldInfo, other: FieldInfo) -> FieldInfo:
    """The field of a setting of two kinds of section: the choices and descriptions of both."""
    both = copy.copy(field)
    both.annotation = Literal[tuple(dict.fromkeys((*get_args(field.annotation), *get_args(other.annotation))))]  # type: ignore[assignment]
    both.description = f"{field.description}; of a measured device, {other.description}"
    both.default = f"{field.default}, {other.default}"
    return both


# Options whose names are not those of the settings: others have these already, or they say too little.
NAMED = {
    ("variation", "device"): "device_model",
    ("converters", "images"): "calibration_images",
    ("converters", "quantile"): "calibration_quantile",
}


def option_name(path: tuple[str, ...], taken: dict[str, tuple[str, ...]]) -> str:
    """Name of a setting's option: --beta for suppress.beta, --network for network.name, --variation for its model,
    --device-model for its device, --calibration-images for those of converters.

    Where two settings of a stage have the same name, the section comes first; --data-factory and --network-factory
    have it in every stage.
    """
    name = NAMED.get(path) or (path[0] if path[-1] in ("name", "model") else path[-1])
    if name == "factory":
        name = f"{path[0]}_factory"
    if taken.get(name, path) != path:
        name = f"{path[0]}_{name}"
    taken[name] = path
    return name


def settings_options(stage: Stage) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that adds an option for every setting of a stage, documented as in `correctnet.settings`.

    The decorated function receives them merged and checked as one argument, `settings`. Later sources override earlier
    ones: the defaults; --settings, or --config with --pair and --row, or else the data set, fraction held out,
    augmentation and seed that the input model was made with; the single options.
    """
    taken: dict[str, tuple[str, ...]] = {}
    # Settings of the stage's own section get the short names.
    order = sorted(leaves(stage), key=lambda leaf: leaf[0][0] != stage)
    names = {path: option_name(path, taken) for path, _ in order}

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(**arguments: Any) -> Any:
            given = {path: arguments.pop(f"set_{name}") for path, name in names.items() if f"set_{name}" in arguments}
            source = {key: arguments.pop(key) for key in ("settings", "config", "pair", "row")}
            models = (arguments.get(key) for key in ("model", "compensated", "base", "pretrained"))
            settings = _settings(stage, given, names, **source, model=next(filter(None, models), None))
            return function(settings=settings, **arguments)

        call.__doc__, call.__name__ = function.__doc__, function.__name__
        call.__click_params__ = list(getattr(function, "__click_params__", []))  # type: ignore[attr-defined]
        for path, field in reversed(list(leaves(stage))):
            option = _option(names[path], path, field)
            if option is not None:
                call = option(call)
        for option in (
            click.option("--row", help="With --pair: one of its rows."),
            click.option("--pair", help="With --config: the network-data pair whose settings are used."),
            click.option(
                "--config",
                type=PATH,
                multiple=True,
                help="A configuration file to take settings from (with --pair); several are merged in their order.",
            ),
            click.option("--settings", help="Settings as JSON, as the workflow passes them."),
        ):
            call = option(call)
        return call

    return decorate


def _option(name: str, path: tuple[str, ...], field: FieldInfo) -> Callable[..., Any] | None:
    kinds = [k for k in get_args(field.annotation) if k is not NoneType] or [field.annotation]
    flag = f"--{name.replace('_', '-')}"
    help_text = f"{field.description}  [{'.'.join(path)}; default: {_shown(field.default)}]"
    if path[-1] == "digest" or get_origin(field.annotation) is dict:
        return None  # found, not chosen; and values of a configuration
    choices = next((get_args(k) for k in (field.annotation, *kinds) if get_origin(k) is Literal), None)
    if choices is not None:
        if len(choices) == 1:
            return None  # a single value: nothing to choose
        return click.option(flag, f"set_{name}", type=click.Choice(choices), help=help_text)
    if get_origin(field.annotation) is tuple:
        return click.option(flag, f"set_{name}", type=OrNone(str), metavar="A,B,...|none", help=help_text)
    if field.annotation is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", f"set_{name}", default=None, help=help_text)
    optional = len(kinds) < len(get_args(field.annotation))
    return click.option(flag, f"set_{name}", type=OrNone(kinds[0]) if optional else kinds[0], help=help_text)


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return ",".join(map(str, default)) or "none"
    if default is None or isinstance(default, bool):
        return {None: "none", True: "yes", False: "no"}[default]
    return exact(default) if isinstance(default, float) else str(default)


def _settings(
    stage: Stage,
    given: dict[tuple[str, ...], Any],
    names: dict[tuple[str, ...], str],
    settings: str | None,
    config: tuple[Path, ...],
    pair: str | None,
    row: str | None,
    model: Path | None,
) -> Settings:
    if settings is not None and config:
        raise UserError("--settings and --config exclude each other")
    if bool(config) != (pair is not None) or (row and not pair):
        raise UserError("--config and --pair (and --row with them) go together")
    base = Settings()
    if settings is not None:
        base = STAGES[stage].parse(settings, stage)
    elif config and pair is not None:
        loaded, files = Config.load(*config), " + ".join(map(str, config))
        if pair not in loaded.pairs:
            raise UserError(f"--pair: {files} has no pair {pair!r} (pairs: {', '.join(loaded.pairs)})")
        if row is not None and row not in loaded.rows:
            raise UserError(f"--row: {files} has no row {row!r} (rows: {', '.join(loaded.rows)})")
        base = loaded.settings(pair, row)
    elif model is not None:
        base = _as_made(model)
    changes: dict[str, Any] = {}
    for path, value in given.items():
        if value is None:
            continue
        if value is NONE:
            value = [] if _is_tuple(path) else None
        elif isinstance(value, str) and _is_tuple(path):
            value = [_as_number(part.strip(), path) for part in value.split(",")]
        target = changes
        for part in path[:-1]:
            target = target.setdefault(part, {})
        target[path[-1]] = value
    return validate(Settings, layered(base.model_dump(), changes), "command line").identified()


def _as_made(model: Path) -> Settings:
    """The defaults, with the data set, split and seed of a model."""
    described = storage.model_files(model)[1]
    if not described.is_file():  # the stage reports it
        return Settings()
    made = storage.training_data(storage.read_json(described))
    changes = {"data": {key: value for key, value in made.items() if key != "seed"}}
    changes |= {"seed": made["seed"]} if "seed" in made else {}
    return validate(Settings, layered(Settings().model_dump(), changes), str(described))


def _is_tuple(path: tuple[str, ...]) -> bool:
    return get_origin(_field(path).annotation) is tuple


def _as_number(text: str, path: tuple[str, ...]) -> Any:
    """An element of a list as a number of the setting's type; a text that is no number is left for `validate`."""
    try:
        return get_args(_field(path).annotation)[0](text)
    except ValueError:
        return text


data_option = click.option(
    "--data-dir",
    type=PATH,
    envvar="CORRECTNET_DATA",
    help="Folder of the data sets.  [CORRECTNET_DATA, else: data]",
)


def runtime_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator that adds the options for where and how a stage runs, which do not change what it computes.

    The decorated function receives them as one argument, `runtime`.
    """

    def call(
        data_dir: Path | None,
        device: str,
        threads: int | None,
        memory: int,
        work: Path | None,
        quiet: bool,
        **arguments: Any,
    ) -> Any:
        out: Path = arguments["out"]
        place = out if out.name not in ("", "..") else Path(os.path.abspath(out))
        work = work or place.parent / storage.WORK / place.name
        end_with(os.environ.get("CORRECTNET_HEAD"))
        _check_out(function.__name__, out, single=arguments.get("state") is not None)
        _check_inputs(function.__name__, out, arguments)
        with storage.exclusive(work, out), progress_lines(quiet):
            return function(runtime=_runtime(data_dir, device, threads, memory, work, quiet), **arguments)

    call.__doc__, call.__name__ = function.__doc__, function.__name__
    call.__click_params__ = list(getattr(function, "__click_params__", []))  # type: ignore[attr-defined]
    for option in (
        click.option("--quiet", is_flag=True, help="For logs: lines of provenance and progress, no bars."),
        click.option("--work", type=PATH, help="Where resume checkpoints are kept.  [default: .resume beside --out]"),
        click.option("--threads", type=click.IntRange(1), help="At most this many CPU threads.  [default: all]"),
        click.option(
            "--memory",
            type=click.IntRange(1),
            envvar="CORRECTNET_MEMORY",
            default=2048,
            show_default=True,
            help="MiB of memory for Monte Carlo besides the data, approximately.",
        ),
        click.option("--device", type=click.Choice(["cpu", "cuda"]), envvar="CORRECTNET_DEVICE", default="cpu"),
        data_option,
    ):
        call = option(call)
    return call


def _check_out(stage: Stage, out: Path, single: bool) -> None:
    """Raise UserError, before the work, where a stage cannot write to `out`: a file or a folder, depending on it."""
    if not STAGES[stage].writes or single:
        storage.check_writable(out)
        return
    if out.suffix in (".safetensors", ".json", ".csv"):
        raise UserError(f"--out {out}: the name of a folder is expected, in which `{stage}` writes several files")
    storage.check_writable(out, "folder")


# Arguments of stages that are models, and those that are other files.
MODELS, FILES = ("pretrained", "base", "model", "compensated"), ("candidates", "found", "known")


def _check_inputs(stage: Stage, out: Path, arguments: dict[str, Any]) -> None:
    """Raise UserError, before the work, where a stage would overwrite one of its inputs."""
    models = [arguments[key] for key in MODELS if arguments.get(key)]
    others = [arguments[key] for key in FILES if arguments.get(key)]
    files = [path for other in others for path in (other if isinstance(other, tuple) else (other,))]
    files += [file for model in models for file in storage.model_files(model)]
    variation = arguments["settings"].variation
    files += [variation.path] if isinstance(variation, DeviceSettings) and variation.path else []
    storage.check_distinct([out, *(out / name for name in STAGES[stage].writes)], files)


def _runtime(data_dir: Path | None, device: str, threads: int | None, memory: int, work: Path, quiet: bool) -> Runtime:
    import torch

    from correctnet.machine import available_cpus, set_threads
    from correctnet.pipeline import provenance
    from correctnet.pipeline.runtime import Runtime

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; use --device cpu")
    set_threads(threads or available_cpus())
    if quiet:  # standard error is a log
        click.echo(provenance.line(device, threads), err=True)
    if device == "cuda":
        warn_without_kernels()
    return Runtime(None if data_dir is None else str(data_dir), device, quiet, work, memory << 20)


def warn_without_kernels() -> None:
    """Tell once that the CUDA kernels cannot be used, and silence the warnings of every engine about it."""
    from correctnet.evaluation.montecarlo import EngineWarning
    from correctnet.noise import device

    status = device.status()
    if not status.usable:
        click.echo(f"--device cuda: torch computes everything: {status.reason}", err=True)
        again = f"everything runs through torch: the model is on .*{re.escape(status.reason)}"
        warnings.filterwarnings("ignore", again, EngineWarning)


def name_values(option: str, texts: tuple[str, ...]) -> dict[str, str]:
    """NAME=VALUE texts as a dict. Raises UserError for other texts and for a name given twice."""
    # Bytes that the locale's encoding cannot decode are most likely UTF-8.
    texts = tuple(os.fsencode(text).decode("utf-8", "replace") if _undecoded(text) else text for text in texts)
    for text in texts:
        if not text.partition("=")[0] or "=" not in text:
            raise UserError(f"{option} {text!r}: NAME=VALUE is expected")
        check_printable(option, text)
    if twice := [name for name, count in Counter(text.split("=", 1)[0] for text in texts).items() if count > 1]:
        raise UserError(f"{option} {twice[0]}: given twice")
    return dict(text.split("=", 1) for text in texts)


def _undecoded(text: str) -> bool:
    return any("\udc80" <= letter <= "\udcff" for letter in text)


def check_printable(option: str, text: str) -> None:
    """Raise UserError for a text with control characters."""
    if unprintable(text):
        raise UserError(f"{option} {text!r}: printable characters are expected")
