"""The command line: `correctnet STAGE` runs one stage of the paper by hand; the workflow calls the same commands."""

from __future__ import annotations

import errno
import json
import os
import re
import select
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import click

from correctnet.errors import UserError, one_line
from correctnet.files import storage
from correctnet.files.yamlfile import json_values
from correctnet.pipeline.config import Config
from correctnet.pipeline.specs import STAGES, Stage
from correctnet.settings import Section, Settings, exact, merge, unprintable, validate

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from correctnet.pipeline.runtime import Runtime


class FilePath(click.Path):
    """A path, with `~` replaced also where the shell leaves it (--out=~/x)."""

    def __init__(self) -> None:
        super().__init__(readable=False, path_type=Path)  # what cannot be read is said by who reads

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See the class."""
        expanded = os.path.expanduser(value)
        if not expanded:
            self.fail("a path is expected, not an empty text", param, ctx)
        if os.fspath(expanded).startswith("~"):
            self.fail(f"{value}: there is no such user; write ./{value} for a file of that name", param, ctx)
        return super().convert(expanded, param, ctx)


PATH = FilePath()


def leaves(stage: Stage) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """(path, field) of every single setting that a stage reads, e.g. (("suppress", "beta"), ...)."""
    for key in STAGES[stage].reads:
        path = tuple(key.split("."))
        section: type[Section] = Settings
        for part in path[:-1]:
            section = section.model_fields[part].annotation  # type: ignore[assignment]
        field = section.model_fields[path[-1]]
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            for name, inner in field.annotation.model_fields.items():
                yield (*path, name), inner
        else:
            yield path, field


class OrNone(click.ParamType):
    """A value, or `none` for a setting that may be empty."""

    def __init__(self, kind: Any):
        self.kind = click.types.convert_type(kind)
        self.name = f"{self.kind.name}|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See the class."""
        return NONE if value == "none" else self.kind.convert(value, param, ctx)


# What was given as `none`; None stands for what was not given.
NONE = object()


def option_name(path: tuple[str, ...], taken: dict[str, tuple[str, ...]]) -> str:
    """--beta for suppress.beta, --network for network.name; with the section in front where two settings collide."""
    name = path[0] if path[-1] == "name" else path[-1]
    if taken.get(name, path) != path:
        name = f"{path[0]}_{name}"
    taken[name] = path
    return name


