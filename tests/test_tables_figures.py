import io
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_profile import examples
from PIL import Image

from correctnet.errors import UserError
from correctnet.evaluation.results import COLUMNS, Result, record
from correctnet.report import figures, pages, tables


def samples(pair="vgg16-cifar100", row="correctnet", sigma=0.5, accuracies=(0.6, 0.7), images=100, **columns):
    """Per-sample results as `correctnet evaluate` writes them."""
    network, dataset = pair.split("-")
    rows = [(i, round(a * images), images, a, 0) for i, a in enumerate(accuracies)]
    values = {"pair": pair, "row": row, "network": network, "dataset": dataset, "split": "test"}
    values |= {"sigma": sigma, "centre": "median", "overhead": 0.02, "layers": 4, "epochs": "1 pretrain"}
    return record(Result(pd.DataFrame(rows, columns=COLUMNS)), {**values, **columns}).table


def complete(pair="vgg16-cifar100"):
    return pd.concat(
        [
            samples(pair, "unprotected", 0.0, [0.7], overhead=0.0, layers=0),
            samples(pair, "unprotected", 0.5, [0.10, 0.14, 0.12], overhead=0.0, layers=0),
            samples(pair, "correctnet", 0.0, [0.69]),
            samples(pair, "correctnet", 0.5, [0.66, 0.68, 0.67]),
            samples(pair, "unprotected", 0.3, [0.3, 0.4]),
            samples(pair, "correctnet", 0.3, [0.68, 0.69]),
        ],
        ignore_index=True,
    )


def test_table1_is_computed_from_the_samples():
    table = tables.table1(complete(), 0.5).set_index("row")
    row = table.loc["correctnet"]
    assert (row["clean"], row["chips"], row["images"], row["layers"]) == (0.69, 3, 100, 4)
    assert row["mean"] == pytest.approx(0.67)
    assert row["std"] == pytest.approx(0.01)
    assert row["ratio"] == pytest.approx(0.67 / 0.70), "against the original network's clean accuracy"
    # t(0.975, 2) = 4.3027
    assert row["ci_high"] - row["mean"] == pytest.approx(4.3027 * 0.01 / np.sqrt(3), rel=1e-4)
    assert row["paper"] == 0.6701
    assert row["difference"] == pytest.approx(0.67 - 0.6701)
    assert table.loc["unprotected", "paper"] == 0.0169


def test_the_ratio_is_to_the_unprotected_network_in_whatever_order_files_come():
    in_order, reversed_ = complete(), complete()[::-1].reset_index(drop=True)
    assert reversed_["row"].iloc[0] == "correctnet"
    for given_ in (in_order, reversed_):
        table = tables.table1(given_, 0.5).set_index("row")
        assert table.loc["correctnet", "ratio"] == pytest.approx(0.67 / 0.70)
        assert table.loc["unprotected", "ratio"] == pytest.approx(0.12 / 0.70)
    other = complete().replace({"row": {"unprotected": "a-unprotected"}})
    assert tables.table1(other, 0.5)["ratio"].tolist() == pytest.approx([0.12 / 0.70, 0.67 / 0.70]), "the first row's"


def test_the_paper_s_values_stand_beside_its_sigma_and_pairs_only():
    at_other_sigma = tables.table1(complete()[complete()["sigma"] != 0.5], 0.3)
    assert at_other_sigma["paper"].isna().all()
    other_pair = tables.table1(complete("lenet5-mnist"), 0.5)
    assert other_pair["paper"].isna().all()


def with_another_row(**change):
    mixed = complete()
    mixed = mixed[~((mixed["row"] == "correctnet") & (mixed["sigma"] == 0.5))]
    return pd.concat([mixed, samples(**{"accuracies": [0.66, 0.68, 0.67], **change})])


def test_rows_of_other_images_are_refused():
    with pytest.raises(UserError, match="rows of vgg16-cifar100 are not comparable"):
        tables.table1(with_another_row(split="validation"), 0.5)


@pytest.mark.parametrize(("change", "shown"), [({"images": 50}, (3, 50)), ({"accuracies": [0.6] * 4}, (4, 100))])
def test_rows_may_have_fewer_chips_or_images_and_say_so(change, shown):
    table = tables.table1(with_another_row(**change), 0.5).set_index("row")
    assert tuple(table.loc["correctnet", ["chips", "images"]]) == shown
    assert tuple(table.loc["unprotected", ["chips", "images"]]) == (3, 100)
    assert f"| {shown[0]} × {shown[1]} |" in tables.markdown(table.reset_index(), 0.5)


