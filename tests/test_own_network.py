"""Networks and data of one's own through the stages: settings, weights, models, and what a change reruns."""

import json
import re
import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
import yaml
from click.testing import CliRunner
from torch import nn
from workflows import configuration, configure, prepare, snakemake, stats

from correctnet.cli import main
from correctnet.errors import UserError
from correctnet.files import factories
from correctnet.networks.building import build_own, load_weights
from correctnet.pipeline.config import Config
from correctnet.pipeline.layout import Layout
from correctnet.pipeline.models import read_network
from correctnet.pipeline.specs import STAGES
from correctnet.settings import Settings, layered

SOURCE = '''
"""A network of its own for images of any size."""

import torch
from torch import nn

NUMBER = 3


class Net(nn.Module):
    def __init__(self, classes, channels, width=4):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, stride=2)
        self.norm = nn.BatchNorm2d(width)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.head = nn.Linear(16 * width, classes)

    def forward(self, x):
        return self.head(torch.flatten(self.pool(torch.relu(self.norm(self.conv(x)))), 1))


def small(classes, channels, width=4):
    return Net(classes, channels, width)


def lazy(num_classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, num_classes))


def keywords(**options):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 20 * 24, options["num_classes"]))


def of_shape(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))


def nothing():
    return None


def fails():
    raise RuntimeError("first line\\nsecond line")


class Reader(nn.Module):
    """Reads the rows of an image as words, by layers of several weights."""

    analog_parameters = ("mix",)

    def __init__(self, classes, channels, width):
        super().__init__()
        self.conv = nn.Conv1d(channels * width, 8, 3, padding=1)
        self.mix = nn.Parameter(torch.eye(8) + torch.randn(8, 8) / 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.rows = nn.LSTM(8, 6, batch_first=True)
        self.head = nn.Linear(6, classes)

    def forward(self, x):
        x = torch.relu(self.conv(x.transpose(2, 3).flatten(1, 2))).transpose(1, 2) @ self.mix
        x = x + self.attention(x, x, x)[0]
        return self.head(self.rows(x)[0].mean(1))


def reader(classes, channels, shape):
    return Reader(classes, channels, shape[2])


class Pair(Net):
    def forward(self, x):
        return super().forward(x), x


class Map(Net):
    def forward(self, x):
        return self.conv(x)
'''
SHAPE = (3, 20, 24)
TINY = {
    "rows": ["unprotected", "suppressed", "correctnet"],
    "data": {"npz": "images.npz", "validation": 0.25},
    "network": {"factory": "own_network:small", "options": {"width": 6}},
    "pretrain": {"epochs": 2, "batch": 16},
    "suppress": {"epochs": 1, "batch": 16},
    "sweep": {"threshold": 1.0, "chips": 2},
    "search": {"limits": [0.5], "evaluations": 2, "episodes": 2, "chips": 2, "ratios": [0, 0.5]},
    "compensate": {"epochs": 1},
    "evaluate": {"chips": 3, "sigmas": [], "chunk": 3},
    "sensitivity": {"chips": 2},
}


