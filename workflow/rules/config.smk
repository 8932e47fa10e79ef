"""Checks of the configuration files before Snakemake reads them, which keeps only the last of two equal keys."""

import os

from snakemake.exceptions import WorkflowError

from correctnet.errors import UserError
from correctnet.files.yamlfile import read_values


def check_files(*paths):
    """Refuse files that cannot be read or have a key twice."""
    try:
        for path in paths:
            read_values(path)
    except UserError as error:
        raise WorkflowError(str(error))


if workflow.is_main_process:
    check_files(*filter(os.path.exists, ["config.yaml"]), *workflow.configfiles)