def settings_options(stage: Stage) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Options for every setting of a stage, its default and meaning taken from `correctnet.pipeline.config`.

    The decorated function gets them merged and checked as one argument, `settings`. They are taken from the defaults,
    then --settings or --config/--pair/--row, or else what the model that the stage begins with was made with (data set,
    fraction held out, augmentation, seed), then the single options.
    """
    taken: dict[str, tuple[str, ...]] = {}
    # The stage's own section last in `reads` has the first claim on a short name.
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
            click.option("--config", type=PATH, help="A config.yaml to take settings from (with --pair)."),
            click.option("--settings", help="Settings as JSON, as the workflow passes them."),
        ):
            call = option(call)
        return call

    return decorate


def _option(name: str, path: tuple[str, ...], field: FieldInfo) -> Callable[..., Any] | None:
    kinds = [k for k in get_args(field.annotation) if k is not NoneType] or [field.annotation]
    flag = f"--{name.replace('_', '-')}"
    help_text = f"{field.description}  [{'.'.join(path)}; default: {_shown(field.default)}]"
    if get_origin(field.annotation) is Literal:
        if len(get_args(field.annotation)) == 1:
            return None  # nothing to choose yet
        return click.option(flag, f"set_{name}", type=click.Choice(get_args(field.annotation)), help=help_text)
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
    config: Path | None,
    pair: str | None,
    row: str | None,
    model: Path | None,
) -> Settings:
    if settings is not None and config is not None:
        raise UserError("--settings and --config exclude each other")
    if (config is None) != (pair is None) or (row and not pair):
        raise UserError("--config and --pair (and --row with them) go together")
    base = Settings()
    if settings is not None:
        base = STAGES[stage].parse(settings, stage)
    elif config is not None and pair is not None:
        loaded = Config.load(config)
        if pair not in loaded.pairs:
            raise UserError(f"--pair: {config} has no pair {pair!r} (pairs: {', '.join(loaded.pairs)})")
        if row is not None and row not in loaded.rows:
            raise UserError(f"--row: {config} has no row {row!r} (rows: {', '.join(loaded.rows)})")
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
    return validate(Settings, merge(base.model_dump(), changes), "command line")


def _as_made(model: Path) -> Settings:
    """The defaults, with the data set, its split and the seed that a model was made with."""
    described = storage.model_files(model)[1]
    if not described.is_file():  # the stage says so
        return Settings()
    made = storage.training_data(storage.read_json(described))
    changes = {"data": {key: value for key, value in made.items() if key != "seed"}}
    changes |= {"seed": made["seed"]} if "seed" in made else {}
    return validate(Settings, merge(Settings().model_dump(), changes), str(described))


def _annotation(path: tuple[str, ...]) -> Any:
    section: Any = Settings
    for part in path[:-1]:
        section = section.model_fields[part].annotation
    return section.model_fields[path[-1]].annotation


def _is_tuple(path: tuple[str, ...]) -> bool:
    return get_origin(_annotation(path)) is tuple


def _as_number(text: str, path: tuple[str, ...]) -> Any:
    """A part of a list as the number that the setting holds; where it is none, the text, for `validate` to refuse."""
    try:
        return get_args(_annotation(path))[0](text)
    except ValueError:
        return text


data_option = click.option(
    "--data-dir",
    type=PATH,
    envvar="CORRECTNET_DATA",
    help="Where the data sets lie.  [CORRECTNET_DATA, else: data]",
)


def runtime_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options that change where and how a stage runs, not what it computes; gives the argument `runtime`."""

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
        _end_with(os.environ.get("CORRECTNET_HEAD"))
        _check_out(function.__name__, out, single=arguments.get("state") is not None)
        _check_inputs(function.__name__, out, arguments)
        with storage.exclusive(work, out):
            return function(runtime=_runtime(data_dir, device, threads, memory, work, quiet), **arguments)

    call.__doc__, call.__name__ = function.__doc__, function.__name__
    call.__click_params__ = list(getattr(function, "__click_params__", []))  # type: ignore[attr-defined]
    for option in (
        click.option("--quiet", is_flag=True, help="No progress bars, but a line of provenance; for logs."),
        click.option("--work", type=PATH, help="What a killed run needs to go on.  [default: .resume beside --out]"),
        click.option("--threads", type=click.IntRange(1), help="At most this many CPU threads.  [default: all]"),
        click.option(
            "--memory",
            type=click.IntRange(1),
            envvar="CORRECTNET_MEMORY",
            default=2048,
            show_default=True,
            help="MiB that Monte Carlo may take beside the data, about.",
        ),
        click.option("--device", type=click.Choice(["cpu", "cuda"]), envvar="CORRECTNET_DEVICE", default="cpu"),
        data_option,
    ):
        call = option(call)
    return call


def _check_out(stage: str, out: Path, single: bool) -> None:
    """Find out before the work that a stage can write to `out`: a file or a folder, by what the stage makes."""
    if stage in ("evaluate", "sensitivity") or single:
        storage.check_writable(out)
        return
    if out.suffix in (".safetensors", ".json", ".csv"):
        raise UserError(f"--out {out}: the name of a folder is expected, in which `{stage}` writes several files")
    storage.check_writable(out, "folder")


# The arguments of stages that name models, and those that name other files.
MODELS, FILES = ("pretrained", "base", "model", "compensated"), ("candidates", "found", "known")