def images(count=60, shape=SHAPE):
    """Three classes that differ in their mean, as arrays of a file."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 3
    pictures = np.clip(rng.normal(60 + 60 * labels[:, None, None, None], 30, (count, *shape)), 0, 255)
    return {"images": pictures.astype(np.uint8), "labels": labels}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A folder with a network and images, which is the present one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "own_network", raising=False)
    (tmp_path / "own_network.py").write_text(SOURCE)
    np.savez(tmp_path / "images.npz", **images())
    return tmp_path


def made(name, **options):
    return build_own(f"own_network:{name}", options, 3, SHAPE)


def test_a_function_is_given_what_the_images_say(study):
    network = made("small", width=5)
    assert network.conv.weight.shape == (5, 3, 3, 3)
    assert network.head.weight.shape == (3, 80)
    assert network.training
    assert not network.norm.num_batches_tracked, "it was tried in evaluation mode"
    assert made("of_shape")[1].weight.shape == (3, 3 * 20 * 24)
    assert made("lazy")[1].weight.shape == (8, 3 * 20 * 24)
    assert made("keywords", num_classes=3)[1].weight.shape == (3, 3 * 20 * 24)


def test_weights_are_drawn_from_the_seed_alone(study):
    before = torch.get_rng_state()
    one, two = (build_own("own_network:lazy", {}, 3, SHAPE, seed=4) for _ in range(2))
    other = build_own("own_network:lazy", {}, 3, SHAPE, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one[1].weight, two[1].weight)
    assert not torch.equal(one[1].weight, other[1].weight)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("none", {}, "own_network has no 'none'"),
        ("NUMBER", {}, "a function is expected, not int"),
        ("nothing", {}, "an nn.Module is expected, not NoneType"),
        ("fails", {}, "RuntimeError: first line second line (its arguments are in network.options)"),
        ("small", {"widht": 3}, "TypeError: small() got an unexpected keyword argument 'widht' (its arguments are"),
        ("small", {"classes": 5}, "gives 5 classes, and the data has 3; network.options has the arguments of the func"),
        ("small", {"channels": 1}, "fails on images of 3 x 20 x 24 (channels x height x width): RuntimeError: Given"),
        ("Pair", {}, "one tensor of outputs (N, classes) is expected, not tuple"),
        ("Map", {}, "outputs (N, classes) are expected, not (2, 4, 9, 11) for 2 images of 3 x 20 x 24"),
    ],
)
def test_functions_that_make_no_network(study, name, options, message):
    with pytest.raises(UserError) as caught:
        made(name, **options)
    text = str(caught.value)
    assert text.startswith(f"network.factory: own_network:{name}: {message}")
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "nested.pth"])
def test_weights_of_a_file(study, name):
    first, second = made("small"), build_own("own_network:small", {}, 3, SHAPE, seed=1)
    state = first.state_dict()
    if name.endswith("safetensors"):
        safetensors.torch.save_file(state, name)
    elif name == "nested.pth":  # as training programs write it; older files have no counters
        state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
        torch.save({"state_dict": state, "epoch": 3}, name)
    else:
        torch.save(state, name)
    load_weights(second, name)
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())


class Malicious:
    def __reduce__(self):
        return (print, ("code of a file of weights",))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda s, p: None, "no such file"),
        (lambda s, p: p.write_bytes(b"nothing"), "no state dict alone; write it with torch.save(model.state_dict(), "),
        (lambda s, p: torch.save(Malicious(), p), "no state dict alone; write it with torch.save(model.state_dict(), "),
        (lambda s, p: torch.save([1, 2], p), "a state dict, tensors by their names, is expected"),
        (lambda s, p: torch.save({"epoch": 3}, p), "a state dict, tensors by their names, is expected"),
        (lambda s, p: torch.save({k: s[k] for k in s if k != "norm.bias"}, p), "has no 'norm.bias', which the network"),
        (
            lambda s, p: torch.save({**s, "head.weight": torch.zeros(10, 64), "conv.bias": torch.zeros(9)}, p),
            "'conv.bias' is (9,), and the network's is (4,)",
        ),
        (lambda s, p: torch.save({**s, "tail.weight": s["conv.bias"]}, p), "has 'tail.weight', which the network has"),
    ],
)
def test_weights_that_do_not_fit(study, capsys, write, message):
    network, path = made("small"), study / "w.pt"
    write(network.state_dict(), path)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_weights(network, path)
    assert str(caught.value).startswith(f"network.weights: {path}: {message}")
    assert len(str(caught.value).splitlines()) == 1
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in before.items())
    assert "code of a file" not in capsys.readouterr().out


def test_safetensors_that_are_damaged(study):
    (study / "w.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(UserError, match=r"network\.weights: .*w\.safetensors: cannot be read \("):
        load_weights(made("small"), study / "w.safetensors")


def run(*arguments, refused=False):
    """Run a command in this process; what it printed. `refused`: it must end with a mistake, in one line."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == (2 if refused else 0), result.output
    return result.output.strip().splitlines()[-1] if refused else result.output


