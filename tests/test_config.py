import copy
import functools
import json
import re
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_profile import examples

from correctnet.datasets import DATASETS, loading
from correctnet.devices.configuration import DeviceSettings
from correctnet.errors import UserError
from correctnet.pipeline.config import RULES, Config
from correctnet.pipeline.specs import STAGES, lineage
from correctnet.sections import exact, members, merge
from correctnet.settings import Settings

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted((ROOT / "workflow" / "experiments").glob("*.yaml"))


def read(path):
    """A file's values; through JSON, so that what it shares between rows can be changed one at a time."""
    return json.loads(json.dumps(yaml.safe_load(path.read_text())))


# Everything that ships, in one configuration.
SHIPPED = functools.reduce(merge, map(read, [ROOT / "config.yaml", *EXPERIMENTS]))


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


def test_the_defaults_are_the_paper_s_values():
    """What the paper prints, of every pair of `paper`; (10) with k = 1, 95 %, REINFORCE, 250 chips, all test images."""
    config = Config.load(ROOT / "config.yaml")
    assert tuple(config.settings("lenet5-mnist").search.limits) == (0.01, 0.02, 0.03)
    for pair in config.runs["paper"]:
        settings = config.settings(pair, "correctnet")
        variation = settings.variation
        assert (variation.model, variation.sigma, variation.centre) == ("lognormal", 0.5, "median")
        assert (settings.base, settings.suppress.k, settings.suppress.form) == ("suppress", 1.0, "orthogonal")
        assert (settings.sweep.threshold, settings.search.strategy) == (0.95, "reinforce")
        assert set(settings.search.limits) <= {0.01, 0.015, 0.02, 0.03}
        assert (settings.evaluate.split, settings.evaluate.chips, settings.evaluate.images) == ("test", 250, None)
        assert config.rows_of(pair) == ("unprotected", "suppressed", "correctnet", "all-candidates")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_adds_to_the_configuration_and_changes_nothing_of_it(path):
    """Its stages of the paper's pairs and rows are those of config.yaml, in the same folders."""
    paper, values = Config.load(ROOT / "config.yaml"), read(path)
    merged = Config.load(ROOT / "config.yaml", path)
    assert set(values) == {"runs", "rows", "pairs"}
    assert not set(values["rows"]) & set(paper.rows)
    (run,) = values["runs"]
    assert run == path.stem
    command = f"# snakemake --cores 2 {run} --configfile workflow/experiments/{path.name}\n"
    assert path.read_text().startswith(command)
    for pair in paper.pairs:
        assert set(paper.rows_of(pair)) <= set(merged.rows_of(pair))
        for row in paper.rows_of(pair):
            before, after = (config.settings(pair, row) for config in (paper, merged))
            assert (before.evaluate, before.search.limits) == (after.evaluate, after.search.limits)
            stages = (*lineage(before, paper.rows[row].evaluate), "evaluate", "sensitivity")
            assert [STAGES[s].canonical(before) for s in stages] == [STAGES[s].canonical(after) for s in stages]
            assert all(paper.variant(pair, row, s) == merged.variant(pair, row, s) for s in stages[:-2])
    used = {row for pair in values["runs"][run] for row in merged.rows_of(pair)}
    assert set(values["rows"]) <= used, "no row is left over"


def test_experiments_say_the_same_of_a_row_and_of_a_pair_s_training():
    said: dict[tuple[str, str, str], object] = {}
    for path in EXPERIMENTS:
        values = read(path)
        parts = [("rows", row, "", of_row) for row, of_row in values["rows"].items()]
        parts += [("pairs", p, key, of_key) for p, own in values["pairs"].items() for key, of_key in own.items()]
        for kind, name, key, value in parts:
            if key != "rows":
                assert said.setdefault((kind, name, key), value) == value, (path.name, name, key)


def test_a_pair_may_be_like_another():
    alike = {"like": "lenet5-mnist", "seed": 3, "search": {"chips": 5}}
    config = Config.check(changed("pairs/other", alike))
    parent, own = config.settings("lenet5-mnist", "correctnet"), config.settings("other", "correctnet")
    assert config.rows_of("other") == config.rows_of("lenet5-mnist")
    assert own == parent.model_copy(update={"seed": 3, "search": parent.search.model_copy(update={"chips": 5})})
    assert config.settings("vgg16-cifar100", "suppressed").evaluate.chips == 50, "as the other pair has the row"
    two = Config.check(changed("pairs/vgg16-cifar100/rows", {"unprotected": None, "suppressed": None}))
    assert two.rows_of("vgg16-cifar100") == ("unprotected", "suppressed")
    assert two.settings("vgg16-cifar100", "suppressed").evaluate.chips == 250, "the rows are its own"


