"""The command line as several test files use it, and every stage by hand."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from correctnet.cli import main


def run(*arguments: object) -> Result:
    """A command."""
    return CliRunner().invoke(main, [str(a) for a in arguments])


def succeed(*arguments: object) -> Result:
    """A command that must work."""
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def every_stage(folder: Path, *options: object) -> dict[str, str]:
    """Every stage on digits, with tiny budgets; what each said, by the name of its result."""
    few = ["--quiet", "--threads", "1", *options]
    train, said = [*few, "--batch", "64"], {}

    def stage(name: str, *arguments: object, out: str) -> None:
        said[out] = succeed(name, *arguments, "--out", folder / out).output

    stage("pretrain", *train, "--epochs", 4, "--work", folder / "work", out="pretrain")
    pre, sup = ("--pretrained", folder / "pretrain"), ("--base", folder / "suppress")
    stage("suppress", *train, "--epochs", 1, *pre, out="suppress")
    stage("inject", *train, "--epochs", 1, *pre, out="inject")
    stage("distil", *train, "--epochs", 1, *pre, out="distil")
    stage("moments", *train, "--epochs", 1, *pre, out="moments")
    stage("sidepath", *train, "--epochs", 1, "--base", folder / "pretrain", out="sidepath")
    chips = [*few, "--chips", 3, "--images", 50]
    stage("sweep", *chips, "--threshold", 1, *pre, *sup, out="sweep")
    (folder / "candidates.json").write_text('{"candidates": ["conv1.layer", "conv2.layer"]}')
    small = [*chips, "--train-images", 100, "--evaluations", 3, *sup, "--candidates", folder / "candidates.json"]
    stage("search", *small, "--limit", 0.02, out="search")
    # With so small a budget the search may well find nothing worth its cost; compensate all candidates instead.
    stage("search", *small, "--strategy", "all", out="all")
    stage("search", *small, "--strategy", "all", "--ratios", "0,0.5", out="half")
    stage("compensate", *train, "--epochs", 1, *sup, "--found", folder / "all" / "best.json", out="compensate")
    stage("finetune", *train, "--epochs", 1, "--compensated", folder / "compensate", out="finetune")
    stage("sensitivity", *chips, "--model", folder / "compensate", out="sensitivity.csv")
    stage("evaluate", *chips, "--model", folder / "compensate", out="evaluate.csv")
    return said