def in_thousandths(pair="vgg16-cifar100", **unprotected):
    """`unprotected` on 1,000 images, `correctnet` on their first 400."""
    clean = samples(pair, "unprotected", 0.0, [0.7], 1000, overhead=0.0, layers=0, **unprotected)
    varied = [samples(pair, "unprotected", 0.5, [0.1, 0.2], 1000), samples(pair, "correctnet", 0.5, [0.6, 0.65], 400)]
    return pd.concat([clean, *varied, samples(pair, "correctnet", 0.0, [0.68], 400)], ignore_index=True)


def test_the_ratio_is_of_accuracies_on_the_same_images():
    """The unprotected network has 0.7 on all images and 300 / 400 = 0.75 on those that the other row has."""
    table = tables.table1(in_thousandths(prefixes="200:158 400:300 500:360"), 0.5).set_index("row")
    assert table.loc["unprotected", "ratio"] == pytest.approx(0.15 / 0.7)
    assert table.loc["correctnet", "ratio"] == pytest.approx(0.625 / 0.75)
    for unknown in ({}, {"prefixes": "200:158"}, {"prefixes": ""}):
        table = tables.table1(in_thousandths(**unknown), 0.5).set_index("row")
        assert table.loc["unprotected", "ratio"] == pytest.approx(0.15 / 0.7)
        assert np.isnan(table.loc["correctnet", "ratio"])
        assert np.isnan(pd.read_csv(io.StringIO(table.to_csv())).set_index("row").loc["correctnet", "ratio"])
        line = next(t for t in tables.markdown(table.reset_index(), 0.5).splitlines() if "correctnet" in t)
        assert [cell.strip() for cell in line.split("|")][6] == "–"
        assert ">–</td>" in pages.table1(table.reset_index(), 0.5).split("correctnet", 2)[-1]


def test_a_row_with_more_images_than_the_reference_has_no_ratio():
    mixed = in_thousandths()
    mixed["row"] = mixed["row"].map({"unprotected": "correctnet", "correctnet": "unprotected"})
    table = tables.table1(mixed, 0.5).set_index("row")
    assert np.isnan(table.loc["correctnet", "ratio"])


@pytest.mark.parametrize("prefixes", ["400", "400:x", "400:401", "1000:700", "0:0", "400:-1"])
def test_prefixes_that_cannot_be_are_refused(prefixes):
    with pytest.raises(UserError, match="prefixes"):
        tables.table1(in_thousandths(prefixes=prefixes), 0.5)


def test_the_committed_samples_of_two_numbers_of_images():
    reference = Path(__file__).parents[1] / "results" / "reference" / "lenet5-cifar10" / "samples.csv"
    table = tables.table1(tables.read_samples([reference]), 0.5).set_index("row")
    assert set(table["images"]) == {2000, 10000}
    assert (table["ratio"].isna() == (table["images"] == 2000)).all()


@pytest.mark.parametrize("change", [{"split": "validation"}, {"dataset": "cifar10"}])
def test_a_clean_accuracy_of_other_images_is_refused(change):
    mixed = complete()
    for column, value in change.items():
        mixed.loc[(mixed["row"] == "correctnet") & (mixed["sigma"] == 0), column] = value
    with pytest.raises(UserError, match="rows of vgg16-cifar100 are not comparable: they are on test images of"):
        tables.table1(mixed, 0.5)


def test_as_many_images_that_are_others_are_refused():
    mixed = complete().assign(data="aa")
    assert len(tables.table1(mixed, 0.5)) == 2
    mixed.loc[(mixed["row"] == "correctnet") & (mixed["sigma"] == 0.5), "data"] = "bb"
    with pytest.raises(UserError, match=r"other 100 images \(unprotected at sigma 0, correctnet at sigma"):
        tables.table1(mixed, 0.5)


def test_a_chip_that_is_missing_in_between_is_named():
    mixed = complete()
    gap = (mixed["row"] == "correctnet") & (mixed["sigma"] == 0.5) & (mixed["sample"] == 1)
    with pytest.raises(UserError, match="row correctnet of vgg16-cifar100 lacks chip 1 and has chip 2"):
        tables.table1(mixed[~gap], 0.5)