@pytest.mark.parametrize(
    ("like", "line"),
    [
        ("lenet5-mnits", "pairs.other.like: no pair 'lenet5-mnits' (did you mean 'lenet5-mnist'?)"),
        ("vgg16-cifar100", "pairs.other.like: 'vgg16-cifar100' is itself like another pair; name that one"),
        ("other", "pairs.other.like: 'other' is itself like another pair; name that one"),
        (3, "pairs.other.like: the name of a pair is expected, not 3"),
    ],
)
def test_a_pair_that_is_like_none(like, line):
    with pytest.raises(UserError) as caught:
        Config.check(changed("pairs/other", {"like": like}))
    assert str(caught.value) == f"config.yaml: {line}"


def test_several_files_are_merged_as_snakemake_does(tmp_path):
    (tmp_path / "a.yaml").write_text("pairs: {lenet5-mnist: {seed: 4, rows: [unprotected]}}")
    (tmp_path / "b.yaml").write_text("pairs: {lenet5-mnist: {seed: 5}}\ndevice: cuda")
    config = Config.load(ROOT / "config.yaml", tmp_path / "a.yaml", tmp_path / "b.yaml")
    assert (config.settings("lenet5-mnist").seed, config.device) == (5, "cuda")
    assert config.rows_of("lenet5-mnist") == ("unprotected",)
    assert config.settings("lenet5-mnist").pretrain.epochs == 10
    (tmp_path / "b.yaml").write_text("- 1")
    with pytest.raises(UserError, match=r"b\.yaml: a mapping of settings is expected"):
        Config.load(ROOT / "config.yaml", tmp_path / "b.yaml")


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
        ("defaults/search/ratios", [0, -1, 1], "defaults.search.ratios: ratios are numbers from 0 to 10"),
        (
            "defaults/search/ratios",
            [0, 25, 50],
            "search.ratios: ratios are numbers from 0 to 10 (0.5, not 50)",
        ),
        ("defaults/search/ratios", [0, 1, 1], "defaults.search.ratios: each ratio once"),
        (
            "defaults/evaluate/chips",
            2**28 + 1,
            "defaults.evaluate.chips: Input should be less than or equal to 268435456",
        ),
        (
            "pairs/lenet5-digits/data/validation",
            0.0001,
            "pairs.lenet5-digits: data.validation: 0.0001 of the 1438 training images leaves one part empty",
        ),
        (
            "pairs/lenet5-digits/data/validation",
            0.9999,
            "pairs.lenet5-digits: data.validation: 0.9999 of the 1438 training images leaves one part empty",
        ),
        ("pairs/lenet5-mnist/network/name", "lenet", "pairs.lenet5-mnist.network.name: Input should be 'lenet5'"),
        ("pairs/lenet5-digits/network/widths", [1, 2], "pairs.lenet5-digits: network.widths: 4 are expected"),
        ("pairs/vgg16-cifar100/network/widths", [8] * 4, "network.widths: 14 are expected for vgg16"),
        ("pairs/vgg16-cifar10/network/widths", [0] * 14, "network.widths: positive widths are expected"),
        ("runs/paper", ["lenet5-mnits"], "runs.paper: no pair 'lenet5-mnits' (did you mean 'lenet5-mnist'?)"),
        ("runs/paper", [], "runs.paper: one pair or more is expected"),
        ("pairs/lenet5-mnist/rows", ["unprotected", "corectnet"], "no row 'corectnet' (did you mean 'correctnet'?)"),
        ("pairs/lenet5-mnist/rows", ["correctnet"], "the first row must evaluate the original network"),
        ("pairs/lenet5-mnist/rows", ["unprotected", "recalibrated"], "'recalibrated' recalibrates BatchNorm"),
        ("pairs/lenet5-digits/pretrain", {"sizes": [16]}, "pretrain.sizes: lenet5 takes images of 32"),
        ("pairs/lenet5-digits/suppress/sizes", [16], "suppress.sizes: lenet5 takes images of 32"),
        ("pairs/vgg16-cifar10/pretrain/sizes", [0], "sides of 1 pixel or more are expected"),
        ("pairs/vgg16-cifar100/pretrain/sizes", [33], "pretrain.sizes: sides between 1 and 32 pixels are expected"),
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


