"""The benchmark's parts: the plain loop computes what it should, the search finds the fastest, rows are complete."""

import copy
import itertools
import json
import math

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_profile import examples
from torch import nn

from correctnet.bench import baseline, gpu_timing, gpu_training, report, workloads
from correctnet.bench import cpu as bench
from correctnet.bench import gpu as bench_gpu
from correctnet.cli import main
from correctnet.errors import UserError
from correctnet.files import storage
from correctnet.networks.lenet import lenet5
from correctnet.noise import core, draw

needs_core = pytest.mark.skipif(not core.status().built, reason="the C++ core was not built")

KINDS = ("float32", "autocast", "bf16")
TINY = workloads.Workload("tiny", lenet5, (1, 32, 32), 3, 70)


@pytest.fixture
def data():
    return TINY.data(0)


def weights(network: nn.Module) -> list[torch.Tensor]:
    return [m.weight for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


# ---- the plain loop -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_those_of_the_weights_drawn(lenet, data, kind, channels_last):
    images, labels = data
    chips = baseline.Chips(lenet, images, labels, baseline.Variant(kind, channels_last, 32), seed=5)
    for _ in range(2):
        (found,) = chips.run(1)
        twin = copy.deepcopy(lenet).double()
        for weight, drawn in zip(weights(twin), weights(chips.network), strict=True):
            assert not torch.equal(weight.float(), drawn.float())
            weight.data = drawn.detach().double()
        with torch.no_grad():
            logits = twin(images.double())
        # Rounding decides where the two largest outputs nearly agree; there is one such image in hundreds.
        top = logits.topk(2).values
        near = (top[:, 0] - top[:, 1] < (1e-5 if kind == "float32" else 2e-2) * top[:, 0].abs()).sum().item()
        assert abs(found - (logits.argmax(1) == labels).sum().item()) <= near
        assert kind != "float32" or near == 0


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_chips_are_drawn_from_the_nominal_weights(lenet, data, kind, channels_last):
    chips = baseline.Chips(lenet, *data, baseline.Variant(kind, channels_last, 64), seed=5)
    for _ in range(3):  # a second chip does not add to the first
        chips.draw()
    theta = [
        (drawn.double() / nominal.double()).log().flatten()
        for drawn, nominal in zip(weights(chips.network), weights(lenet), strict=True)
    ]
    theta = torch.cat(theta)
    assert abs(theta.mean()) < 5 * workloads.SIGMA / math.sqrt(len(theta))
    assert abs(theta.std() / workloads.SIGMA - 1) < 5 / math.sqrt(2 * len(theta))


def test_what_is_left_out_is_not_done(lenet, data):
    chips = baseline.Chips(lenet, *data, baseline.Variant("float32", True, 64), seed=5)
    chips.draw()
    before = [w.clone() for w in weights(chips.network)]
    assert len(set(chips.run(3, draw=False))) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, weights(chips.network), strict=True))
    assert chips.run(2, classify=False) == []
    assert not any(torch.equal(a, b) for a, b in zip(before, weights(chips.network), strict=True))


def test_chips_at_once_are_different_chips(lenet, data):
    plain = baseline.Plain(lenet, *data, baseline.Variant("float32", False, 64, at_once=3), threads=3, seed=0)
    assert len(plain.run(7)) == 7
    drawn = [weights(worker.network)[0] for worker in plain._workers]
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.get_num_threads() == 1


# ---- the choice -----------------------------------------------------------------------------------------------------


