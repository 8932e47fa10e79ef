"""The whole chain, LeNet-5 on the real MNIST, with a budget of two minutes; the shipped settings take longer."""

import os
from pathlib import Path

import pytest
from test_cli import succeed

from correctnet.datasets import DATASETS
from correctnet.evaluation.results import Result
from correctnet.files import storage

ROOT = Path(os.environ.get("CORRECTNET_DATA", "data"))
FILES = [ROOT / "MNIST" / "raw" / f.name for f in (*DATASETS["mnist"].source().train, *DATASETS["mnist"].source().test)]


@pytest.mark.slow
@pytest.mark.skipif(not all(f.exists() for f in FILES), reason=f"no MNIST under {ROOT} (CORRECTNET_DATA says where)")
def test_the_chain_on_mnist(tmp_path):
    common = ["--config", "config.yaml", "--config", "workflow/experiments/extensions.yaml"]
    common += ["--pair", "lenet5-mnist", "--row", "correctnet-t99", "--quiet"]
    common += ["--data-dir", ROOT, "--threads", 1]
    pre, sup = ("--pretrained", tmp_path / "pretrain"), ("--base", tmp_path / "suppress")
    succeed("pretrain", *common, "--epochs", 2, "--out", tmp_path / "pretrain")
    succeed("suppress", *common, "--epochs", 1, *pre, "--out", tmp_path / "suppress")
    succeed("sweep", *common, "--chips", 10, "--images", 1000, *pre, *sup, "--out", tmp_path / "sweep")
    found = ("--candidates", tmp_path / "sweep" / "candidates.json")
    # States that are trained for less come out below the network without compensation, and are not chosen.
    budget = ["--evaluations", 3, "--train-images", 20000, "--chips", 10, "--images", 500]
    succeed("search", *common, *budget, *sup, *found, "--limit", 0.03, "--out", tmp_path / "search")
    best = tmp_path / "search" / "best.json"
    succeed("compensate", *common, "--epochs", 1, *sup, "--found", best, "--out", tmp_path / "compensate")
    results = {}
    for stage in ("pretrain", "compensate"):
        for sigma, chips in ((0, 1), (0.5, 30)):
            out = tmp_path / f"{stage}-{sigma}.csv"
            options = [*common, "--sigma", sigma, "--chips", chips, "--images", 2000]
            succeed("evaluate", *options, "--model", tmp_path / stage, "--out", out)
            results[stage, sigma] = Result.from_csv(out)
    assert results["pretrain", 0].mean >= 0.98
    assert results["compensate", 0].mean >= results["pretrain", 0].mean - 0.01
    assert results["pretrain", 0.5].mean < results["pretrain", 0].mean - 0.02, "variation hurts"
    assert results["compensate", 0.5].minus(results["pretrain", 0.5]).low > 0, "and CorrectNet wins some of it back"
    description = storage.read_json(tmp_path / "compensate" / "model.json")
    assert 0 < description["overhead"] <= 0.03
    candidates = storage.read_json(tmp_path / "sweep" / "candidates.json")["candidates"]
    assert set(storage.read_json(best)["filters"]) <= set(candidates)
