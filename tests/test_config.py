"""What the settings promise: who overrules whom, every mistake at once, files that cannot do harm."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peelcli.config import (
    SCHEMES,
    SECTIONS,
    AuditConfig,
    ExtractConfig,
    FitConfig,
    ReportConfig,
    cache_directory,
    load_yaml,
    parse_duration,
    parse_layers,
    resolve,
    section_name,
    stray_variables,
    to_json,
)
from peelcli.config.setting import Setting, settings_of
from peelcli.errors import UsageError

SAMPLES = Path(__file__).parent.parent / "sample_configs"
RULES = [(section, rule) for section in SECTIONS for rule in settings_of(section).values()]
TOTALS = {part for _, rule in RULES for part, _ in rule.split}


def values(rule: Setting) -> st.SearchStrategy[Any]:
    """Valid values of a setting, as they come out of `resolve`."""
    if rule.kind is bool:
        return st.booleans()
    if rule.kind is int:
        return st.integers(int(rule.at_least or 0), 10**6)
    if rule.kind is float:
        return st.floats(0.01, 0.99)
    if rule.kind is Path:
        one: Any = st.text("abc/. ,é", min_size=1).map(lambda text: Path("x" + text))
    elif rule.name == "layers":
        return st.lists(st.integers(1, 99), min_size=1, max_size=3).map(
            lambda items: ",".join(map(str, items))
        )
    elif rule.name == "device":
        return st.sampled_from(["cpu", "cuda", "cuda:1"])
    elif rule.name in ("budget", "every", "max_idle"):
        return st.sampled_from(["90", "90s", "1.5m", "2h"])
    elif rule.name == "trained_modules":
        one = st.sampled_from(["*.mlp.*", "*_proj", "lm_head", "model.layers.[12].*"])
    elif rule.name == "log_to":
        one = st.sampled_from(["tensorboard:runs/peel", "wandb:project", "mlflow:http://localhost:5000"])
    elif rule.name == "paths":
        one = st.sampled_from(["direct", "last", "all", "search", "[3, 3, 3, 4]", "[1,2]", "[1]"])
    else:
        one = st.sampled_from([choice for choice in rule.choices if choice != rule.alone])
    return st.lists(one, min_size=1, max_size=3, unique=True).map(tuple) if rule.many else one


def as_text(rule: Setting, value: Any) -> str:
    if rule.many:
        return (os.pathsep if rule.kind is Path else ",").join(map(str, value))
    return str(value).lower() if rule.kind is bool else str(value)


def as_yaml(value: Any) -> Any:
    if isinstance(value, tuple):
        return [as_yaml(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def as_flag(rule: Setting, value: Any) -> Any:
    return [str(item) for item in value] if rule.many else value if rule.kind is bool else str(value)


@pytest.mark.parametrize(("section", "rule"), RULES, ids=lambda item: getattr(item, "name", None))
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_flag_beats_environment_beats_yaml_beats_default(
    section: type, rule: Setting, data: st.DataObject
) -> None:
    by_flag, by_env, by_yaml = (data.draw(st.none() | values(rule)) for _ in range(3))
    yaml = {} if by_yaml is None else {section_name(section): {rule.key: as_yaml(by_yaml)}}
    env = {} if by_env is None else {rule.variable: as_text(rule, by_env)}
    flags = {} if by_flag is None else {rule.name: as_flag(rule, by_flag)}
    expected = next((value for value in (by_flag, by_env, by_yaml) if value is not None), rule.default)
    assert getattr(resolve([section], yaml, env, flags)[section], rule.name) == expected


def test_a_higher_level_can_take_a_value_back() -> None:
    yaml = {
        "extract": {"batch_size": 4, "layers": "2"},
        "report": {"output": "x", "top": 3},
        "audit": {"resume": False},
    }
    flags = {"batch_size": "auto", "output": "-", "top": "all", "layers": "all"}
    configs = resolve([ExtractConfig, AuditConfig, ReportConfig], yaml, {"PEEL_RESUME": "on"}, flags)
    assert (configs[ExtractConfig].batch_size, configs[ExtractConfig].layers) == (None, None)
    assert (configs[ReportConfig].output, configs[ReportConfig].top) == (None, None)
    assert configs[AuditConfig].resume is True


def test_a_shared_setting_reaches_every_section_and_any_other_the_last() -> None:
    yaml = {"extract": {"device": "cuda"}, "fit": {"device": "cuda:1"}, "report": {"output": "r"}}
    configs = resolve(
        [ExtractConfig, ReportConfig, FitConfig, AuditConfig], yaml, {"PEEL_SEED": "7"}, {"output": "d"}
    )
    assert (configs[ExtractConfig].device, configs[FitConfig].device) == ("cuda", "cuda:1")
    assert configs[ExtractConfig].seed == configs[FitConfig].seed == 7
    outputs = [configs[section].output for section in (ExtractConfig, ReportConfig, FitConfig, AuditConfig)]
    assert outputs == [None, Path("r"), None, Path("d")]


@given(total=st.integers(5, 10**9))
def test_a_total_is_shared_out_whole_two_to_one_to_two(total: int) -> None:
    config = resolve([ExtractConfig], None, {}, {"tokens": str(total)})[ExtractConfig]
    shares = (config.fit_tokens, config.select_tokens, config.eval_tokens)
    assert sum(shares) == total
    assert all(abs(share - total * part / 5) < 1 for share, part in zip(shares, (2, 1, 2), strict=True))


def test_a_total_gives_way_to_a_part_of_its_own_level_or_a_higher_one_only() -> None:
    yaml = {"extract": {"tokens": 500, "fit_tokens": 9}}
    by_yaml = resolve([ExtractConfig], yaml, {}, {})[ExtractConfig]
    assert (by_yaml.fit_tokens, by_yaml.select_tokens, by_yaml.eval_tokens) == (9, 100, 200)
    by_flag = resolve([ExtractConfig], yaml, {"PEEL_SELECT_TOKENS": "7"}, {"tokens": "50"})[ExtractConfig]
    assert (by_flag.fit_tokens, by_flag.select_tokens, by_flag.eval_tokens) == (20, 10, 20)
    by_part = resolve([ExtractConfig], yaml, {}, {"eval_tokens": "7"})[ExtractConfig]
    assert (by_part.fit_tokens, by_part.select_tokens, by_part.eval_tokens) == (9, 100, 7)


def test_every_mistake_is_told_at_once_with_its_place() -> None:
    yaml = {
        "fit": {
            "scheme": "ternery",
            "seq_len": 3,
            "direct-steps": -1,
            "group-size": 1,
            "group_size": 1,
            "seed": None,
        },
        "fti": {},
        "seed": 1,
        3: {},
        "report": {"confidence": 1, "top": True, "fail_on": ["none", "broken"], "format": ["json"]},
        "audit": ["resume"],
        "extract": {
            "threads": "2",
            "data": [3],
            "layers": "6to7",
            "device": "gpu",
            "seq_len": 2.5,
            "dtype": "Float32",
        },
    }
    env = {"PEEL_SEED": "x", "PEEL_REFERENCES": "span,dirct"}
    with pytest.raises(UsageError) as caught:
        resolve(
            [FitConfig], yaml, env, {"batch_size": "0", "learning_rate": "nan", "stepz": "1"}, source="n.yaml"
        )
    lines = str(caught.value).splitlines()
    expected = [
        "n.yaml: fit.scheme: 'ternery' is not one of ; did you mean 'ternary'?",
        "n.yaml: fit.seq_len: no such setting ; it belongs under 'extract:'",
        "n.yaml: fit.direct-steps: -1 is too small; it must be at least 0",
        "n.yaml: fit.group_size: stands twice",
        "n.yaml: fit.seed: has no value",
        "n.yaml: fti: no such section; did you mean 'fit'?",
        "n.yaml: seed: no such section; it belongs under 'extract:' or 'fit:'",
        "n.yaml: 3: no such section",
        "n.yaml: report.confidence: 1.0 is too large; it must be below 1",
        "n.yaml: report.top: True is not a whole number",
        "n.yaml: report.fail_on: 'none' cannot stand beside others",
        "n.yaml: report.format: ['json'] is not text",
        "n.yaml: audit: expected settings under it, found ['resume']",
        "n.yaml: extract.threads: '2' is not a whole number",
        "n.yaml: extract.data: 3 is not text",
        "n.yaml: extract.layers: '6to7' is not a list of layers such as 1,4-6",
        "n.yaml: extract.device: 'gpu' is not a device such as auto, cpu or cuda:0",
        "n.yaml: extract.seq_len: 2.5 is not a whole number",
        "n.yaml: extract.dtype: 'Float32' is not one of ; did you mean 'float32'?",
        "PEEL_SEED: 'x' is not a whole number",
        "PEEL_REFERENCES: 'dirct' is not one of ; did you mean 'direct'?",
        "--batch-size: 0 is too small; it must be at least 1",
        "--learning-rate: 'nan' is not a finite number",
        "--stepz: no such setting",
    ]
    assert lines[0] == f"{len(expected)} settings are wrong:"
    for line, wanted in zip(sorted(lines[1:]), sorted(expected), strict=True):
        start, _, end = wanted.partition(" ; ")
        assert line.startswith(start)
        assert line.endswith(end)


def test_a_single_mistake_is_one_line_even_where_it_goes_to_several_sections() -> None:
    with pytest.raises(UsageError, match=r"^--seed: -1 is too small; it must be at least 0$"):
        resolve([ExtractConfig, FitConfig], None, {}, {"seed": "-1"})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fit: {seed: 1}\nfit: {seed: 2}", "'fit' stands twice"),
        ("fit: {seed: 1, seed: 2}", "'seed' stands twice"),
        ("- fit", "expected sections"),
        ("", "expected sections"),
        ("fit: [", "not valid YAML"),
        ("fit: !!python/object/apply:os.system [echo]", "not valid YAML"),
        ("fit: !!timestamp x", "not valid YAML"),
        ("fit: !!bool x", "not valid YAML"),
        ("fit: !!float ''", "not valid YAML"),
        ("fit: !!map [x]", "not valid YAML"),
        ("fit: {[a]: 1}", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ("\x00", "not valid YAML"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_by_name(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "n.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=says) as caught:
        load_yaml(path)
    assert str(path) in str(caught.value)


@given(text=st.text(st.sampled_from("a:-[]{}!&*<>|'\"#%@`,?\n 0.~=")) | st.binary())
@example(text="a: &b [*b]")
@example(text="<<: *a")
def test_no_file_can_do_worse_than_a_usage_error(
    tmp_path_factory: pytest.TempPathFactory, text: str | bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with suppress(UsageError):
        resolve(SECTIONS, load_yaml(path), {}, {})


def test_an_alias_bomb_is_refused_in_few_words() -> None:
    bomb: Any = "lol"
    for _ in range(60):
        bomb = [bomb] * 9
    with pytest.raises(UsageError) as caught:
        resolve(SECTIONS, {"extract": bomb, "fit": {"scheme": bomb, "layers": bomb}}, {}, {})
    assert len(str(caught.value)) < 500


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.yaml: the configuration cannot be read: No such file"):
        load_yaml(tmp_path / "gone.yaml")


def test_yaml_may_write_numbers_lists_and_layers_as_people_do(tmp_path: Path) -> None:
    path = tmp_path / "n.yaml"
    path.write_text(
        "extract: {layers: [1, 4-6], data: ~/x.txt, batch-size: auto}\nfit: {learning_rate: 1e-3, layers: 4,"
        " references: 'span,direct'}\nreport:\n"
    )
    configs = resolve([ExtractConfig, FitConfig], load_yaml(path), {}, {})
    assert configs[ExtractConfig].layers == "1,4-6"
    assert configs[ExtractConfig].data == (Path.home() / "x.txt",)
    assert configs[FitConfig].learning_rate == 1e-3
    assert configs[FitConfig].layers == "4"
    assert configs[FitConfig].references == ("span", "direct")


def test_an_empty_variable_is_not_set_and_a_stray_one_is_named() -> None:
    assert resolve([FitConfig], None, {"PEEL_SEED": ""}, {})[FitConfig].seed == 0
    strays = stray_variables(
        {"PEEL_SEQLEN": "1", "PEEL_DEBUG": "1", "PEEL_CONFIG": "x", "PEEL_SEED": "1", "HOME": "/"}
    )
    assert len(strays) == 1
    assert "PEEL_SEQLEN" in strays[0]
    assert "'PEEL_SEQ_LEN'" in strays[0]


@given(data=st.data())
def test_what_an_artefact_stores_resolves_to_itself(data: st.DataObject) -> None:
    flags = {
        rule.name: as_flag(rule, value)
        for rule in settings_of(ExtractConfig).values()
        if (value := data.draw(st.none() | values(rule))) is not None
    }
    configs = resolve([FitConfig, ExtractConfig], None, {}, flags)
    stored = to_json(configs.values())
    assert json.dumps(stored) == json.dumps(to_json(reversed(configs.values())))
    again = resolve([FitConfig, ExtractConfig], json.loads(json.dumps(stored, allow_nan=False)), {}, {})
    assert again == configs


@given(num_layers=st.integers(1, 40), data=st.data())
def test_layers_are_those_that_the_list_spells_out(num_layers: int, data: st.DataObject) -> None:
    bounds = st.tuples(st.integers(1, num_layers), st.integers(1, num_layers)).map(sorted)
    ranges = data.draw(st.lists(bounds, min_size=1, max_size=4))
    text = ", ".join(f"{low}-{high}" if low != high else str(low) for low, high in ranges)
    named = {layer for low, high in ranges for layer in range(low, high + 1)}
    assert parse_layers(text, num_layers) == tuple(sorted(named))
    assert parse_layers(None, num_layers) == tuple(range(1, num_layers + 1))


@pytest.mark.parametrize("text", ["0", "7", "1,7", "5-7", "6-4", "1-999999999"])
def test_layers_that_are_not_there_are_named_with_the_range(text: str) -> None:
    with pytest.raises(UsageError, match=r"within the layers 1-6 of the checkpoint"):
        parse_layers(text, 6)


@pytest.mark.parametrize("text", ["", "a", "1,,2", "1-", "-1", "1-2-3", "²"])
def test_a_list_that_names_no_layer_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no layer or range"):
        parse_layers(text, 6)


def test_the_cache_is_where_the_desktop_standard_says(tmp_path: Path) -> None:
    assert cache_directory({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "peel"
    assert cache_directory({"XDG_CACHE_HOME": "relative"}) == Path.home() / ".cache" / "peel"
    assert cache_directory({}) == Path.home() / ".cache" / "peel"


def test_the_schemes_are_those_that_can_be_quantised() -> None:
    from peelcli.quant import initial_scale, schemes
    from peelcli.records.schemes import INTEGERS, SCALE_RULES

    assert list(SCHEMES) == list(schemes.SCHEMES)
    assert SCALE_RULES == initial_scale.SCALE_RULES
    assert set(INTEGERS) < set(SCHEMES)


def test_every_setting_keeps_its_own_rules() -> None:
    for section, rule in RULES:
        assert rule.help.endswith("."), (section, rule.name)
        if rule.default not in (None, ()):
            assert rule.from_value(as_yaml(rule.default)) == rule.default
    assert set(settings_of(ExtractConfig)) >= TOTALS


@pytest.mark.parametrize("name", ["quick_cpu", "nightly_ci", "ternary", "binary", "large_model", "own_qat"])
def test_each_sample_says_its_command_and_loads(name: str) -> None:
    path = SAMPLES / f"{name}.yaml"
    head = path.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in head)
    assert f"peel audit CKPT -c sample_configs/{name}.yaml" in "\n".join(head)
    configs = resolve(SECTIONS, load_yaml(path), {}, {}, source=str(path))
    assert configs != resolve(SECTIONS, None, {}, {})


def test_no_sample_goes_untested() -> None:
    named = {"quick_cpu", "nightly_ci", "ternary", "binary", "four_bits", "large_model", "own_qat"}
    assert {path.stem for path in SAMPLES.iterdir()} == named


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200), ("0.5s", 0.5)]
)
def test_a_budget_is_a_time(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "10 m", "1d", "-5s", "1e3", "m"])
def test_a_budget_that_is_no_time_is_refused(text):
    with pytest.raises(UsageError, match="10m"):
        parse_duration(text)


def test_a_map_in_a_file_may_be_a_list(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("fit:\n  paths: [direct, [3, 3, 3, 4]]\n", encoding="utf-8")
    found = resolve((FitConfig,), load_yaml(file), {}, {})[FitConfig]
    assert found.paths == ("direct", "[3, 3, 3, 4]")


@pytest.mark.parametrize("name", ["fit_tokens", "batch_size", "direct_steps"])
def test_a_count_that_no_machine_can_count_is_refused(name: str) -> None:
    sections = (ExtractConfig, FitConfig)
    assert resolve(sections, None, {}, {name: "2147483647"})
    with pytest.raises(UsageError, match="is too large; it must be below"):
        resolve(sections, None, {}, {name: "9" * 20})
