import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from correctnet.crossbar.convert import chip_of, convert, program
from correctnet.crossbar.layers import analog_layers
from correctnet.devices.lognormal import LogNormalVariation
from correctnet.errors import UserError
from correctnet.evaluation.montecarlo import EngineWarning, clean_accuracy, count_correct, evaluate
from correctnet.evaluation.results import COLUMNS, IDENTITY, Result, record
from correctnet.methods.recalibration import recalibrate
from correctnet.precision import say_once


def result(accuracies, images=1000, start=0, seed=0):
    rows = [(start + i, round(a * images), images, a, seed) for i, a in enumerate(accuracies)]
    return Result(pd.DataFrame(rows, columns=COLUMNS))


def test_every_chip_is_evaluated_on_all_images(tiny, blobs):
    analog = convert(tiny, LogNormalVariation(0.5), seed=2)
    found = evaluate(analog, blobs, 4, start=5, batch=64, progress=False)
    for i, sample in enumerate(range(5, 9)):
        program(analog, sample)
        with torch.no_grad():
            right = (analog(blobs.images).argmax(1) == blobs.labels).sum().item()
        row = found.table.iloc[i]
        assert (row["sample"], row["correct"], row["images"], row["seed"]) == (sample, right, 300, 2)
        assert row["accuracy"] == right / 300


def test_what_was_programmed_before_is_restored(tiny, blobs):
    analog = convert(tiny, LogNormalVariation(0.5))
    program(analog, 77, first_layer=1)
    evaluate(analog, blobs, 2, progress=False)
    assert (chip_of(analog).sample, chip_of(analog).first_layer) == (77, 1)
    assert clean_accuracy(analog, blobs) == clean_accuracy(tiny, blobs)


@given(st.integers(1, 6), st.integers(0, 5), st.integers(1, 300))
def test_chunks_and_batches_do_not_matter(chips, cut, batch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    images, labels = torch.randn(200, 1, 2, 2), torch.arange(200) % 3
    analog = convert(model, LogNormalVariation(1.0))
    whole = evaluate(analog, (images, labels), chips, progress=False)
    cut = min(cut, chips)
    parts = [(0, cut), (cut, chips - cut)]
    found = Result.concatenate(
        evaluate(analog, (images, labels), n, start=s, batch=batch, progress=False) for s, n in reversed(parts) if n
    )
    pd.testing.assert_frame_equal(whole.table, found.table)


def test_a_loader_of_batches(tiny, blobs):
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(blobs.images, blobs.labels), batch_size=50)
    analog = convert(tiny, LogNormalVariation(0.5))
    by_loader = evaluate(analog, loader, 3, progress=False)
    by_tensor = evaluate(analog, (blobs.images, blobs.labels), 3, progress=False)
    pd.testing.assert_frame_equal(by_loader.table, by_tensor.table)


def test_statistics_are_the_textbook_s():
    values = np.array([0.90, 0.92, 0.95, 0.91, 0.97])
    found = result(values)
    assert found.mean == pytest.approx(0.93)
    assert found.std == pytest.approx(np.sqrt(sum((values - 0.93) ** 2) / 4))
    # t(0.975, 4) = 2.776 in any table of Student's distribution
    half = 2.776445 * found.std / np.sqrt(5)
    interval = found.interval()
    assert (interval.low, interval.high) == pytest.approx((0.93 - half, 0.93 + half))
    assert found.percentile(50) == 0.92


def test_yield_has_wilson_s_interval():
    found = result([0.94, 0.95, 0.96, 0.97] * 5)
    good = found.yield_at(0.95)
    assert good.estimate == 0.75  # at or above
    # Wilson: (p + z^2/2n +- z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)
    z, n, p = 1.959964, 20, 0.75
    centre, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)
    assert (good.low, good.high) == pytest.approx(expected, rel=1e-5)


def test_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = sum(i.low <= 0.9 <= i.high for i in (result(rng.normal(0.9, 0.02, 10)).interval(0.9) for _ in range(1000)))
    assert abs(hits / 1000 - 0.9) < 4 * np.sqrt(0.9 * 0.1 / 1000)


