from pathlib import Path

import pytest

from correctnet.errors import UserError
from correctnet.files import csvfile as checked
from correctnet.methods.search_log import read_log
from correctnet.report import figures, tables

REFERENCE = Path(__file__).parents[1] / "results" / "reference"


def files(*patterns):
    found = [str(p.relative_to(REFERENCE)) for pattern in patterns for p in sorted(REFERENCE.rglob(pattern))]
    assert found
    return found


@pytest.mark.parametrize("name", files("samples*.csv"))
def test_committed_samples_are_read(name):
    samples = tables.read_samples([REFERENCE / name])
    assert len(samples) == len((REFERENCE / name).read_text().splitlines()) - 1
    assert samples["accuracy"].between(0, 1).all()


@pytest.mark.parametrize("name", files("sweep*.csv", "sensitivity*.csv", "search*.csv", "*search-five.csv"))
def test_committed_files_of_stages_are_read(name):
    path = REFERENCE / name
    if "search" in name:
        states = read_log(path)
        columns = ["filters", "overhead", "mean", "std", "reward", "seconds", "candidates"]
        table = figures.read_table(path, columns)
        assert [s.mean for s in states if s.mean is not None] == table["mean"].dropna().tolist()
        assert [" ".join(map(str, s.filters)) for s in states] == table["filters"].tolist()
    else:
        table = figures.read_table(path, ["layer", "name", "accuracy", "images"])
        assert (table["accuracy"] == table["correct"] / table["images"]).all()


def write(path, text):
    path.write_bytes(text.encode())
    return path


SWEEP = "sample,correct,images,accuracy,seed,layer,name,original,threshold\n0,9,10,0.9,0,1,a,0.95,0.95\n"
LOG = "evaluation,episode,filters,ratios,layers,overhead,mean,std,reward,seconds,candidates\n"
LOG += "1,0,,,0,0.0,0.9,0.1,0.9,1.5,\n"


@pytest.mark.parametrize(
    ("text", "before", "after", "message"),
    [
        (SWEEP, "0.95,0.95\n", "0.95,0.9", "line 2: no line break"),
        (SWEEP, "a,0.95", "a,95.0", "line 2: original: a fraction between 0 and 1 is expected; '95.0' was found"),
        (SWEEP, ",1,a", ",0,a", "line 2: layer: an integer that is at least 1 is expected; '0' was found"),
        (SWEEP, ",1,a", ",1,", "line 2: name: a text is expected; the cell is empty"),
        (SWEEP, "9,10,0.9", "8,10,0.9", "line 2: accuracy: 0.9 where correct / images is 8 / 10"),
        (LOG, "0.0,0.9", "0.0,90", "line 2: mean: a fraction between 0 and 1 is expected; '90' was found"),
        (LOG, "0.0,0.9", "-0.1,0.9", "line 2: overhead: a number that is at least 0 is expected; '-0.1' was found"),
        (LOG, "0.1,0.9,1.5", "0.1,,1.5", "line 2: reward: a number is expected; the cell is empty"),
        (LOG, "1.5,\n", "1.5\n", "line 2: 10 cells where the header has 11 columns"),
        (LOG, "1,0,,", '1,0,"', "line 2: not CSV"),
    ],
)
def test_files_of_stages_that_were_edited_are_refused(tmp_path, text, before, after, message):
    path = write(tmp_path / "x.csv", text)
    figures.read_table(path, [])
    assert before in text
    write(path, text.replace(before, after, 1))
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as caught:
        figures.read_table(path, [])
    assert str(caught.value).startswith(f"{path}: ")


def test_texts_stay_texts_and_numbers_come_back_to_the_last_bit(tmp_path):
    row = "row,sigma,note,digits,blank,seed\r\nnan,0.1,null,007,,18446744073709551615\r\n"
    row += "1,0.30000000000000004,x,8,2,3\r\n"
    table = checked.read(write(tmp_path / "x.csv", "\ufeff" + row)).table
    assert table["row"].tolist() == ["nan", "1"], "the names of rows, whatever they look like"
    assert table["note"].tolist() == ["null", "x"]
    assert table["sigma"].tolist() == [0.1, 0.30000000000000004]
    assert table["seed"].tolist() == [2**64 - 1, 3]
    assert table["blank"].isna().tolist() == [True, False]


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe", b"a;b\n1;2\n"])
def test_files_that_are_no_tables(tmp_path, content):
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{path}: (cannot be read|no column 'a')"):
        checked.read(path, ["a"])
    with pytest.raises(UserError, match=r"none\.csv: no such file"):
        checked.read(tmp_path / "none.csv")