@examples(50)
@given(st.data())
def test_select_finds_the_fastest(data):
    """Rates that are products of what each choice gives, with one best batch size."""
    batches = data.draw(st.lists(st.integers(1, 5000), min_size=1, max_size=4, unique=True).map(sorted))
    best_batch = data.draw(st.sampled_from(range(len(batches))))
    factor = st.sampled_from([0.5, 0.9, 1.1, 3.0])
    at_once = data.draw(st.sampled_from([1, 2, 16]))
    compiles = data.draw(st.booleans())
    of_kind = {(k, order): data.draw(factor) for k in KINDS for order in (False, True)}
    compiled, chips = data.draw(factor), data.draw(factor)

    def rate(v: baseline.Variant) -> float:
        distance = abs(batches.index(v.batch) - best_batch)
        return of_kind[v.kind, v.channels_last] * compiled**v.compiled * chips ** (v.at_once > 1) * 0.8**distance

    every = [
        baseline.Variant(kind, order, batch, comp, at)
        for kind, order, batch, comp, at in itertools.product(
            KINDS, (False, True), batches, {False, compiles}, {1, at_once}
        )
    ]
    found = baseline.select(rate, batches, compiles, at_once)
    assert set(found) == {"bf16", "float32"}
    for precision, (variant, speed) in found.items():
        assert variant in every
        assert variant.precision == precision
        assert speed == pytest.approx(rate(variant))
        assert speed == pytest.approx(max(rate(v) for v in every if v.precision == precision))


def test_select_measures_the_fastest_again():
    """A variant that was lucky once is not taken."""
    lucky = baseline.Variant("float32", False, 64)
    seen = []

    def rate(v: baseline.Variant) -> float:
        seen.append(v)
        if v == lucky:
            return 10.0 if seen.count(v) == 1 else 1.0
        return 6.0

    assert baseline.select(rate, [64], False, 1)["float32"][0] == baseline.Variant("float32", True, 64)


# ---- the rows -------------------------------------------------------------------------------------------------------

KEYS = {"work", "precision", "against", "ratio", "fraction_of_limit", "cpu", "threads"}


@pytest.fixture(scope="module")
def measured():
    if not core.status().built:
        pytest.skip("the C++ core was not built")
    said = []
    result = bench.measure([TINY], rounds=2, batches=(32, 64), compiles=False, seconds=0.01, log=said.append)
    assert any("round 2 of 2" in line for line in said)
    result["rows"] += [{**row, "cpu": result["cpu"]} for row in bench.scaling_rows(1, 1, 0, print, chips=4, images=64)]
    return result


def test_rows_of_a_work(measured, tmp_path):
    storage.write_json(tmp_path / "b.json", measured)
    read = json.loads((tmp_path / "b.json").read_text())
    assert {"cpu", "isa", "threads", "torch", "peak_flop_per_s"} <= set(read)
    for work in ("tiny", "noise"):
        rows = [row for row in read["rows"] if row["work"] == work]
        assert len(rows) == 6
        assert all(set(row) >= KEYS for row in rows)
        pairs = {(row["precision"], row["against"]) for row in rows}
        assert pairs == set(itertools.product(("bf16", "float32"), ("best", "bf16", "float32")))
        unit = "weights_per_s" if work == "noise" else "images_per_s"
        by_pair = {(row["precision"], row["against"]): row for row in rows}
        for (precision, _), row in by_pair.items():
            assert row["ratio"] == pytest.approx(row[unit] / row[f"plain_{unit}"])
            # The best loop is that against which the engine wins by least.
            least = min(by_pair[precision, against]["ratio"] for against in ("bf16", "float32"))
            assert by_pair[precision, "best"]["ratio"] == least
    kinds = {row["kind"]: row for row in read["rows"] if row["work"] == "noise kinds"}
    assert list(kinds) == ["lognormal", "lognormal, protected", "Gaussian", "Gaussian, stuck devices"]
    for row in kinds.values():
        assert row["relative_time"] == pytest.approx(kinds["lognormal"]["weights_per_s"] / row["weights_per_s"])
    for row in read["rows"]:
        if row["work"] == "tiny":
            assert row["chips"] == 3
            assert row["images"] == 70
            assert row["fraction_of_limit"] == pytest.approx(row["images_per_s"] / row["limit_images_per_s"])
            assert row["ratio_low"] <= row["ratio_high"]