def test_paired_comparison_is_scipy_s():
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.9, 0.05, 30), rng.normal(0.88, 0.05, 30)
    difference = result(a).minus(result(b))
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (difference.low, difference.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("other", [{"start": 1}, {"images": 500}, {"seed": 1}])
def test_only_the_same_chips_are_compared(other):
    with pytest.raises(UserError, match="same chips"):
        result([0.9, 0.8]).minus(result([0.9, 0.8], **other))


def test_one_chip_has_no_interval():
    found = result([0.9])
    assert (found.std, found.interval().estimate) == (0.0, 0.9)
    assert np.isnan([found.interval().low, found.interval().high, found.minus(result([0.8])).low]).all()
    assert str(found) == "accuracy 90.00% (1 chip, no interval) over 1 chip x 1000 images"
    assert str(found.interval()) == "0.9000 (1 chip, no interval)"
    assert "95 % CI" in str(result([0.9, 0.8]))


@pytest.mark.parametrize(
    "call",
    [
        lambda r: r.yield_at(90),
        lambda r: r.yield_at(-0.1),
        lambda r: r.yield_at(float("nan")),
        lambda r: r.yield_at(0.9, 95),
        lambda r: r.interval(95),
        lambda r: r.interval(1),
        lambda r: r.interval(0.0),
        lambda r: r.minus(r, 95),
    ],
)
def test_percent_for_a_fraction_is_refused(call):
    with pytest.raises(UserError, match="a fraction between 0 and 1 is expected"):
        call(result([0.9, 0.8]))


@pytest.mark.parametrize("q", [101, -1, float("nan")])
def test_a_percentile_beyond_100_is_refused(q):
    with pytest.raises(UserError, match="percentile: q is a number between 0 and 100"):
        result([0.9, 0.8]).percentile(q)


@pytest.mark.parametrize("name", ["data", "device", "dataset", "split", "variation", "sigma", "centre", "resample"])
def test_results_on_other_images_or_another_device_are_not_compared(name):
    one, other = (record(result([0.9, 0.8]), {name: value}) for value in ("0.5", "0.3"))
    with pytest.raises(UserError, match=rf"same chips and images: {name} is 0\.5 here and 0\.3 there$"):
        one.minus(other)
    assert one.minus(result([0.9, 0.8])).estimate == 0, "the other does not say it"
    assert record(result([0.9, 0.8]), {"model": "a"}).minus(record(result([0.9, 0.8]), {"model": "b"})).estimate == 0


def test_seeds_beyond_a_float_s_precision_are_told_apart():
    with pytest.raises(UserError, match="same chips"):
        result([0.9, 0.8], seed=2**63).minus(result([0.9, 0.8], seed=2**63 + 1))


@pytest.mark.parametrize("name", IDENTITY)
def test_chunks_of_another_evaluation_are_not_put_together(name):
    parts = [record(result([0.9], start=k), {name: value}) for k, value in enumerate(("aa", "bb"))]
    with pytest.raises(UserError, match=rf"differ in {name} \(aa, bb\)"):
        Result.concatenate(parts)
    with pytest.raises(UserError, match=rf"differ in {name} \(aa, none\)"):
        Result.concatenate([parts[0], result([0.9], start=1)])
    with pytest.raises(UserError, match=f"a column '{name}' already"):
        record(parts[0], {name: "x"})


def test_what_an_evaluation_was_of_comes_back(tmp_path):
    identity = {"std": "low", "layer": 0, "original": "no"}  # notes of one's own
    identity |= {"data": "0123456789", "device": "lognormal(sigma=0.5, centre=median)", "model": "ab12"}
    found = record(result([0.9, 0.8]), identity)
    found.to_csv(tmp_path / "r.csv")
    pd.testing.assert_frame_equal(Result.from_csv(tmp_path / "r.csv").table, found.table)


GOOD = "row,sigma,sample,correct,images,accuracy,seed\nr,0.5,0,40,50,0.8,7\nr,0.5,1,45,50,0.9,7\n"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("0.9,7\n", "0.", "line 3: no line break: the file was cut short, or edited"),
        ("0.9,7\n", "0.9,7", "line 3: no line break"),
        ("0.9,7\n", "0.9\n", "line 3: 6 cells where the header has 7 columns"),
        ("0.9,7\n", "0.9,\n", "line 3: seed: an integer that is at least 0 is expected; the cell is empty"),
        ("0.9,7\n", "0.9,7.0\n", "line 3: seed: an integer that is at least 0 is expected; '7.0' was found"),
        ("0.9,7\n", "0.9,-7\n", "line 3: seed: an integer that is at least 0 is expected; '-7' was found"),
        (",0.9,", ",,", "line 3: accuracy: a fraction between 0 and 1 is expected; the cell is empty"),
        (",0.9,", ",90.0,", "line 3: accuracy: a fraction between 0 and 1 is expected; '90.0' was found"),
        (",0.9,", ",90 %,", "line 3: accuracy: a fraction between 0 and 1 is expected; '90 %' was found"),
        (",0.9,", ",nan,", "line 3: accuracy: a fraction between 0 and 1 is expected; 'nan' was found"),
        (",0.9,", ",0.91,", "line 3: accuracy: 0.91 where correct / images is 45 / 50"),
        ("45,50,0.9", "51,50,1.0", "line 3: correct: 51 of 50 images"),
        ("45,50,0.9", "4_5,50,0.9", "line 3: correct: an integer that is at least 0 is expected; '4_5' was found"),
        ("45,50,0.9", "0,0,0.0", "line 3: images: an integer that is at least 1 is expected; '0' was found"),
        ("45,50,0.9", "18,20,0.9", "line 3: images: 20 where the lines before have 50; one evaluation is expected"),
        ("0.9,7", "0.9,8", "line 3: seed: 8 where the lines before have 7; one evaluation is expected"),
        ("r,0.5,1", "r,0.4,1", "line 3: sigma: 0.4 where the lines before have 0.5; one evaluation is expected"),
        ("r,0.5,1", "s,0.5,1", "line 3: row: s where the lines before have r; one evaluation is expected"),
        ("r,0.5,1", "r,inf,1", "line 3: sigma: a number that is at least 0 is expected; 'inf' was found"),
        ("r,0.5,1", "r,0.5,0", "line 3: sample: chip 0 occurs twice"),
        ("seed\n", "sample\n", "line 1: two columns are named 'sample'"),
    ],
)
def test_a_file_that_was_cut_or_edited_is_refused_by_line_and_column(tmp_path, before, after, message):
    path = tmp_path / "r.csv"
    path.write_text(GOOD)
    assert Result.from_csv(path).mean == pytest.approx(0.85)
    assert before in GOOD
    path.write_text(after.join(GOOD.rsplit(before, 1)))
    with pytest.raises(UserError) as caught:
        Result.from_csv(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_csv_round_trip(tmp_path):
    found = result(np.random.default_rng(0).integers(0, 1000, 20) / 1000)
    found.to_csv(tmp_path / "r.csv")
    pd.testing.assert_frame_equal(Result.from_csv(tmp_path / "r.csv").table, found.table)


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        Result.from_csv(tmp_path / "none.csv")
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="not a Monte Carlo result"):
        Result.from_csv(tmp_path / "x.csv")


