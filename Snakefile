# CorrectNet: from config.yaml to Table I and the figures of the paper.
#
#   snakemake --cores 8          the paper: its four network-data pairs
#   snakemake --cores 8 lenet    the LeNet-5 half
#   snakemake --cores 8 quick    the same stages on the embedded digits, in minutes
#
# Every stage is a command (`correctnet STAGE --help`); the rules only chain them. A run shows the progress of its jobs,
# which `correctnet progress` prints in another terminal, too, and ends with Table I.

from snakemake.utils import min_version

min_version("9.0")


include: "workflow/rules/config.smk"


configfile: "config.yaml"


include: "workflow/rules/common.smk"


report: "workflow/report/workflow.rst"


rule all:
    input:
        layout.targets("paper"),


# `snakemake lenet`, `snakemake quick`, and any other run of the configuration
for run in layout.target_runs():

    rule:
        name:
            run
        input:
            layout.targets(run),


include: "workflow/rules/data.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/search.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/summary.smk"


onstart:
    begin()


onsuccess:
    end()