@needs_core
def test_limit_counts_operations_and_weights(lenet):
    """LeNet-5 without padding: 2 * 416,520 FLOP an image; 61,470 weights a chip, drawn once for each 1,024 images."""
    machine = bench.Machine.__new__(bench.Machine)
    machine.threads, machine.peak, machine.weights = 4, {"float32": 1e9}, {"float32": 1e6}
    work = workloads.Workload("w", lenet5, (1, 32, 32), 10, 3000)
    analog = bench.convert(lenet, bench.LogNormalVariation(0.5))
    multiplications = 28 * 28 * 6 * 25 + 10 * 10 * 16 * 150 + 400 * 120 + 120 * 84 + 84 * 10
    wanted = 10 * 3000 * 2 * multiplications / 1e9 + 10 * 3 * 61470 / (4 * 1e6)
    assert bench.limit_of(work, analog, torch.zeros(2, 1, 32, 32), machine, "float32") == pytest.approx(wanted)


def test_scaling_rows(measured):
    rows = [row for row in measured["rows"] if row["work"] == "scaling"]
    points = {axis: [(r["chips"], r["images"]) for r in rows if r["axis"] == axis] for axis in ("samples", "images")}
    assert points["samples"] == [(1, 64), (2, 64), (4, 64), (8, 64), (16, 64)]
    assert points["images"] == [(4, 16), (4, 32), (4, 64), (4, 128), (4, 256)]
    assert [r["threads"] for r in rows if r["axis"] == "threads"] == [1]
    assert all(r["images_per_s"] == pytest.approx(r["chips"] * r["images"] / r["seconds"]) for r in rows)


def test_table_and_plots(measured, tmp_path):
    text = report.table(measured)
    assert "tiny: 3 chips × 70 images" in text
    assert "noise" in text
    assert "Gaussian, stuck devices" in text
    assert max(map(len, text.splitlines())) <= 130
    report.check_plot(tmp_path / "p.svg")
    assert report.plot(measured, tmp_path / "p.svg") == [tmp_path / "p.svg", tmp_path / "p-scaling.svg"]
    assert "<svg" in (tmp_path / "p-scaling.svg").read_text()
    with pytest.raises(UserError, match=r"--plot .*p\.txt: the name must end"):
        report.check_plot(tmp_path / "p.txt")


@needs_core
def test_no_rounds_is_an_error():
    with pytest.raises(UserError, match="at least one round"):
        bench.measure([], rounds=0)


def test_without_the_core(monkeypatch):
    monkeypatch.setattr(core, "extension", None)
    with pytest.raises(UserError, match="nothing to measure"):
        bench.measure([])


# ---- the peak -------------------------------------------------------------------------------------------------------

# Multiply-adds of a round: sums in registers, floats of a register, and products in each of them.
ROUNDS = {
    ("portable", "float32"): 12 * 4,
    ("portable", "bfloat16"): 12 * 4,
    ("avx2", "float32"): 12 * 8,
    ("avx2", "bfloat16"): 12 * 8,
    ("avx512", "float32"): 24 * 16,
    ("avx512", "bfloat16"): 24 * 16,
    ("avx512bf16", "float32"): 24 * 16,
    ("avx512bf16", "bfloat16"): 24 * 16 * 2,
    ("amx", "float32"): 24 * 16,
    ("amx", "bfloat16"): 4 * 16 * 16 * 32,
}


@needs_core
@pytest.mark.parametrize(("isa", "precision"), ROUNDS)
def test_peak_counts_its_operations(isa, precision):
    if isa not in core.status().available:
        pytest.skip(f"this machine has no {isa}")
    before = core.status().isa
    core.extension.select_isa(isa)
    try:
        for repetitions in (1, 1000):
            assert core.extension.peak(precision, repetitions) == 2 * ROUNDS[isa, precision] * repetitions
    finally:
        core.extension.select_isa(before)


@needs_core
def test_peak_rejects_what_it_does_not_know():
    with pytest.raises(ValueError, match="repetitions must be at least 1"):
        core.extension.peak("float32", 0)
    with pytest.raises(ValueError, match="'float16'"):
        core.extension.peak("float16", 1)


# ---- the command ----------------------------------------------------------------------------------------------------