HEAD = "runs: {paper: [p]}\nrows: {unprotected: {evaluate: pretrain, label: u}}\n"
NAME = "a name of at most 100 letters, digits, '-', '_' and '.' is expected, a letter, digit or '_' first"
SMALL = "a name of lower-case letters, digits, '-' and '.' is expected"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        # keys that stand twice, at any depth, in any style, behind an anchor
        (
            "pairs:\n  p:\n    evaluate: {chips: 10}\n    seed: 1\n    evaluate: {images: 9}",
            "pairs.p.evaluate: is listed",
        ),
        ("pairs: {p: {evaluate: {chips: 1, 'chips': 2}}}", "pairs.p.evaluate.chips: is listed twice"),
        ("pairs: {p: {}}\npairs: {q: {}}", "pairs: is listed twice"),
        ("pairs: {p: &a {seed: 1}, q: {<<: *a, seed: 2, seed: 3}}", "pairs.q.seed: is listed twice"),
        ("pairs: {p: &a {seed: 1}, q: {<<: *a, <<: *a}}", "pairs.q.<<: is listed twice"),
        ("pairs: {a: &a {seed: 1}, b: &b {seed: 2}, p: {<<: [*a, *b]}}", "pairs.p.<<: seed is in several"),
        ("pairs: {a: &a {seed: 1}, b: &b {<<: *a}, p: {<<: [*a, *b]}}", "pairs.p.<<: seed is in several"),
        # what YAML reads as something else
        ("pairs: {p: {evaluate: {chips: yes}}}", "pairs.p.evaluate.chips: a number is expected, not True"),
        ("pairs: {p: {evaluate: {images: on}}}", "pairs.p.evaluate.images: a number is expected, not True"),
        ("pairs: {p: {variation: {sigma: off}}}", "pairs.p.variation.sigma: a number is expected, not False"),
        (
            "pairs: {p: {evaluate: {sigmas: [0.1, on]}}}",
            "pairs.p.evaluate.sigmas: a number is expected, not [0.1, True]",
        ),
        ("pairs: {p: {pretrain: {clip: no}}}", "pairs.p.pretrain.clip: a number is expected, not False"),
        (
            "pairs: {p: {suppress: {beta: 1e-4}}}",
            "pairs.p.suppress.beta: a number is expected (write 0.0001), not '1e-4'",
        ),
        ("pairs: {p: {suppress: {beta: 1e-5}}}", "a number is expected (write 1.0e-05), not '1e-5'"),
        ("pairs: {p: {seed: '5'}}", "pairs.p.seed: a number is expected (write 5), not '5'"),
        (
            "pairs: {p: {search: {limits: ['0.1']}}}",
            "pairs.p.search.limits: a number is expected (write 0.1), not ['0.1']",
        ),
        (
            "pairs: {p: {suppress: {fold_batchnorm: 1}}}",
            "pairs.p.suppress.fold_batchnorm: true or false is expected, not 1",
        ),
        ("pairs: {p: {suppress: {fold_batchnorm: 'yes'}}}", "true or false is expected, not 'yes'"),
        ("pairs: {p: {seed: 010}}", "pairs.p.seed: 010 is read as 8"),
        ("pairs: {p: {pretrain: {epochs: 1:30}}}", "pairs.p.pretrain.epochs: 1:30 is read as 90"),
        ("pairs: {p: {variation: {sigma: 0:0.5}}}", "pairs.p.variation.sigma: 0:0.5 is read as 0.5"),
        ("pairs: {p: {variation: {sigma: .inf}}}", "pairs.p.variation.sigma: Input should be a finite number"),
        ("pairs: {p: {variation: {sigma: .nan}}}", "pairs.p.variation.sigma: Input should be a finite number"),
        ("pairs: {p: {evaluate: }}", "pairs.p.evaluate: Input should be a valid dictionary"),
        ("pairs: {p: {evaluate: {chips: }}}", "pairs.p.evaluate.chips: Input should be a valid integer, not None"),
        ("pairs: {p: {variation: {on: weight}}}", "pairs.p.variation: a name is expected as key, and on is read as"),
        ("pairs: {p: {}, 1: {}}", "pairs: a name is expected as key, and 1 is read as a number; put it in quotes"),
        ("pairs: {p: {}, no: {}}", "pairs: a name is expected as key, and no is read as true or false"),
        ("pairs: {p: {}, 2020-01-01: {}}", "pairs: a name is expected as key, and 2020-01-01 is read as a date"),
        ("pairs: {p: {}, ~: {}}", "pairs: a name is expected as key, and ~ is read as empty"),
        ("pairs: {p: {}, [a]: {}}", "pairs: a name is expected as key, and a list or mapping is there"),
        ("pairs: {p: {rows: [no]}}", "pairs.p.rows: the name of a row is expected, not False"),
        ("pairs: {p: {rows: [[unprotected]]}}", "pairs.p.rows: the name of a row is expected, not ['unprotected']"),
        ("pairs: {p: {rows: []}}", "pairs.p.rows: one row or more is expected"),
        ("pairs: {p: {rows: {unprotected: 0}}}", "pairs.p.rows.unprotected: Input should be a valid dictionary"),
        ("pairs: {p: &x {pretrain: *x}}", "pairs.p.pretrain: contains itself"),
        ("pairs: {p: !!set {seed}}", "pairs.p: the tag tag:yaml.org,2002:set is not supported"),
        ("pairs: {p: {seed: !!python/name:os.system x}}", "pairs.p.seed: the tag"),
        ("pairs:\n\tp: {}", "indent with spaces"),
        ("pairs: {p: {}}\n---\na: 1", "expected a single document"),
        ("pairs: {p: {}}\n__use_yte__: true", "__use_yte__: templates are not supported"),
        # names
        *(
            (f"pairs: {{p: {{}}, {name!r}: {{}}}}", NAME)
            for name in ("my pair", "a/b", "x@y", "..", ".logs", "", "-x", "é")
        ),
        ('pairs: {p: {}, "a\\nb": {}}', NAME),
        (f"pairs: {{p: {{}}, {'x' * 101}: {{}}}}", NAME),
        ("pairs: {p: {}, summary: {}}", "pairs.summary: summary is the folder of tables and figures"),
        # folders
        ("pairs: {p: {}}\nresults: ''", "results: a folder is expected, not ''"),
        ("pairs: {p: {}}\nresults: 'a{b}'", "results: a path without '{'"),
        ("pairs: {p: {}}\nresults: -x", "results: a path without '{'"),
        ("pairs: {p: {}}\nresults: no", "results: Input should be a valid string, not False"),
        ("pairs: {p: {}}\ndata_dir: ~nobody-of-this-name/x", "data_dir: there is no such user"),
        # rows that are not of one table
        ("pairs: {p: {rows: {unprotected: {seed: 1}}}}", None),
    ],
)
def test_what_means_something_else_than_it_shows(tmp_path, text, line):
    (tmp_path / "c.yaml").write_text(HEAD + text, encoding="utf-8")
    if line is None:
        Config.load(tmp_path / "c.yaml")
        return
    with pytest.raises(UserError) as caught:
        Config.load(tmp_path / "c.yaml")
    lines = str(caught.value).splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"{tmp_path / 'c.yaml'}: ")
    assert line in lines[0]


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("pairs: {p: {suppress: {beta: 1.0e-4}}}", "suppress.beta", 1e-4),
        ("pairs: {p: {suppress: {beta: 1}}}", "suppress.beta", 1.0),
        ("pairs: {p: {evaluate: {chips: 1_000}}}", "evaluate.chips", 1000),
        ("pairs: {p: {evaluate: {chips: 10.0}}}", "evaluate.chips", 10),
        ("pairs: {p: {suppress: {fold_batchnorm: yes}}}", "suppress.fold_batchnorm", True),
        ("pairs: {p: {evaluate: {images: ~}}}", "evaluate.images", None),
        ("pairs: {p: }", "seed", 0),
        ("pairs: {p: {rows: }}", "seed", 0),
        ("pairs: {a: &a {seed: 1, evaluate: {chips: 7}}, p: {<<: *a, seed: 2}}", "evaluate.chips", 7),
        ("pairs: {a: &a {seed: 1}, b: &b {base: inject}, p: {<<: [*a, *b]}}", "seed", 1),
        ("pairs: {a: &a {seed: 1}, b: &b {seed: 2}, p: {<<: [*a, *b], seed: 3}}", "seed", 3),
        ("pairs: {a: &a {seed: 1}, p: *a}", "seed", 1),
        ("\ufeffpairs: {p: {seed: 3}}  # é", "seed", 3),
    ],
)
def test_what_yaml_means_as_it_shows(tmp_path, text, path, value):
    text = HEAD + text if text[0] != "\ufeff" else f"\ufeff{HEAD}{text[1:]}"
    (tmp_path / "c.yaml").write_text(text.replace("\n", "\r\n"), encoding="utf-8")
    found = Config.load(tmp_path / "c.yaml").settings("p")
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        *((f"runs/{rule}", ["lenet5-mnist"], f"runs.{rule}: {rule} is a rule of the workflow") for rule in RULES),
        ("runs/my run", ["lenet5-mnist"], f"runs.'my run': {NAME}"),
        ("runs/-n", ["lenet5-mnist"], NAME),
        ("runs", {"quick": ["lenet5-mnist"]}, "runs.paper: missing; `snakemake` without a target runs its pairs"),
        *(
            (f"rows/{name}", {"evaluate": "pretrain", "label": "x"}, SMALL)
            for name in ("A", "a b", ".a", "-a", "a_b", "é")
        ),
        *(
            ("rows/s-clip", {"evaluate": "pretrain", "label": label}, "rows.s-clip.label: printable characters")
            for label in ("\x07", "\ud800", "a\x1bb")
        ),
        (
            "rows/s-clip",
            {"evaluate": "pretrain", "label": 5},
            "rows.s-clip.label: Input should be a valid string, not 5",
        ),
        ("rows/correctnet/set", {"seed": 3}, "'correctnet' has seed 3 and 'unprotected' 0, which are no rows of one"),
        ("rows/correctnet/set", {"evaluate": {"split": "validation"}}, "'correctnet' has evaluate.split validation"),
        ("rows/combined-t90/set", {"data": {"dataset": "mnist"}}, "'combined-t90' has data.dataset mnist"),
        ("defaults/evaluate/chips", 2**28 + 1, "evaluate.chips: Input should be less than or equal to 268435456"),
        ("defaults/sweep/chips", 2**28 + 1, "sweep.chips: Input should be less than or equal to 268435456"),
        ("defaults/search/chips", 2**28 + 1, "search.chips: Input should be less than or equal to 268435456"),
    ],
)
def test_names_and_rows_that_the_workflow_cannot_take(path, value, line):
    with pytest.raises(UserError) as caught:
        Config.check(changed(path, value))
    lines = str(caught.value).splitlines()
    assert lines
    assert all(
        line in found or "has seed" in found or "has evaluate.split" in found or "has data" in found for found in lines
    )
    assert any(line in found for found in lines)


