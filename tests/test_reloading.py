"""A notebook that reloads a module (`importlib.reload`, `%autoreload 2`) goes on as before."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest

import correctnet

MODULES = [
    name.removeprefix("correctnet.")
    for _, name, _ in pkgutil.walk_packages(correctnet.__path__, "correctnet.")
    if not name.rpartition(".")[2].startswith("_")
]

WORK = """
import importlib, pkgutil, sys, warnings
import torch
from torch import nn
import correctnet
from correctnet import LogNormalVariation, convert, errors, evaluate
from correctnet.crossbar import convert as analog
from correctnet.evaluation import montecarlo
from correctnet.crossbar import operators as ops
from correctnet.devices import lognormal as variation

modules = {n: importlib.import_module("correctnet." + n) for n in %r}
torch.set_num_threads(1)
warnings.simplefilter("ignore")

class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else self.layer(-x)

def work():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)).eval()
    x, y = torch.randn(64, 1, 8, 8), torch.randint(0, 10, (64,))
    old, new = convert(net, LogNormalVariation(0.5)), analog.convert(net, variation.LogNormalVariation(0.5))
    found = [
        f(m, (x, y), 2, engine=e, progress=False).accuracies.tolist()
        for f in (evaluate, montecarlo.evaluate) for m in (old, new) for e in ("auto", "torch")
    ]
    weight = torch.ones(3, 4, requires_grad=True)
    out = ops.noisy_linear(torch.ones(5, 4), weight, seed=0, layer=1, sigma=0.5, samples=range(2))
    out.sum().backward()
    found += [out.tolist(), weight.grad.tolist()]
    odd = analog.convert(Untraceable().eval(), variation.LogNormalVariation(0.5))
    found += evaluate(odd, (torch.ones(6, 4), torch.zeros(6, dtype=torch.long)), 2, progress=False).accuracies.tolist()
    for error in (correctnet.errors.UserError, errors.UserError):
        try:
            evaluate(net, (x, y), 2)
        except error:
            found.append("refused")
    return found
"""


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """By module, "as before" or what else came of a reload; each is reloaded after those before it."""
    code = (
        WORK % MODULES
        + f"""
before = work()
assert before.count("refused") == 2 and before[0] == before[1]
for name in {MODULES!r}:
    try:
        importlib.reload(modules[name])
        after = work()
        print(name, "as before" if after == before else f"{{after}} instead of {{before}}")
    except Exception as error:
        print(name, type(error).__name__, *str(error).split())
"""
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(line.split(maxsplit=1) for line in done.stdout.splitlines())


@pytest.mark.parametrize("module", MODULES)
def test_reloading_a_module(said: dict[str, str], module: str) -> None:
    assert said[module] == "as before"


def test_a_class_that_survives_takes_over_what_is_new(tmp_path, monkeypatch) -> None:
    source = """
from correctnet.reloading import survives_reload

class Base:
    def say(self):
        return ["base"]

@survives_reload
class Kept(Base):
    {body}
"""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    file = tmp_path / "reloaded_for_a_test.py"
    file.write_text(source.format(body="old = 1\n    def say(self):\n        return ['old', *super().say()]"))
    module = importlib.import_module("reloaded_for_a_test")
    kept, one = module.Kept, module.Kept()
    assert one.say() == ["old", "base"]
    file.write_text(source.format(body="new = 2\n    def say(self):\n        return ['new', *super().say()]"))
    importlib.reload(module)
    assert module.Kept is kept
    assert one.say() == ["new", "base"]
    assert kept.new == 2
    assert not hasattr(kept, "old")
