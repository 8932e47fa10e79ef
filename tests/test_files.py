"""Files and texts as users have them: names, folders, permissions, encodings, labels; each works, or is one line."""

import ast
import html
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from by_hand import run, succeed
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_profile import examples
from test_tables_figures import complete, log_of_a_search

from correctnet.datasets import DATASETS
from correctnet.errors import UserError
from correctnet.files import storage
from correctnet.noise import core
from correctnet.pipeline import provenance
from correctnet.report import figures, pages, tables
from correctnet.sections import exact

ROOT = Path(__file__).parents[1]
# Markup of mathtext, LaTeX, Markdown and HTML, a quote of each kind, letters beyond Latin-1, and a second line.
ODD = "$\\foo$ | <b>σ</b> & `a` *b* _c_ 'f' \"g\" \\"


def error_of(*arguments):
    """The only line of a command that must fail as users' errors do."""
    result = run(*arguments)
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    lines = [line for line in result.output.splitlines() if line.startswith(("error:", "Error:"))]
    assert len(lines) == 1, result.output
    return lines[0]


@pytest.fixture
def samples(tmp_path):
    """Per-sample results of two rows at three sigmas."""
    complete().to_csv(tmp_path / "samples.csv", index=False)
    return tmp_path / "samples.csv"


@pytest.fixture
def log(tmp_path):
    return log_of_a_search(tmp_path, 0.02, [(1, 0, "", "", 0.0, 0.9, 0.1)])


# Every command that writes one file for --out (or --json, --plot), with what it reads.
WRITING = {
    "merge": ["merge", "{samples}", "--out"],
    "collect": ["collect", "{samples}", "--out"],
    "table": ["table", "{samples}", "--out"],
    "figure": ["figure", "rows", "{samples}", "--out"],
    "explore": ["explore", "{log}", "--out"],
    "provenance": ["provenance", "quick", "--pair", "one", "--out"],
    "evaluate": ["evaluate", "--model", "m", "--out"],
    "sensitivity": ["sensitivity", "--model", "m", "--out"],
    "search": ["search", "--state", "0", "--base", "b", "--candidates", "c", "--out"],
    "bench": ["bench", "--json"],
    "plot": ["bench", "--plot"],
}
FOLDERS = {
    "pretrain": [],
    "suppress": ["--pretrained", "p"],
    "inject": ["--pretrained", "p"],
    "sweep": ["--pretrained", "p", "--base", "b"],
    "search": ["--base", "b", "--candidates", "c"],
    "compensate": ["--base", "b", "--found", "f"],
    "finetune": ["--compensated", "c"],
}


@pytest.fixture
def no_work(monkeypatch):
    """Nothing is read, measured or computed."""

    def work(*_, **__):
        pytest.fail("it went to work")

    for module, name in ((tables, "read_samples"), (pages, "search_scatter"), (provenance, "jobs"), (plt, "subplots")):
        monkeypatch.setattr(module, name, work)
    from correctnet.bench import cpu as bench
    from correctnet.evaluation import results
    from correctnet.pipeline import stages

    monkeypatch.setattr(bench, "measure", work)
    monkeypatch.setattr(results.Result, "from_csv", work)
    for stage in (*FOLDERS, "sensitivity", "evaluate_chips", "search_state"):
        monkeypatch.setattr(stages, stage, work)


@pytest.mark.parametrize("command", WRITING)
def test_an_out_that_is_a_folder_or_below_a_file_is_said_before_the_work(command, samples, log, tmp_path, no_work):
    suffix = ".png" if command in ("figure", "plot") else ".csv"
    folder, below = tmp_path / f"d{suffix}", tmp_path / "file" / f"x{suffix}"
    folder.mkdir()
    (tmp_path / "file").write_text("")
    arguments = [a.format(samples=samples, log=log) for a in WRITING[command]]
    assert f"{folder}: is a folder; the name of a file is expected" in error_of(*arguments, folder)
    assert f"{below}: cannot be written: {tmp_path / 'file'} is a file" in error_of(*arguments, below)
    assert "cannot be written: File name too long" in error_of(*arguments, tmp_path / f"{'x' * 250}{suffix}")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("stage", FOLDERS)
