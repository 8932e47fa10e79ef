# The data sets: looked for, and downloaded once if they are not there.


localrules:
    fetch,


rule fetch:
    output:
        touch(f"{RESULTS}/.data/{{dataset}}.ready"),
    log:
        f"{RESULTS}/.logs/fetch/{{dataset}}.log",
    shell:
        "correctnet fetch {wildcards.dataset:q} > {log:q} 2>&1"
