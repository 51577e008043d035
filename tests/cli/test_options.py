"""Flags are made from the settings: every one is there, in the help too, and reaches its section."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from peelcli.cli.console import Console
from peelcli.cli.main import build_app, run
from peelcli.cli.options import with_options
from peelcli.config import (
    SECTIONS,
    AuditConfig,
    Configs,
    ConsoleConfig,
    ExtractConfig,
    FitConfig,
    ReportConfig,
    TrackConfig,
    TrainedSchemeConfig,
    WatchConfig,
    section_name,
)
from peelcli.config.setting import Setting, settings_of

ALL = (
    ExtractConfig,
    TrainedSchemeConfig,
    FitConfig,
    ReportConfig,
    TrackConfig,
    AuditConfig,
    WatchConfig,
)
SHOWN = {name: rule for section in SECTIONS for name, rule in settings_of(section).items()}


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PEEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")


class Toy:
    """An app with one command, which keeps what it was called with."""

    def __init__(self, *sections: type) -> None:
        @with_options(*sections)
        def toy(
            checkpoint: Annotated[Path, typer.Argument(help="Where it lies.")],
            layer: Annotated[int, typer.Option("--layer", "-l", help="Its own option.")] = 1,
            *,
            configs: Configs,
            console: Console,
        ) -> int:
            """Do nothing much."""
            self.seen = {"checkpoint": checkpoint, "layer": layer, "configs": configs, "console": console}
            return 0

        self.app = build_app({"toy": toy})
        self.seen: dict[str, Any] = {}

    def __call__(self, *arguments: str) -> Configs:
        assert run(["toy", "ckpt", *arguments], self.app) == 0
        configs: Configs = self.seen["configs"]
        return configs


def example(rule: Setting) -> str:
    by_kind = {int: "77", float: "0.5", Path: "some/file", str: "3"}
    choices = [choice for choice in rule.choices if choice != rule.default_text]
    by_name = {"device": "cpu", "paths": "[1,2,3]", "every": "3s", "log_to": "wandb:x"}
    return choices[-1] if choices else by_name.get(rule.name) or by_kind[rule.kind]


@pytest.mark.parametrize("section", SECTIONS, ids=section_name)
def test_every_setting_is_a_flag_that_reaches_its_section(section: type) -> None:
    toy = Toy(*([] if section is ConsoleConfig else [section]))
    for rule in settings_of(section).values():
        if rule.kind is bool:
            assert getattr(toy(rule.flag)[section], rule.name) is True
            assert getattr(toy(f"--no-{rule.flag[2:]}")[section], rule.name) is False
        else:
            expected = rule.from_flag(example(rule))
            assert getattr(toy(rule.flag, example(rule))[section], rule.name) == expected != rule.default
            if rule.short:
                assert getattr(toy(rule.short, example(rule))[section], rule.name) == expected


@pytest.mark.parametrize("name", SHOWN)
def test_every_setting_is_a_variable_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = SHOWN[name]
    section = next(section for section in reversed((*ALL, ConsoleConfig)) if name in settings_of(section))
    text = ("false" if rule.default else "true") if rule.kind is bool else example(rule)
    monkeypatch.setenv(rule.variable, text)
    assert getattr(Toy(*ALL)()[section], name) == rule.from_text(text) != rule.default


def test_the_help_has_every_flag_sentence_default_and_variable(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["toy", "--help"], Toy(*ALL).app) == 0
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    for rule in SHOWN.values():
        default = f"default: {rule.default_text}; " if rule.default_text else ""
        choices = f" of: {', '.join(rule.choices)}." if rule.choices else ""
        assert f"{rule.flag} " in text
        assert f"{choices} ({default}env: {rule.variable})" in text
        assert rule.help in text
    assert "Where it lies." in text
    assert "--layer -l" in text
    assert "--config -c FILE" in text


def test_the_help_shows_each_flag_once_in_the_panel_of_its_sections(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(["toy", "--help"], Toy(*ALL).app)
    title, found = "", []
    for line in capsys.readouterr().out.splitlines():
        title = match[1] if (match := re.match(r"╭─ (.*?) ─", line)) else title
        found += [(flag, title) for flag in re.findall(r"^│ (--[\w-]+)", line)]
    expected = [("--config", "Options"), ("--help", "Options"), ("--layer", "Options")]
    for name, rule in SHOWN.items():
        homes = [section_name(section) for section in (*ALL, ConsoleConfig) if name in settings_of(section)]
        expected.append((rule.flag, ", ".join(homes if rule.shared else homes[-1:])))
    assert sorted(found) == sorted(expected)


def test_a_config_file_is_read_and_overruled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "n.yaml"
    path.write_text(
        "fit: {scheme: int4, seed: 1, direct-steps: 5}\naudit: {dry-run: true}\nreport: {top: 2}\n"
    )
    monkeypatch.setenv("PEEL_SEED", "2")
    configs = Toy(FitConfig, AuditConfig)(
        "-c", str(path), "--direct-steps", "6", "--no-dry-run", "--layer", "4"
    )
    fit = configs[FitConfig]
    assert (fit.scheme, fit.seed, fit.direct_steps, configs[AuditConfig].dry_run) == ("int4", 2, 6, False)
    monkeypatch.setenv("PEEL_CONFIG", str(path))
    assert Toy(FitConfig)()[FitConfig].scheme == "int4"


def test_lists_are_repeated_or_parted_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = Toy(ExtractConfig, FitConfig)(
        "--references", "span,direct", "--references", "identity", "--data", "a,b:c"
    )
    assert configs[FitConfig].references == ("span", "direct", "identity")
    assert configs[ExtractConfig].data == (Path("a,b:c"),)
    monkeypatch.setenv("PEEL_DATA", os.pathsep.join(["a,b", "c"]))
    assert Toy(ExtractConfig)()[ExtractConfig].data == (Path("a,b"), Path("c"))


def test_wrong_flags_variables_and_yaml_are_told_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "n.yaml"
    path.write_text("fit: {scheme: ternery}\n")
    monkeypatch.setenv("PEEL_SEED", "x")
    assert run(["toy", "ckpt", "-c", str(path), "--direct-steps", "many"], Toy(FitConfig).app) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"{path}: fit.scheme: 'ternery'" in err
    assert "PEEL_SEED: 'x'" in err
    assert "--direct-steps: 'many'" in err


def test_a_misspelt_variable_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PEEL_SEQLEN", "3")
    Toy(ExtractConfig)()
    assert capsys.readouterr().err.startswith("warning: PEEL_SEQLEN is no setting")


def test_contradicting_switches_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["toy", "ckpt", "--dry-run", "--no-dry-run"], Toy(AuditConfig).app) == 2
    assert "contradict" in capsys.readouterr().err


def test_a_command_takes_only_what_it_declares_and_keeps_its_arguments() -> None:
    toy = Toy(FitConfig)
    toy("-q", "-l", "3")
    assert (toy.seen["checkpoint"], toy.seen["layer"]) == (Path("ckpt"), 3)
    assert toy.seen["console"].config.quiet
    bare = with_options(FitConfig)(lambda: 1)
    assert run(["bare"], build_app({"bare": bare, "other": bare})) == 1


def test_a_parameter_named_as_a_setting_is_a_mistake_of_the_programmer() -> None:
    def clash(seed: int = 0) -> int:
        return seed

    with pytest.raises(TypeError, match="clash: seed would be an option twice"):
        with_options(FitConfig)(clash)