def test_command_line():
    result = CliRunner().invoke(main, ["bench", "--help"])
    assert result.exit_code == 0
    for name in [
        *workloads.WORKLOADS,
        "noise",
        "--rounds",
        "--threads",
        "--full",
        "--json",
        "--plot",
        "--seed",
        "--scaling",
    ]:
        assert name in result.output
    result = CliRunner().invoke(main, ["bench", "--work", "noise", "--plot", "p.txt"])
    assert result.exit_code == 2
    assert result.output.startswith("error: --plot p.txt")


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cuda", "--work", "noise"], "noise is measured on the CPU"),
        (["--device", "cuda", "--scaling"], "--plot and --scaling are for the CPU's measurements"),
        (["--work", "vgg16-250x10000"], "vgg16-250x10000 is measured on a GPU (--device cuda)"),
    ],
)
def test_works_belong_to_a_device(options: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["bench", *options])
    assert result.exit_code == 2 or isinstance(result.exception, UserError)
    assert message in result.output + str(result.exception)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_bench_says_so() -> None:
    with pytest.raises(UserError, match="bench --device cuda: "):
        bench_gpu.measure(())


@pytest.fixture
def on_the_cpu(monkeypatch):
    """The measurements of a GPU with the CPU in its place: all of them but CUDA graphs, and times that mean nothing."""

    def seconds(work, at_least=0.0):
        work()
        return 1.0

    def noisy_weight(weight, seed, samples, layer, sigma):
        return draw.noisy_weight(weight, seed, layer, samples[0], sigma)[None]

    monkeypatch.setattr(gpu_timing, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_timing, "seconds", seconds)
    monkeypatch.setattr(bench_gpu, "CROSSOVER_IMAGES", (2, 4))
    monkeypatch.setattr(gpu_training.gpu, "noisy_weight", noisy_weight)


MEASURED = {
    "device": "a card",
    "torch": "2",
    "cuda": "13",
    "architectures": "80-real, 90",
    "sigma": 0.5,
    "matmul_flop_per_s": {"bf16": 7e14, "float32": 4e14},
}


@needs_core
def test_the_measurements_of_a_gpu_run(on_the_cpu) -> None:
    said = []
    rows = bench_gpu.workload_rows(TINY, {"bf16": 1e12, "float32": 1e12}, 1, 0, False, said.append)
    ways = [(p, m) for p in ("bf16", "float32") for m in ("fused", "materialise", "library")]
    assert [(row["precision"], row["method"]) for row in rows] == ways
    flop = 2 * (28 * 28 * 6 * 25 + 10 * 10 * 16 * 150 + 400 * 120 + 120 * 84 + 84 * 10)
    assert all(row["images_per_s"] == 3 * 70 for row in rows)
    assert all(row["fraction_of_peak"] == pytest.approx(3 * 70 * flop / 1e12) for row in rows)
    rows += bench_gpu.crossover_rows(0, 1, said.append, chips=1)
    assert [row["images_per_s"] for row in rows if row["work"] == "crossover"] == [2.0] * 3 + [4.0] * 3
    text = bench_gpu.table({**MEASURED, "rows": rows})
    assert "Crossover: library is faster than fused not up to the most images measured." in text


@needs_core
@pytest.mark.slow
def test_ways_of_training_are_measured(on_the_cpu, monkeypatch) -> None:
    made = gpu_training.Trainer

    def trainer(network, filters, x, y, way, seed):
        if way.compiled and way.noise == "kernels":
            raise RuntimeError("no compiler\nmore of it")
        return made(network, filters, x, y, gpu_training.Way(way.noise), seed)

    monkeypatch.setattr(gpu_training, "Trainer", trainer)
    rows = gpu_training.training_rows(0, 1, print, batch=2, steps=1)
    assert [row["way"] for row in rows] == ["fit", "the kernels' noise, eager"]
    assert set(rows[0]["plain"]) == {"torch's noise, eager", "torch's noise, torch.compile"}
    assert rows[0]["ratio"] == 1
    text = bench_gpu.table({**MEASURED, "rows": rows})
    assert "| fit | 1.0 | 1.00 |" in text
    assert "| the kernels' noise, torch.compile | does not work: no compiler" in text