def test_an_out_that_is_a_file_is_said_before_the_work(stage, tmp_path, no_work):
    (tmp_path / "file").write_text("kept")
    given = [stage, "--quiet", *FOLDERS[stage], "--out"]
    assert f"{tmp_path / 'file'}: is a file; the name of a folder is expected" in error_of(*given, tmp_path / "file")
    assert "is a file" in error_of(*given, tmp_path / "file" / "x")
    assert "the name of a folder is expected" in error_of(*given, tmp_path / "m.safetensors")
    assert (tmp_path / "file").read_text() == "kept"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("written", ["t.md", "t.html", "PAGE.MD", "fig.svg", "page.html"])
def test_a_folder_in_the_place_of_a_file_beside_it_is_said_before_the_work(written, samples, tmp_path, no_work):
    (tmp_path / written).mkdir()
    commands = {"t.md": "table", "t.html": "table", "PAGE.MD": "table", "fig.svg": "figure", "page.html": "provenance"}
    command = commands[written]
    out = {"t": "t.csv", "PAGE": "PAGE.MD", "fig": "fig.png", "page": "page.csv"}[written.split(".")[0]]
    arguments = [a.format(samples=samples) for a in WRITING[command]]
    assert f"{tmp_path / written}: is a folder" in error_of(*arguments, tmp_path / out)


@pytest.mark.parametrize(
    ("command", "out", "files"),
    [
        ("table", "t.csv", {"t.csv", "t.md", "t.html"}),
        ("table", "t.md", {"t.csv", "t.md", "t.html"}),
        ("table", "run.v1", {"run.v1", "run.v1.md", "run.v1.html"}),
        ("table", "sigma-0.5.csv", {"sigma-0.5.csv", "sigma-0.5.md", "sigma-0.5.html"}),
        ("figure", "f", {"f.png", "f.svg"}),
        ("figure", "f.svg", {"f.png", "f.svg"}),
        ("figure", "sigma-0.5", {"sigma-0.5.png", "sigma-0.5.svg"}),
        ("provenance", "run.v1", {"run.v1", "run.v1.html"}),
        ("provenance", "p.html", {"p.csv", "p.html"}),
    ],
)
def test_names_keep_their_dots(command, out, files, samples, tmp_path):
    folder = tmp_path / "new"
    arguments = [a.format(samples=samples) for a in WRITING[command]]
    if command == "provenance":
        arguments[1:1] = ["--results", tmp_path]
    succeed(*arguments, folder / out)
    assert {path.name for path in folder.iterdir()} == files
    for path in folder.iterdir():
        beginning = path.read_bytes()[:5]
        kinds = {".png": b"\x89PNG\r", ".svg": b"<?xml", ".html": b"<!doc", ".md": b"Accur"}
        assert beginning == kinds.get(path.suffix, b"pair," if command == "table" else b"job,s")


def test_a_figure_of_another_kind_is_refused(samples, tmp_path):
    assert "a PNG and an SVG are written" in error_of("figure", "rows", samples, "--out", tmp_path / "f.pdf")


