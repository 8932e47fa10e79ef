# Table I, the figures, the page of the search, and provenance.


localrules:
    table1,
    figure,
    overheads,
    explore,
    provenance,


rule table1:
    input:
        layout.table_inputs,
    output:
        csv=report(
            layout.summary("{run}", "table1.csv"),
            caption="../report/table1.rst",
            category="1. Table I",
            labels={"table": "the same as CSV", "run": "{run}"},
        ),
        html=report(
            layout.summary("{run}", "table1.html"),
            caption="../report/table1.rst",
            category="1. Table I",
            labels={"table": "beside the paper's numbers", "run": "{run}"},
        ),
        markdown=layout.summary("{run}", "table1.md"),
    log:
        layout.log("summary/{run}/table1"),
    params:
        level=layout.table_level,
        labels=layout.labels,
    shell:
        "correctnet table {input:q} {params.level} --labels {params.labels:q} --out {output.csv:q} > {log:q} 2>&1"


rule figure:
    input:
        layout.figure_inputs,
    output:
        png=layout.summary("{run}", "figure-{name}.png"),
        svg=report(
            layout.summary("{run}", "figure-{name}.svg"),
            caption="../report/figure.rst",
            category="2. Figures",
            labels=layout.figure_label,
        ),
    log:
        layout.log("summary/{run}/figure-{name}"),
    params:
        options=layout.figure_options,
    shell:
        "correctnet figure {wildcards.name:q} {input:q} {params.options} --out {output.png:q} > {log:q} 2>&1"


# Figure 8, whose points are a table as well.
use rule figure as overheads with:
    output:
        png=layout.summary("{run}", "figure-{name,8}.png"),
        svg=report(
            layout.summary("{run}", "figure-{name,8}.svg"),
            caption="../report/figure.rst",
            category="2. Figures",
            labels=layout.figure_label,
        ),
        csv=layout.summary("{run}", "figure-{name,8}.csv"),


rule explore:
    input:
        lambda wildcards: layout.search_logs(wildcards.run),
    output:
        report(
            layout.summary("{run}", "search.html"),
            caption="../report/search.rst",
            category="3. Search",
            labels={"page": "states and their accuracy", "run": "{run}"},
        ),
    log:
        layout.log("summary/{run}/search"),
    shell:
        "correctnet explore {input:q} --out {output:q} > {log:q} 2>&1"


# After everything else of the run, so that it is remade whenever some of it is.
rule provenance:
    input:
        lambda wildcards: layout.shown(wildcards.run),
    output:
        csv=layout.summary("{run}", "provenance.csv"),
        html=report(
            layout.summary("{run}", "provenance.html"),
            caption="../report/provenance.rst",
            category="4. Provenance",
            labels={"page": "jobs, versions, seeds", "run": "{run}"},
        ),
    log:
        layout.log("summary/{run}/provenance"),
    params:
        facts=layout.run_facts,
        jobs=layout.run_jobs,
    shell:
        "correctnet provenance {wildcards.run:q} {params.facts} --jobs {params.jobs:q}"
        " --out {output.csv:q} > {log:q} 2>&1"
