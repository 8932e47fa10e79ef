"""Atomic writes and validated reads of JSON, CSV and safetensors.

A model is two files: `model.safetensors` holds its tensors, `model.json` its description (network, compensation plan,
history) and the SHA-256 of the first, so that a torn or swapped pair is noticed. No pickles.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO, TypeVar

import safetensors

from correctnet.errors import UserError, one_line
from correctnet.files.yamlfile import json_values

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

FORMAT = 1
TEXT = ("pair", "row", "label", "network", "dataset", "split", "variation", "on", "centre", "epochs", "name", "stage")
"""columns of results that hold text, even where it looks like a number or a missing one (a row named nan)"""
MISSING = ["", "nan", "NaN", "NA", "N/A", "n/a", "null", "NULL", "None"]
"""what denotes a missing number in the other columns"""
WORK = ".resume"
"""the folder, beside a stage's result, of its resume checkpoints"""


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it there when the block succeeds, delete it when it does not.

    A reader sees the old file or the new one, never a part of one. Raises UserError where the file cannot be written.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes private files; results are to be shared
        os.replace(temporary, path)
        temporary = None
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: cannot be written: {_reason(error)}; what was there before is kept") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive(folder: str | Path, *cleaned: Path) -> Iterator[None]:
    """Lock `folder` for this process; delete temporary files that a killed process left there and in `cleaned`.

    Raises UserError, at once, where another process holds the lock: two that train one model would write the same
    files.
    """
    lock = Path(folder) / "lock"
    try:
        file = _locked(lock)
    except BlockingIOError as error:
        holder = lock.read_text(encoding="utf-8", errors="replace") if lock.exists() else ""
        raise UserError(
            f"{folder}: {holder or 'another process'} is already running this stage; stop it or wait for it"
        ) from error
    except OSError as error:
        raise UserError(f"{lock}: cannot be written: {_reason(error)}") from error
    try:
        for place in (Path(folder), *cleaned):
            for left in place.glob(".*.tmp") if place.is_dir() else ():
                left.unlink(missing_ok=True)
        yield
    finally:
        lock.unlink(missing_ok=True)  # while it is held: no other process can hold a file of this name
        file.close()
        with contextlib.suppress(OSError):  # a checkpoint is kept there
            lock.parent.rmdir()
            if lock.parent.parent.name == WORK:
                lock.parent.parent.rmdir()


def _locked(lock: Path) -> TextIO:
    """Open and lock the lock file. Raises BlockingIOError where another process has locked it."""
    for attempt in itertools.count():
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = open(lock, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed by the caller)
        except FileNotFoundError:
            if attempt < 10:
                continue  # the process that held it has just removed the folder
            raise  # it cannot be made
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                file.close()
                raise
            warnings.warn(f"{lock}: this file system has no locks; do not start the same stage twice", stacklevel=3)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
                return file
        file.close()  # locked, but deleted by the process before


def check_writable(path: str | Path, kind: Literal["file", "folder"] = "file") -> None:
    """Check, before the work, that its result (a file, or a folder of files) can be written to `path`.

    Parent folders are made. Raises UserError where it cannot, or where `path` is of the other kind.
    """
    path = Path(path)
    try:
        if kind == "file" and path.is_dir():
            raise UserError(f"{path}: is a folder; the name of a file is expected")
        if kind == "file" and path.exists() and not path.is_file():
            raise UserError(f"{path}: is no ordinary file; a result would replace it")
        if kind == "folder" and path.exists() and not path.is_dir():
            raise UserError(f"{path}: is a file; the name of a folder is expected")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path if path.is_dir() else path.parent):
            pass
        # The name may be too long, and a file has a longer one while it is written.
        name = f".{path.name}.12345678.tmp" if kind == "file" else path.name
        with contextlib.suppress(FileNotFoundError):
            os.stat(path.parent / name)
    except FileExistsError as error:
        raise UserError(f"{path}: cannot be written: {path.parent} is a file") from error
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path}: cannot be written: {_reason(error)}") from error


def check_distinct(outs: Iterable[str | Path], inputs: Iterable[str | Path]) -> None:
    """Raise a UserError where a result would overwrite a file or folder that it is made from."""
    given = {os.path.realpath(path): path for path in inputs}
    for out in outs:
        if os.path.realpath(out) in given:
            raise UserError(f"{out}: the result is made from this file; write it elsewhere")


def beside(path: str | Path, suffix: str, known: Sequence[str]) -> Path:
    """Path of a file of another kind beside `path`: one of the `known` suffixes is replaced by `suffix`.

    Other suffixes belong to the name, to which `suffix` is appended: run.v1 becomes run.v1.md, and run.csv run.md.
    """
    path = Path(path)
    stem = path.name.removesuffix(path.suffix) if path.suffix.lower() in known else path.name
    return path.with_name(f"{stem}{suffix}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or one_line(error)


def unreadable(path: str | Path, error: OSError) -> UserError:
    """The UserError for a file that does not exist or cannot be read."""
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path}: no such file")
    return UserError(f"{path}: cannot be read: {_reason(error)}")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically: UTF-8 with "\\n" as line break, whatever the locale.

    Bytes of the command line that the locale's encoding lacks (Python's surrogate escapes) are written unchanged.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "surrogateescape"))


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON atomically, indented for people."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_csv(path: str | Path, table: pd.DataFrame) -> None:
    """Write a table as CSV without its index, atomically. Floats are written so that they read back unchanged."""
    write_text(path, table.to_csv(index=False))


