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
    """Before the first job: the estimate of a full run, and from then on the progress of what runs."""
    layout.note_place()
    for run in layout.requested_runs(workflow.dag_settings.targets):
        head.write_configuration(layout, run, config)
        # On a cluster (no cores) this machine says nothing about those that compute.
        if run != "quick" and workflow.resource_settings.cores is not None:
            head.print_estimate(run, workflow.cores, config)
    head.Progress(layout.results).start()


def end():
    """After the last job: Table I, and where everything is."""
    runs = layout.requested_runs(workflow.dag_settings.targets)
    if runs:
        print(f"\n{head.summary(layout, runs)}\n", file=sys.stderr)
