"""Figure 8: what is drawn, and written beside it, is what the rows of the evaluations say."""

import subprocess
import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from test_tables_figures import samples
from workflows import configuration

from correctnet.errors import UserError
from correctnet.pipeline.config import Config
from correctnet.pipeline.layout import Layout
from correctnet.report import figures
from correctnet.report.overheads import overheads, series_label, series_of
from correctnet.report.tables import read_samples

LABELS = {
    "unprotected": "unprotected",
    "correctnet": "CorrectNet",
    "rsa-0.05": "[9] RSA, 5 %",
    "rsa-0.01": "[9] RSA, 1 %",
    "rsa-online-0.05": "[9] RSA, 5 %, online",
    "rsa-online-0.01": "[9] RSA, 1 %, online",
    "front": "first layer digital",
}
# row: overhead, digital multiplications, accuracies of the chips
ROWS = {
    "unprotected": (0.0, None, [0.50, 0.60, 0.40]),
    "correctnet": (0.02, 0.25, [0.80, 0.82, 0.84]),
    "rsa-0.05": (0.05, 0.06, [0.52, 0.62, 0.48]),
    "rsa-0.01": (0.01, 0.012, [0.51, 0.60, 0.42]),
    "rsa-online-0.05": (0.05, 0.06, [0.90, 0.92]),
    "rsa-online-0.01": (0.01, 0.012, [0.70, 0.76]),
    "front": (0.003, 0.15, [0.77, 0.75, 0.79]),
}


def table(pair="lenet5-mnist", rows=ROWS):
    parts = []
    for row, (overhead, macs, accuracies) in rows.items():
        more = {} if macs is None else {"digital_macs": macs}
        online = "online" in row
        more |= {"adapt_images": 54000, "adapt_passes": 1} if online else {}
        part = samples(pair, row, 0.5, accuracies, overhead=overhead, layers=0, **more)
        parts.append(part.assign(adapt_seconds=[2.0, 4.0]) if online else part)
        parts.append(samples(pair, row, 0.0, [0.95], overhead=overhead, layers=0))
    return pd.concat(parts, ignore_index=True)


@pytest.fixture
def file(tmp_path):
    table().to_csv(tmp_path / "samples.csv", index=False)
    return tmp_path / "samples.csv"


def drawn(figure):
    """By panel and label: (points, half lengths of the error bars, filled, joined)."""
    found = []
    for ax in figure.axes:
        panel = {}
        for container in ax.containers:
            line, _, (bars,) = container
            halves = [float(np.ptp(segment[:, 1]) / 2) for segment in bars.get_segments()]
            points = [tuple(map(float, point)) for point in line.get_xydata()]
            filled = line.get_markerfacecolor() == line.get_color()
            assert filled or line.get_markerfacecolor() == "white"
            panel[container.get_label()] = (points, halves, filled, line.get_linestyle() != "None")
        found.append(panel)
    return found


def test_each_point_is_a_row_at_its_overhead_with_the_deviation_of_its_chips(file):
    figure = figures.figure8([file], LABELS)
    weights, multiplications = drawn(figure)
    expected = {
        "unprotected": (["unprotected"], False, False),
        "CorrectNet": (["correctnet"], False, False),
        "[9] RSA": (["rsa-0.01", "rsa-0.05"], False, True),
        "[9] RSA (on each chip)": (["rsa-online-0.01", "rsa-online-0.05"], True, True),
        "first layer digital": (["front"], False, False),
    }
    for panel, column in ((weights, 0), (multiplications, 1)):
        assert set(panel) == set(expected)
        for label, (rows, filled, joined) in expected.items():
            points = [(100 * (ROWS[row][column] or 0.0), np.mean(ROWS[row][2])) for row in rows]
            halves = [np.std(ROWS[row][2], ddof=1) for row in rows]
            assert panel[label][0] == [pytest.approx(point) for point in points]
            assert panel[label][1] == pytest.approx(halves)
            assert panel[label][2:] == (filled, joined)
    assert "2 or 3 chips, 100 images" in [text.get_text() for text in figure.axes[0].texts]
    assert {text.get_text() for text in figure.legends[0].get_texts()} == set(expected)
    plt.close(figure)


def test_a_method_has_one_colour_trained_on_the_chips_or_not(file):
    figure = figures.figure8([file], LABELS)
    colours = {}
    for container in figure.axes[0].containers:
        colours.setdefault(container[0].get_color(), set()).add(container.get_label())
    assert sorted(map(len, colours.values())) == [1, 1, 1, 2]
    assert {"[9] RSA", "[9] RSA (on each chip)"} in colours.values()
    plt.close(figure)


