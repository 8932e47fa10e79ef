# Table I, the figures, the search to explore, and where all of it comes from.


localrules:
    table1,
    figure,
    explore,
    provenance,


rule table1:
    input:
        table_inputs,
    output:
        csv=report(
            f"{RESULTS}/summary/{{run}}/table1.csv",
            caption="../report/table1.rst",
            category="1. Table I",
            labels={"table": "the same as CSV", "run": "{run}"},
        ),
        html=report(
            f"{RESULTS}/summary/{{run}}/table1.html",
            caption="../report/table1.rst",
            category="1. Table I",
            labels={"table": "beside the paper's numbers", "run": "{run}"},
        ),
        markdown=f"{RESULTS}/summary/{{run}}/table1.md",
    log:
        f"{RESULTS}/.logs/summary/{{run}}/table1.log",
    params:
        sigma=table_sigma,
        labels=labels,
    shell:
        "correctnet table {input:q} --sigma {params.sigma} --labels {params.labels:q} --out {output.csv:q} > {log:q} 2>&1"


rule figure:
    input:
        figure_inputs,
    output:
        png=f"{RESULTS}/summary/{{run}}/figure-{{name}}.png",
        svg=report(
            f"{RESULTS}/summary/{{run}}/figure-{{name}}.svg",
            caption="../report/figure.rst",
            category="2. Figures",
            labels=figure_label,
        ),
    log:
        f"{RESULTS}/.logs/summary/{{run}}/figure-{{name}}.log",
    wildcard_constraints:
        name="|".join(FIGURES),
    params:
        options=figure_options,
    shell:
        "correctnet figure {wildcards.name:q} {input:q} {params.options} --out {output.png:q} > {log:q} 2>&1"


rule explore:
    input:
        lambda wildcards: search_logs(wildcards.run),
    output:
        report(
            f"{RESULTS}/summary/{{run}}/search.html",
            caption="../report/search.rst",
            category="3. Search",
            labels={"page": "states and their accuracy", "run": "{run}"},
        ),
    log:
        f"{RESULTS}/.logs/summary/{{run}}/search.log",
    shell:
        "correctnet explore {input:q} --out {output:q} > {log:q} 2>&1"


# Made after everything else of the run, so that it is made anew whenever something of it was.
rule provenance:
    input:
        lambda wildcards: shown(wildcards.run),
    output:
        csv=f"{RESULTS}/summary/{{run}}/provenance.csv",
        html=report(
            f"{RESULTS}/summary/{{run}}/provenance.html",
            caption="../report/provenance.rst",
            category="4. Provenance",
            labels={"page": "jobs, versions, seeds", "run": "{run}"},
        ),
    log:
        f"{RESULTS}/.logs/summary/{{run}}/provenance.log",
    params:
        facts=run_facts,
        jobs=run_jobs,
    shell:
        "correctnet provenance {wildcards.run:q} {params.facts} --jobs {params.jobs:q}"
        " --out {output.csv:q} > {log:q} 2>&1"
