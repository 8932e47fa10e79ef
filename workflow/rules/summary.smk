# Table I and the figures of a run.


localrules:
    table1,
    figure,


rule table1:
    input:
        lambda wildcards: samples(wildcards.run),
    output:
        csv=report(
            f"{RESULTS}/summary/{{run}}/table1.csv",
            caption="../report/table1.rst",
            category="Table I",
        ),
        markdown=f"{RESULTS}/summary/{{run}}/table1.md",
    log:
        f"{RESULTS}/.logs/summary/{{run}}/table1.log",
    params:
        sigma=table_sigma,
        labels=labels,
    shell:
        "correctnet table {input} --sigma {params.sigma} {params.labels} --out {output.csv} > {log} 2>&1"


rule figure:
    input:
        figure_inputs,
    output:
        png=f"{RESULTS}/summary/{{run}}/figure{{number}}.png",
        svg=report(
            f"{RESULTS}/summary/{{run}}/figure{{number}}.svg",
            caption="../report/figure.rst",
            category="Figures",
            labels={"figure": "{number}", "run": "{run}"},
        ),
    log:
        f"{RESULTS}/.logs/summary/{{run}}/figure{{number}}.log",
    wildcard_constraints:
        number=r"2|7|9|10",
    shell:
        "correctnet figure {wildcards.number} {input} --out {output.png} > {log} 2>&1"