def read_csv(path: str | Path, text: Sequence[str] = ()) -> pd.DataFrame:
    """Read what `write_csv` wrote: floats to the last bit, columns of TEXT and `text` as strings, empty fields too.

    Raises:
        UserError: the file is not there, or cannot be read.
        ValueError: it is no CSV, or no UTF-8 text.
    """
    import pandas as pd  # a fifth of a second, and most commands do without it

    before = tuple(map(int, pd.__version__.split(".")[:2])) < (3, 1)  # from then on pandas reads exactly by default
    exact = {"float_precision": "round_trip"} if before else {}
    text = {*TEXT, *text}
    try:
        columns = pd.read_csv(path, nrows=0).columns
        # A row may be named nan: empty fields are missing numbers in the other columns only.
        empty = {name: MISSING for name in columns if name not in text}
        return pd.read_csv(path, dtype=dict.fromkeys(text, str), keep_default_na=False, na_values=empty, **exact)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {_reason(error)}") from error


def read_json(path: str | Path) -> Any:
    """Read JSON. Raises UserError where the file is absent or broken."""
    try:
        return json_values(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({_reason(error)}); delete it to have it remade") from error


T = TypeVar("T")


def resume(path: str | Path | None, read: Callable[[Path], T], nothing: T) -> T:
    """Read a text file that a stopped stage left as its checkpoint, with `read`.

    Returns `nothing` where there is none, and, with a warning, where it is damaged: starting again costs time, but a
    number cut short would be a wrong one. All such files end with a line break.
    """
    path = Path(path or "")
    if not path.is_file():
        return nothing
    try:
        if not path.read_bytes().endswith(b"\n"):
            raise UserError("cut short")
        return read(path)
    except (UserError, OSError, ValueError, KeyError) as error:
        reason = one_line(error).removeprefix(f"{path}: ")
        warnings.warn(f"{path}: damaged checkpoint, its work is repeated ({reason})", stacklevel=2)
        return nothing


def sha256(path: str | Path) -> str:
    """The file's SHA-256, in hexadecimal. Raises UserError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, Any] | None = None) -> None:
    """Write tensors, and JSON values as metadata of the same file, atomically."""
    import safetensors.torch  # torch takes seconds to import, and tables do not need it

    contiguous = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    text = None if metadata is None else {"correctnet": json.dumps(metadata)}
    with replacing(path) as temporary:
        safetensors.torch.save_file(contiguous, temporary, metadata=text)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], Any]:
    """Read what `write_tensors` wrote. Raises UserError where the file is absent, cut short or not safetensors."""
    try:
        with open(path, "rb"):  # its errors are clearer than those of safetensors
            pass
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get("correctnet")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return tensors, None if metadata is None else json.loads(metadata)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: damaged ({_reason(error)}); delete it to have it remade") from error


def model_files(path: str | Path) -> tuple[Path, Path]:
    """The (tensors, description) files of a model, given its folder or either file.

    Only the suffixes .safetensors and .json are removed: other dots belong to the name.
    """
    path = Path(path)
    stem = path.with_name(path.stem) if path.suffix in (".safetensors", ".json") else path / "model"
    return stem.with_name(f"{stem.name}.safetensors"), stem.with_name(f"{stem.name}.json")


def write_model(path: str | Path, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Write a model's two files; the description last, so that a kill in between leaves a pair that is refused."""
    weights, text = model_files(path)
    write_tensors(weights, tensors)
    write_json(text, {"format": FORMAT, **description, "sha256": sha256(weights)})


def read_model(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a model's two files. Raises UserError where one is absent or damaged, or they do not belong together."""
    weights, text = model_files(path)
    description = read_json(text)
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise UserError(f"{text}: not a model description of format {FORMAT}")
    if sha256(weights) != description.get("sha256"):
        raise UserError(f"{weights}: damaged, or not the file that {text.name} describes; delete both to remake them")
    return read_tensors(weights)[0], description


def training_data(description: Any) -> dict[str, Any]:
    """The images that a model was trained on, from its description.

    `dataset`, `validation` (the fraction held out), `seed` (of that split), and `augment`; {} where the description
    does not say. Older descriptions say it in the settings of their history.
    """
    if not isinstance(description, dict):
        return {}
    if isinstance(description.get("data"), dict):
        return description["data"]
    history = description.get("history")
    for entry in history if isinstance(history, list) else ():
        settings = entry.get("settings") if isinstance(entry, dict) else None
        if isinstance(settings, dict) and "seed" in settings and {"dataset", "validation"} <= set(settings["data"]):
            return {**settings["data"], "seed": settings["seed"]}
    return {}