def test_no_run_has_the_name_of_a_rule():
    """RULES are the rules of the workflow's files."""
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "workflow" / "rules").glob("*.smk"))
    source += (ROOT / "Snakefile").read_text(encoding="utf-8")
    assert set(re.findall(r"^(?:use rule \w+ as|rule) (\w+)", source, re.MULTILINE)) == set(RULES)


@pytest.mark.parametrize("name", ["nan", "null", "none", "inf", "true", "1", "a.b", "no"])
def test_rows_may_be_called_what_they_like(name):
    config = Config.check(changed(f"rows/{name}", {"evaluate": "pretrain", "label": "x"}))
    assert name in config.rows


NUMBERS = {"variation.sigma": "variation", "suppress.beta": "suppress", "search.learning_rate": "search"}


@given(
    st.one_of(
        st.booleans(), st.text(max_size=6), st.floats(), st.integers(), st.none(), st.lists(st.booleans(), max_size=2)
    )
)
@examples(200)
def test_a_number_is_a_number_and_a_truth_value_is_one(value):
    """Of every setting: what is taken has the type that it was given, or is the float of an integer."""
    for name, field in Settings.model_fields.items():
        inner = [(section, *item) for section in members(field.annotation) for item in section.model_fields.items()]
        for section, key, of_key in inner:
            try:
                found = getattr(section.model_validate({key: value}), key)
            except ValueError:
                continue
            args = get_args(of_key.annotation)
            numeric = {int, float} & {of_key.annotation, *args} and get_origin(of_key.annotation) is not tuple
            if numeric and found is not None:
                assert type(value) in (int, float), f"{name}.{key}"
                assert found == (float(value) if type(found) is float else value)
            if of_key.annotation is bool:
                assert type(value) is bool, f"{name}.{key}"
    assert type(value) in (int, float) or _refused(value)