def config_of(study, **changes):
    values = {**configuration(), "runs": {"paper": ["own"]}, "pairs": {"own": {**TINY, **changes}}}
    configure(study, values)
    return values


def test_all_stages_of_a_network_and_data_of_ones_own(study):
    """Images of 20 x 24 pixels, so that nothing can take them for 32 x 32."""
    config_of(study)
    how = ("--config", "config.yaml", "--pair", "own", "--row", "correctnet", "--threads", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of so short a training of compensators
        run("pretrain", *how, "--out", "p")
        run("suppress", *how, "--pretrained", "p", "--out", "s")
        run("sweep", *how, "--pretrained", "p", "--base", "s", "--out", "w")
        run("search", *how, "--base", "s", "--candidates", "w/candidates.json", "--limit", 0.5, "--out", "f")
        run("compensate", *how, "--base", "s", "--found", "f/best.json", "--out", "c")
        run("finetune", "--compensated", "c", "--epochs", 1, "--out", "ft", "--threads", 1)
        run("evaluate", *how, "--model", "c", "--chips", 3, "--out", "e.csv")
        run("sensitivity", *how, "--model", "c", "--out", "sens.csv")
    described = json.loads((study / "c" / "model.json").read_text())
    network = {"factory": "own_network:small", "options": {"width": 6}, "classes": 3, "channels": 3}
    source = factories.source_digest("own_network:small", "")
    assert described["network"] == network | {"height": 20, "width": 24, "source": source}
    assert described["data"]["npz"] == "images.npz"
    assert "dataset" not in described["data"]
    table = pd.read_csv(study / "e.csv")
    assert set(table["network"]) == {"small"}
    assert set(table["dataset"]) == {"images"}
    assert set(table["images"]) == {12}
    assert table["correct"].between(0, 12).all()
    assert {"conv", "head"} <= set(pd.read_csv(study / "sens.csv")["name"])
    assert "small" in run("info", "c")
    assert json.loads(run("show", "c"))["network"]["factory"] == "own_network:small"
    assert read_network(study / "ft")[1]["history"][-1]["stage"] == "finetune"
    # Later stages take the data from the model, and refuse other data.
    run("evaluate", "--model", "p", "--chips", 1, "--out", "e2.csv", "--threads", 1)
    assert set(pd.read_csv(study / "e2.csv")["dataset"]) == {"images"}
    line = run("evaluate", "--model", "p", "--dataset", "digits", "--chips", 1, "--out", "e3.csv", refused=True)
    assert line == "error: --dataset digits: p was trained on images.npz"
    shutil.copy("images.npz", "moved.npz")
    run("evaluate", "--model", "p", "--npz", "moved.npz", "--chips", 1, "--out", "e4.csv", "--threads", 1)
    assert pd.read_csv(study / "e4.csv")["correct"].tolist() == pd.read_csv(study / "e2.csv")["correct"].tolist()
    np.savez("images.npz", **images(63))
    for option in ((), ("--npz", "images.npz")):
        line = run("evaluate", "--model", "p", *option, "--chips", 1, "--out", "e5.csv", refused=True)
        assert line.startswith("error: images.npz: has changed (digest ")


def test_all_stages_of_a_network_of_other_layers(study):
    config_of(study, network={"factory": "own_network:reader"})
    how = ("--config", "config.yaml", "--pair", "own", "--row", "correctnet", "--threads", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run("pretrain", *how, "--out", "p")
        run("suppress", *how, "--pretrained", "p", "--out", "s")
        run("sweep", *how, "--pretrained", "p", "--base", "s", "--out", "w")
        run("search", *how, "--base", "s", "--candidates", "w/candidates.json", "--limit", 0.5, "--out", "f")
        run("compensate", *how, "--base", "s", "--found", "f/best.json", "--out", "c")
        run("evaluate", *how, "--model", "c", "--chips", 3, "--out", "e.csv")
        run("sensitivity", *how, "--model", "s", "--out", "sens.csv")
    order = ["conv", "mix", "attention.in_proj_weight", "attention.out_proj"]
    order += ["rows.weight_ih_l0", "rows.weight_hh_l0", "head"]
    assert list(json.loads((study / "w" / "candidates.json").read_text())["accuracy"]) == order
    assert set(json.loads((study / "f" / "best.json").read_text())["filters"]) <= {"conv", "head"}
    assert list(dict.fromkeys(pd.read_csv(study / "sens.csv")["name"])) == order
    listed = run("info", "s")
    assert re.search(r"0 head +fused +3 x 6\n", listed)
    assert re.search(r"5 rows\.weight_hh_l0 +unfused +24 x 6\n", listed)
    assert re.search(r"6 mix +unfused +8 x 8", listed)


def test_weights_are_not_trained_again(study):
    torch.manual_seed(0)
    state = made("small", width=6).state_dict()
    torch.save(state, "w.pt")
    config_of(study, network={**TINY["network"], "weights": "w.pt"})
    run("pretrain", "--config", "config.yaml", "--pair", "own", "--out", "p", "--threads", 1)
    model, described = read_network(study / "p")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    assert described["history"][0]["epochs"] == 0
    assert 0 <= described["history"][0]["validation"] <= 1
    config_of(study, network={**TINY["network"], "options": {"width": 3}, "weights": "w.pt"})
    line = run("pretrain", "--config", "config.yaml", "--pair", "own", "--out", "q", "--threads", 1, refused=True)
    assert line == "error: network.weights: w.pt: 'conv.weight' is (6, 3, 3, 3), and the network's is (3, 3, 3, 3)"


def test_a_data_set_of_ours_with_a_network_of_ones_own_and_the_reverse(study):
    run("pretrain", "--network-factory", "own_network:small", "--epochs", 0, "--out", "a", "--threads", 1)
    assert read_network("a")[1]["network"]["height"] == 32
    np.savez("grey.npz", **images(30, (1, 32, 32)))
    run("pretrain", "--npz", "grey.npz", "--epochs", 0, "--out", "b", "--threads", 1)
    network = read_network("b")[1]["network"]
    assert (network["name"], network["classes"], network["channels"]) == ("lenet5", 3, 1)
    narrow = ("--network", "vgg16", "--widths", ",".join(["4"] * 14), "--epochs", 0, "--threads", 1)
    np.savez("few.npz", **images(30, (1, 20, 24)))
    run("pretrain", "--npz", "few.npz", *narrow, "--out", "c")
    assert "c: vgg16" in run("info", "c")
    assert read_network("c")[1]["network"]["width"] == 24
    np.savez("large.npz", **images(30, (1, 40, 40)))
    line = run("pretrain", "--npz", "large.npz", *narrow, "--out", "d", refused=True)
    assert line.startswith("error: network.name: vgg16: fails on images of 1 x 40 x 40 (channels x height x width): ")


def test_smaller_images_at_first(study):
    np.savez("square.npz", **images(40, (1, 16, 16)))
    how = ("pretrain", "--npz", "square.npz", "--epochs", 2, "--sizes", "8", "--threads", 1)
    run(*how, "--network-factory", "own_network:small", "--out", "a")
    assert len(pd.read_csv(study / "a" / "log.csv")) == 2
    line = run(*how, "--network-factory", "own_network:of_shape", "--out", "b", refused=True)
    assert line.startswith("error: pretrain.sizes: fails on images of 1 x 8 x 8 (channels x height x width): ")
    line = run(*how, "--sizes", "17", "--network-factory", "own_network:small", "--out", "b", refused=True)
    assert line == "error: pretrain.sizes: sides between 1 and 16 pixels are expected, not 17"


def canonical(study, stage, **changes):
    config_of(study, **changes)
    return STAGES[stage].canonical(Config.load(study / "config.yaml").settings("own", "correctnet"))


def test_what_a_change_reruns(study):
    """Settings' strings, which Snakemake compares: the network is pre-training's, the data is every stage's."""
    before = {stage: canonical(study, stage) for stage in STAGES}
    assert canonical(study, "pretrain") == before["pretrain"]
    (study / "own_network.py").write_text(SOURCE + "\n# another\n")
    after = {stage: canonical(study, stage) for stage in STAGES}
    assert {stage for stage in STAGES if after[stage] != before[stage]} == {"pretrain"}
    np.savez(study / "images.npz", **images(63))
    assert {stage for stage in STAGES if canonical(study, stage) != after[stage]} == set(STAGES)
    np.savez(study / "images.npz", **images())
    assert {stage: canonical(study, stage) for stage in STAGES} == after, "what counts is the content"
    torch.save({}, study / "w.pt")
    weighted = canonical(study, "pretrain", network={**TINY["network"], "weights": "w.pt"})
    torch.save({"a": torch.zeros(1)}, study / "w.pt")
    assert canonical(study, "pretrain", network={**TINY["network"], "weights": "w.pt"}) != weighted


def test_settings_of_ones_own_survive_the_workflow_s_string(study):
    config_of(study)
    settings = Config.load(study / "config.yaml").settings("own")
    for stage in ("pretrain", "evaluate"):
        text = STAGES[stage].canonical(settings)
        again = STAGES[stage].parse(text, stage)
        assert STAGES[stage].canonical(again) == text
        assert (again.data.kind, again.data.place, again.data.name) == ("npz", "images.npz", "images")
        assert "dataset" not in json.loads(text)["data"]
    assert json.loads(STAGES["pretrain"].canonical(Settings()))["data"].keys() == {"dataset", "validation", "augment"}
    assert json.loads(STAGES["pretrain"].canonical(Settings()))["network"].keys() == {
        *("name", "widths", "batchnorm", "dropout")
    }


def test_layout_needs_no_download_of_ones_own_data(study):
    layout = Layout(Config.check(config_of(study)))

    class Job:
        pair, variant = "own", ""

    assert layout.dataset_ready(Job) == []
    assert layout.resources("pretrain")["mem_mb"](Job, 1) > 1000


def test_rows_with_another_network_have_folders_of_their_own(study):
    torch.save({}, study / "w.pt")
    rows = {
        "wide": {"options": {"width": 8, "depth": "a/b"}},
        "deep": {"options": {"depth": "a_b"}},
        "given": {"weights": "w.pt"},
        "ours": {"name": "vgg16"},
    }
    np.savez(study / "images.npz", **images(60, (3, 32, 32)))
    values = config_of(study, rows=["unprotected", *rows])
    values["rows"] |= {row: {"evaluate": "pretrain", "label": row, "set": {"network": n}} for row, n in rows.items()}
    config = Config.check(values)
    found = {row: config.variant("own", row, "pretrain") for row in ("unprotected", *rows)}
    assert found["unprotected"] == ""
    assert found["wide"].startswith("@network.options.width-8+network.options.depth-a_b+")
    assert found["deep"] == "@network.options.depth-a_b"
    assert found["given"] == "@network.weights-w.pt"
    assert found["ours"].startswith("@network.name-vgg16")
    assert all(not name or re.fullmatch(r"@[A-Za-z0-9._+-]{1,130}", name) for name in found.values())
    (study / "own_network.py").write_text(SOURCE + "\n# changed\n")
    assert {row: Config.check(values).variant("own", row, "pretrain") for row in found} == found


@pytest.mark.parametrize(
    ("under", "over", "expected"),
    [
        ({"dataset": "mnist"}, {"folder": "x"}, {"folder": "x"}),
        ({"folder": "x", "digest": "1"}, {"validation": 0.2}, {"folder": "x", "digest": "1", "validation": 0.2}),
        ({"folder": "x", "digest": "1"}, {"npz": "y"}, {"npz": "y"}),
        ({"npz": "x", "augment": "crop"}, {"dataset": "digits"}, {"dataset": "digits", "augment": "crop"}),
    ],
)
def test_data_of_a_pair_takes_the_place_of_the_defaults(under, over, expected):
    assert layered({"data": under}, {"data": over})["data"] == expected


def test_a_network_of_a_pair_takes_the_place_of_the_defaults():
    under = {"name": "vgg16", "widths": [4] * 14, "batchnorm": "none"}
    assert layered({"network": under}, {"network": {"factory": "a:b"}}) == {"network": {"factory": "a:b"}}
    assert layered({"network": under}, {"network": {"batchnorm": "after"}})["network"]["name"] == "vgg16"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"data": {"npz": "none.npz"}}, "none.npz: no such file or folder"),
        (
            {"data": {"npz": "images.npz", "folder": "x"}},
            "one of dataset, folder, npz, factory is expected, not both f",
        ),
        ({"data": {"factory": "none:f"}}, "data.factory: none:f: no module 'none' here ("),
        ({"data": {"factory": "f"}}, "pairs.own.data.factory: package.module:function is expected, not 'f'"),
        ({"data": {"folder": " "}}, "pairs.own.data.folder: a path is expected, not ' '"),
        (
            {"data": {"npz": "images.npz", "validation": 0.001}},
            "data.validation: 0.001 of the 48 training images leaves",
        ),
        (
            {"network": {"factory": "own_netwrk:small"}},
            "network.factory: own_netwrk:small: no module 'own_netwrk' here",
        ),
        (
            {"network": {"factory": "os:system"}},
            "network.factory: a module that is not of Python's standard library is",
        ),
        ({"network": {"factory": "own_network:small", "widths": [3]}}, "widths goes with name and not with factory"),
        ({"network": {"name": "lenet5", "options": {"a": 1}}}, "pairs.own: network.options: those of a factory, "),
        ({"network": {"factory": "own_network:small", "weights": "no.pt"}}, "no.pt: no such file"),
        (
            {"network": {"name": "lenet5"}},
            "network.name: lenet5 takes images of 32 x 32 pixels only, and those of imag",
        ),
        (
            {"rows": {"unprotected": None, "suppressed": {"network": {"batchnorm": "none"}}}},
            "pairs.own: network: batchnorm goes with name and not with factory",
        ),
        ({"network": {"factory": "broken:f"}}, "broken.py: SyntaxError: "),
        ({"pretrain": {"sizes": [10]}}, "pretrain.sizes: square images are expected, and those of images are not"),
    ],
)
def test_mistakes_in_a_configuration(study, changes, line):
    (study / "broken.py").write_text("def f(:\n")
    config_of(study, **changes)
    with pytest.raises(UserError) as caught:
        Config.load(study / "config.yaml")
    assert str(caught.value).startswith(f"{study / 'config.yaml'}: pairs.own")
    assert line in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_description_that_names_a_function_of_the_standard_library(study):
    run("pretrain", "--npz", "images.npz", "--network-factory", "own_network:small", "--epochs", 0, "--out", "a")
    path = study / "a" / "model.json"
    described = json.loads(path.read_text())
    described["network"] |= {"factory": "os:system", "options": {"command": "touch x"}}
    path.write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"network\.factory: package\.module:function is expected"):
        read_network(study / "a")
    assert not (study / "x").exists()


