import copy
import json
import re
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from correctnet.config import READS, VERSIONS, Config, Settings, lineage
from correctnet.errors import UserError

ROOT = Path(__file__).parents[1]
# Through JSON, so that sections that the file shares between pairs can be changed one at a time.
SHIPPED = json.loads(json.dumps(yaml.safe_load((ROOT / "config.yaml").read_text())))


def changed(path, value, base=SHIPPED):
    """The shipped configuration with one key (a dotted path) changed."""
    config = copy.deepcopy(base)
    *groups, leaf = path.split("/")
    target = config
    for group in groups:
        target = target.setdefault(group, {})
    target[leaf] = value
    return config


def test_the_shipped_configuration_is_right():
    config = Config.load(ROOT / "config.yaml")
    assert config.runs["paper"] == ("lenet5-mnist", "lenet5-cifar10", "vgg16-cifar10", "vgg16-cifar100")
    settings = config.settings("vgg16-cifar100", "correctnet")
    assert (settings.variation.sigma, settings.sweep.threshold, settings.suppress.k) == (0.5, 0.95, 1.0)
    assert max(settings.search.limits) == 0.03
    assert settings.evaluate.chips == 250
    assert settings.evaluate.images is None


def test_a_row_that_the_search_would_judge_otherwise_than_its_evaluation():
    with pytest.raises(UserError) as caught:
        Config.check(changed("rows/combined-chip/set/search", {"strategy": "random"}))
    lines = str(caught.value).splitlines()  # one for each pair that has the row
    assert lines
    assert all("'combined-chip' recalibrates BatchNorm on each chip, which the search does not" in s for s in lines)


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("defaults/sweep/treshold", 0.9, "defaults.sweep.treshold: unknown key (did you mean 'threshold'?)"),
        ("result", "x", "result: unknown key (did you mean 'results'?)"),
        ("defaults/variation/sigma", -0.1, "defaults.variation.sigma: Input should be greater than or equal to 0"),
        ("pairs/lenet5-mnist/suppress/beta", "big", "pairs.lenet5-mnist.suppress.beta: Input should be a valid number"),
        ("defaults/variation/sigma", float("nan"), "defaults.variation.sigma: Input should be a finite number"),
        ("defaults/search/limits", [0.01, 0], "defaults.search.limits: limits are fractions above 0"),
        ("defaults/search/limits", [], "defaults.search.limits: limits are fractions above 0"),
        ("defaults/search/ratios", [0.5, 1.0], "defaults.search.ratios: ratios need 0"),
        ("pairs/lenet5-mnist/network/name", "lenet", "pairs.lenet5-mnist.network.name: Input should be 'lenet5'"),
        ("pairs/lenet5-mnist/network/widths", [1, 2], "pairs.lenet5-mnist: network.widths: four are expected"),
        ("pairs/vgg16-cifar10/network/widths", [8] * 4, "network.widths: fourteen are expected for vgg16"),
        ("pairs/vgg16-cifar10/network/widths", [0] * 14, "network.widths: positive widths are expected"),
        ("runs/paper", ["lenet5-mnits"], "runs.paper: no pair 'lenet5-mnits' (did you mean 'lenet5-mnist'?)"),
        ("runs/paper", [], "runs.paper: one pair or more is expected"),
        ("pairs/lenet5-mnist/rows", ["unprotected", "corectnet"], "no row 'corectnet' (did you mean 'correctnet'?)"),
        ("pairs/lenet5-mnist/rows", ["correctnet"], "the first row must evaluate the original network"),
        ("pairs/lenet5-mnist/rows", ["unprotected", "recalibrated"], "'recalibrated' recalibrates BatchNorm"),
        ("pairs/lenet5-mnist/pretrain", {"sizes": [16]}, "pretrain.sizes: LeNet-5's linear layers fit"),
        ("pairs/lenet5-mnist/suppress/sizes", [16], "suppress.sizes: LeNet-5's linear layers fit"),
        ("pairs/vgg16-cifar10/pretrain/sizes", [0], "sides between 1 and 32 pixels"),
        ("pairs/lenet5-mnist/rows", 3, "pairs.lenet5-mnist.rows: a list of rows, or a mapping"),
        (
            "pairs/lenet5-mnist/rows",
            {"unprotected": None, "correctnet": {"evaluate": {"chip": 3}}},
            "pairs.lenet5-mnist.rows.correctnet.evaluate.chip: unknown key (did you mean 'chips'?)",
        ),
        ("rows/unprotected/evaluate", "prune", "rows.unprotected.evaluate: Input should be 'pretrain'"),
        ("rows/Bad_Row", {"evaluate": "pretrain", "label": "x"}, "rows.Bad_Row: a name of lower-case letters"),
        ("device", "tpu", "device: Input should be 'cpu' or 'cuda'"),
        ("rows/correctnet/set", {"sweep": {"chips": 0}}, "rows.correctnet.set.sweep.chips: Input should be greater"),
        ("defaults/evaluate/sigmas", [0.0], "defaults.evaluate.sigmas: sigmas lie above 0"),
    ],
)
def test_mistakes_are_one_line_each(path, value, line):
    with pytest.raises(UserError) as caught:
        Config.check(changed(path, value))
    lines = str(caught.value).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("config.yaml: ")
    assert line in lines[0]


