"""All functions of the workflow: the configuration, where a stage's files stand, and which rows read them."""

import functools
import json
import os
import re
import shlex
import subprocess
import sys
from typing import get_args

from snakemake.exceptions import WorkflowError

from correctnet.pipeline.config import Config
from correctnet.pipeline.specs import STAGES, Stage, lineage
from correctnet.settings import SEARCHING, exact, search_rounds
from correctnet.errors import UserError

try:
    CONFIG = Config.check(config)
    os.fsencode(CONFIG.results)
except UnicodeEncodeError:
    raise WorkflowError(
        f"results: {CONFIG.results!a} has letters that this locale's encoding, {sys.getfilesystemencoding()}, has not; "
        "set PYTHONUTF8=1, or another name"
    )
except UserError as error:
    raise WorkflowError(str(error))

RUNS = [run for run in CONFIG.runs if run != "paper"]
RESULTS = CONFIG.results
# What every stage is told about where it runs goes through the environment: it changes no result, so it is no param.
data_dir = os.environ.get("CORRECTNET_DATA") or os.path.abspath(CONFIG.data_dir)  # set, but empty, is not set
os.environ.update(CORRECTNET_DATA=data_dir)
os.environ.update(CORRECTNET_DEVICE=CONFIG.device, CORRECTNET_RESULTS=RESULTS)
# The process that its stages end with: if it is killed, they do not go on without it.
os.environ.update(CORRECTNET_HEAD=str(os.getpid()))
# For the page of provenance. A job that another Snakemake started keeps what that one says.
os.environ.setdefault("CORRECTNET_COMMAND", shlex.join(["snakemake", *sys.argv[1:]]))
GPUS = int(CONFIG.device == "cuda")


wildcard_constraints:
    pair="|".join(map(re.escape, CONFIG.pairs)),
    row="|".join(map(re.escape, CONFIG.rows)),
    run="|".join(map(re.escape, CONFIG.runs)),
    # '' for a pair's own stage, '@' and what differs for one whose settings a row changes (Config.variant)
    variant=r"(@[A-Za-z0-9._+-]+)?",
    limit=r"[0-9.e+-]+",
    round=r"\d+",
    state=r"\d+",
    sigma=r"[0-9.e+-]+",
    model=r"pretrain|suppress|compensate",
    start=r"\d+",
    stop=r"\d+",


def check_place():
    """Refuse results that were made under another name.

    Snakemake's records of what they were made with go by that name: under a new one, changed settings would go
    unnoticed.
    """
    try:
        with open(f"{RESULTS}/.place", encoding="utf-8") as file:
            before = file.read().strip()
    except FileNotFoundError:
        return
    if before != RESULTS:
        raise WorkflowError(
            f"results: {RESULTS} holds what was made as {before!r}, and Snakemake's records go by that name; "
            f"say 'results: {before}' and put a link there: ln -s {os.path.abspath(RESULTS)} {before}"
        )


def note_place():
    os.makedirs(RESULTS, exist_ok=True)
    with open(f"{RESULTS}/.place", "w", encoding="utf-8") as file:
        file.write(f"{RESULTS}\n")


check_place()


def stages_of(pair, row):
    """The stages of a row: those before its evaluation, and for `correctnet` what figures show of it, too."""
    settings = CONFIG.settings(pair, row)
    shown = ("suppress", "compensate") if row == "correctnet" else ()
    return {before: None for stage in (CONFIG.rows[row].evaluate, *shown) for before in lineage(settings, stage)}


@functools.cache
def rows_by_variant(pair):
    """{variant: {stage: a row that has the stage in this variant}}, the latest stage first."""
    found = {}
    for stage in reversed(get_args(Stage)):
        for row in CONFIG.rows_of(pair):
            if stage in stages_of(pair, row):
                found.setdefault(CONFIG.variant(pair, row, stage), {}).setdefault(stage, row)
    return found


