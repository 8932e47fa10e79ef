"""The configuration and its layout, which all rules bind to (correctnet/pipeline/layout.py)."""

import os
import shlex
import sys

from snakemake.exceptions import WorkflowError

from correctnet.errors import UserError
from correctnet.pipeline import head
from correctnet.pipeline.config import Config
from correctnet.pipeline.layout import Layout

try:
    layout = Layout(Config.check(config))
    layout.check_place()
    os.environ.update(head.environment(layout.config, shlex.join(["snakemake", *sys.argv[1:]])))
except UserError as error:
    raise WorkflowError(str(error))


wildcard_constraints:
    **layout.constraints(),


def begin():
    """Print the estimate of a full run, and from then on the progress of running jobs."""
    layout.note_place()
    for run in layout.requested_runs(workflow.dag_settings.targets):
        head.write_configuration(layout, run, config)
        # On a cluster there are no cores here, and this machine says nothing about those that compute.
        if run != "quick" and workflow.resource_settings.cores is not None:
            head.print_estimate(run, workflow.cores, config)
    head.Progress(layout.results).start()


def end():
    """Print Table I of the requested runs, and where their results are; nothing where a run was cut short."""
    settings = workflow.dag_settings
    runs = layout.requested_runs(settings.targets)
    if runs and not (settings.until or settings.omit_from or settings.batch):
        experiments = [file for file in workflow.configfiles if str(file) != "config.yaml"]
        print(f"\n{head.summary(layout, runs, experiments)}\n", file=sys.stderr)
