# The candidate layers, and the search for the best compensation within each overhead limit.


use rule pretrain as sweep with:
    input:
        data=ancient(layout.dataset_ready),
        device=ancient(layout.measurements),
        pretrained=layout.result("pretrain"),
        base=layout.base_model,
    output:
        accuracy=layout.output("sweep{variant}/accuracy.csv"),
        candidates=layout.output("sweep{variant}/candidates.json"),
    log:
        layout.log("{pair}/sweep{variant}"),
    benchmark:
        layout.benchmark("{pair}/sweep{variant}")
    resources:
        **layout.resources("sweep"),
    params:
        settings=layout.canonical("sweep"),
        command=layout.command("sweep"),


# What each layer alone costs: of the original network, the suppressed one, and the compensated one.
use rule pretrain as sensitivity with:
    input:
        data=ancient(layout.dataset_ready),
        device=ancient(layout.measurements),
        model=layout.compared_model,
    output:
        layout.output("sensitivity/{model}.csv"),
    log:
        layout.log("{pair}/sensitivity/{model}"),
    benchmark:
        layout.benchmark("{pair}/sensitivity/{model}")
    resources:
        **layout.resources("sensitivity"),
    params:
        settings=layout.canonical("sensitivity"),
        command=layout.command("sensitivity"),
        out=layout.output_file,


use rule pretrain as search with:
    input:
        data=ancient(layout.dataset_ready),
        device=ancient(layout.measurements),
        base=layout.base_model,
        candidates=layout.result("sweep", "candidates.json"),
        known=layout.all_states,
    output:
        best=layout.output("search{variant}/limit-{limit}/best.json"),
        states=layout.output("search{variant}/limit-{limit}/log.csv"),
    log:
        layout.log("{pair}/search{variant}-{limit}"),
    benchmark:
        layout.benchmark("{pair}/search{variant}-{limit}")
    resources:
        **layout.resources("search"),
    params:
        settings=layout.canonical("search"),
        command=layout.command("search"),


# With `search.population`, every state is trained in a job of its own: round 0 is the state without compensation, and
# the states of each further round follow from the results of all rounds before.
use rule search as search_state with:
    input:
        data=ancient(layout.dataset_ready),
        device=ancient(layout.measurements),
        base=layout.base_model,
        candidates=layout.result("sweep", "candidates.json"),
        known=layout.earlier_states,
    output:
        layout.output("search{variant}/limit-{limit}/round-{round}/state-{state}.json"),
    log:
        layout.log("{pair}/search{variant}-{limit}/round-{round}-state-{state}"),
    benchmark:
        layout.benchmark("{pair}/search{variant}-{limit}/round-{round}-state-{state}")
    resources:
        **layout.resources("search", state=True),
    params:
        out=layout.output_file,
