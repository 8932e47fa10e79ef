"""A new study in a folder of its own: a configuration, a network, data, and the workflow that runs them."""

from __future__ import annotations

import shutil
from pathlib import Path

from correctnet.errors import UserError, one_line

TEMPLATE = Path(__file__).parents[1] / "study"
FILES = ("README.md", "config.yaml", "network.py", "data.py")
WORKFLOW = ("Snakefile", "workflow/rules", "workflow/report", "profiles/default")
"""what setup.py puts beside the template in an installation; a checkout has it at its root"""


def new(folder: Path) -> None:
    """Write a small study that `snakemake` runs into `folder`, which must be new or empty.

    Raises UserError where it is neither, or cannot be written.
    """
    root = next((place for place in (TEMPLATE, TEMPLATE.parents[1]) if (place / "Snakefile").is_file()), None)
    if root is None:
        raise UserError("new: this installation has no workflow; install CorrectNet again")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder}: is there and not empty; a new folder is expected")
        for source in (*(TEMPLATE / name for name in FILES), *(root / name for name in WORKFLOW)):
            target = folder / source.relative_to(TEMPLATE if source.parent == TEMPLATE else root)
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".*"))
            else:
                shutil.copyfile(source, target)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: cannot be written: {error.strerror or one_line(error)}"
        ) from error
