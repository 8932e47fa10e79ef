"""The pages of the report: what they say, in one file each."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from correctnet.errors import UserError
from correctnet.methods.search import COLUMNS, Problem, search
from correctnet.pipeline import provenance
from correctnet.report import figures, pages, tables
from correctnet.settings import Search

pytest.importorskip("bokeh", reason="the workflow extra is not installed")


class Cells(HTMLParser):
    """The rows of all tables of a page, as lists of text."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.addresses, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True
        self.addresses += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        self.inside &= tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data


def row(**values):
    table = {"pair": "vgg16-cifar100", "row": "correctnet", "label": "CorrectNet <b>", "centre": "median"}
    table |= {"clean": 0.69, "mean": 0.6701, "std": 0.0087, "ci_low": 0.669, "ci_high": 0.6712, "ratio": 0.95}
    table |= {"overhead": 0.01, "layers": 4, "chips": 250, "images": 10000, "epochs": "1 pretrain", "seed": 0}
    return {**table, "paper": 0.6601, "difference": 0.01, **values}


def test_table1_stands_beside_the_paper_s_numbers():
    table = pd.DataFrame(
        [row(), row(row="other", label="other", paper=None, difference=None), row(pair="lenet5-mnist")]
    )
    page = Cells(pages.table1(table, 0.5))
    header, first, second, third = page.rows
    values = dict(zip(header, first, strict=True))
    assert values["mean ± std"] == "67.01% ± 0.87"
    assert (values["paper"], values["difference"]) == ("66.01%", "+1.00")
    assert values["row"] == "CorrectNet <b>", "labels are text"
    assert values["chips × images"] == "250 × 10,000"
    assert dict(zip(header, second, strict=True))["paper"] == "–"
    assert [first[0], second[0], third[0]] == ["vgg16-cifar100", "", "lenet5-mnist"], "a pair is named once"
    assert set(tables.PAPER_CLEAN.values()) == {0.8089}
    assert "80.89%" in pages.table1(table, 0.5)


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "vgg16-cifar10" / "search" / "limit-0.02" / "log.csv"
    path.parent.mkdir(parents=True)
    states = [(1, 0, "0 0", "0 0", 0, 0.0, 0.5, 0.1, 0.4, 1.0), (2, 1, "3 0", "0.5 0", 1, 0.01, 0.75, 0.05, 0.69, 2.0)]
    states += [(2, 1, "9 9", "1 1", 2, 0.05, None, None, -0.05, 0.0)]
    pd.DataFrame(states, columns=COLUMNS).assign(candidates="conv1 conv2").to_csv(path, index=False)
    return path


def find_all(value, key):
    """What stands behind `key` in the columns of every data source of Bokeh's JSON."""
    if isinstance(value, list):
        if len(value) == 2 and value[0] == key:
            return [value[1]]
        return [found for part in value for found in find_all(part, key)]
    return [found for part in value.values() for found in find_all(part, key)] if isinstance(value, dict) else []


def test_the_scatter_has_every_trained_state_with_its_layers(log):
    page = pages.search_scatter([log])
    assert not [a for a in Cells(page).addresses if a], "nothing is fetched"
    assert len(page) < 1_500_000, "browsers show no longer page inside the report"
    documents = json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)[1])
    (shown,) = find_all(documents, "state")
    assert shown[0].endswith("no compensation")
    assert "conv1: 3" in shown[1]
    assert "conv2" not in shown[1]
    assert "75.00% ± 5.00" in shown[1]
    assert len(shown) == 2, "a state over its limit was never trained"


