# Monte Carlo on the test images, scattered by the number of the chip and gathered.


localrules:
    gather,
    collect,


rule evaluate:
    input:
        data=ancient(layout.dataset_ready),
        device=ancient(layout.measurements),
        model=layout.evaluated_model,
    output:
        temp(layout.output("evaluate/{row}/sigma-{sigma}/chips-{start}-{stop}.csv")),
    log:
        layout.log("{pair}/evaluate/{row}/sigma-{sigma}/chips-{start}-{stop}"),
    benchmark:
        layout.benchmark("{pair}/evaluate/{row}/sigma-{sigma}/chips-{start}-{stop}")
    threads: 1
    resources:
        **layout.resources("evaluate"),
    params:
        settings=layout.chunk_settings,
        chips=layout.chunk_chips,
        prefixes=layout.prefixes,
    shell:
        "correctnet evaluate --settings {params.settings:q} --quiet --threads {threads}"
        " --note pair={wildcards.pair:q} --note row={wildcards.row:q} {params.prefixes}"
        " --model {input.model:q} --chips {params.chips} --start {wildcards.start:q} --out {output:q} > {log:q} 2>&1"


rule gather:
    input:
        layout.chunks,
    output:
        layout.output("evaluate/{row}/sigma-{sigma}.csv"),
    log:
        layout.log("{pair}/gather/{row}/sigma-{sigma}"),
    shell:
        "correctnet merge {input:q} --out {output:q} > {log:q} 2>&1"


rule collect:
    input:
        layout.evaluations,
    output:
        report(
            layout.output("samples.csv"),
            caption="../report/samples.rst",
            category="5. Every chip",
            labels={"pair": "{pair}"},
        ),
    log:
        layout.log("{pair}/collect"),
    shell:
        "correctnet collect {input:q} --out {output:q} > {log:q} 2>&1"