def test_a_tilde_is_the_home_folder_and_an_empty_path_none(samples, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    succeed("collect", samples, "--out=~/x.csv")
    assert (tmp_path / "home" / "x.csv").is_file()
    assert "there is no such user" in error_of("collect", samples, "--out=~nobody-of-this-name/x.csv")
    assert "an empty text" in error_of("collect", samples, "--out", "")
    monkeypatch.chdir(tmp_path)
    line = error_of("fetch", "mnist", "--data-dir=~nobody-of-this-name")
    assert "there is no such user" in line


# What cannot be read, as whoever is not root.
ORDINARY = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
READING = {
    "a configuration": ["check", "{}"],
    "a configuration of a stage": ["pretrain", "--config", "{}", "--pair", "p", "--out", "out"],
    "a model": ["show", "{}/model.json"],
    "a model's weights": ["evaluate", "--model", "{}", "--out", "e.csv", "--quiet"],
    "results": ["collect", "{}", "--out", "out.csv"],
    "chunks": ["merge", "{}", "--out", "out.csv"],
    "a log": ["explore", "{}", "--out", "out.html"],
    "sensitivities": ["figure", "sensitivity", "{}", "--out", "out.png"],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", READING)
def test_files_of_somebody_else(kind, tmp_path):
    if not shutil.which("setpriv") and os.geteuid() == 0:
        pytest.skip("root can read every file, and there is no setpriv")
    closed = tmp_path / "closed"
    if "model" in kind:
        closed.mkdir()
        storage.write_model(closed, {}, {"network": {"name": "lenet5"}})
        closed = closed / ("model.json" if kind == "a model" else "model.safetensors")
    else:
        closed.write_text("sample,correct,images,accuracy,seed\n0,1,2,0.5,0\n")
    closed.chmod(0)
    name = closed.parent if "model" in kind else closed
    command = [sys.executable, "-m", "correctnet.cli", *(a.format(name) for a in READING[kind])]
    done = subprocess.run([*ORDINARY, *command], cwd=tmp_path, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("provenance: ")]
    assert lines == [f"error: {closed}: cannot be read: Permission denied"]
    assert done.returncode == 2


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root can read and write every file")
@pytest.mark.parametrize("closed", ["train-images-idx3-ubyte", "."])
def test_data_of_somebody_else(closed, tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    source = DATASETS["mnist"].source()
    for file in (*source.train, *source.test):
        with open(folder / file.name, "wb") as empty:
            empty.truncate(file.size)  # sparse: of the right size, and of nothing
    (folder / closed).chmod(0)
    command = [sys.executable, "-m", "correctnet.cli", "pretrain", "--dataset", "mnist", "--epochs", "0", "--quiet"]
    command += ["--data-dir", tmp_path, "--out", tmp_path / "out"]
    done = subprocess.run([*ORDINARY, *command], capture_output=True, text=True)
    (folder / closed).chmod(0o755)
    named = folder / "train-images-idx3-ubyte"
    assert done.stderr.splitlines()[-1] == f"error: {named}: cannot be read: Permission denied"
    assert done.returncode == 2


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root can read and write every file")
@pytest.mark.parametrize("command", [["collect", "s.csv", "--out", "{}/x.csv"], ["pretrain", "--quiet", "--out", "{}"]])
def test_folders_of_somebody_else(command, tmp_path):
    complete().to_csv(tmp_path / "s.csv", index=False)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    given = [a.format(closed) for a in command]
    running = [*ORDINARY, sys.executable, "-m", "correctnet.cli", *given]
    done = subprocess.run(running, cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == f"error: {given[-1]}: cannot be written: Permission denied"
    assert done.returncode == 2


def test_a_device_is_not_replaced(samples):
    assert "/dev/null: is no ordinary file" in error_of("collect", samples, "--out", "/dev/null")
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("kind", READING)
def test_files_that_are_folders_absent_or_no_text(kind, tmp_path):
    def line_for(path):
        given = [a.format(path) for a in READING[kind]]
        return error_of(*[tmp_path / a if a.startswith(("out", "e.csv")) else a for a in given])

    if "model" in kind:
        assert "no such file" in line_for(tmp_path / "none")
        (tmp_path / "m" / "model.json").mkdir(parents=True)
        assert line_for(tmp_path / "m").endswith("model.json: cannot be read: Is a directory")
        return
    line = line_for(tmp_path / "none")
    assert line.startswith(f"error: {tmp_path / 'none'}: ")
    assert "no such file" in line.lower()
    (tmp_path / "d").mkdir()
    assert line_for(tmp_path / "d") == f"error: {tmp_path / 'd'}: cannot be read: Is a directory"
    long = tmp_path / ("x" * 300)
    assert line_for(long) == f"error: {long}: cannot be read: File name too long"
    (tmp_path / "latin").write_bytes(b"pair,row,\xe9,sample\n")
    assert f"{tmp_path / 'latin'}: cannot be read" in line_for(tmp_path / "latin")


@pytest.mark.parametrize(
    "module", sorted([*ROOT.glob("correctnet/**/*.py"), *ROOT.glob("docs/*.py")]), ids=lambda p: p.name
)
def test_text_files_name_their_encoding(module):
    """Else it is the locale's."""
    for call in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if not isinstance(call, ast.Call):
            continue
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        given = {keyword.arg for keyword in call.keywords}
        if name in ("read_text", "write_text") and getattr(call.func, "value", None) is not None:
            of_storage = isinstance(call.func.value, ast.Name) and call.func.value.id == "storage"
            assert of_storage or "encoding" in given, f"{module.name}:{call.lineno}"
        if name == "open" and (isinstance(call.func, ast.Name) or not call.args or len(call.args) == 1):
            mode = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            binary = any("b" in m for m in mode)
            owner = getattr(call.func, "value", None)
            of_other = getattr(owner, "id", getattr(owner, "attr", "")) in ("tarfile", "os", "Image", "zip")
            assert binary or of_other or "encoding" in given, f"{module.name}:{call.lineno}"


@pytest.fixture(scope="module")
def latin(tmp_path_factory):
    """The environment of a terminal in ISO 8859-1."""
    folder = tmp_path_factory.mktemp("locale")
    if not shutil.which("localedef"):
        pytest.skip("there is no localedef")
    made = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", folder / "en_US"]
    if subprocess.run(made, capture_output=True).returncode and not (folder / "en_US").exists():
        pytest.skip("localedef has no source of en_US")
    return {"LOCPATH": str(folder), "LC_ALL": "en_US", "PYTHONUTF8": "0"}


@pytest.mark.slow
@pytest.mark.parametrize("locale", ["C", "latin"])
def test_files_are_utf_8_in_any_locale(locale, request, tmp_path):
    chosen = request.getfixturevalue("latin") if locale == "latin" else {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    there = {**os.environ, "PYTHONUTF8": "0", **chosen}
    complete().to_csv(tmp_path / "s.csv", index=False)
    (tmp_path / "c.yaml").write_text(
        "runs: {paper: [p]}\nrows: {unprotected: {evaluate: pretrain, label: σ}, σ: {evaluate: pretrain, label: x}}\n"
        "pairs: {p: {}}\n",
        encoding="utf-8",
    )

    def command(*arguments):
        given = [sys.executable, "-m", "correctnet.cli", *arguments]
        return subprocess.run(given, cwd=tmp_path, env=there, capture_output=True)

    labels = ["--labels", json.dumps({"unprotected": "σ = é"}), "--label", "correctnet=plain"]
    done = command("table", "s.csv", *labels, "--out", "t.csv")
    assert done.returncode == 0, done.stderr
    for name in ("t.csv", "t.md", "t.html"):
        assert "σ = é" in (tmp_path / name).read_text(encoding="utf-8"), name
    assert command("figure", "rows", "s.csv", *labels, "--out", "f.png").returncode == 0
    assert "σ = é" in (tmp_path / "f.svg").read_text(encoding="utf-8")
    assert command("collect", "t.csv", "--out", "u.csv").returncode == 2, "a table is no result, and that is all"
    done = command("check", "c.yaml")
    assert done.returncode == 2
    assert re.search(rb"c\.yaml: rows\.(\\u03c3|\xcf\x83): a name of lower-case letters", done.stderr)
    assert command("search", "--help").returncode == 0
    if locale == "C":  # bytes that its encoding has not are written as they came
        done = command("table", "s.csv", "--label", "unprotected=σ", "--out", "v.csv")
        assert done.returncode == 0, done.stderr
        assert "| σ |" in (tmp_path / "v.md").read_text(encoding="utf-8")


def cells(line):
    """The cells of a line of a Markdown table, as a reader shows them: without escapes."""
    parts = re.split(r"(?<!\\)(?:\\\\)*\|", line)[1:-1]
    return [re.sub(r"\\([!-/:-@[-`{-~])", r"\1", part.strip()) for part in parts]


@given(st.text(st.sampled_from("a_|\\`*[]<>~$&\n σ-"), min_size=1, max_size=20).filter(str.strip))
@examples(60)
def test_a_label_is_one_cell_of_markdown_and_of_html(label):
    table = tables.table1(complete(), 0.5, {"correctnet": f"x{label}x"})
    text = tables.markdown(table, 0.5)
    lines = text.rstrip("\n").split("\n")
    assert len(lines) == 4 + len(table)
    shown = cells(lines[-1])
    assert len(shown) == 13
    assert shown[1].replace("<br>", "\n") == f"x{label}x"
    assert not re.search(r"(?<!\\)(?:\\\\)*<(?!br>)", lines[-1]), "no tag but the line breaks"
    page = pages.table1(table, 0.5)
    assert page.count("<tr>") == 1 + len(table)
    assert f"x{'<br>'.join(html.escape(label).split(chr(10)))}x" in page


def test_a_label_is_drawn_as_it_is_written(samples, tmp_path):
    labels = {"unprotected": ODD, "correctnet": "long " * 2000}
    figures.draw("rows", [samples], tmp_path / "f.png", labels)
    drawn = (tmp_path / "f.svg").read_text(encoding="utf-8")
    comments = [html.unescape(text) for text in re.findall("<!-- (.*?) -->", drawn)]
    assert ODD in comments
    assert any(text.endswith("…") for text in comments), "a label of 10,000 letters is cut"
    succeed("figure", "rows", samples, "--label", f"unprotected={ODD}", "--out", tmp_path / "g.png")
    twice = ["--label", "unprotected=a", "--label", "unprotected=b"]
    assert "--label unprotected: given twice" in error_of("table", samples, *twice, "--out", tmp_path / "t.csv")
    assert "printable" in error_of("table", samples, "--label", "unprotected=\x07", "--out", tmp_path / "t.csv")
    for bad in ("{", "[]", '{"a": 1}', '{"unprotected": "\\ud800"}'):
        assert "--labels" in error_of("table", samples, "--labels", bad, "--out", tmp_path / "t.csv")


@pytest.mark.parametrize("name", ["2", "7", "9", "10", "rows", "yield", "sensitivity"])
def test_names_of_pairs_and_folders_are_drawn_as_they_are_written(name, tmp_path, samples):
    pair = tmp_path / "$x^{_a$ & <b>"
    (pair / "sweep").mkdir(parents=True)
    own = complete().assign(pair=pair.name)
    own.to_csv(pair / "samples.csv", index=False)
    columns = {"images": 10, "sample": 0, "accuracy": 0.5}
    sweep = pd.DataFrame({"layer": [1, 2], "original": 0.7, "threshold": 0.9, **columns})
    sweep.to_csv(pair / "sweep" / "accuracy.csv", index=False)
    (pair / "sensitivity").mkdir()
    alone = pd.DataFrame({"layer": [1, 2], "name": ["$a", "b$"], "clean": 0.7, "stage": "$s$", **columns})
    alone.to_csv(pair / "sensitivity" / "x.csv", index=False)
    found = log_of_a_search(tmp_path, 0.02, [(1, 0, "", "", 0.0, 0.9, 0.1)])
    shutil.copytree(found.parents[1], pair / "search")
    files = {"9": "sweep/accuracy.csv", "10": "search/limit-0.02/log.csv", "sensitivity": "sensitivity/x.csv"}
    figures.draw(name, [pair / files.get(name, "samples.csv")], tmp_path / "f.png")
    assert "$x^{_a$ &amp; &lt;b&gt;" in (tmp_path / "f.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("row", ["nan", "null", "none", "inf", "true", "1", "010", "1e-3", "na"])
def test_rows_whose_names_look_like_something_else_keep_them(row, tmp_path):
    own = complete().replace({"row": {"correctnet": row}}).assign(pair="007", epochs="1")
    own.to_csv(tmp_path / "s.csv", index=False)
    read = tables.read_samples([tmp_path / "s.csv"])
    assert set(read["row"]) == {"unprotected", row}
    assert set(read["pair"]) == {"007"}
    succeed("collect", tmp_path / "s.csv", "--out", tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text() == (tmp_path / "s.csv").read_text()
    table = tables.table1(read, 0.5)
    assert list(table["row"]) == ["unprotected", row]
    figures.draw("rows", [tmp_path / "t.csv"], tmp_path / "f.png")


def test_a_missing_number_is_still_one(tmp_path):
    (tmp_path / "t.csv").write_text("row,x,y\nnan,,1\nb,nan,NA\n")
    table = storage.read_csv(tmp_path / "t.csv")
    assert list(table["row"]) == ["nan", "b"]
    assert table["x"].isna().all()
    assert table["y"].tolist()[0] == 1.0
    assert table["y"].isna().tolist() == [False, True]


@given(st.floats(0, 3) | st.sampled_from([0.4723807270774388, 1e-05, 0.3333333, 5e-05, 5e-324, 1e-4, 0.1 + 0.2]))
def test_a_number_in_a_path_reads_back_to_the_last_bit(value):
    text = exact(value)
    assert float(text) == value
    assert re.fullmatch(r"[0-9.e+-]+", text), "the workflow's wildcards"
    rounded = f"{value:g}"
    if float(rounded) == value and "e" not in rounded:
        assert text == rounded, "names of before stay"


def test_paths_of_before_stay():
    assert [exact(v) for v in (0, 0.0, -0.0, 0.5, 1, 1.0)] == ["0", "0", "0", "0.5", "1", "1"]
    assert [exact(v) for v in (0.03, 0.25, 3, 1e-05)] == ["0.03", "0.25", "3", "1e-05"]


def test_files_of_sigmas_that_agree_in_six_digits_are_told_apart(tmp_path):
    own = complete().replace({"sigma": {0.3: 0.50000001}})
    own.to_csv(tmp_path / "s.csv", index=False)
    for sigma, mean in ((0.5, 0.67), (0.50000001, 0.685)):
        succeed("table", tmp_path / "s.csv", "--sigma", repr(sigma), "--out", tmp_path / "t.csv")
        assert pd.read_csv(tmp_path / "t.csv")["mean"][1] == pytest.approx(mean)
        assert f"sigma = {sigma!r};" in (tmp_path / "t.md").read_text(encoding="utf-8")
    assert "no results at sigma 0.500000011" in error_of(
        "table", tmp_path / "s.csv", "--sigma", "0.500000011", "--out", tmp_path / "t.csv"
    )


def test_figure_7_takes_the_sigma_of_a_row_s_name_to_the_last_bit(tmp_path):
    sigma = 0.4723807270774388
    own = complete().replace({"sigma": {0.3: sigma}})
    anew = own[own["row"] == "correctnet"].assign(row=f"correctnet-sigma-{sigma!r}")
    pd.concat([own, anew]).to_csv(tmp_path / "s.csv", index=False)
    ax = figures.figure7([tmp_path / "s.csv"]).axes[0]
    curve = next(line for line in ax.lines if line.get_label().endswith("trained for each σ"))
    assert sigma in list(curve.get_xdata())
    plt.close("all")


def test_figure_7_does_without_the_original_network(tmp_path):
    own = complete()
    own[own["row"] == "correctnet"].to_csv(tmp_path / "s.csv", index=False)
    drawn = {line.get_label() for line in figures.figure7([tmp_path / "s.csv"]).axes[0].lines}
    plt.close("all")
    assert "CorrectNet" in drawn
    assert "original network" not in drawn


@given(st.lists(st.lists(st.sampled_from("ab-.1"), min_size=1, max_size=4).map("/".join), unique=True, max_size=12))
def test_names_of_jobs_come_back(names):
    assert sorted(provenance.unfold(provenance.fold(names))) == sorted(names)


@pytest.mark.parametrize("text", ["{", "3", '{"a": 3}', "[3]"])
def test_jobs_that_are_none(text, tmp_path):
    line = error_of("provenance", "quick", "--pair", "one", "--jobs", text, "--out", tmp_path / "p.csv")
    assert line.startswith("error: --jobs: ")


def test_provenance_leaves_out_the_jobs_of_other_settings(tmp_path):
    benchmarks = tmp_path / ".benchmarks" / "one"
    now = ["one/pretrain", "one/search-0.02", "one/search-0.02/round-0-state-0", "one/evaluate/a/sigma-0.5/chips-0-4"]
    before = ["one/pretrain@seed-3", "one/evaluate/b/sigma-0.5/chips-0-4", "one/evaluate/a/sigma-0.5/chips-0-2"]
    for name in (*now, *before):
        path = tmp_path / ".benchmarks" / f"{name}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("s\tmax_rss\tcpu_time\n1\t1\t1\n")
    assert benchmarks.is_dir()
    given = ["provenance", "quick", "--results", tmp_path, "--pair", "one", "--out", tmp_path / "p.csv"]
    succeed(*given, "--jobs", provenance.fold(now))
    assert sorted(pd.read_csv(tmp_path / "p.csv")["job"]) == sorted(now)
    succeed(*given)
    assert sorted(pd.read_csv(tmp_path / "p.csv")["job"]) == sorted([*now, *before])


def test_sources_in_the_place_of_the_installed_package_are_said(tmp_path, monkeypatch):
    installed = tmp_path / "site" / "correctnet"
    information = tmp_path / "site" / "correctnet-1.0.dist-info"
    installed.mkdir(parents=True)
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: correctnet\nVersion: 1.0\n")
    monkeypatch.setattr(core, "extension", None)
    monkeypatch.delenv("CORRECTNET_ISA", raising=False)
    found = [importlib.metadata.Distribution.at(information)]
    monkeypatch.setattr(core, "distributions", lambda name: found if name == "correctnet" else [])
    assert "no compiler when correctnet was installed" in core.status().reason, "the package has none either"
    (installed / "_native.cpython-311.so").write_text("")
    reason = core.status().reason
    assert f"the sources in {ROOT / 'correctnet'} were imported" in reason
    assert str(installed) in reason
    assert "\n" not in reason


@pytest.mark.parametrize("command", ["merge", "collect", "table", "figure", "explore"])
def test_a_result_never_takes_the_place_of_what_it_is_made_from(command, samples, log, tmp_path, no_work):
    suffix = ".png" if command == "figure" else ".csv"
    source = (samples if command != "explore" else log).rename(tmp_path / f"s{suffix}")
    before = source.read_bytes()
    arguments = [a.format(samples=source, log=source) for a in WRITING[command]]
    (tmp_path / "d").mkdir()
    (tmp_path / f"link{suffix}").symlink_to(source)
    for out in (source, tmp_path / "d" / ".." / source.name, tmp_path / f"link{suffix}"):
        assert f"{out}: the result is made from this file" in error_of(*arguments, out)
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "inputs"),
    [
        (["evaluate", "--model", "m"], ["m/model.json", "m/model.safetensors"]),
        (["evaluate", "--model", "m/v1.json"], ["m/v1.json", "m/v1.safetensors"]),
        (["sensitivity", "--model", "m"], ["m/model.json"]),
        (["suppress", "--pretrained", "m"], ["m"]),
        (["inject", "--pretrained", "m/model.safetensors"], ["m"]),
        (["finetune", "--compensated", "m/"], ["m"]),
        (["search", "--base", "m", "--candidates", "s/best.json"], ["s"]),
        (["compensate", "--base", "m", "--found", "f/model.json", "--found", "g/log.csv"], ["m", "f", "g"]),
        (["search", "--state", "0", "--base", "m", "--candidates", "c", "--known", "k"], ["c", "k"]),
    ],
)
def test_no_stage_writes_over_what_it_begins_with(arguments, inputs, tmp_path, no_work, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out in inputs:
        assert "the result is made from this file" in error_of(*arguments, "--quiet", "--out", out)


@pytest.mark.parametrize("value", ["007", "12e5", "1_000", "+5", "1E3", "0x10", "Infinity", "nan", " 5", "٣", "5.50"])
def test_a_note_comes_back_as_it_was_written(value, tmp_path):
    own = complete()
    own = own[(own["sigma"] == 0.5) & (own["row"] == "correctnet")].assign(note=value, number=5, part=0.25)
    own.to_csv(tmp_path / "s.csv", index=False)
    for command in ("merge", "collect"):
        succeed(command, tmp_path / "s.csv", "--out", tmp_path / "t.csv")
        assert (tmp_path / "t.csv").read_text() == (tmp_path / "s.csv").read_text()
    table = tables.read_samples([tmp_path / "t.csv"])
    assert (table["number"].sum(), table["part"].sum()) == (15, 0.75)


def test_files_that_have_no_folders_of_a_pair(log, tmp_path, monkeypatch):
    assert figures.folder_name(Path("/log.csv"), 1) == ""
    assert figures.folder_name(Path("/one/search/limit-0.02/log.csv"), 2) == "one"
    pages.search_scatter([log])
    monkeypatch.setattr(Path, "absolute", lambda _: Path("/log.csv"))  # as if the file stood there
    assert figures.figure10([log]).axes[0].get_title() == ""
    plt.close("all")


def test_titles_of_figure_9_are_those_of_the_folder_whatever_the_path(tmp_path, monkeypatch):
    folder = tmp_path / "my-pair" / "sweep"
    folder.mkdir(parents=True)
    text = "sample,correct,images,accuracy,seed,layer,name,original,threshold\n0,9,10,0.9,0,1,a,0.95,0.95\n"
    (folder / "accuracy.csv").write_text(text)
    monkeypatch.chdir(folder)
    assert figures.figure9([Path("accuracy.csv")]).axes[0].get_title() == "my-pair"
    plt.close("all")


@pytest.mark.parametrize("command", ["table", "provenance"])
def test_json_options_say_each_key_once(command, samples, tmp_path):
    option = {"table": "--labels", "provenance": "--jobs"}[command]
    given = {"table": ["table", samples], "provenance": ["provenance", "run", "--results", tmp_path, "--pair", "p"]}
    text = '{"correctnet": "a", "correctnet": "b"}' if command == "table" else '{"a": ["b"], "a": ["c"]}'
    line = error_of(*given[command], option, text, "--out", tmp_path / "t.csv")
    assert f"{option}: not JSON ({'correctnet' if command == 'table' else 'a'}: is listed twice)" in line


def test_a_json_file_says_each_key_once(tmp_path):
    (tmp_path / "c.json").write_text('{"candidates": ["a"], "candidates": []}')
    with pytest.raises(UserError, match=r"c.json: cannot be read \(candidates: is listed twice\)"):
        storage.read_json(tmp_path / "c.json")


def test_provenance_of_results_that_are_not_there(tmp_path):
    given = ["provenance", "run", "--pair", "one", "--out", tmp_path / "p.csv", "--results"]
    assert f"{tmp_path / 'no'}: no such folder" in error_of(*given, tmp_path / "no")
    succeed(*given, tmp_path)
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "0, 0.00 hours of wall time, at most – MiB" in page


def test_a_chunk_that_is_missing_in_between(tmp_path):
    own = complete().query("row == 'correctnet' and sigma == 0.5")
    for start, stop in ((0, 1), (2, 3)):
        own[own["sample"].between(start, stop - 1)].to_csv(tmp_path / f"{start}.csv", index=False)
    line = error_of("merge", tmp_path / "2.csv", tmp_path / "0.csv", "--out", tmp_path / "m.csv")
    assert line == "error: merge: chip 1 is missing; the chunks have chips 0 to 2"
    assert not (tmp_path / "m.csv").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_is_full_is_one_line(unbuffered):
    command = [sys.executable, "-m", "correctnet.cli", "check", ROOT / "config.yaml"]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr == "error: the output cannot be written: No space left on device\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["sweep", "--pretrained", "one", "--base", "one"],
        ["search", "--base", "one", "--candidates", "one/candidates.json"],
        ["compensate", "--base", "other", "--found", "one/best.json"],
    ],
)
def test_one_folder_may_hold_what_has_other_names(arguments, tmp_path, monkeypatch):
    """A sweep, searches and a model share no file's name."""
    from correctnet.pipeline import stages

    began = []
    monkeypatch.setattr(stages, arguments[0], lambda *_, **__: began.append(arguments[0]))
    monkeypatch.chdir(tmp_path)
    succeed(*arguments, "--quiet", "--out", "one")
    assert began == [arguments[0]]