def test_every_mistake_is_named_at_once():
    config = changed("defaults/sweep/chips", 0, changed("runs/quick", ["nothing"], changed("defaults/sed", 1)))
    with pytest.raises(UserError) as caught:
        Config.check(config)
    text = str(caught.value)
    assert len(text.splitlines()) == 3
    assert all(part in text for part in ("defaults.sweep.chips", "runs.quick", "defaults.sed"))


def test_the_pairs_of_a_run_are_one_table():
    config = Config.check(changed("pairs/lenet5-cifar10/variation", {"sigma": 0.3}))
    assert config.sigma_of("quick") == 0.5
    for run in ("paper", "lenet", "seeds"):
        with pytest.raises(UserError) as caught:
            config.sigma_of(run)
        assert str(caught.value) == f"runs.{run}: its pairs are one table, but their variation.sigma differ (0.3, 0.5)"


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "", "\x00"])
def test_files_that_are_no_configuration(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=r"c\.yaml: "):
        Config.load(tmp_path / "c.yaml")
    with pytest.raises(UserError, match="No such file"):
        Config.load(tmp_path / "none.yaml")


@pytest.mark.parametrize("stage", READS)
def test_a_stage_gets_what_it_reads_and_nothing_else(stage):
    settings = Settings()
    text = settings.canonical(stage)
    values = json.loads(text)
    assert values.pop("version") == VERSIONS[stage]
    assert Settings.from_canonical(text, stage).canonical(stage) == text
    view = settings.of(stage)
    for section in ("data", "network", "variation", "pretrain", "suppress", "search", "compensate", "evaluate"):
        assert hasattr(view, section) == (section in values)


def test_a_stage_s_string_changes_with_what_it_reads_only():
    config = Config.check(SHIPPED)
    before = config.settings("lenet5-mnist", "correctnet")
    after = Config.check(changed("pairs/lenet5-mnist/suppress/beta", 0.5)).settings("lenet5-mnist", "correctnet")
    assert {s for s in READS if before.canonical(s) != after.canonical(s)} == {"suppress"}
    after = Config.check(changed("defaults/variation/sigma", 0.4)).settings("lenet5-mnist", "correctnet")
    assert {s for s in READS if before.canonical(s) != after.canonical(s)} == set(READS) - {"pretrain"}


def test_a_pair_can_change_a_row():
    few = {"evaluate": {"chips": 50}, "sweep": {"threshold": 0.8}}
    config = Config.check(changed("pairs/lenet5-mnist/rows", {"unprotected": None, "correctnet-t99": few}))
    assert config.rows_of("lenet5-mnist") == ("unprotected", "correctnet-t99")
    assert config.settings("lenet5-mnist", "unprotected").evaluate.chips == 250
    settings = config.settings("lenet5-mnist", "correctnet-t99")
    assert settings.evaluate.chips == 50
    assert settings.sweep.threshold == 0.8, "the pair's row comes last"
    assert config.settings("vgg16-cifar10", "correctnet-t99").sweep.threshold == 0.99


def test_rows_share_the_stages_in_which_they_agree():
    config = Config.check(SHIPPED)
    pair = "lenet5-mnist"
    assert config.variant(pair, "correctnet", "compensate") == ""
    assert config.variant(pair, "correctnet-t99", "suppress") == ""
    assert config.variant(pair, "correctnet-t99", "sweep") == "@sweep.threshold-0.99"
    assert config.variant(pair, "correctnet-t99", "compensate") == "@sweep.threshold-0.99"
    assert config.variant(pair, "random-t99", "sweep") == "@sweep.threshold-0.99"
    both = "@sweep.threshold-0.99+search.strategy-random"
    assert config.variant(pair, "random-t99", "search") == both
    assert config.variant(pair, "random-t99", "compensate") == both, "its input differs"
    assert config.variant(pair, "combined", "sweep") == "@base-inject+sweep.threshold-0.99"
    # Two rows that make the same change share one run of it.
    twins = changed("rows/b", {"evaluate": "suppress", "label": "b", "set": {"suppress": {"beta": 9.0}}})
    twins = changed("rows/a", {"evaluate": "suppress", "label": "a", "set": {"suppress": {"beta": 9.0}}}, twins)
    twins["pairs"][pair]["rows"] = ["unprotected", "b", "a"]
    config = Config.check(twins)
    assert config.variant(pair, "a", "suppress") == config.variant(pair, "b", "suppress") == "@suppress.beta-9.0"