def test_the_table_beside_the_figure_has_the_same_values(file, tmp_path):
    command = [sys.executable, "-m", "correctnet.cli", "figure", "8", str(file), "--label", "front=the first layer"]
    subprocess.run([*command, "--out", str(tmp_path / "f.png")], check=True)
    assert (tmp_path / "f.svg").exists()
    found = pd.read_csv(tmp_path / "f.csv").set_index("row")
    assert list(found.index) == list(ROWS)
    for row, (overhead, macs, accuracies) in ROWS.items():
        own = found.loc[row]
        assert own["overhead"] == overhead
        assert own["digital_macs"] == (macs or 0.0)
        assert own["mean"] == pytest.approx(np.mean(accuracies))
        assert own["std"] == pytest.approx(np.std(accuracies, ddof=1))
        assert own["chips"] == len(accuracies)
        assert own["online"] == ("online" in row)
    # t(0.975, 1) = 12.7062
    half = 12.7062 * np.std([0.90, 0.92], ddof=1) / np.sqrt(2)
    assert found.loc["rsa-online-0.05", "ci_high"] == pytest.approx(0.91 + half, rel=1e-4)
    assert found.loc["rsa-online-0.05", ["adapt_images", "adapt_passes", "adapt_seconds"]].tolist() == [54000, 1, 3.0]
    assert np.isnan(found.loc["rsa-0.05", "adapt_images"])
    assert found.loc["front", "label"] == "the first layer"


def test_chosen_rows_alone(file):
    samples_ = read_samples([file])
    assert list(overheads(samples_, only=["front", "correctnet"])["row"]) == ["correctnet", "front"]
    with pytest.raises(UserError, match="no row 'fron'"):
        overheads(samples_, only=["fron"])


def test_rows_whose_multiplications_were_not_counted_are_said_and_not_drawn_at_zero(tmp_path):
    own = table()
    own.loc[own["row"] == "front", "digital_macs"] = np.nan
    own.to_csv(tmp_path / "s.csv", index=False)
    figure = figures.figure8([tmp_path / "s.csv"], LABELS)
    weights, multiplications = drawn(figure)
    assert "first layer digital" in weights
    assert "first layer digital" not in multiplications
    assert "1 of 7 rows not counted" in [text.get_text() for text in figure.axes[1].texts]
    plt.close(figure)


def test_each_pair_has_its_own_panels(tmp_path):
    pd.concat([table(), table("lenet5-cifar10", {"unprotected": ROWS["unprotected"]})]).to_csv(
        tmp_path / "s.csv", index=False
    )
    figure = figures.figure8([tmp_path / "s.csv"])
    assert [len(panel) for panel in drawn(figure)] == [5, 5, 1, 1]
    assert [ax.get_title() for ax in figure.axes[::2]] == ["lenet5-mnist", "lenet5-cifar10"]
    plt.close(figure)


def test_rows_of_other_chips_are_refused(tmp_path):
    own = table()
    own.loc[(own["row"] == "front") & (own["sigma"] > 0), "sample"] += 1
    own.to_csv(tmp_path / "s.csv", index=False)
    with pytest.raises(UserError, match="figure: rows of lenet5-mnist are not comparable"):
        figures.figure8([tmp_path / "s.csv"])


def test_series():
    assert [series_of(row) for row in ("rsa-0.05", "rsa-online-5", "rsa", "injected-0.4", "correctnet-t99")] == [
        "rsa",
        "rsa-online",
        "rsa",
        "injected",
        "correctnet-t99",
    ]
    assert series_label(["RSA, online, 1 %", "RSA, online, 5 %"], "rsa") == "RSA, online"
    assert series_label(["one", "two"], "rsa") == "rsa"
    assert series_label(["RSA, 1 %"], "rsa") == "RSA, 1 %"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], []),
        (["mean-preserving"], []),
        (["injected"], ["one"]),
        (["front"], ["one"]),
        (["rsa"], ["one"]),
        (["front-correctnet"], []),
    ],
)
def test_runs_with_correctnet_and_a_rival_end_with_it(rows, expected):
    config = configuration()
    config["rows"] |= {
        "front": {"evaluate": "pretrain", "label": "f", "set": {"digital": {"front": 1}}},
        "rsa": {"evaluate": "pretrain", "label": "r", "set": {"protect": {"fraction": 0.1}}},
        "front-correctnet": {"evaluate": "compensate", "label": "c", "set": {"digital": {"front": 1}}},
    }
    config["pairs"]["one"]["rows"] = ["unprotected", "correctnet", *rows]
    layout = Layout(Config.check(config))
    assert layout.compared_pairs("both") == expected
    assert ("8" in layout.figures("both")) == bool(expected)
    assert ("results/summary/both/figure-8.png" in layout.shown("both")) == bool(expected)
    if expected:
        job = SimpleNamespace(run="both", name="8")
        assert layout.figure_inputs(job) == ["results/one/samples.csv"]
        assert layout.figure_options(job).startswith("--sigma 0.5 --labels ")


def test_rows_that_are_calibrated_on_each_chip_are_filled_as_well(tmp_path):
    own = table(rows={"unprotected": ROWS["unprotected"], "front": ROWS["front"]})
    own["calibrate_images"] = own["row"].map({"front": 10})
    own.to_csv(tmp_path / "s.csv", index=False)
    found = overheads(read_samples([tmp_path / "s.csv"])).set_index("row")
    assert found["online"].to_dict() == {"unprotected": False, "front": True}
    assert found.loc["front", "calibrate_images"] == 10


def test_rows_that_are_mapped_to_each_chip_are_filled_as_well(tmp_path):
    own = table(rows={"unprotected": ROWS["unprotected"], "front": ROWS["front"]})
    own.loc[(own["row"] == "front") & (own["sigma"] > 0), "mapping"] = "rows"
    own.to_csv(tmp_path / "s.csv", index=False)
    found = overheads(read_samples([tmp_path / "s.csv"])).set_index("row")
    assert found["online"].to_dict() == {"unprotected": False, "front": True}