def test_one_chip_has_no_interval_anywhere(tmp_path):
    one = complete()[lambda t: (t["sigma"] == 0) | ((t["sigma"] == 0.5) & (t["sample"] == 0))]
    table = tables.table1(one, 0.5)
    assert table[["std", "ci_low", "ci_high"]].isna().all(axis=None)
    assert "| 66.00% | 1 chip, no interval |" in tables.markdown(table, 0.5)
    page = pages.table1(table, 0.5)
    assert page.count("1 chip, no interval") == 2
    assert "nan" not in page + tables.markdown(table, 0.5)
    one.to_csv(tmp_path / "s.csv", index=False)
    ax = figures.rows([tmp_path / "s.csv"]).axes[0]
    assert [t.get_text().split("\n")[-1] for t in ax.get_yticklabels()] == ["(1 chip, no interval)"] * 2
    assert not [c for c in ax.collections if len(getattr(c, "get_segments", list)())], "no bar"
    for name in ("2", "yield"):
        texts = [t.get_text() for t in figures.FIGURES[name]([tmp_path / "s.csv"]).axes[0].texts]
        assert any("1 chip, no interval" in text for text in texts)
    ax = Result(one[one["sigma"] == 0.5].iloc[:1]).plot()
    assert [t.get_text() for t in ax.texts] == ["1 chip, no interval"]
    plt.close("all")


def test_missing_results():
    with pytest.raises(UserError, match=r"no results at sigma 0\.4"):
        tables.table1(complete(), 0.4)
    without = complete()
    without = without[~((without["row"] == "correctnet") & (without["sigma"] == 0))]
    with pytest.raises(UserError, match="correctnet of vgg16-cifar100 has no results at sigma 0"):
        tables.table1(without, 0.5)


def test_markdown_has_a_line_a_row():
    table = tables.table1(complete(), 0.5, {"correctnet": "CORRECTNET"})
    text = tables.markdown(table, 0.5)
    assert "| vgg16-cifar100 | CORRECTNET | 69.00% | 67.00% ± 1.00 |" in text
    assert "| 67.01% | -0.01 |" in text
    assert len(text.strip().splitlines()) == 4 + len(table)


def test_read_samples_names_what_is_missing(tmp_path):
    path = tmp_path / "s.csv"
    samples().drop(columns="epochs").to_csv(path, index=False)
    with pytest.raises(UserError, match=r"s\.csv: no column 'epochs'"):
        tables.read_samples([path])


def test_a_file_that_is_given_twice_does_not_double_the_chips(tmp_path):
    complete().to_csv(tmp_path / "s.csv", index=False)
    with pytest.raises(UserError, match="chip 0 of row unprotected of vgg16-cifar100 at sigma 0 comes twice"):
        tables.read_samples([tmp_path / "s.csv"] * 2)


@pytest.fixture
def files(tmp_path):
    """Files of a run, where the workflow puts them."""
    pair = tmp_path / "vgg16-cifar100"
    (pair / "sweep").mkdir(parents=True)
    (pair / "search" / "limit-0.02").mkdir(parents=True)
    complete().to_csv(pair / "samples.csv", index=False)
    layers = np.repeat(np.arange(1, 6), 3)
    accuracy = 0.3 + 0.08 * layers + 0.01 * np.tile([0, 1, 2], 5)
    sweep = pd.DataFrame({"layer": layers, "accuracy": accuracy, "original": 0.7, "threshold": 0.95, "images": 100})
    sweep.to_csv(pair / "sweep" / "accuracy.csv", index=False)
    log = pd.DataFrame({"overhead": [0.0, 0.01, 0.05], "mean": [0.4, 0.6, np.nan], "std": [0.02, 0.01, np.nan]})
    log.to_csv(pair / "search" / "limit-0.02" / "log.csv", index=False)
    (pair / "sensitivity").mkdir()
    columns = {"layer": [1, 1, 2, 2], "name": ["a", "a", "b", "b"], "images": 100, "clean": 0.7}
    for stage, accuracy in (("pretrain", [0.5, 0.6, 0.7, 0.7]), ("compensate", [0.6, 0.7, 0.7, 0.72])):
        table = pd.DataFrame({**columns, "accuracy": accuracy, "stage": stage})
        table.to_csv(pair / "sensitivity" / f"{stage}.csv", index=False)
    sample_file = [pair / "samples.csv"]
    aged = complete().drop(columns="sigma")
    aged = aged[aged["row"] == "correctnet"].assign(level=1.0, variation="device", model="a")
    aged = aged.groupby("sample").head(1)
    times = [aged.assign(time=time, row=f"row-{time}") for time in ("1s", "1d")]
    (pair / "aged").mkdir()
    pd.concat(times).to_csv(pair / "aged" / "samples.csv", index=False)
    return {
        "2": sample_file,
        "7": sample_file,
        "9": [pair / "sweep" / "accuracy.csv"],
        "10": [pair / "search" / "limit-0.02" / "log.csv"],
        "8": sample_file,
        "rows": sample_file,
        "yield": sample_file,
        "sensitivity": [pair / "sensitivity" / f"{stage}.csv" for stage in ("pretrain", "compensate")],
        "time": [pair / "aged" / "samples.csv"],
    }


