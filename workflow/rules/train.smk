# Training of the original network, and of what follows from it. Each stage resumes from its last epoch; the
# checkpoints for that are in results/PAIR/.resume, outside of the outputs.
#
# The rules of all stages are derived from `pretrain`. A stage's input files are options of its command, by their names.


rule pretrain:
    input:
        data=ancient(layout.dataset_ready),
    output:
        **layout.model("pretrain"),
    log:
        layout.log("{pair}/pretrain{variant}"),
    benchmark:
        layout.benchmark("{pair}/pretrain{variant}")
    threads: layout.threads
    resources:
        **layout.resources("pretrain"),
    params:
        settings=layout.canonical("pretrain"),
        command=layout.command("pretrain"),
        out=layout.output_folder,
    shell:
        "correctnet {params.command} --settings {params.settings:q} --quiet --threads {threads}"
        " --out {params.out:q} > {log:q} 2>&1"


# Under the Lipschitz regulariser.
use rule pretrain as suppress with:
    input:
        data=ancient(layout.dataset_ready),
        device=ancient(layout.measurements),
        pretrained=layout.result("pretrain"),
    output:
        **layout.model("suppress"),
    log:
        layout.log("{pair}/suppress{variant}"),
    benchmark:
        layout.benchmark("{pair}/suppress{variant}")
    resources:
        **layout.resources("suppress"),
    params:
        settings=layout.canonical("suppress"),
        command=layout.command("suppress"),


# Variation-aware training.
use rule suppress as inject with:
    output:
        **layout.model("inject"),
    log:
        layout.log("{pair}/inject{variant}"),
    benchmark:
        layout.benchmark("{pair}/inject{variant}")
    resources:
        **layout.resources("inject"),
    params:
        settings=layout.canonical("inject"),
        command=layout.command("inject"),


# The same with the original network as a teacher.
use rule suppress as distil with:
    output:
        **layout.model("distil"),
    log:
        layout.log("{pair}/distil{variant}"),
    benchmark:
        layout.benchmark("{pair}/distil{variant}")
    resources:
        **layout.resources("distil"),
    params:
        settings=layout.canonical("distil"),
        command=layout.command("distil"),


# With the moments of what variation does.
use rule suppress as moments with:
    output:
        **layout.model("moments"),
    log:
        layout.log("{pair}/moments{variant}"),
    benchmark:
        layout.benchmark("{pair}/moments{variant}")
    resources:
        **layout.resources("moments"),
    params:
        settings=layout.canonical("moments"),
        command=layout.command("moments"),


# Digital paths beside analog layers.
use rule pretrain as sidepath with:
    input:
        data=ancient(layout.dataset_ready),
        device=ancient(layout.measurements),
        base=layout.base_model,
    output:
        **layout.model("sidepath"),
    log:
        layout.log("{pair}/sidepath{variant}"),
    benchmark:
        layout.benchmark("{pair}/sidepath{variant}")
    resources:
        **layout.resources("sidepath"),
    params:
        settings=layout.canonical("sidepath"),
        command=layout.command("sidepath"),


# The compensators of the best state that the searches found.
use rule pretrain as compensate with:
    input:
        data=ancient(layout.dataset_ready),
        device=ancient(layout.measurements),
        base=layout.base_model,
        found=layout.found_states,
    output:
        **layout.model("compensate"),
    log:
        layout.log("{pair}/compensate{variant}"),
    benchmark:
        layout.benchmark("{pair}/compensate{variant}")
    resources:
        **layout.resources("compensate"),
    params:
        settings=layout.canonical("compensate"),
        command=layout.command("compensate"),


# Beyond the paper: the analog weights trained with the compensators.
use rule pretrain as finetune with:
    input:
        data=ancient(layout.dataset_ready),
        device=ancient(layout.measurements),
        compensated=layout.result("compensate"),
    output:
        **layout.model("finetune"),
    log:
        layout.log("{pair}/finetune{variant}"),
    benchmark:
        layout.benchmark("{pair}/finetune{variant}")
    resources:
        **layout.resources("finetune"),
    params:
        settings=layout.canonical("finetune"),
        command=layout.command("finetune"),