def test_a_model_whose_function_has_changed_says_so(study):
    run("pretrain", "--npz", "images.npz", "--network-factory", "own_network:small", "--epochs", 0, "--out", "a")
    assert "warning" not in run("show", "a")
    (study / "own_network.py").write_text(SOURCE.replace("torch.relu", "torch.tanh"))
    assert "warning: a: the source of own_network:small has changed since this model was made; " in run("show", "a")


def test_modules_in_packages_are_found_without_importing_them(study):
    (study / "lab").mkdir()
    (study / "lab" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (study / "lab" / "nets.py").write_text("from . import parts\n")
    (study / "lab" / "parts.py").write_text("A = 1\n")
    first = factories.source_digest("lab.nets:f", "network.factory")
    (study / "lab" / "parts.py").write_text("A = 2\n")
    assert factories.source_digest("lab.nets:f", "network.factory") != first
    with pytest.raises(UserError, match="RuntimeError: imported"):
        factories.imported("lab.nets:f", "network.factory")


@pytest.mark.e2e
def test_the_workflow_on_pictures_and_a_network_of_ones_own(study):
    """A run from pictures to Table I; then what a changed picture, network or weights file reruns."""
    from PIL import Image

    data = {"folder": "my pictures", "validation": 0.25}
    folder = prepare(study / "run", config_of(study, rows=["unprotected", "correctnet"], data=data))
    (folder / "own_network.py").write_text(SOURCE)
    arrays = images()
    for i, (picture, label) in enumerate(zip(arrays["images"], arrays["labels"], strict=True)):
        place = folder / "my pictures" / "abc"[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.transpose(1, 2, 0)).save(place / f"{i}.png")
    plan = "results/summary/paper/table1.csv"
    snakemake(folder, plan)
    table = pd.read_csv(folder / plan).set_index("row")
    assert list(table.index) == ["unprotected", "correctnet"]
    assert set(table["images"]) == {12}
    assert stats(snakemake(folder, "-n", plan)) == {}
    everything = {"pretrain", "suppress", "sweep", "search", "compensate", "evaluate", "table1"}
    picture = folder / "my pictures" / "a" / "0.png"
    picture.rename(picture.with_name("renamed.png"))
    assert stats(snakemake(folder, "-n", plan)) == {}, "a name is no content"
    shutil.copy(picture.with_name("renamed.png"), picture)
    assert everything <= set(stats(snakemake(folder, "-n", plan)))
    picture.unlink()
    assert stats(snakemake(folder, "-n", plan)) == {}
    (folder / "own_network.py").write_text(SOURCE + "\n# changed\n")
    assert everything <= set(stats(snakemake(folder, "-n", plan)))
    (folder / "own_network.py").write_text(SOURCE)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    shutil.copy(folder / "results" / "own" / "pretrain" / "model.safetensors", folder / "w.safetensors")
    config["pairs"]["own"]["network"]["weights"] = "w.safetensors"
    configure(folder, config)
    snakemake(folder, "results/own/pretrain/model.safetensors")
    trained, given = (folder / p for p in ("w.safetensors", "results/own/pretrain/model.safetensors"))
    assert trained.read_bytes() == given.read_bytes()
    state = safetensors.torch.load_file(trained)
    safetensors.torch.save_file(state | {"head.bias": state["head.bias"] + 1}, trained)
    assert everything <= set(stats(snakemake(folder, "-n", plan)))


def test_a_network_that_is_not_ours_is_an_ordinary_module(study):
    assert isinstance(made("small"), nn.Module)


def test_a_new_study_is_checked_and_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = run("new", "my study")
    assert output == "my study: a study that runs as it is: cd 'my study' && snakemake --cores 2\n"
    monkeypatch.chdir("my study")
    assert run("check").endswith("1 pairs, 3 rows, no mistakes\n")
    assert {path.name for path in (tmp_path / "my study").iterdir()} == {
        *("README.md", "config.yaml", "network.py", "data.py", "Snakefile", "workflow", "profiles")
    }
    monkeypatch.chdir(tmp_path)
    assert run("new", "my study", refused=True) == "error: my study: is there and not empty; a new folder is expected"
    (tmp_path / "file").write_text("x")
    assert run("new", "file", refused=True) == "error: file: is there and not empty; a new folder is expected"
    assert run("new", "file/in", refused=True) == "error: file/in: cannot be written: Not a directory"


@pytest.mark.e2e
def test_a_new_study_runs_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("new", "study")
    output = snakemake(tmp_path / "study")
    results = tmp_path / "study" / "results"
    table = pd.read_csv(results / "summary" / "paper" / "table1.csv").set_index("row")
    assert list(table.index) == ["unprotected", "suppressed", "correctnet"]
    assert table["clean"].min() > 0.9
    samples = pd.read_csv(results / "own" / "samples.csv")
    assert set(samples["network"]) == {"small_cnn"}
    assert set(samples["dataset"]) == {"digits"}
    jobs = pd.read_csv(results / "summary" / "paper" / "provenance.csv")["job"]
    assert {"own/pretrain", "own/compensate", "own/sensitivity/compensate"} <= set(jobs)
    assert "Table I at sigma = 0.5" in output
    assert stats(snakemake(tmp_path / "study", "-n", "all")) == {}