def test_folders_are_named_by_what_differs_whatever_other_rows_there_are():
    config = Config.check(SHIPPED)
    for pair in config.pairs:
        names: dict[str, str] = {}
        for row in config.rows_of(pair):
            alone = Config.check(changed(f"pairs/{pair}/rows", list(dict.fromkeys(["unprotected", row]))))
            settings = config.settings(pair, row)
            for stage in lineage(settings, config.rows[row].evaluate):
                variant = config.variant(pair, row, stage)
                assert re.fullmatch(r"(@[A-Za-z0-9._+-]{1,130})?", variant)
                assert variant == alone.variant(pair, row, stage)
                made_with = " ".join(settings.canonical(s) for s in lineage(settings, stage))
                if stage in ("compensate", "finetune"):
                    made_with += f" {settings.search.limits}"
                assert names.setdefault(f"{stage}{variant}", made_with) == made_with, "one name, one run"


def test_a_row_with_limits_of_its_own_takes_the_best_of_those():
    pair = "lenet5-mnist"
    rows = {"tight": {"search": {"limits": [0.01]}}, "greedy": None}
    rows |= {"greedy-tight": {"search": {"strategy": "greedy", "limits": [0.01]}}}
    config = changed(f"pairs/{pair}/rows", {"unprotected": None, "correctnet": None, **rows})
    for row in ("tight", "greedy-tight"):
        config = changed(f"rows/{row}", {"evaluate": "compensate", "label": row}, config)
    config = Config.check(config)
    assert config.variant(pair, "correctnet", "compensate") == ""
    assert config.variant(pair, "tight", "compensate") == "@search.limits-0.01"
    assert config.variant(pair, "tight", "search") == "", "the search within one limit knows of no other"
    assert config.variant(pair, "greedy", "compensate") == "@search.strategy-greedy"
    assert config.variant(pair, "greedy-tight", "compensate") == "@search.strategy-greedy+search.limits-0.01"


def test_a_name_that_stands_twice_is_a_mistake():
    config = changed("pairs/lenet5-mnist/rows", ["unprotected", "suppressed", "suppressed"])
    config = changed("runs/quick", ["lenet5-digits", "lenet5-digits"], config)
    with pytest.raises(UserError) as caught:
        Config.check(config)
    assert "pairs.lenet5-mnist.rows: 'suppressed' stands there twice" in str(caught.value)
    assert "runs.quick: 'lenet5-digits' stands there twice" in str(caught.value)


# Which stages read what, by hand: a setting in a stage's own section is its own; these are shared.
SHARED = {
    "seed": set(READS),
    "data.dataset": set(READS),
    "data.validation": set(READS),
    "data.augment": {"pretrain", "suppress", "inject", "search", "compensate", "finetune"},
    "network": {"pretrain"},
    "variation": set(READS) - {"pretrain"},
    "montecarlo": {"sweep", "search", "evaluate", "sensitivity"},
    "compensate": {"search", "compensate"},
    "compensate.epochs": {"compensate"},  # a state of the search trains for search.train_epochs
    # which stages run, not what they do: the workflow reads them
    "base": set(),
    "search.limits": set(),
    "evaluate.chips": set(),
    "evaluate.sigmas": set(),
    "evaluate.curve_chips": set(),
    "evaluate.curve_images": set(),
    "evaluate.chunk": set(),
}
OTHER = {"seed": 7, "base": "inject", "data.dataset": "mnist", "network.name": "vgg16", "network.widths": [8, 8, 8, 8]}
OTHER |= {"pretrain.sizes": [16], "suppress.sizes": [16]}
OTHER |= {"search.limits": [0.5], "search.ratios": [0.0, 0.3], "evaluate.sigmas": [0.7]}
OTHER |= {"data.augment": "crop", "variation.centre": "mean", "network.batchnorm": "none"}


def leaves(model, prefix=""):
    for name, field in model.model_fields.items():
        value = field.annotation
        if isinstance(value, type) and issubclass(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


@pytest.mark.parametrize(
    ("key", "field"), list(leaves(Settings)), ids=lambda value: value if type(value) is str else ""
)
def test_every_setting_is_read_by_exactly_the_stages_that_depend_on_it(key, field):
    default = field.get_default(call_default_factory=True)
    if key in OTHER:
        value = OTHER[key]
    elif get_origin(field.annotation) is Literal:
        values = [v for v in get_args(field.annotation) if v != default]
        if not values:
            pytest.skip("there is no other value yet")
        value = values[0]
    elif isinstance(default, bool):
        value = not default
    elif isinstance(default, int) or default is None:
        value = (default or 3) + 1
    else:
        value = default / 2 or 0.25
    nested = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    before, after = Settings(), Settings.model_validate(nested)
    found = {stage for stage in READS if before.canonical(stage) != after.canonical(stage)}
    section = key.split(".")[0]
    assert found == SHARED.get(key, SHARED.get(section, {section}))


def test_swapped_numbers_are_noticed():
    a = Settings.model_validate({"suppress": {"beta": 0.1, "k": 0.2}}).canonical("suppress")
    b = Settings.model_validate({"suppress": {"beta": 0.2, "k": 0.1}}).canonical("suppress")
    assert a != b


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 99}', '{"sweep": {"chip": 3}}'])
def test_bad_settings_strings(text):
    with pytest.raises(UserError, match="--settings"):
        Settings.from_canonical(text, "sweep")