def _refused(value):
    try:
        Settings.model_validate({"seed": value})
    except ValueError:
        return True
    return False


@given(st.lists(st.floats(1e-9, 1.0), min_size=1, max_size=4, unique=True))
@examples(50)
def test_limits_in_names_of_folders_are_exact(limits):
    assert len({exact(limit) for limit in limits}) == len(limits)
    config = changed("rows/tight", {"evaluate": "compensate", "label": "t", "set": {"search": {"limits": limits}}})
    config["pairs"] = {"p": {"rows": ["unprotected", "tight"]}}
    config["runs"] = {"paper": ["p"]}
    variant = Config.check(config).variant("p", "tight", "compensate")
    named = "_".join(map(repr, limits))
    assert variant == f"@search.limits-{named}" or len(variant) > 120
    assert re.fullmatch(r"(@[A-Za-z0-9._+-]+)?", variant)


def test_a_configuration_in_json(tmp_path):
    rows = '"rows": {"unprotected": {"evaluate": "pretrain", "label": "u"}}'
    text = f'{{"runs": {{"paper": ["p"]}}, {rows}, "pairs": {{"p": %s}}}}'
    path = tmp_path / "c.json"
    path.write_text(text % '{"suppress": {"beta": 1e-4},\t"seed": 1}', encoding="utf-8")
    assert Config.load(path).settings("p").suppress.beta == 1e-4
    path.write_text(text % '{"seed": 1, "suppress": {"k": 1, "k": 2}, "seed": 2}', encoding="utf-8")
    with pytest.raises(UserError) as caught:
        Config.load(path)
    assert str(caught.value).splitlines() == [
        f"{path}: pairs.p.seed: is listed twice",
        f"{path}: pairs.p.suppress.k: is listed twice",
    ]