@pytest.mark.parametrize("number", figures.FIGURES)
def test_figures_are_drawn_as_png_and_svg(files, tmp_path, number):
    figures.draw(number, files[number], tmp_path / "f.png")
    picture = np.asarray(Image.open(tmp_path / "f.png").convert("L"))
    assert picture.shape[0] > 300
    assert (picture < 128).mean() > 0.001, "an empty picture"
    first = (tmp_path / "f.svg").read_text()
    # matplotlib draws words as outlines, and says in a comment which; Figure 9 and others are titled with the pair.
    assert "<!-- vgg16-cifar100 -->" in first
    figures.draw(number, files[number], tmp_path / "f.png")
    assert (tmp_path / "f.svg").read_text() == first, "the same data give the same file"


def lines(figure):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines}


def test_figures_show_the_data(files):
    drawn = lines(figures.figure7(files["7"]))
    assert drawn["CorrectNet"] == ([0.0, 0.3, 0.5], pytest.approx([0.69, 0.685, 0.67]))
    assert drawn["original network"][1][0] == 0.7
    drawn = lines(figures.figure9(files["9"]))
    assert drawn["without compensation"][0] == [1, 2, 3, 4, 5]
    assert drawn["95% of the original accuracy"][1] == pytest.approx([0.665, 0.665])
    stars = [c for c in figures.figure2(files["2"]).axes[0].collections if c.get_label() == "paper, original network"]
    assert stars[0].get_offsets().tolist() == [[0.5, 0.0169]]
    plt.close("all")


def test_figure_7_shows_rows_trained_for_each_sigma(tmp_path):
    retrained = [
        samples(row="correctnet-sigma-0.3", sigma=sigma, accuracies=accuracies)
        for sigma, accuracies in ((0.0, [0.6]), (0.3, [0.5, 0.7]), (0.5, [0.1, 0.2]))
    ]
    pd.concat([complete(), *retrained]).to_csv(tmp_path / "s.csv", index=False)
    drawn = lines(figures.figure7([tmp_path / "s.csv"]))
    assert drawn["CorrectNet, trained for each σ"] == ([0.3, 0.5], pytest.approx([0.6, 0.67]))
    assert drawn["CorrectNet"][0] == [0.0, 0.3, 0.5]
    plt.close("all")


def test_a_sigma_beyond_the_table_s_own_is_no_row_of_it(tmp_path):
    beyond = samples(row="correctnet", sigma=0.6, accuracies=(0.3, 0.4))
    pd.concat([complete(), beyond]).to_csv(tmp_path / "s.csv", index=False)
    ax = figures.rows([tmp_path / "s.csv"]).axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["unprotected", "correctnet"]
    assert ("o", [pytest.approx(0.67)]) in [(line.get_marker(), list(line.get_xdata())) for line in ax.lines]
    assert {"unprotected", "correctnet"} <= set(lines(figures.yield_curve([tmp_path / "s.csv"])))
    plt.close("all")


def test_the_sigma_of_the_table_is_taken_if_it_is_given(tmp_path):
    """All rows have curves up to 0.5, and Table I is at 0.3."""
    at = [samples(row=row, sigma=0.3, accuracies=(0.4, 0.6)) for row in ("unprotected", "correctnet")]
    pd.concat([complete()[complete()["sigma"] != 0.3], *at]).to_csv(tmp_path / "s.csv", index=False)
    figures.draw("rows", [tmp_path / "s.csv"], tmp_path / "f.png", sigma=0.3)
    for sigma, mean in ((0.3, 0.5), (None, 0.67)):
        ax = figures.rows([tmp_path / "s.csv"], only=["correctnet"], sigma=sigma).axes[0]
        assert [list(line.get_xdata()) for line in ax.lines if line.get_marker() == "o"] == [[pytest.approx(mean)]]
    ax = figures.yield_curve([tmp_path / "s.csv"], sigma=0.3).axes[0]
    assert "σ = 0.3, 2 chips" in [text.get_text() for text in ax.texts]
    with pytest.raises(UserError, match=r"pair vgg16-cifar100 has no results at sigma 0\.4"):
        figures.draw("yield", [tmp_path / "s.csv"], tmp_path / "f.png", sigma=0.4)
    with pytest.raises(UserError, match="--sigma: figure 9"):
        figures.draw("9", [tmp_path / "s.csv"], tmp_path / "f.png", sigma=0.3)
    plt.close("all")


