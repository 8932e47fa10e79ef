"""On a GPU without our CUDA kernels: every stage runs through torch, and says so.

pytest -m gpu                     skipped, with the reason, where there is no GPU; the kernels need not be built
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from by_hand import every_stage

from correctnet.noise import device as gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def test_every_stage_runs_through_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "kernels", lambda: None)
    said = every_stage(tmp_path, "--device", "cuda")
    for name, output in said.items():
        assert output.count("the CUDA kernels were not built") == 1, (name, output)
    assert len(pd.read_csv(tmp_path / "evaluate.csv")) == 3
    assert len(pd.read_csv(tmp_path / "sensitivity.csv")) == 15
