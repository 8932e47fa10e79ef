"""The command line: `correctnet STAGE` runs one stage of the paper; the workflow calls the same commands."""

import click

from correctnet.cli import devices, results, stages, tools
from correctnet.cli.process import Group

__all__ = ["main"]


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="correctnet")
def main() -> None:
    """CorrectNet: neural networks under the device variation of analog in-memory hardware.

    Train with error suppression, find the layers that need compensation, compensate them, and evaluate over chip
    samples. Every stage reads files and writes files; `snakemake` chains them.
    """


COMMANDS = (
    *(stages.pretrain, stages.suppress, stages.inject, stages.distil, stages.moments, stages.sidepath),
    *(stages.sweep, stages.sensitivity, stages.search, stages.compensate, stages.finetune, stages.evaluate),
    *(results.merge_chunks, results.collect, results.table, results.figure, results.explore, results.provenance_page),
    *(tools.new_study, tools.fetch, tools.check, tools.progress, tools.info, tools.show, tools.bench, devices.device),
)
for command in COMMANDS:
    main.add_command(command)