def test_every_mistake_is_named_at_once():
    config = changed("defaults/sweep/chips", 0, changed("runs/quick", ["nothing"], changed("defaults/sed", 1)))
    with pytest.raises(UserError) as caught:
        Config.check(config)
    text = str(caught.value)
    assert len(text.splitlines()) == 3
    assert all(part in text for part in ("defaults.sweep.chips", "runs.quick", "defaults.sed"))


def test_the_pairs_of_a_run_are_one_table():
    config = Config.check(changed("pairs/lenet5-cifar10/variation", {"sigma": 0.3}))
    assert config.level_of("quick") == 0.5
    for run in ("paper", "lenet", "seeds"):
        with pytest.raises(UserError) as caught:
            config.level_of(run)
        assert str(caught.value) == f"runs.{run}: its pairs are one table, but their variation.sigma differ (0.3, 0.5)"


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "", "\x00", "[" * 5000, "3", b"\xff\xfea: 1", b"a: \xe9"])
def test_files_that_are_no_configuration(tmp_path, text):
    (tmp_path / "c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"c\.yaml: "):
        Config.load(tmp_path / "c.yaml")
    with pytest.raises(UserError, match="No such file"):
        Config.load(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        Config.load(tmp_path)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_gets_what_it_reads_and_nothing_else(stage):
    settings = Settings()
    text = STAGES[stage].canonical(settings)
    values = json.loads(text)
    assert values.pop("version") == STAGES[stage].version
    assert STAGES[stage].canonical(STAGES[stage].parse(text, stage)) == text
    view = STAGES[stage].read(settings)
    for section in ("data", "network", "variation", "pretrain", "suppress", "search", "compensate", "evaluate"):
        assert hasattr(view, section) == (section in values)


def test_a_stage_s_string_changes_with_what_it_reads_only():
    config = Config.check(SHIPPED)
    before = config.settings("lenet5-mnist", "correctnet")
    after = Config.check(changed("pairs/lenet5-mnist/suppress/beta", 0.5)).settings("lenet5-mnist", "correctnet")
    assert {s for s in STAGES if STAGES[s].canonical(before) != STAGES[s].canonical(after)} == {"suppress"}
    after = Config.check(changed("defaults/variation/sigma", 0.4)).settings("lenet5-mnist", "correctnet")
    assert {s for s in STAGES if STAGES[s].canonical(before) != STAGES[s].canonical(after)} == set(STAGES) - {
        "pretrain"
    }


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


def listed_rows(pair):
    """The rows of a shipped pair as they are written, of its own or of the pair that it is like."""
    values = SHIPPED["pairs"][pair]
    return values["rows"] if "rows" in values else listed_rows(values["like"])


@pytest.mark.slow
def test_folders_are_named_by_what_differs_whatever_other_rows_there_are():
    config = Config.check(SHIPPED)
    for pair in config.pairs:
        names: dict[str, str] = {}
        rows = listed_rows(pair)
        for row in config.rows_of(pair):
            own = rows.get(row) if isinstance(rows, dict) else None
            alone = Config.check(changed(f"pairs/{pair}/rows", {"unprotected": None, row: own}))
            settings = config.settings(pair, row)
            for stage in lineage(settings, config.rows[row].evaluate):
                variant = config.variant(pair, row, stage)
                assert re.fullmatch(r"(@[A-Za-z0-9._+-]{1,130})?", variant)
                assert variant == alone.variant(pair, row, stage)
                made_with = " ".join(STAGES[s].canonical(settings) for s in lineage(settings, stage))
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
    assert "pairs.lenet5-mnist.rows: 'suppressed' is listed twice" in str(caught.value)
    assert "runs.quick: 'lenet5-digits' is listed twice" in str(caught.value)


# Which stages read what, by hand: a setting in a stage's own section is its own; these are shared.
SHARED = {
    "seed": set(STAGES),
    **{f"data.{key}": set(STAGES) for key in ("dataset", "folder", "npz", "factory", "digest")},
    "data.validation": set(STAGES),
    "data.augment": {
        "pretrain",
        "suppress",
        "inject",
        "distil",
        "moments",
        "sidepath",
        "search",
        "compensate",
        "finetune",
    },
    "network": {"pretrain"},
    "variation": set(STAGES) - {"pretrain"},
    "converters": set(STAGES) - {"pretrain", "suppress", "moments"},
    "digital": set(STAGES) - {"pretrain", "suppress"},
    "protect": {"evaluate"},
    "adapt": {"evaluate"},
    "calibrate": {"evaluate"},
    "mapping": {"evaluate"},
    "montecarlo": {"sweep", "search", "evaluate", "sensitivity"},
    "compensate": {"search", "compensate"},
    "compensate.epochs": {"compensate"},  # a state of the search trains for search.train_epochs
    # which stages run, not what they do: the workflow reads them
    "base": set(),
    "search.limits": set(),
    "evaluate.chips": set(),
    "evaluate.variation": set(),
    "evaluate.sigmas": set(),
    "evaluate.curve_chips": set(),
    "evaluate.curve_images": set(),
    "evaluate.chunk": set(),
}
OTHER = {"seed": 7, "base": "inject", "data.dataset": "mnist", "network.name": "vgg16", "network.widths": [8, 8, 8, 8]}
OTHER |= {"digital.layers": ["conv1"], "protect.allocation": "equal", "pretrain.sizes": [16], "suppress.sizes": [16]}
OTHER |= {"evaluate.variation": {"sigma": 0.2}, "distil.teachers": [0.2]}
OTHER |= {"search.limits": [0.5], "search.ratios": [0.0, 0.3], "evaluate.sigmas": [0.7]}
OTHER |= {"data.folder": "x", "data.npz": "x", "data.factory": "a:b", "data.digest": "0", "network.factory": "a:b"}
OTHER |= {"network.options": {"a": 1}, "network.weights": "x", "network.digest": "0"}
# What a setting needs beside it.
BESIDE = {"network.options": {"network": {"factory": "a:b"}}}
BESIDE |= {f"variation.{key}": {"variation": {"device": "b"}} for key in DeviceSettings.model_fields if key != "centre"}
OTHER |= {f"variation.{key}": "a" for key in ("device", "unit", "time", "digest")} | {"variation.g_max": 1.0}
OTHER |= {"variation.cell": "offset", "variation.chip_gain": 0.1, "variation.column_gain": 0.1}
OTHER |= {"data.augment": "crop", "variation.centre": "mean", "network.batchnorm": "none"}


def leaves(model, prefix=""):
    for name, field in model.model_fields.items():
        for section in members(field.annotation):
            yield from leaves(section, f"{prefix}{name}.")
        if not members(field.annotation):
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
    beside = BESIDE.get(key, {})
    before, after = Settings.model_validate(beside), Settings.model_validate(merge(beside, nested))
    found = {stage for stage in STAGES if STAGES[stage].canonical(before) != STAGES[stage].canonical(after)}
    section = key.split(".")[0]
    assert found == SHARED.get(key, SHARED.get(section, {section}))


def test_swapped_numbers_are_noticed():
    a = STAGES["suppress"].canonical(Settings.model_validate({"suppress": {"beta": 0.1, "k": 0.2}}))
    b = STAGES["suppress"].canonical(Settings.model_validate({"suppress": {"beta": 0.2, "k": 0.1}}))
    assert a != b


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100000, '{"version": 99}', '{"sweep": {"chip": 3}}'])
def test_bad_settings_strings(text):
    with pytest.raises(UserError, match="--settings"):
        STAGES["sweep"].parse(text, "sweep")