def _check_inputs(stage: str, out: Path, arguments: dict[str, Any]) -> None:
    """Find out before the work whether a stage's result would take the place of what it is made from."""
    models = [arguments[key] for key in MODELS if arguments.get(key)]
    others = [arguments[key] for key in FILES if arguments.get(key)]
    files = [path for other in others for path in (other if isinstance(other, tuple) else (other,))]
    files += [file for model in models for file in storage.model_files(model)]
    storage.check_distinct([out, *(out / name for name in WRITTEN.get(stage, MODEL))], files)


# What the stages that write several files call them: most write a model.
MODEL = ("model.safetensors", "model.json", "log.csv")
WRITTEN = {"sweep": ("accuracy.csv", "candidates.json"), "search": ("best.json", "log.csv")}


def _runtime(data_dir: Path | None, device: str, threads: int | None, memory: int, work: Path, quiet: bool) -> Runtime:
    import torch

    from correctnet.machine import available_cpus, set_threads
    from correctnet.pipeline import provenance
    from correctnet.pipeline.runtime import Runtime

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; use --device cpu")
    set_threads(threads or available_cpus())
    if quiet:  # nobody is watching: this is a log
        click.echo(provenance.line(device, threads), err=True)
    if device == "cuda":
        _say_without_kernels()
    return Runtime(None if data_dir is None else str(data_dir), device, quiet, work, memory << 20)


def _say_without_kernels() -> None:
    """Say it where a GPU is to compute and our kernels cannot, and keep every engine from saying it again."""
    from correctnet.evaluation.montecarlo import EngineWarning
    from correctnet.noise import device as cuda

    status = cuda.status()
    if not status.usable:
        click.echo(f"--device cuda: torch computes everything: {status.reason}", err=True)
        again = f"everything runs through torch: the model is on .*{re.escape(status.reason)}"
        warnings.filterwarnings("ignore", again, EngineWarning)


# The commands that keep what they have done when they are stopped; the others take minutes.
RESUMED = ("pretrain", "suppress", "inject", "search", "compensate", "finetune", "evaluate")


class Stopped(BaseException):
    """A signal that asks the process to end: what is half written is taken away, and one line says so."""

    def __init__(self, number: int):
        super().__init__(number)
        self.signal = signal.Signals(number)


def _stop(number: int, _frame: Any) -> None:
    for further in (signal.SIGTERM, signal.SIGINT):  # the process is ending: the next one shall not cut that short
        signal.signal(further, signal.SIG_IGN)
    raise Stopped(number)


def _end_with(head: str | None) -> None:
    """End (as by SIGTERM) when process `head` is gone: the workflow that started this was killed, and its successor
    shall find no stage of it still running."""
    head_folder = Path("/proc") / (head or "-")
    if not head_folder.exists():  # started by hand, or in a container that does not show the process
        return

    def watch() -> None:
        try:  # tells of a process that has ended though nobody has asked after it (a zombie), and of no other
            select.select([os.pidfd_open(int(head))], [], [])
        except OSError:  # it is gone by now, or the kernel is older than 5.3
            while head_folder.exists():
                time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


class Group(click.Group):
    """Commands in the order of the pipeline, and user errors as one line each with exit status 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of definition."""
        return list(self.commands)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Texts have letters, like σ, that a terminal's encoding may lack: those are shown as escapes."""
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """See the class."""
        signal.signal(signal.SIGTERM, _stop)
        signal.signal(signal.SIGINT, _stop)
        try:
            with warnings.catch_warnings():  # a command leaves no filter behind for the next one of the process
                warnings.showwarning = lambda message, *_, **__: click.echo(f"warning: {message}", err=True)
                try:
                    return super().invoke(ctx)
                except OSError as error:  # of a file that nobody has looked at with suspicion
                    if error.errno == errno.ENOSPC and error.filename is None:
                        raise UserError(f"the output cannot be written: {error.strerror}") from error
                    if error.filename is None:
                        raise
                    raise storage.unreadable(os.fsdecode(error.filename), error) from error
        except UserError as error:
            for line in str(error).splitlines():
                click.echo(f"error: {line}", err=True)
            ctx.exit(2)
        except Stopped as stopped:
            again = "; the same command goes on from what is done" if ctx.invoked_subcommand in RESUMED else ""
            click.echo(f"stopped by {stopped.signal.name}{again}", err=True)
            ctx.exit(128 + stopped.signal)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="correctnet")
