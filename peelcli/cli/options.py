"""Flags from settings: a command names the sections it needs and receives them resolved."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from peelcli.cli.console import Console
from peelcli.config import Configs, ConsoleConfig, load_yaml, resolve, section_name, stray_variables
from peelcli.config.setting import Setting, settings_of
from peelcli.errors import UsageError

Command = Callable[..., Any]
METAVARS = {int: "N", float: "X", str: "NAME", Path: "PATH"}
NEGATIVE = "no_"  # begins the name of the hidden opposite of a switch


def with_options(*sections: type) -> Callable[[Command], Command]:
    """Give a command function one option per setting of `sections`, and `-c/--config`.

    The function keeps its own typer parameters; of the keyword parameters `configs: Configs` (the sections by
    class, resolved) and `console: Console` it receives those that it declares. Raises TypeError, at import,
    where one of its own parameters has the name of a setting.
    """
    every = (*sections, ConsoleConfig)

    def decorate(command: Command) -> Command:
        parameters = inspect.signature(command, eval_str=True).parameters
        own = [value for name, value in parameters.items() if name not in ("configs", "console")]
        options = [*_context_and_config(), *_options(every)]
        clashes = {value.name for value in own} & {option.name for option in options}
        if clashes:
            raise TypeError(
                f"{command.__name__}: {', '.join(sorted(clashes))} would be an option twice; rename it"
            )

        def run(**values: Any) -> Any:
            console = values.pop("context").find_object(Console)
            flags = {option.name: values.pop(option.name) for option in options[1:]}
            configs = _resolved(every, flags)
            console.configure(configs[ConsoleConfig])
            for stray in stray_variables(os.environ):
                console.warn(stray)
            given = {"configs": configs, "console": console}
            return command(**values, **{name: value for name, value in given.items() if name in parameters})

        shown = [value.replace(kind=inspect.Parameter.KEYWORD_ONLY) for value in [*own, *options]]
        run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
        run.__annotations__ = {value.name: value.annotation for value in shown}
        run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
        return run

    return decorate


def _resolved(sections: tuple[type, ...], flags: dict[str, Any]) -> Configs:
    path = flags.pop("config") or os.environ.get("PEEL_CONFIG")
    for name in [name for name in flags if name.startswith(NEGATIVE)]:
        switch = name.removeprefix(NEGATIVE)
        if flags.pop(name):
            if flags[switch]:
                flag = switch.replace("_", "-")
                raise UsageError(f"--{flag} and --no-{flag} contradict each other; give one of them")
            flags[switch] = False
    return resolve(sections, load_yaml(path) if path else None, os.environ, flags, source=str(path))


def _context_and_config() -> list[inspect.Parameter]:
    file = typer.Option(
        "--config",
        "-c",
        metavar="FILE",
        help="YAML file with settings (env: PEEL_CONFIG).",
        show_default=False,
    )
    return [
        _parameter("context", typer.Context, inspect.Parameter.empty),
        _parameter("config", Annotated[str | None, file], None),
    ]


def _options(sections: tuple[type, ...]) -> list[inspect.Parameter]:
    """An option per setting, in panels by section; of a name that several own, the last one's is shown."""
    found: dict[str, tuple[Setting, list[str]]] = {}
    for section in sections:
        for name, rule in settings_of(section).items():
            if not rule.shared:
                found.pop(name, None)
            found.setdefault(name, (rule, []))[1].append(section_name(section))
    return [option for rule, panels in found.values() for option in _option(rule, ", ".join(panels))]


@cache  # seven commands share most of their settings, and help is to come at once
def _option(rule: Setting, panel: str) -> list[inspect.Parameter]:
    """All but a switch is taken as text, so that one place checks flags, variables and YAML alike.

    A switch that is off by default has its opposite too, to overrule a file, but out of sight.
    """
    switch, negative = rule.kind is bool, f"--no-{rule.flag[2:]}"
    hide_negative = switch and rule.default is False
    flag = f"{rule.flag}/{negative}" if switch and not hide_negative else rule.flag
    info = typer.Option(
        *([flag, rule.short] if rule.short else [flag]),
        metavar="" if switch else rule.metavar or METAVARS[rule.kind],
        help=_help(rule),
        show_default=False,
        rich_help_panel=panel,
        autocompletion=(lambda: list(rule.choices)) if rule.choices else None,
    )
    kind: Any = bool if switch else list[str] if rule.many else str
    options = [_parameter(rule.name, Annotated[kind | None, info], None)]
    if hide_negative:
        hidden = typer.Option(negative, hidden=True)
        options.append(_parameter(NEGATIVE + rule.name, Annotated[bool | None, hidden], None))
    return options


def _help(rule: Setting) -> str:
    choices = f" {'Any' if rule.many else 'One'} of: {', '.join(rule.choices)}." if rule.choices else ""
    default = f"default: {rule.default_text}; " if rule.default_text else ""
    return f"{rule.help}{choices} ({default}env: {rule.variable})"


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