def test_files_of_stages_run_by_hand_have_no_pair_s_folder_above_them(tmp_path, monkeypatch):
    log = log_of_a_search(tmp_path, 0.01, [(1, 0, "", "", 0.0, 0.9, 0.1)])
    monkeypatch.chdir(log.parent)
    figures.draw("10", [Path("log.csv")], Path("f.png"))
    assert "pair" in pages.search_scatter([Path("log.csv")])
    plt.close("all")


def log_of_a_search(folder, limit, rows):
    path = folder / "pair" / "search" / f"limit-{limit:g}" / "log.csv"
    path.parent.mkdir(parents=True)
    columns = ["evaluation", "episode", "filters", "candidates", "overhead", "mean", "std"]
    pd.DataFrame(rows, columns=columns).to_csv(path, index=False)
    return path


def test_searches_without_states_without_candidates_and_of_many_limits(tmp_path):
    logs = [log_of_a_search(tmp_path, 1, [])]
    assert len(figures.figure10(logs).axes[0].containers) == 0
    logs += [log_of_a_search(tmp_path, k / 100, [(1, 0, "", "", 0.0, 0.9, 0.1)]) for k in range(1, 7)]
    assert len(figures.figure10(logs).axes[0].containers) == 6
    page = pages.search_scatter(logs[1:])
    assert "no compensation" in page
    assert "nan: nan" not in page
    plt.close("all")


def test_all_rows_show_their_mean_interval_and_clean_accuracy(files):
    ax = figures.rows(files["rows"], {"correctnet": "CorrectNet, " + 8 * "the method "}).axes[0]
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names[0] == "unprotected"
    assert names[1].replace("\n", " ") == "CorrectNet, " + "the method " * 7 + "the method"
    assert max(len(line) for line in names[1].split("\n")) <= 48
    shown = [(line.get_marker(), list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines]
    assert ("o", [pytest.approx(0.67)], [1]) in shown
    assert ("D", [0.69], [1]) in shown
    assert [line for line in shown if line[0] == "*"] == [("*", [0.0169], [0]), ("*", [0.6701], [1])], "the paper's"
    (low, _), (high, _) = ax.collections[1].get_segments()[0]
    assert (low, high) == (pytest.approx(0.67 - 4.3027 * 0.01 / 3**0.5, rel=1e-4), pytest.approx(0.67 * 2 - low))
    plt.close("all")


def test_chosen_rows_alone(tmp_path):
    without = samples("lenet5-mnist", "unprotected", 0.5, [0.9, 0.8])
    beyond = samples(row="correctnet", sigma=0.6, accuracies=(0.3, 0.4))
    pd.concat([complete(), beyond, without]).to_csv(tmp_path / "s.csv", index=False)
    axes = figures.rows([tmp_path / "s.csv"], only=["correctnet"]).axes
    assert [ax.get_title() for ax in axes] == ["vgg16-cifar100"], "the only pair that has it"
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["correctnet"]
    means = [list(line.get_xdata()) for line in axes[0].lines if line.get_marker() == "o"]
    assert means == [[pytest.approx(0.67)]], "at the sigma of the table, which the row left out has, too"
    with pytest.raises(UserError, match=r"no row 'corectnet' \(rows: unprotected, correctnet\)"):
        figures.rows([tmp_path / "s.csv"], only=["corectnet"])
    plt.close("all")


@given(st.lists(st.integers(0, 100), min_size=1, max_size=30), st.integers(0, 101))
@examples(30)
def test_the_yield_curve_is_the_fraction_of_chips_at_or_above(tmp_path_factory, correct, threshold):
    folder = tmp_path_factory.mktemp("yield")
    samples("lenet5-mnist", "unprotected", 0.5, [c / 100 for c in correct]).to_csv(folder / "s.csv", index=False)
    figure = figures.yield_curve([folder / "s.csv"])
    line = next(line for line in figure.axes[0].lines if line.get_label() == "unprotected")
    assert line.get_drawstyle() == "steps-pre"
    x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    # with "steps-pre", y[i] holds from behind x[i - 1] up to x[i]
    at = np.searchsorted(x, threshold / 100 - 1e-9)
    drawn = y[at] if at < len(y) else 0.0
    assert drawn == pytest.approx(sum(c >= threshold for c in correct) / len(correct))
    plt.close(figure)


def test_sensitivities_are_what_was_lost(files):
    figure = figures.sensitivity(files["sensitivity"])
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in figure.axes[0].containers[1::2]}
    assert heights == {
        "original network": pytest.approx([0.15, 0.0]),
        "CorrectNet": pytest.approx([0.05, -0.01]),
    }
    plt.close(figure)