def row_of(wildcards, stage=None):
    """A row with whose settings a stage's folder is made; None: the pair's own.

    Without the stage, of several rows the one that has the variant at the latest stage: what its name says is what all
    stages before differ in.
    """
    if hasattr(wildcards, "model"):
        return "correctnet"  # whose networks `sensitivity` compares
    if hasattr(wildcards, "row"):
        return wildcards.row
    if not wildcards.variant:
        return None
    try:
        rows = rows_by_variant(wildcards.pair)[wildcards.variant]
        return rows.get(stage) or next(iter(rows.values()))
    except KeyError:
        raise WorkflowError(f"pair {wildcards.pair}: no row has a stage that differs in {wildcards.variant[1:]}")


def settings_of(wildcards, stage=None):
    """All settings of the row (or pair) that a job is for."""
    return CONFIG.settings(wildcards.pair, row_of(wildcards, stage))


def stage_settings(stage):
    """A params function: exactly the settings that `stage` reads, as one canonical string."""

    def canonical(wildcards):
        return STAGES[stage].canonical(settings_of(wildcards, stage))

    return canonical


def place(pair, row, stage):
    """The folder of a stage of a row."""
    variant = CONFIG.variant(pair, row, stage) if row else ""
    return f"{RESULTS}/{pair}/{stage}{variant}"


def result(stage, name="model.safetensors"):
    """An input function: a file of another stage of the same row."""

    def path(wildcards):
        return f"{place(wildcards.pair, row_of(wildcards), stage)}/{name}"

    return path


def base_model(wildcards):
    """The model that a row sweeps, searches and compensates."""
    return result(settings_of(wildcards).base)(wildcards)


def evaluated_model(wildcards):
    """The model that a row of Table I evaluates."""
    stage = CONFIG.rows[wildcards.row].evaluate
    return f"{place(wildcards.pair, wildcards.row, stage)}/model.safetensors"


def dataset_ready(wildcards):
    return f"{RESULTS}/.data/{settings_of(wildcards).data.dataset}.ready"


def limits(settings):
    """The overhead limits that are searched. `strategy: all` has none, and stands as 1; `greedy` keeps the largest."""
    search = settings.search
    return {"all": (1.0,), "greedy": (max(search.limits),)}.get(search.strategy, search.limits)


def found_states(wildcards):
    folder = place(wildcards.pair, row_of(wildcards), "search")
    return [f"{folder}/limit-{exact(limit)}/best.json" for limit in limits(settings_of(wildcards))]


def states(wildcards, rounds):
    """The files of the states that a search trains in jobs of their own, in its first `rounds` rounds."""
    folder = f"{place(wildcards.pair, row_of(wildcards), 'search')}/limit-{wildcards.limit}"
    sizes = [1, *[settings_of(wildcards).search.population] * (rounds - 1)] if rounds else []
    return [f"{folder}/round-{r}/state-{k}.json" for r, size in enumerate(sizes) for k in range(size)]


def earlier_states(wildcards):
    return states(wildcards, int(wildcards.round))


def all_states(wildcards):
    """All states of a search with a population; without one, a single job trains them."""
    search = settings_of(wildcards).search
    return states(wildcards, 1 + search_rounds(search)) if search.population and search.strategy in SEARCHING else []


def sigmas(pair, row):
    """The sigmas at which a row is evaluated, and the chips at each: clean, the pair's own, and those of the curves."""
    settings, own = CONFIG.settings(pair, row), CONFIG.settings(pair)
    chips = {0.0: 1}
    if CONFIG.rows[row].curve:
        chips |= dict.fromkeys(settings.evaluate.sigmas, settings.evaluate.curve_chips)
    return chips | {own.variation.sigma: settings.evaluate.chips if own.variation.sigma else 1}


def chunk_settings(wildcards):
    """The settings of `evaluate` at the sigma of the wildcards."""
    settings = settings_of(wildcards)
    sigma, own = float(wildcards.sigma), CONFIG.settings(wildcards.pair).variation.sigma
    changed = {"variation": settings.variation.model_copy(update={"sigma": sigma})}
    if sigma not in (0.0, own) and settings.evaluate.curve_images:
        images = {"images": settings.evaluate.curve_images}
        changed["evaluate"] = settings.evaluate.model_copy(update=images)
    return STAGES["evaluate"].canonical(settings.model_copy(update=changed))