def main() -> None:
    """CorrectNet: neural networks under the device variation of analog in-memory hardware.

    Train with error suppression, find the layers that need compensation, compensate them, and evaluate over chip
    samples. Every stage reads files and writes files; `snakemake` chains them.
    """


out_option = click.option("--out", type=PATH, required=True, help="Folder that the result is written to.")
pretrained_option = click.option("--pretrained", type=PATH, required=True, help="Model of `pretrain`.")
base_option = click.option(
    "--base", type=PATH, required=True, help="Model to be compensated: of `suppress`, or of `pretrain` or `inject`."
)


@main.command()
@settings_options("pretrain")
@runtime_options
@out_option
def pretrain(settings: Settings, runtime: Runtime, out: Path) -> None:
    """Train the network without any method."""
    from correctnet.pipeline import stages

    stages.pretrain(settings, out, runtime)


@main.command()
@settings_options("suppress")
@runtime_options
@pretrained_option
@out_option
def suppress(settings: Settings, runtime: Runtime, pretrained: Path, out: Path) -> None:
    """Train under the modified Lipschitz regulariser, (10) and (11) of the paper."""
    from correctnet.pipeline import stages

    stages.suppress(settings, pretrained, out, runtime)


@main.command()
@settings_options("inject")
@runtime_options
@pretrained_option
@out_option
def inject(settings: Settings, runtime: Runtime, pretrained: Path, out: Path) -> None:
    """Train on with variation injected into all weights (a rival without overhead)."""
    from correctnet.pipeline import stages

    stages.inject(settings, pretrained, out, runtime)


@main.command()
@settings_options("sweep")
@runtime_options
@pretrained_option
@base_option
@out_option
def sweep(settings: Settings, runtime: Runtime, pretrained: Path, base: Path, out: Path) -> None:
    """Find the candidate layers: variation from the last layer backwards."""
    from correctnet.pipeline import stages

    stages.sweep(settings, pretrained, base, out, runtime)


@main.command()
@settings_options("sensitivity")
@runtime_options
@click.option("--model", type=PATH, required=True, help="Model of any stage.")
@click.option("--out", type=PATH, required=True, help="CSV that is written, a row a layer and chip.")
def sensitivity(settings: Settings, runtime: Runtime, model: Path, out: Path) -> None:
    """What variation in each layer alone costs a model."""
    from correctnet.pipeline import stages

    stages.sensitivity(settings, model, out, runtime)


@main.command()
@settings_options("search")
@runtime_options
@base_option
@click.option("--candidates", type=PATH, required=True, help="candidates.json of `sweep`.")
@click.option("--limit", type=float, default=0.03, show_default=True, help="Overhead allowed, a fraction.")
@click.option("--known", type=PATH, multiple=True, help="A state that --state has scored; may be repeated.")
@click.option(
    "--state",
    type=click.IntRange(0),
    help="Score only this one (from 0) of the states that the search needs next; --out is a JSON file for it.",
)
@out_option
def search(
    settings: Settings,
    runtime: Runtime,
    base: Path,
    candidates: Path,
    limit: float,
    known: tuple[Path, ...],
    state: int | None,
    out: Path,
) -> None:
    """Search where to compensate and with how many filters, within one overhead limit."""
    from correctnet.pipeline import stages

    if state is None:
        stages.search(settings, base, candidates, limit, out, runtime, known)
    else:
        stages.search_state(settings, base, candidates, limit, known, state, out, runtime)


@main.command()
@settings_options("compensate")
@runtime_options
@base_option
@click.option("--found", type=PATH, required=True, multiple=True, help="best.json of `search`; may be repeated.")
@out_option
def compensate(settings: Settings, runtime: Runtime, base: Path, found: tuple[Path, ...], out: Path) -> None:
    """Train the compensators of the best state that the searches found."""
    from correctnet.pipeline import stages

    stages.compensate(settings, base, found, out, runtime)


