# Monte Carlo on the test images, scattered by the number of the chip and gathered.


localrules:
    gather,
    collect,


rule evaluate:
    input:
        data=ancient(dataset_ready),
        model=evaluated_model,
    output:
        temp(f"{RESULTS}/{{pair}}/evaluate/{{row}}/sigma-{{sigma}}/chips-{{start}}-{{stop}}.csv"),
    log:
        f"{RESULTS}/.logs/{{pair}}/evaluate/{{row}}/sigma-{{sigma}}/chips-{{start}}-{{stop}}.log",
    benchmark:
        f"{RESULTS}/.benchmarks/{{pair}}/evaluate/{{row}}/sigma-{{sigma}}/chips-{{start}}-{{stop}}.tsv"
    threads: 1
    resources:
        mem_mb=mem_mb,
        runtime=runtime("evaluate"),
        gpu=GPUS,
    params:
        settings=chunk_settings,
        chips=lambda wildcards: int(wildcards.stop) - int(wildcards.start),
        prefixes=prefixes,
    shell:
        "correctnet evaluate --settings {params.settings:q} --quiet --threads {threads}"
        " --note pair={wildcards.pair:q} --note row={wildcards.row:q} {params.prefixes}"
        " --model {input.model:q} --chips {params.chips} --start {wildcards.start:q} --out {output:q} > {log:q} 2>&1"


rule gather:
    input:
        chunks,
    output:
        f"{RESULTS}/{{pair}}/evaluate/{{row}}/sigma-{{sigma}}.csv",
    log:
        f"{RESULTS}/.logs/{{pair}}/gather/{{row}}/sigma-{{sigma}}.log",
    shell:
        "correctnet merge {input:q} --out {output:q} > {log:q} 2>&1"


rule collect:
    input:
        lambda wildcards: evaluations(wildcards.pair),
    output:
        report(
            f"{RESULTS}/{{pair}}/samples.csv",
            caption="../report/samples.rst",
            category="5. Every chip",
            labels={"pair": "{pair}"},
        ),
    log:
        f"{RESULTS}/.logs/{{pair}}/collect.log",
    shell:
        "correctnet collect {input:q} --out {output:q} > {log:q} 2>&1"