def test_a_figure_of_a_row_that_is_not_there(files, tmp_path):
    complete()[complete()["row"] != "correctnet"].to_csv(files["7"][0], index=False)
    with pytest.raises(UserError, match="no row 'correctnet'"):
        figures.draw("7", files["7"], tmp_path / "f.png")
    with pytest.raises(UserError, match="no column 'overhead'"):
        figures.draw("10", files["9"], tmp_path / "f.png")


def test_only_the_figure_of_all_rows_names_them(files, tmp_path):
    with pytest.raises(UserError, match="--label: figure 7 names no rows"):
        figures.draw("7", files["7"], tmp_path / "f.png", {"correctnet": "CorrectNet"})
    with pytest.raises(UserError, match="--only: figure yield names no rows"):
        figures.draw("yield", files["yield"], tmp_path / "f.png", only=["correctnet"])
    assert not (tmp_path / "f.png").exists()


def test_a_row_without_results_at_the_sigma_is_said_and_not_left_out():
    """Without `unprotected` at the sigma, the ratio would be to another network than the text says."""
    own = complete()
    without = own[~((own["row"] == "unprotected") & (own["sigma"] == 0.5))]
    with pytest.raises(UserError, match=r"row unprotected of vgg16-cifar100 has no results at sigma 0\.5"):
        tables.table1(without, 0.5)
    assert set(tables.table1(without, 0.3)["row"]) == {"unprotected", "correctnet"}


def test_the_text_of_the_table_says_what_the_ratio_is_to():
    own = complete()
    alone = tables.table1(own[own["row"] == "correctnet"], 0.5)
    assert alone["ratio"].tolist() == pytest.approx([0.67 / 0.69])
    assert "of the row unprotected, or else of the pair's first row" in tables.markdown(alone, 0.5)


@pytest.mark.parametrize("name", ["rows", "yield", "7"])
def test_rows_that_have_no_sigma_in_common(name, tmp_path):
    own = complete()
    at = {"unprotected": 0.3, "correctnet": 0.5}
    apart = own[own["sigma"] == own["row"].map(at)]
    apart.to_csv(tmp_path / "s.csv", index=False)
    with pytest.raises(UserError, match="no sigma at which all of its rows have results; give --sigma"):
        figures.draw(name, [tmp_path / "s.csv"], tmp_path / "f.png")
    figures.draw(name, [tmp_path / "s.csv"], tmp_path / "f.png", sigma=0.5)


@pytest.mark.parametrize("name", ["8", "rows", "yield"])
@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("split", "validation", "validation images of cifar100"),
        ("seed", 1, "seed 1"),
        ("sample", 5, "chips from 5 on"),
    ],
)
def test_figures_refuse_what_the_table_does(name, column, value, message, tmp_path):
    own = complete()
    at = (own["row"] == "correctnet") & (own["sigma"] == 0.5)
    own.loc[at, column] = own.loc[at, column] + value if column == "sample" else value
    own.to_csv(tmp_path / "s.csv", index=False)
    with pytest.raises(UserError, match=f"figure: rows of vgg16-cifar100 are not comparable .*{message}"):
        figures.draw(name, [tmp_path / "s.csv"], tmp_path / "f.png")
    with pytest.raises(UserError, match=f"table: rows of vgg16-cifar100 are not comparable .*{message}"):
        tables.table1(own, 0.5)


@pytest.mark.parametrize("name", ["8", "rows", "yield"])
def test_a_chip_that_is_missing_in_between(name, tmp_path):
    own = complete().query("not (row == 'correctnet' and sigma == 0.5 and sample == 1)")
    own.to_csv(tmp_path / "s.csv", index=False)
    with pytest.raises(UserError, match="figure: row correctnet of vgg16-cifar100 lacks chip 1 and has chip 2"):
        figures.draw(name, [tmp_path / "s.csv"], tmp_path / "f.png")