@main.command()
@settings_options("finetune")
@runtime_options
@click.option("--compensated", type=PATH, required=True, help="Model of `compensate`.")
@out_option
def finetune(settings: Settings, runtime: Runtime, compensated: Path, out: Path) -> None:
    """Train analog weights and compensators together, with variation in the former (beyond the paper)."""
    from correctnet.pipeline import stages

    stages.finetune(settings, compensated, out, runtime)


@main.command()
@settings_options("evaluate")
@runtime_options
@click.option("--model", type=PATH, required=True, help="Model of any stage.")
@click.option("--chips", type=click.IntRange(1), default=250, show_default=True, help="Chip samples.")
@click.option("--start", type=click.IntRange(0), default=0, show_default=True, help="Number of the first chip.")
@click.option("--note", multiple=True, metavar="NAME=VALUE", help="A further column of the CSV; may be repeated.")
@click.option(
    "--prefix",
    type=click.IntRange(1),
    multiple=True,
    metavar="N",
    help="With --sigma 0: also count what is correct of the first N images; may be repeated.",
)
@click.option("--out", type=PATH, required=True, help="CSV that is written, a row a chip.")
def evaluate(
    settings: Settings,
    runtime: Runtime,
    model: Path,
    chips: int,
    start: int,
    note: tuple[str, ...],
    prefix: tuple[int, ...],
    out: Path,
) -> None:
    """Evaluate a model over chip samples: a CSV with the accuracy of each."""
    from correctnet.pipeline import stages

    notes = _pairs("--note", note)
    result = stages.evaluate_chips(
        settings, model, out, runtime, chips=chips, start=start, notes=notes, prefixes=prefix
    )
    first = result.table.iloc[0]
    click.echo(
        f"{first['variation']} {first['on']}s, sigma {exact(first['sigma'])}, centre {first['centre']}: "
        f"w / nominal has mean {first['factor_mean']:.3f} and coefficient of variation {first['factor_cv']:.1%}\n"
        f"{result}",
        err=True,
    )


def _pairs(option: str, texts: tuple[str, ...]) -> dict[str, str]:
    """NAME=VALUE texts as a dict."""
    # What the locale's encoding could not read is UTF-8 more often than not.
    texts = tuple(os.fsencode(text).decode("utf-8", "replace") if _undecoded(text) else text for text in texts)
    for text in texts:
        if not text.partition("=")[0] or "=" not in text:
            raise UserError(f"{option} {text!r}: NAME=VALUE is expected")
        _check_printable(option, text)
    if twice := [name for name, count in Counter(text.split("=", 1)[0] for text in texts).items() if count > 1]:
        raise UserError(f"{option} {twice[0]}: given twice")
    return dict(text.split("=", 1) for text in texts)


def _undecoded(text: str) -> bool:
    return any("\udc80" <= letter <= "\udcff" for letter in text)


def _check_printable(option: str, text: str) -> None:
    if unprintable(text):
        raise UserError(f"{option} {text!r}: printable characters are expected")


def _labels(texts: tuple[str, ...], given: str | None) -> dict[str, str]:
    """The labels of --label, and of --labels as JSON."""
    labels: Any = {}
    if given is not None:
        try:
            labels = json_values(given)
        except (ValueError, RecursionError) as error:
            raise UserError(f"--labels: not JSON ({one_line(error)})") from error
        if not isinstance(labels, dict) or not all(isinstance(label, str) for label in labels.values()):
            raise UserError("--labels: a JSON object from rows to labels is expected")
        for label in labels.values():
            _check_printable("--labels", label)
    return labels | _pairs("--label", texts)


