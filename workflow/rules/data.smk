# The data sets: looked for, and downloaded once if they are not there.


localrules:
    fetch,


rule fetch:
    output:
        touch(f"{RESULTS}/.data/{{dataset}}.ready"),
    log:
        f"{RESULTS}/.logs/fetch/{{dataset}}.log",
    params:
        data_dir=DATA_DIR,
    shell:
        "correctnet fetch {wildcards.dataset} --data-dir {params.data_dir:q} > {log} 2>&1"
