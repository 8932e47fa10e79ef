"""The configuration as it is written: Snakemake reads the files itself, and of two equal keys the last alone."""

import os

from snakemake.exceptions import WorkflowError

from correctnet.errors import UserError
from correctnet.files.yamlfile import read_values


def check_files(*paths):
    """Refuse what means something else than it shows, before Snakemake reads it."""
    try:
        for path in paths:
            read_values(path)
    except UserError as error:
        raise WorkflowError(str(error))


if workflow.is_main_process:
    check_files(*filter(os.path.exists, ["config.yaml"]), *workflow.configfiles)
