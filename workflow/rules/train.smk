# Training of the original network, under the Lipschitz regulariser, and with variation injected.
# Each resumes from its last epoch: what it needs for that stands in results/PAIR/.resume, outside the outputs.


rule pretrain:
    input:
        data=ancient(dataset_ready),
    output:
        model=f"{RESULTS}/{{pair}}/pretrain{{variant}}/model.safetensors",
        description=f"{RESULTS}/{{pair}}/pretrain{{variant}}/model.json",
        epochs=f"{RESULTS}/{{pair}}/pretrain{{variant}}/log.csv",
    log:
        f"{RESULTS}/.logs/{{pair}}/pretrain{{variant}}.log",
    benchmark:
        f"{RESULTS}/.benchmarks/{{pair}}/pretrain{{variant}}.tsv"
    threads: training_threads
    resources:
        mem_mb=mem_mb,
        runtime=runtime("pretrain"),
        gpu=GPUS,
    params:
        settings=stage_settings("pretrain"),
    shell:
        "correctnet pretrain --settings {params.settings:q} --quiet --threads {threads}"
        ' --out "$(dirname {output.model:q})" > {log:q} 2>&1'


rule suppress:
    input:
        data=ancient(dataset_ready),
        pretrained=result("pretrain"),
    output:
        model=f"{RESULTS}/{{pair}}/suppress{{variant}}/model.safetensors",
        description=f"{RESULTS}/{{pair}}/suppress{{variant}}/model.json",
        epochs=f"{RESULTS}/{{pair}}/suppress{{variant}}/log.csv",
    log:
        f"{RESULTS}/.logs/{{pair}}/suppress{{variant}}.log",
    benchmark:
        f"{RESULTS}/.benchmarks/{{pair}}/suppress{{variant}}.tsv"
    threads: training_threads
    resources:
        mem_mb=mem_mb,
        runtime=runtime("suppress"),
        gpu=GPUS,
    params:
        settings=stage_settings("suppress"),
    shell:
        "correctnet suppress --settings {params.settings:q} --quiet --threads {threads}"
        ' --pretrained {input.pretrained:q} --out "$(dirname {output.model:q})" > {log:q} 2>&1'


rule inject:
    input:
        data=ancient(dataset_ready),
        pretrained=result("pretrain"),
    output:
        model=f"{RESULTS}/{{pair}}/inject{{variant}}/model.safetensors",
        description=f"{RESULTS}/{{pair}}/inject{{variant}}/model.json",
        epochs=f"{RESULTS}/{{pair}}/inject{{variant}}/log.csv",
    log:
        f"{RESULTS}/.logs/{{pair}}/inject{{variant}}.log",
    benchmark:
        f"{RESULTS}/.benchmarks/{{pair}}/inject{{variant}}.tsv"
    threads: training_threads
    resources:
        mem_mb=mem_mb,
        runtime=runtime("inject"),
        gpu=GPUS,
    params:
        settings=stage_settings("inject"),
    shell:
        "correctnet inject --settings {params.settings:q} --quiet --threads {threads}"
        ' --pretrained {input.pretrained:q} --out "$(dirname {output.model:q})" > {log:q} 2>&1'
