# The data sets: downloaded once where they are missing.


localrules:
    fetch,


rule fetch:
    output:
        touch(f"{layout.results}/.data/{{dataset}}.ready"),
    log:
        layout.log("fetch/{dataset}"),
    shell:
        "correctnet fetch {wildcards.dataset:q} > {log:q} 2>&1"