def test_what_a_search_chose_is_starred_and_ringed(tmp_path):
    # Of three states with the best mean the search takes the one with the least overhead, wherever it stands.
    means = {(0, 0): 0.5, (4, 4): 0.75, (0, 4): 0.75, (4, 0): 0.75}
    problem = Problem((4, 4), (0.0, 1.0), 1.0, lambda f: (2 * f[0] + f[1]) / 100, lambda f: (means[f], 0.01))
    found = search(problem, Search(), 0, progress=False)
    assert (found.best().filters, found.best().overhead) == ((0, 4), 0.04)
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1), (1, 3, 0, 2)):
        path = tmp_path / str(order[0]) / "pair" / "search" / "limit-1" / "log.csv"
        path.parent.mkdir(parents=True)
        found.table().assign(candidates="conv1 conv2").iloc[list(order)].to_csv(path, index=False)

        ring = figures.figure10([path]).axes[0].collections[-1]
        assert ring.get_offsets().tolist() == [[4.0, 0.75]]
        plt.close("all")
        page = pages.search_scatter([path])
        documents = json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)[1])
        ((markers,), (states,)) = (find_all(documents, key) for key in ("marker", "state"))
        (starred,) = [s for m, s in zip(markers, states, strict=True) if m == "star"]
        assert "conv2: 4" in starred
        assert "conv1" not in starred


def test_a_log_without_layers_is_named(log):
    pd.read_csv(log).drop(columns="candidates").to_csv(log, index=False)
    with pytest.raises(UserError, match=r"log\.csv: no column 'candidates'"):
        pages.search_scatter([log])


def write_job(results, job, seconds, memory, **first):  # "-" is what Snakemake writes of a job too short to look at
    benchmark, log = results / ".benchmarks" / f"{job}.tsv", results / ".logs" / f"{job}.log"
    for path in (benchmark, log):
        path.parent.mkdir(parents=True, exist_ok=True)
    benchmark.write_text(f"s\tmax_rss\tcpu_time\n{seconds}\t{memory}\t{seconds}\n")
    log.write_text(f"{provenance.PREFIX}{json.dumps(first)}\nmore\n" if first else "nothing\n")


def test_provenance_puts_benchmarks_and_logs_together(tmp_path):
    write_job(tmp_path, "one/search-0.02", 7.5, 500.0, started="2026-01-02", revision="abc", command="correctnet <x>")
    write_job(tmp_path, "one/pretrain", 60.0, 700.0, started="2026-01-01", revision="abc+")
    write_job(tmp_path, "one/evaluate/row/sigma-0.5/chips-0-2", "-", "-")
    write_job(tmp_path, "two/pretrain", 1.0, 1.0)
    jobs = provenance.jobs(tmp_path, ["one"])
    assert list(jobs["job"]) == ["one/evaluate/row/sigma-0.5/chips-0-2", "one/pretrain", "one/search-0.02"]
    assert list(jobs["revision"][1:]) == ["abc+", "abc"]
    assert jobs["seconds"].sum() == 67.5
    page = pages.provenance("quick", {**provenance.here(), "command": "snakemake quick"}, jobs, [0, 1])
    facts = {cells[0]: cells[1] for cells in Cells(page).rows if len(cells) == 2}
    assert facts["command"] == "snakemake quick"
    assert facts["seeds"] == "0, 1"
    assert facts["jobs"] == "3, 0.02 hours of wall time, at most 700 MiB"
    assert "correctnet &lt;x&gt;" in page


def test_a_damaged_benchmark_file_is_named(tmp_path):
    write_job(tmp_path, "one/pretrain", 1.0, 1.0)
    (tmp_path / ".benchmarks" / "one" / "pretrain.tsv").write_text("")
    with pytest.raises(UserError, match=r"pretrain\.tsv: not a benchmark file"):
        provenance.jobs(tmp_path, ["one"])


def test_a_stage_writes_its_provenance_into_its_log(tmp_path):
    command = [sys.executable, "-m", "correctnet.cli", "pretrain", "--dataset", "digits", "--epochs", "0", "--quiet"]
    done = subprocess.run(
        [*command, "--out", tmp_path / "p", "--threads", "1"], capture_output=True, text=True, check=True
    )
    first, *rest = done.stderr.splitlines()
    found = json.loads(first.removeprefix(provenance.PREFIX))
    assert found["threads"] == 1
    assert "--dataset digits" in found["command"]
    assert not rest


def test_the_revision_is_git_s(tmp_path):
    expected = provenance.revision()
    if expected is None:
        pytest.skip("this code is no git checkout")
    root = pages.__file__.rsplit("/correctnet/", 1)[0]
    head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert head.startswith(expected.rstrip("+"))