def test_chunks_that_overlap_or_differ():
    with pytest.raises(UserError, match="a chip occurs twice"):
        Result.concatenate([result([0.9, 0.8]), result([0.7], start=1)])
    with pytest.raises(UserError, match="different numbers of images"):
        Result.concatenate([result([0.9]), result([0.7], start=1, images=10)])
    with pytest.raises(UserError, match=r"differ in seed \(0, 1\)"):
        Result.concatenate([result([0.9]), result([0.7], start=1, seed=1)])
    parts = [record(result([0.9], start=k), {"row": "r", "sigma": sigma}) for k, sigma in enumerate((0.5, 0.4))]
    with pytest.raises(UserError, match="differ in sigma"):
        Result.concatenate(parts)


def test_bad_calls(tiny, blobs):
    analog = convert(tiny, LogNormalVariation(0.5))
    with pytest.raises(UserError, match="at least 1"):
        evaluate(analog, blobs, 0)
    with pytest.raises(UserError, match="convert"):
        evaluate(tiny, blobs, 1)
    with pytest.raises(UserError, match="300 images and 3 labels"):
        evaluate(analog, (blobs.images, blobs.labels[:3]), 1, progress=False)
    with pytest.raises(UserError, match="many times"):
        evaluate(analog, iter([(blobs.images, blobs.labels)]), 1, progress=False)
    with pytest.raises(UserError, match="no images"):
        count_correct(tiny, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chips": 2.5}, "chips must be a whole number, not 2.5"),
        ({"chips": True}, "chips must be a whole number, not True"),
        ({"start": "3"}, "start must be a whole number, not '3'"),
        ({"start": -1}, "chips lie in"),
        ({"start": 2**32 - 1}, "chips lie in"),
        ({"first_layer": -1}, "first_layer must lie in 0 to "),
        ({"first_layer": 9}, "first_layer must lie in 0 to "),
        ({"first_layer": 0.5}, "first_layer must be a whole number"),
        ({"batch": 0}, "batch must be at least 1, not 0"),
        ({"memory": -5}, "memory must be at least 1 byte, not -5"),
        ({"chunk": 1.5}, "chunk must be a whole number"),
        ({"prepare": 3}, "int cannot be called"),
        ({"save": 3}, "the path of a file"),
        ({"save": "."}, "is a folder; the name of a file is expected"),
    ],
)
@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_arguments_that_are_refused(tiny, blobs, arguments, message, engine):
    analog = convert(tiny, LogNormalVariation(0.5))
    with pytest.raises(UserError, match=message):
        evaluate(analog, blobs, **{"chips": 2, "engine": engine, "progress": False, **arguments})