@pytest.mark.parametrize(
    ("text", "where"),
    [('{"seed": 1, "seed": 2}', "seed"), ('{"sweep": {"chips": 5, "images": 3, "chips": 9}}', "sweep.chips")],
)
def test_a_settings_string_says_each_key_once(text, where):
    with pytest.raises(UserError, match=rf"--settings: not JSON \({where}: is listed twice\)"):
        STAGES["sweep"].parse(text, "sweep")


@pytest.mark.parametrize("name", [*DATASETS])
def test_the_numbers_of_training_images_are_those_of_the_files(name):
    if name == "digits":
        assert len(loading.load(name, validation=0.5).train) * 2 == DATASETS[name].train
        return
    record = {"mnist": 28 * 28, "cifar10": 1 + 3 * 32 * 32, "cifar100": 2 + 3 * 32 * 32}[name]
    files = [file for file in DATASETS[name].source().train if "labels" not in file.name]
    assert sum(file.size // record for file in files) == DATASETS[name].train


@pytest.mark.parametrize(
    ("row", "settings", "stage"),
    [
        ("unprotected", {"pretrain": {"epochs": 1, "batch": 431}}, "pretrain"),
        ("unprotected", {"pretrain": {"epochs": 1, "batch": 1}}, "pretrain"),
        ("suppressed", {"suppress": {"epochs": 1, "batch": 431}}, "suppress"),
        ("injected", {"inject": {"epochs": 1, "batch": 431}}, "inject"),
        ("finetuned", {"finetune": {"epochs": 1, "batch": 431, "batchnorm": "updated"}}, "finetune"),
        ("unprotected", {"suppress": {"epochs": 1, "batch": 431}}, None),
        ("unprotected", {"pretrain": {"epochs": 0, "batch": 431}}, None),
        ("unprotected", {"pretrain": {"epochs": 1, "batch": 431}, "network": {"batchnorm": "none"}}, None),
        ("injected", {"inject": {"epochs": 1, "batch": 431, "batchnorm": "frozen"}}, None),
        ("unprotected", {"pretrain": {"epochs": 1, "batch": 430}}, None),
    ],
)
def test_a_batch_of_one_image_for_batchnorm(row, settings, stage):
    """1294 of the digits are left to train on, which is 3 x 431 + 1."""
    pair = {"rows": list(dict.fromkeys(["unprotected", row])), "data": {"dataset": "digits"}, **settings}
    pair["network"] = {"name": "vgg16", **settings.get("network", {})}
    config = changed("pairs", {"p": pair}, changed("runs", {"paper": ["p"]}))
    if stage is None:
        Config.check(config)
        return
    with pytest.raises(UserError, match=rf"'{row}': {stage}.batch: of 1294 images, .* leave one alone"):
        Config.check(config)