def prefixes(wildcards):
    """Options that have the clean accuracy that Table I divides by counted on as many images as each row has."""
    rows = CONFIG.rows_of(wildcards.pair)
    if float(wildcards.sigma) or wildcards.row != ("unprotected" if "unprotected" in rows else rows[0]):
        return ""
    own = settings_of(wildcards).evaluate.images
    counts = {CONFIG.settings(wildcards.pair, row).evaluate.images for row in rows} - {None, own}
    return " ".join(f"--prefix {count}" for count in sorted(counts) if own is None or count < own)


def chunks(wildcards):
    """The chunks of a Monte Carlo evaluation, by absolute number of the chip."""
    at = {exact(s): n for s, n in sigmas(wildcards.pair, wildcards.row).items()}
    if wildcards.sigma not in at:
        raise WorkflowError(
            f"pair {wildcards.pair}: row {wildcards.row} is not evaluated at sigma {wildcards.sigma} ({', '.join(at)})"
        )
    folder = f"{RESULTS}/{wildcards.pair}/evaluate/{wildcards.row}/sigma-{wildcards.sigma}"
    return [f"{folder}/{chunk}.csv" for chunk in chunk_names(settings_of(wildcards), at[wildcards.sigma])]


def chunk_names(settings, chips):
    size = settings.evaluate.chunk
    return [f"chips-{a}-{min(a + size, chips)}" for a in range(0, chips, size)]


def evaluations(pair):
    folder = f"{RESULTS}/{pair}/evaluate"
    rows = CONFIG.rows_of(pair)
    return [f"{folder}/{row}/sigma-{exact(sigma)}.csv" for row in rows for sigma in sigmas(pair, row)]


def labels(wildcards):
    """What Table I calls the rows of the run, as JSON: a shell passes it on in any locale."""
    names = {row for pair in CONFIG.runs[wildcards.run] for row in CONFIG.rows_of(pair)}
    return json.dumps({name: row.label for name, row in CONFIG.rows.items() if name in names})


def pairs_with(run, row):
    return [pair for pair in CONFIG.runs[run] if row in CONFIG.rows_of(pair)]


def samples(run, row=None):
    pairs = CONFIG.runs[run] if row is None else pairs_with(run, row)
    return [f"{RESULTS}/{pair}/samples.csv" for pair in pairs]


def sweeps(run):
    pairs = pairs_with(run, "correctnet")
    return [f"{place(pair, 'correctnet', 'sweep')}/accuracy.csv" for pair in pairs]


def search_logs(run):
    """The logs of the search of each pair's correctnet row."""
    return [
        f"{place(pair, 'correctnet', 'search')}/limit-{exact(limit)}/log.csv"
        for pair in pairs_with(run, "correctnet")
        for limit in limits(CONFIG.settings(pair, "correctnet"))
    ]


FIGURES = {
    "2": "Figure 2: unprotected, over σ",
    "7": "Figure 7: CorrectNet, over σ",
    "9": "Figure 9: candidate layers",
    "10": "Figure 10: the search",
    "rows": "All rows",
    "yield": "Yield",
    "sensitivity": "Sensitivity of each layer",
}


def figure_label(wildcards):
    return {"figure": FIGURES[wildcards.name], "run": wildcards.run}


def sensitivities(run):
    """What each layer alone costs: of the networks that lead to the correctnet row of each pair."""
    stages = ("pretrain", "suppress", "compensate")
    return [f"{RESULTS}/{pair}/sensitivity/{stage}.csv" for pair in pairs_with(run, "correctnet") for stage in stages]


def figure_inputs(wildcards):
    """The files that a figure is drawn from."""
    return {
        "2": samples(wildcards.run, "unprotected"),
        "7": samples(wildcards.run, "correctnet"),
        "9": sweeps(wildcards.run),
        "10": search_logs(wildcards.run),
        "rows": samples(wildcards.run),
        "yield": samples(wildcards.run),
        "sensitivity": sensitivities(wildcards.run),
    }[wildcards.name]