def test_variation_hurts_more_with_more_layers(tiny, blobs):
    analog = convert(tiny, LogNormalVariation(0.8))
    layers = len(analog_layers(analog))
    none = evaluate(analog, blobs, 3, first_layer=layers, progress=False)
    assert set(none.accuracies) == {clean_accuracy(tiny, blobs)}


def test_plot():
    import matplotlib.pyplot as plt

    found = result(np.random.default_rng(0).normal(0.9, 0.02, 50))
    ax = found.plot(label="mine")
    heights = [bar.get_height() for bar in ax.containers[0]]
    assert sum(heights) == 50
    plt.close(ax.figure)


@pytest.mark.parametrize("network", ["whole", "in pieces"])
def test_a_prepared_chip_is_evaluated_as_it_was_prepared(tiny, blobs, network):
    model = tiny if network == "whole" else nn.Sequential(tiny[0], nn.Softplus(), *tiny[1:])
    analog = convert(model, LogNormalVariation(0.5), seed=2)
    prepared = []

    def prepare(chip):
        prepared.append(chip_of(chip).sample)
        recalibrate(chip, blobs.images[:100])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EngineWarning)
        found = evaluate(analog, blobs, 3, start=4, prepare=prepare, progress=False)
    assert prepared == [4, 5, 6]
    plain = evaluate(convert(model, LogNormalVariation(0.5), seed=2), blobs, 3, start=4, engine="torch", progress=False)
    for sample in (4, 5, 6):
        own = convert(model, LogNormalVariation(0.5), seed=2)
        program(own, sample)
        recalibrate(own, blobs.images[:100])
        with torch.no_grad():
            right = (own(blobs.images).argmax(1) == blobs.labels).sum().item()
        assert found.table["correct"][sample - 4] == right
    assert list(found.table["correct"]) != list(plain.table["correct"])


def test_the_ways_of_a_gpu_change_nothing_on_a_cpu_and_say_so(tiny, blobs):
    analog = convert(tiny, LogNormalVariation(0.5))
    wanted = evaluate(analog, blobs, 2, progress=False)
    for method in ("fused", "materialise", "library"):
        with pytest.warns(EngineWarning, match=f"gpu_method '{method}' has no effect: the model is on the CPU"):
            found = evaluate(analog, blobs, 2, gpu_method=method, progress=False)
        pd.testing.assert_frame_equal(found.table, wanted.table)
    with pytest.raises(UserError, match="method must be one of auto, fused, materialise, library, not 'cudnn'"):
        evaluate(analog, blobs, 2, gpu_method="cudnn", progress=False)


def test_bfloat16_is_for_cpus_that_multiply_it(isa, tiny, blobs, capsys):
    say_once.cache_clear()
    analog = convert(tiny, LogNormalVariation(0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EngineWarning)  # without the core torch computes
        found, usual = (
            evaluate(analog, blobs, 6, precision=precision, progress=False) for precision in ("bfloat16", "float32")
        )
    said = capsys.readouterr()
    slow = isa in ("portable", "avx2", "avx512")
    assert (said.out + said.err).count("no instructions for bfloat16; chips are evaluated in float32") == slow
    if slow:
        assert found.table.equals(usual.table)