@main.command("merge")
@click.argument("files", type=PATH, nargs=-1, required=True)
@click.option("--out", type=PATH, required=True, help="CSV that is written.")
def merge_chunks(files: tuple[Path, ...], out: Path) -> None:
    """Put the CSVs of several chunks of one evaluation together, in the order of the chips."""
    from correctnet.evaluation.results import Result, missing_chip

    storage.check_writable(out)
    storage.check_distinct([out], files)
    merged = Result.concatenate(Result.from_csv(path) for path in files)
    chips = merged.table["sample"]
    if (missing := missing_chip(chips)) is not None:
        raise UserError(f"merge: chip {missing} is missing; the chunks have chips {chips.min()} to {chips.max()}")
    merged.to_csv(out)


@main.command()
@click.argument("files", type=PATH, nargs=-1, required=True)
@click.option("--out", type=PATH, required=True, help="CSV that is written.")
def collect(files: tuple[Path, ...], out: Path) -> None:
    """Put the CSVs of several evaluations (rows, sigmas) into one."""
    from correctnet.report import tables

    storage.check_writable(out)
    storage.check_distinct([out], files)
    storage.write_csv(out, tables.read_samples(files))


@main.command()
@click.argument("samples", type=PATH, nargs=-1, required=True)
@click.option("--sigma", type=float, default=0.5, show_default=True, help="The sigma of the table.")
@click.option("--label", multiple=True, metavar="ROW=LABEL", help="What a row is called; may be repeated.")
@click.option("--labels", metavar="JSON", help="What rows are called, as a JSON object.")
@click.option("--out", type=PATH, required=True, help="CSV; the same as .md and .html is written beside it.")
def table(samples: tuple[Path, ...], sigma: float, label: tuple[str, ...], labels: str | None, out: Path) -> None:
    """Table I of the paper from per-sample results."""
    from correctnet.report import pages, tables

    csv, markdown, page = _beside(out, ".csv", ".md", ".html")
    storage.check_distinct([csv, markdown, page], samples)
    rows = tables.table1(tables.read_samples(samples), sigma, _labels(label, labels))
    text = tables.markdown(rows, sigma)
    storage.write_csv(csv, rows)
    storage.write_text(markdown, text)
    storage.write_text(page, pages.table1(rows, sigma))
    click.echo(text, err=True)


def _beside(out: Path, *suffixes: str) -> list[Path]:
    """The files of several kinds that are written for one --out; that they can be is found out before the work.

    They are `out` for the kind that its name tells, and for the first where it tells none of them; see
    `storage.beside` for the names of the others.
    """
    paths = [storage.beside(out, suffix, suffixes) for suffix in suffixes]
    if out.suffix.lower() not in suffixes:
        paths[0] = out
    else:
        paths[suffixes.index(out.suffix.lower())] = out
    for path in paths:
        storage.check_writable(path)
    return paths


@main.command()
@click.argument("name", type=click.Choice(["2", "7", "9", "10", "rows", "yield", "sensitivity"]))
@click.argument("files", type=PATH, nargs=-1, required=True)
@click.option("--label", multiple=True, metavar="ROW=LABEL", help="What `rows` calls a row; may be repeated.")
@click.option("--labels", metavar="JSON", help="What `rows` calls rows, as a JSON object.")
@click.option("--only", multiple=True, metavar="ROW", help="A row that `rows` shows, and no other; may be repeated.")
@click.option("--sigma", type=float, help="The sigma of Table I (7, rows, yield); else the largest that all rows have.")
@click.option("--out", type=PATH, required=True, help="PNG; an SVG of the same name is written beside it.")
def figure(
    name: str,
    files: tuple[Path, ...],
    label: tuple[str, ...],
    labels: str | None,
    only: tuple[str, ...],
    sigma: float | None,
    out: Path,
) -> None:
    """One figure: 2, 7, 9 or 10 of the paper, all rows, the yield over accuracy, or each layer's sensitivity.

    FILES are per-sample results (2, 7, rows, yield), accuracy.csv of `sweep` (9), log.csv of `search` (10), or what
    `sensitivity` wrote; the panel of a file is titled with the name of its pair's folder.
    """
    import matplotlib

    matplotlib.use("Agg")  # no window, no display
    from correctnet.report import figures

    figures.draw(name, files, out, _labels(label, labels), only, sigma)