def has(run, row):
    """Whether a pair of the run has the row; what is drawn of it leaves the other pairs out."""
    return bool(pairs_with(run, row))


def figures(run):
    first = ["2"] if has(run, "unprotected") else []
    return [*first, "rows", "yield", *(["7", "9", "10", "sensitivity"] if has(run, "correctnet") else [])]


def targets(run):
    """All of a run that people look at."""
    if run not in CONFIG.runs:
        return []
    return [*shown(run), f"{RESULTS}/summary/{run}/provenance.html"]


def shown(run):
    """Table I, the figures, and the search to explore."""
    folder = f"{RESULTS}/summary/{run}"
    scatter = [f"{folder}/search.html"] if has(run, "correctnet") else []
    return [f"{folder}/table1.md", *(f"{folder}/figure-{name}.png" for name in figures(run)), *scatter]


def run_facts(wildcards):
    """The pairs and seeds of a run, as options."""
    pairs = CONFIG.runs[wildcards.run]
    seeds = {CONFIG.settings(pair, row).seed for pair in pairs for row in CONFIG.rows_of(pair)}
    return " ".join([*(f"--pair {shlex.quote(pair)}" for pair in pairs), *(f"--seed {n}" for n in sorted(seeds))])


def run_jobs(wildcards):
    """The jobs of a run that have benchmark files, by their paths; others of its pairs are of settings of before."""
    from correctnet.pipeline import provenance  # not needed in the process of any other job

    names = {}
    for pair in CONFIG.runs[wildcards.run]:
        for row in CONFIG.rows_of(pair):
            settings = CONFIG.settings(pair, row)
            for stage in stages_of(pair, row):
                names |= dict.fromkeys(stage_jobs(settings, place(pair, row, stage), stage))
            for sigma, chips in sigmas(pair, row).items():
                folder = f"{RESULTS}/{pair}/evaluate/{row}/sigma-{exact(sigma)}"
                names |= dict.fromkeys(f"{folder}/{chunk}" for chunk in chunk_names(settings, chips))
    names |= dict.fromkeys(path.removesuffix(".csv") for path in sensitivities(wildcards.run))
    return provenance.fold(name.removeprefix(f"{RESULTS}/") for name in names)


def stage_jobs(settings, folder, stage):
    """The jobs that make the folder of a stage: one, or those of a search for each limit."""
    if stage != "search":
        return [folder]
    search, jobs = settings.search, []
    spread = search.population and search.strategy in SEARCHING
    sizes = [1, *[search.population] * search_rounds(search)] if spread else []
    for limit in limits(settings):
        own = f"{folder}-{exact(limit)}"
        jobs += [f"{own}/round-{r}-state-{k}" for r, size in enumerate(sizes) for k in range(size)] + [own]
    return jobs


def table_sigma(wildcards):
    """The sigma of Table I, which all pairs of a run have."""
    try:
        return CONFIG.sigma_of(wildcards.run)
    except UserError as error:
        raise WorkflowError(str(error))


def table_inputs(wildcards):
    """What Table I is made of; refused before any job runs where it would be of several sigmas."""
    table_sigma(wildcards)
    return samples(wildcards.run)


def figure_options(wildcards):
    """What a figure is told beside its files: the sigma of Table I, and what rows are called."""
    sigma = f"--sigma {exact(table_sigma(wildcards))}" if wildcards.name in ("7", "rows", "yield") else ""
    return f"{sigma} --labels {shlex.quote(labels(wildcards))}" if wildcards.name == "rows" else sigma


def print_estimate():
    """Say how long a full run may take, before it begins."""
    if workflow.resource_settings.cores is None:
        return  # jobs run on a cluster, and this machine says nothing of it
    for target in workflow.dag_settings.targets or ["all"]:
        run = "paper" if target == "all" else target
        if run in CONFIG.runs and run != "quick":
            command = [
                sys.executable,
                "-m",
                "correctnet.pipeline.estimate",
                "--run",
                run,
                "--cores",
                str(workflow.cores),
            ]
            subprocess.run(command, input=json.dumps(config), text=True, check=True)
