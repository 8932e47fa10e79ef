# The candidate layers, the search for the best compensation within each overhead limit, and its training.


rule sweep:
    input:
        data=ancient(dataset_ready),
        pretrained=result("pretrain"),
        base=base_model,
    output:
        accuracy=f"{RESULTS}/{{pair}}/sweep{{variant}}/accuracy.csv",
        candidates=f"{RESULTS}/{{pair}}/sweep{{variant}}/candidates.json",
    log:
        f"{RESULTS}/.logs/{{pair}}/sweep{{variant}}.log",
    benchmark:
        f"{RESULTS}/.benchmarks/{{pair}}/sweep{{variant}}.tsv"
    threads: training_threads
    resources:
        mem_mb=mem_mb,
        runtime=runtime("sweep"),
        gpu=GPUS,
    params:
        settings=stage_settings("sweep"),
    shell:
        "correctnet sweep --settings {params.settings:q} --quiet --threads {threads}"
        " --pretrained {input.pretrained:q} --base {input.base:q}"
        ' --out "$(dirname {output.accuracy:q})" > {log:q} 2>&1'


# What each layer alone costs: of the original network, the suppressed one, and the compensated one.
rule sensitivity:
    input:
        data=ancient(dataset_ready),
        model=lambda wildcards: f"{place(wildcards.pair, 'correctnet', wildcards.model)}/model.safetensors",
    output:
        f"{RESULTS}/{{pair}}/sensitivity/{{model}}.csv",
    log:
        f"{RESULTS}/.logs/{{pair}}/sensitivity/{{model}}.log",
    benchmark:
        f"{RESULTS}/.benchmarks/{{pair}}/sensitivity/{{model}}.tsv"
    threads: training_threads
    resources:
        mem_mb=mem_mb,
        runtime=runtime("sensitivity"),
        gpu=GPUS,
    params:
        settings=stage_settings("sensitivity"),
    shell:
        "correctnet sensitivity --settings {params.settings:q} --quiet --threads {threads}"
        " --model {input.model:q} --out {output:q} > {log:q} 2>&1"


# With `search.population`, every state is trained in a job of its own: round 0 is the state without compensation, and
# the states of each further round follow from the results of all rounds before.
rule search_state:
    input:
        data=ancient(dataset_ready),
        base=base_model,
        candidates=result("sweep", "candidates.json"),
        known=earlier_states,
    output:
        f"{RESULTS}/{{pair}}/search{{variant}}/limit-{{limit}}/round-{{round}}/state-{{state}}.json",
    log:
        f"{RESULTS}/.logs/{{pair}}/search{{variant}}-{{limit}}/round-{{round}}-state-{{state}}.log",
    benchmark:
        f"{RESULTS}/.benchmarks/{{pair}}/search{{variant}}-{{limit}}/round-{{round}}-state-{{state}}.tsv"
    threads: training_threads
    resources:
        mem_mb=mem_mb,
        runtime=runtime("state"),
        gpu=GPUS,
    params:
        settings=stage_settings("search"),
        known=lambda wildcards, input: " ".join(f"--known {shlex.quote(path)}" for path in input.known),
    shell:
        "correctnet search --settings {params.settings:q} --quiet --threads {threads} --limit {wildcards.limit:q}"
        " --base {input.base:q} --candidates {input.candidates:q} {params.known}"
        " --state {wildcards.state:q} --out {output:q} > {log:q} 2>&1"


rule search:
    input:
        data=ancient(dataset_ready),
        base=base_model,
        candidates=result("sweep", "candidates.json"),
        known=all_states,
    output:
        best=f"{RESULTS}/{{pair}}/search{{variant}}/limit-{{limit}}/best.json",
        states=f"{RESULTS}/{{pair}}/search{{variant}}/limit-{{limit}}/log.csv",
    log:
        f"{RESULTS}/.logs/{{pair}}/search{{variant}}-{{limit}}.log",
    benchmark:
        f"{RESULTS}/.benchmarks/{{pair}}/search{{variant}}-{{limit}}.tsv"
    threads: training_threads
    resources:
        mem_mb=mem_mb,
        runtime=runtime("search"),
        gpu=GPUS,
    params:
        settings=stage_settings("search"),
        known=lambda wildcards, input: " ".join(f"--known {shlex.quote(path)}" for path in input.known),
    shell:
        "correctnet search --settings {params.settings:q} --quiet --threads {threads} --limit {wildcards.limit:q}"
        " --base {input.base:q} --candidates {input.candidates:q} {params.known}"
        ' --out "$(dirname {output.best:q})" > {log:q} 2>&1'


rule compensate:
    input:
        data=ancient(dataset_ready),
        base=base_model,
        found=found_states,
    output:
        model=f"{RESULTS}/{{pair}}/compensate{{variant}}/model.safetensors",
        description=f"{RESULTS}/{{pair}}/compensate{{variant}}/model.json",
        epochs=f"{RESULTS}/{{pair}}/compensate{{variant}}/log.csv",
    log:
        f"{RESULTS}/.logs/{{pair}}/compensate{{variant}}.log",
    benchmark:
        f"{RESULTS}/.benchmarks/{{pair}}/compensate{{variant}}.tsv"
    threads: training_threads
    resources:
        mem_mb=mem_mb,
        runtime=runtime("compensate"),
        gpu=GPUS,
    params:
        settings=stage_settings("compensate"),
        found=lambda wildcards, input: " ".join(f"--found {shlex.quote(path)}" for path in input.found),
    shell:
        "correctnet compensate --settings {params.settings:q} --quiet --threads {threads}"
        " --base {input.base:q} {params.found}"
        ' --out "$(dirname {output.model:q})" > {log:q} 2>&1'


# Beyond the paper: the analog weights trained with the compensators.
rule finetune:
    input:
        data=ancient(dataset_ready),
        compensated=result("compensate"),
    output:
        model=f"{RESULTS}/{{pair}}/finetune{{variant}}/model.safetensors",
        description=f"{RESULTS}/{{pair}}/finetune{{variant}}/model.json",
        epochs=f"{RESULTS}/{{pair}}/finetune{{variant}}/log.csv",
    log:
        f"{RESULTS}/.logs/{{pair}}/finetune{{variant}}.log",
    benchmark:
        f"{RESULTS}/.benchmarks/{{pair}}/finetune{{variant}}.tsv"
    threads: training_threads
    resources:
        mem_mb=mem_mb,
        runtime=runtime("finetune"),
        gpu=GPUS,
    params:
        settings=stage_settings("finetune"),
    shell:
        "correctnet finetune --settings {params.settings:q} --quiet --threads {threads}"
        ' --compensated {input.compensated:q} --out "$(dirname {output.model:q})" > {log:q} 2>&1'