@main.command()
@click.argument("logs", type=PATH, nargs=-1, required=True)
@click.option("--out", type=PATH, required=True, help="HTML that is written.")
def explore(logs: tuple[Path, ...], out: Path) -> None:
    """The states that searches explored (their log.csv) as an interactive scatter, in one HTML file."""
    from correctnet.report import pages

    storage.check_writable(out)
    storage.check_distinct([out], logs)
    storage.write_text(out, pages.search_scatter(logs))


@main.command("provenance")
@click.argument("run")
@click.option(
    "--results",
    type=PATH,
    envvar="CORRECTNET_RESULTS",
    default=Path("results"),
    help="Folder of all results.  [CORRECTNET_RESULTS, else: results]",
)
@click.option("--pair", "pairs", multiple=True, required=True, help="A pair of the run; may be repeated.")
@click.option("--seed", "seeds", multiple=True, help="A seed of the run; may be repeated.")
@click.option("--command", envvar="CORRECTNET_COMMAND", help="What was run.  [CORRECTNET_COMMAND, else this command]")
@click.option(
    "--jobs",
    metavar="JSON",
    help="The jobs of the run, folders as objects and those in one folder as a list.  [default: all jobs of the pairs]",
)
@click.option("--out", type=PATH, required=True, help="CSV, a row a job; an HTML page is written beside it.")
def provenance_page(
    run: str,
    results: Path,
    pairs: tuple[str, ...],
    seeds: tuple[str, ...],
    command: str | None,
    jobs: str | None,
    out: Path,
) -> None:
    """What made the results of a RUN: command, revision, versions, machine, time and memory of each job."""
    from correctnet.pipeline import provenance
    from correctnet.report import pages

    csv, page = _beside(out, ".csv", ".html")
    names = None if jobs is None else provenance.unfold(jobs)
    table, here = provenance.jobs(results, list(pairs), names), provenance.here()
    storage.write_csv(csv, table)
    here |= {"command": command} if command else {}
    storage.write_text(page, pages.provenance(run, here, table, seeds))


@main.command()
@click.argument("name", type=click.Choice(["digits", "mnist", "cifar10", "cifar100"]))
@data_option
def fetch(name: str, data_dir: Path | None) -> None:
    """Make sure that a data set is there; download it if not."""
    from correctnet.datasets import loading

    loading.fetch(name, data_dir)


@main.command()
@click.argument("config", type=PATH, default=Path("config.yaml"))
@click.option("--run", help="Also print an estimate of the hours that this run takes.")
def check(config: Path, run: str | None) -> None:
    """Check a config.yaml."""
    loaded = Config.load(config)
    click.echo(f"{config}: {len(loaded.pairs)} pairs, {len(loaded.rows)} rows, no mistakes")
    for name in loaded.runs:
        try:
            loaded.sigma_of(name)
        except UserError as error:
            if name == run:
                raise
            click.echo(f"{config}: {error}; each pair can be run, this table not")
    if run:
        from correctnet.machine import available_cpus
        from correctnet.pipeline import estimate

        click.echo(estimate.report(loaded, run, available_cpus()))


