"""Files of measurements: three forms, units, and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from correctnet.devices.device import Device
from correctnet.devices.measured import MeasurementWarning
from correctnet.errors import UserError


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "device.csv"
    path.write_text(text)
    return path


def read(tmp_path: Path, text: str, **options: object) -> Device:
    with warnings.catch_warnings():
        warnings.simplefilter("error", MeasurementWarning)
        return Device.from_csv(write(tmp_path, text), **options)


def test_summary(tmp_path):
    device = read(tmp_path, "level,mean_uS,std_uS,count\n0,2,0.1,100\n1,9,0.2,100\n2,20,0.4,100\n")
    table = device.programming
    assert (table.unit, table.low, table.high, table.levels) == ("uS", 2, 20, (2, 9, 20))
    assert (table.means, table.stds) == ((2, 9, 20), (0.1, 0.2, 0.4))
    # Only the levels exist: 0.3 of the range is 7.4 uS, nearest to 9.
    mean, std = device.curve(torch.tensor([0.3, 1.0], dtype=torch.float64))
    np.testing.assert_allclose(mean, [(9 - 2) / 18, 1], rtol=1e-9)
    np.testing.assert_allclose(std, [np.hypot(0.2, 0.1) / 18, np.hypot(0.4, 0.1) / 18], rtol=1e-9)
    assert device.describe()["model"] == "device.csv"
    with pytest.raises(UserError, match=r"levels: device\.csv has 3 of its own"):
        Device.from_csv(tmp_path / "device.csv", levels=4)
    with pytest.raises(UserError, match="between g_min 10 and g_max 20 uS there are no two levels"):
        Device.from_csv(tmp_path / "device.csv", g_min=10.0)


def test_states_are_in_siemens(tmp_path):
    table = read(tmp_path, "states,mean,std\n1e-6,1e-6,1e-8\n1e-5,1e-5,2e-8\n").programming
    assert (table.unit, table.high) == ("S", 1e-5)


def test_samples_long(tmp_path):
    random = np.random.default_rng(1)
    lines = ["target_uS,measured_uS,device"]
    drawn = {target: random.normal(target, 0.5, 40) for target in (30.0, 10.0, 20.0)}  # in any order
    lines += [f"{target},{value!r},{i}" for target, values in drawn.items() for i, value in enumerate(values.tolist())]
    table = read(tmp_path, "\n".join(lines) + "\n").programming
    assert table.targets == (10, 20, 30)
    assert table.levels == ()
    for target, mean, std in zip(table.targets, table.means, table.stds, strict=True):
        assert mean == pytest.approx(drawn[target].mean())
        assert std == pytest.approx(drawn[target].std(ddof=1))


def test_samples_of_several_times(tmp_path):
    rows = [f"{g},{g + d + t / 100},{t}" for g in (10, 20) for t in (1, 60) for d in np.linspace(-1, 1, 30)]
    text = "\n".join(["target,measured,time", *rows]) + "\n"
    with pytest.raises(UserError, match="several times, 1s, 1min; choose one"):
        read(tmp_path, text, unit="nS")
    with pytest.raises(UserError, match="no samples after 1h"):
        read(tmp_path, text, unit="nS", time="1h")
    table = read(tmp_path, text, unit="nS", time="1min").programming
    assert table.time_seconds == 60
    np.testing.assert_allclose(table.means, [10.6, 20.6])


def test_samples_wide(tmp_path):
    random = np.random.default_rng(2)
    values = random.normal([0.0, 5.0, 10.0], 0.3, (50, 3)) + 3
    lines = ["3,8,13", *(",".join(map(repr, row)) for row in values.tolist()), "3.1,,"]
    table = read(tmp_path, "\n".join(lines) + "\n", unit="uS").programming
    assert table.targets == (3, 8, 13)
    assert table.means[0] == pytest.approx(np.append(values[:, 0], 3.1).mean())
    np.testing.assert_allclose(table.stds[1:], values[:, 1:].std(0, ddof=1))


def test_curve(tmp_path):
    device = read(tmp_path, "g,std,mean\n0,0.1,0\n10,0.3,9\n30,0.2,31\n", unit="uS")
    mean, std = device.programming.gaussian(torch.tensor([0, 5, 10, 20, 30], dtype=torch.float64))
    np.testing.assert_allclose(mean, [0, 4.5, 9, 20, 31])
    np.testing.assert_allclose(std, [0.1, 0.2, 0.3, 0.25, 0.2])
    assert read(tmp_path, "g,std\n0,0.1\n10,0.3\n", unit="uS").programming.means == (0, 10)


def test_resistances(tmp_path):
    """Samples are converted one by one; moments to first order, with a warning."""
    random = np.random.default_rng(3)
    ohms = {100.0: random.normal(100, 5, 60), 50.0: random.normal(50, 2, 60)}
    rows = [f"{target},{value!r}" for target, values in ohms.items() for value in values.tolist()]
    table = read(tmp_path, "\n".join(["target,measured", *rows]) + "\n", unit="kohm").programming
    assert table.unit == "mS"
    assert table.targets == (0.01, 0.02)
    np.testing.assert_allclose(table.means, [(1 / ohms[100.0]).mean(), (1 / ohms[50.0]).mean()])
    with pytest.warns(MeasurementWarning, match="to first order"):
        table = Device.from_csv(write(tmp_path, "level,mean,std\n0,100,5\n1,50,2\n"), unit="kohm").programming
    np.testing.assert_allclose(table.means, [0.01, 0.02])
    np.testing.assert_allclose(table.stds, [5 / 100**2, 2 / 50**2])


def test_few_samples_are_said(tmp_path):
    text = "target,measured\n" + "".join(f"{g},{g + d}\n" for g in (1, 2) for d in (-0.1, 0.1, 0))
    with pytest.warns(MeasurementWarning, match="only 3 samples, so its deviation is known to 50 %") as said:
        Device.from_csv(write(tmp_path, text), unit="uS")
    assert said[0].filename == __file__


@pytest.mark.parametrize(
    ("text", "unit", "what"),
    [
        ("", "uS", "empty"),
        ("level,mean,std\n", "uS", "a header and nothing else"),
        ("level,mean,std\n0,1,0.1\n1,2,0.1\n", None, "no unit"),
        ("level,mean,std\n0,1,0.1\n1,2,0.1\n", "uF", "there is no 'uF'"),
        ("level,mean_uS,std_nS\n0,1,0.1\n1,2,0.1\n", None, "units nS and uS"),
        ("level,mean_uS,std\n0,1,0.1\n1,2,0.1\n", "nS", "units nS and uS"),
        ("level,mean,std\n0,1,-0.1\n1,2,0.1\n", "uS", "-0.1 is negative"),
        ("level,mean,std\n0,2,0.1\n1,1,0.1\n", "uS", "must ascend: 1 comes after 2"),
        ("level,mean,std\n0,2,0.1\n1,2,0.1\n", "uS", "must ascend: 2 is there twice"),
        ("level,mean,std\n0,2,0.1\n", "uS", "at least two levels"),
        ("level,mean,std\n0,-2,0.1\n1,2,0.1\n", "uS", "0 <= low < high"),
        ("level,mean,std\n0,1,x\n1,2,0.1\n", "uS", "line 2: std: a number is expected; 'x' was found"),
        ("level,mean,std\n0,1,nan\n1,2,0.1\n", "uS", "line 2: std: a number is expected; 'nan' was found"),
        ("level,mean,std\n0,1,\n1,2,0.1\n", "uS", "line 2: std: a number is expected"),
        ("level,mean,mean\n0,1,1\n", "uS", "two columns are named 'mean'"),
        ("a,b\n1,2\n", "uS", "columns a, b; level,mean,std"),
        ("target,measured\n1,1\n2,2\n", "uS", "one sample for target 1"),
        ("target,measured\n0,1\n0,2\n1,1\n1,2\n", "kohm", "a resistance must be above 0"),
        ("g,std\n1,1\n2,2\n", "kohm", "one of conductances or currents"),
        ("pulse,rmp,r\n1,2,3\n", "uS", "a pulse train says how devices are updated"),
        ("VMeasCh1,IMeasCh1\n1,2\n", "uS", "an I-V sweep says how a device conducts"),
        ("voltage,current\n1,2\n", "uS", "an I-V sweep"),
    ],
)
@pytest.mark.filterwarnings("ignore::correctnet.devices.measured.MeasurementWarning")
def test_refused_in_one_line(tmp_path, text, unit, what):
    with pytest.raises(UserError, match=what) as refused:
        Device.from_csv(write(tmp_path, text), unit=unit)
    assert "\n" not in str(refused.value)
    assert "device.csv" in str(refused.value) or "unit:" in str(refused.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        Device.from_csv(tmp_path / "none.csv", unit="uS")


def test_a_time_of_a_file_without_times(tmp_path):
    with pytest.raises(UserError, match="no column `time`"):
        read(tmp_path, "level,mean,std\n0,1,0.1\n1,2,0.1\n", unit="uS", time="1h")