@needs_core
@pytest.mark.parametrize("noise", ["kernels", "torch"])
def test_a_step_of_training_is_on_a_fresh_chip_and_trains_compensators_alone(on_the_cpu, lenet, noise) -> None:
    x, y = workloads.Workload("t", lenet5, (1, 32, 32), 1, 8).data(0)
    trainer = gpu_training.Trainer(lenet, {"conv1.layer": 3}, x, y, gpu_training.Way(noise), seed=9)
    before = [p.detach().clone() for p in trainer.parameters]
    drawn = [w.detach().clone() for w in trainer.weights]
    trainer.run(1)
    assert all(not torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))
    theta = []
    for i, (old, weight, nominal) in enumerate(zip(drawn, trainer.weights, weights(lenet), strict=True)):
        assert not torch.equal(old, weight)
        theta.append((weight.double() / nominal.double()).log().flatten())
        if noise == "kernels":  # three steps to begin with, and one
            assert torch.equal(weight, draw.noisy_weight(nominal, 9, i, 4, workloads.SIGMA))
    theta = torch.cat(theta)
    assert abs(theta.mean()) < 5 * workloads.SIGMA / math.sqrt(len(theta))
    assert abs(theta.std() / workloads.SIGMA - 1) < 5 / math.sqrt(2 * len(theta))


@pytest.mark.parametrize(
    ("library", "wanted"),
    [([1, 1, 1], None), ([3, 3, 3], 16), ([1, 3, 3], 64), ([3, 1, 3], 256), ([1, 3, 1], None), ([2, 2, 2.5], 256)],
)
def test_the_crossover_is_where_the_library_is_faster_from_then_on(library: list[float], wanted: int | None) -> None:
    rows = [{"work": "vgg16-64x64", "method": "library", "images": 1, "images_per_s": 9.0}]
    for images, rate in zip((64, 256, 16), (library[1], library[2], library[0]), strict=True):  # in any order
        rows += [
            {"work": "crossover", "method": m, "images": images, "images_per_s": r}
            for m, r in (("fused", 2), ("materialise", 9), ("library", rate))
        ]
    assert bench_gpu.crossover(rows) == wanted
    assert bench_gpu.crossover(rows, "materialise") == 16
    assert bench_gpu.crossover([]) is None


def test_the_table_of_a_gpu() -> None:
    row = {"work": "vgg16-64x64", "precision": "bf16", "method": "fused", "images_per_s": 1e5, "ratio": 3.0}
    row |= {"fraction_of_peak": 0.4, "plain": "bf16 network, CUDA graph", "plain_images_per_s": 33333.0}
    crossing = [
        {"work": "crossover", "method": m, "images": 64, "images_per_s": r}
        for m, r in (("fused", 2e3), ("materialise", 1e3), ("library", 3e3))
    ]
    training = {"work": "training", "batch": 128, "way": "the kernels' noise, CUDA graph", "steps_per_s": 90.0}
    training |= {"ratio": 1.5, "plain_steps_per_s": 60.0, "against": "torch's noise, CUDA graph", "failed": {}}
    training |= {"plain": {"torch's noise, CUDA graph": 60.0, "torch's noise, eager": 30.0}}
    text = bench_gpu.table({**MEASURED, "rows": [row, *crossing, training]})
    assert "| vgg16-64x64 | bf16, fused | 100,000 | 3.0 | 40% | bf16 network, CUDA graph | 33,333 |" in text
    assert "| 64 | 2,000 | 1,000 | 3,000 |" in text
    assert "Crossover: library is faster than fused from 64 images a chip on." in text
    assert "Crossover: materialise is faster than fused not up to the most images measured." in text
    assert "| the kernels' noise, CUDA graph | 90.0 | 1.50 |" in text
    assert "| torch's noise, eager | 30.0 | 0.50 |" in text
