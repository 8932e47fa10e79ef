"""`correctnet device`, and the example of the documentation."""

from __future__ import annotations

import io
import re
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from by_hand import run, succeed

from correctnet.devices.device import Device
from correctnet.devices.presets import PRESETS
from correctnet.evaluation.montecarlo import EngineWarning
from correctnet.networks.building import build
from correctnet.report import devices as report

DOCS = Path(__file__).parent.parent / "docs" / "devices.md"


def line_of(*arguments: object) -> str:
    result = run("device", *arguments)
    assert result.exit_code == 2, result.output
    (line,) = (text for text in result.output.splitlines() if text.lower().startswith("error"))
    return line


def test_presets_are_listed_with_their_sources():
    listed = succeed("device", "list").output
    for name, preset in PRESETS.items():
        assert f"{name}: {preset.source}" in listed


def test_states_of_a_preset():
    shown = succeed("device", "rram-wan-2022", "--time", "1d").output
    assert "Wan et al., Nature 608" in shown
    assert "cell pair, 0 to 40 uS, scale by layer, after 1d" in shown
    rows = [line.split() for line in shown.splitlines() if line.startswith("   ") and line.endswith("%")]
    assert [row[0] for row in rows] == ["0", "4", "10", "20", "30", "40"]
    # Far from 0 a deviation is the measured one, 9.77 % and 6.63 % at a half and at the whole range.
    assert (rows[3][-1], rows[5][-1]) == ("9.77%", "6.63%")


def test_levels_of_a_file_and_a_plot(tmp_path):
    path, plot = tmp_path / "own.csv", tmp_path / "own.svg"
    path.write_text("level,mean_uS,std_uS\n0,10,0.1\n1,20,0.3\n2,40,0.6\n")
    shown = succeed("device", path, "--stuck-off", "0.02", "--clip", "2.5", "--plot", plot).output
    assert "own.csv: measurements" in shown
    assert "clipped at 2.5 rms, 3 levels, right after programming, stuck off 0.02, on 0" in shown
    assert [line.split()[-1] for line in shown.splitlines() if line.endswith("%")] == ["0.33%", "1.00%", "2.00%"]
    options = ["--stuck-off", "0.02", "--clip-rms", "2.5", "--level", "1"]  # as the stages have them
    assert succeed("device", path, *options).output == shown
    assert plot.read_text().startswith("<?xml")


def test_layers_of_a_model(tmp_path):
    network = build("lenet5", classes=10, channels=1, seed=1).eval()
    device = Device.preset("pcm-nandakumar-2019", scale="output")
    rows = {name: rest for name, *rest in report.layers(device, network)}
    assert list(rows) == ["conv1.layer", "conv2.layer", "linear1.layer", "linear2.layer", "linear3.layer"]
    weight = network.conv1.layer.weight.detach()
    crest, mean, deviation, bound = rows["conv1.layer"]
    largest = weight.abs().flatten(1).amax(1).double()
    assert crest == pytest.approx((largest / weight.double().square().mean().sqrt()).mean().item())
    assert bound == pytest.approx(device.bound(weight))
    assert bound == pytest.approx(1 / (mean + 3 * deviation))
    text = report.layers_text(device, network)
    assert f"{bound:.4f}" in text


def test_layers_of_a_saved_model(tmp_path):
    from by_hand import every_stage

    every_stage(tmp_path)
    shown = succeed("device", "rram-milo-2021", tmp_path / "pretrain").output
    assert "conv1" in shown
    assert shown.count("\n") > 10


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["memristor"], "neither a file nor a preset (pcm-nandakumar-2019"),
        (["none.csv"], "none.csv: no such file"),
        (["rram-wan-2022", "--unit", "uS"], "--unit: rram-wan-2022 is a preset"),
        (["rram-wan-2022", "--time", "1h"], "measured after 1s, 1d, 2d"),
        (["rram-wan-2022", "--g-max", "50"], "outside of what was measured"),
        (["rram-wan-2022", "--stuck-off", "0.7", "--stuck-on", "0.4"], "sum to more than 1"),
        (["rram-wan-2022", "--plot", "p.txt"], "--plot p.txt"),
        (["rram-wan-2022", "none"], "none"),
    ],
)
def test_mistakes_are_one_line(arguments, what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert what in line_of(*arguments)


def test_the_example_of_the_documentation_runs_in_the_kernels():
    text = DOCS.read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- example -->\n```python[^\n]*\n(.*?)```", text, re.DOTALL)
    body = [line for line in code.splitlines() if line.strip() and not line.startswith(("from ", "import ", "@"))]
    assert len(body) <= 20
    names = {"network": build("lenet5", classes=10, channels=1, seed=1).eval()}
    names |= {"images": torch.randn(30, 1, 32, 32), "labels": torch.arange(30) % 10, "__name__": "example"}
    said = io.StringIO()
    with warnings.catch_warnings(), redirect_stdout(said):
        warnings.simplefilter("error", EngineWarning)
        exec(compile(code, str(DOCS), "exec", dont_inherit=True), names)
    assert "20 chips" in said.getvalue()
    device, weight = names["NoisyLevels"](levels=8), torch.linspace(-1, 1, 2000).view(40, 50)
    mean = device.moments(weight).mean
    assert len(mean.float().unique()) == 8
    assert (mean - weight).abs().max() <= weight.abs().max() / 7 + 1e-6


def test_the_table_of_the_documentation_is_that_of_the_presets():
    text = DOCS.read_text(encoding="utf-8")
    parts = torch.tensor([0, 0.1, 0.25, 0.5, 1], dtype=torch.float64)
    for name in PRESETS:
        measured = Device.preset(name).programming
        _, std = measured.gaussian(measured.low + (measured.high - measured.low) * parts)
        numbers = ", ".join(f"{100 * s / (measured.high - measured.low):.2f}" for s in std.tolist())
        (row,) = (line for line in text.splitlines() if line.startswith(f"| `{name}`"))
        assert numbers in row, name
