"""The example scripts of the documentation, run as they are printed, on little data."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torchvisions
from PIL import Image

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.slow
def test_resnet18_on_a_folder_of_pictures(tmp_path, monkeypatch, capsys):
    torchvisions.models()
    script = DOCS / "resnet18.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 40
    generator = np.random.default_rng(0)
    for part, count in (("train", 30), ("test", 5)):
        for level, name in ((60, "dark"), (190, "light")):
            for i in range(count):
                path = tmp_path / "pictures" / part / name / f"{i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(generator.integers(level - 40, level + 40, (32, 32, 3), np.uint8)).save(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["resnet18.py", "pictures", "1"])
    found = runpy.run_path(str(script), run_name="__main__")["found"]
    printed = capsys.readouterr().out
    assert all(row in printed for row in ("unprotected", "suppressed", "corrected"))
    assert list(found.table["chips"]) == [50] * 3
    assert found.table["overhead"].iloc[-1] <= 0.03
    report = (tmp_path / "resnet18.html").read_text(encoding="utf-8")
    assert all(part in report for part in ("corrected", "<img", "Candidate layers", "Search"))