@main.command()
@click.argument("model", type=PATH, required=False)
def info(model: Path | None) -> None:
    """Say what this machine computes with, and what of MODEL (of any stage) the C++ core runs."""
    import platform

    import torch

    from correctnet import __version__, machine
    from correctnet.noise import core as native
    from correctnet.noise import device as cuda
    from correctnet.pipeline.stages.evaluation import describe_engine

    status = native.status(check=False)
    click.echo(f"correctnet {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    click.echo(f"CPU: {machine.cpu_name()}, {machine.available_cpus()} usable")
    if status.built:
        missing = [isa for isa in status.compiled if isa not in status.available]
        click.echo(f"C++ core: compiled for {', '.join(status.compiled)}")
        click.echo(f"  this CPU has {', '.join(status.available)}; it lacks {', '.join(missing) or 'none of them'}")
        click.echo(f"  in use: {status.isa}, {status.reason}")
        if status.problem:
            click.echo(f"  it computes {status.problem}")
    else:
        click.echo(f"C++ core: {status.reason}; numpy draws the noise and torch runs the networks")
    gpu = cuda.status()
    click.echo(f"CUDA kernels: {'' if gpu.usable or not gpu.built else 'built, but '}{gpu.reason}")
    if torch.cuda.is_available():
        click.echo(f"  GPU: {torch.cuda.get_device_name()}")
    if model is not None:
        click.echo(describe_engine(model))


@main.command()
@click.argument("model", type=PATH)
def show(model: Path) -> None:
    """Describe a model: its network, compensation, overhead and history."""
    from correctnet.pipeline.models import read_network

    click.echo(json.dumps(read_network(model)[1], indent=2))


@main.command()
@click.option(
    "--work",
    "works",
    type=click.Choice(["lenet5-250x10000", "vgg16-8x2000", "vgg16-64x64", "vgg16-250x10000", "noise"]),
    multiple=True,
    help="What to measure; may be repeated.  [default: all]",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="With cuda: its own works, the crossover of the engine's methods, and training.",
)
@click.option("--scaling", is_flag=True, help="Also measure cost against samples, images and threads.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Turns that each side takes.")
@click.option("--threads", type=click.IntRange(1), help="At most this many CPU threads.  [default: all]")
@click.option("--full", is_flag=True, help="Plain loops over all chips, not over as many as take ten seconds.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of images, weights and chips.")
@click.option("--json", "json_file", type=PATH, help="JSON that is written, with all that was measured.")
@click.option("--plot", type=PATH, help="Plot that is written (.png, .svg, ...); with --scaling a second beside it.")
def bench(
    works: tuple[str, ...],
    device: str,
    scaling: bool,
    rounds: int,
    threads: int | None,
    full: bool,
    seed: int,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """Measure the Monte Carlo engine against the best loops in plain PyTorch on this machine."""
    import matplotlib

    matplotlib.use("Agg")  # no window, no display
    from correctnet.bench import cpu as benchmark
    from correctnet.bench import report
    from correctnet.machine import available_cpus, set_threads

    if json_file is not None:
        storage.check_writable(json_file)
    if plot is not None:
        report.check_plot(plot)

    def log(text: str) -> None:
        click.echo(text, err=True)

    if device == "cuda":
        from correctnet.bench import gpu as bench_gpu

        if plot is not None or scaling:
            raise UserError("bench --device cuda: --plot and --scaling are for the CPU's measurements")
        if unknown := [work for work in works if work not in bench_gpu.WORKLOADS]:
            raise UserError(
                f"bench --device cuda: {unknown[0]} is measured on the CPU (here: {', '.join(bench_gpu.WORKLOADS)})"
            )
        few = bool(works)
        measured = bench_gpu.measure(
            works or tuple(bench_gpu.WORKLOADS), training=not few, crossover=not few, rounds=rounds, seed=seed, log=log
        )
        click.echo(bench_gpu.table(measured))
        if json_file is not None:
            storage.write_json(json_file, measured)
        return
    if unknown := [work for work in works if work not in benchmark.WORKLOADS and work != "noise"]:
        raise UserError(f"bench: {unknown[0]} is measured on a GPU (--device cuda)")
    set_threads(threads or available_cpus())
    measured = benchmark.measure(
        [work for name, work in benchmark.WORKLOADS.items() if not works or name in works],
        noise=not works or "noise" in works,
        scaling=scaling,
        rounds=rounds,
        full=full,
        seed=seed,
        log=log,
    )
    click.echo(report.table(measured))
    if json_file is not None:
        storage.write_json(json_file, measured)
    if plot is not None:
        report.plot(measured, plot)


if __name__ == "__main__":
    sys.exit(main())
