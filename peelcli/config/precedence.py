"""Resolve settings: command line over environment over YAML over default, and report every mistake at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from peelcli.config.sections import SECTIONS, section_name
from peelcli.config.setting import Setting, hint, settings_of, short_repr
from peelcli.errors import UsageError

Section = TypeVar("Section")


class Configs(dict[type, Any]):
    """The resolved sections by class: `configs[FitConfig]` is a FitConfig."""

    def __getitem__(self, section: type[Section]) -> Section:
        found: Section = super().__getitem__(section)
        return found


def resolve(
    sections: Sequence[type],
    yaml: Mapping[Any, Any] | None,
    env: Mapping[str, str],
    flags: Mapping[str, Any],
    *,
    source: str = "configuration",
) -> Configs:
    """The `sections` with every setting resolved: flag over environment over YAML over default.

    `yaml` is what `load_yaml` returned, and is checked whole, also in the sections that are not asked for;
    `source` names it in messages. `flags` maps names of fields to text or values, None if not given. A
    setting marked shared goes from a flag or variable to all `sections`, any other to the last that has it.

    Raises UsageError that lists every mistake at once.
    """
    mistakes: list[str] = []
    levels = [
        _from_yaml(yaml or {}, tuple(dict.fromkeys((*SECTIONS, *sections))), source, mistakes),
        _from_env(env, sections, mistakes),
        _from_flags(flags, sections, mistakes),
    ]
    if mistakes:
        mistakes = list(dict.fromkeys(mistakes))  # a shared flag is checked once a section
        lead = [] if len(mistakes) == 1 else [f"{len(mistakes)} settings are wrong:"]
        raise UsageError(*lead, *mistakes)
    resolved = Configs()
    for section in sections:
        values: dict[str, Any] = {}
        for level in levels:
            values |= _spread(level.get(section, {}), settings_of(section))
        resolved[section] = section(**values)
    return resolved


def to_json(configs: Iterable[Any]) -> dict[str, dict[str, Any]]:
    """The instances as plain JSON values by section, in an order that does not depend on the caller's."""
    ordered = sorted(configs, key=lambda config: section_name(type(config)))
    return {section_name(type(config)): _values(type(config), config) for config in ordered}


def _values(section: type, config: Any) -> dict[str, Any]:
    """The values of one section under their YAML keys."""
    return {rule.key: _plain(getattr(config, name)) for name, rule in settings_of(section).items()}


def stray_variables(env: Mapping[str, str]) -> list[str]:
    """A warning for each `PEEL_*` variable that is no setting, so that a misspelt one is noticed."""
    known = {rule.variable for section in SECTIONS for rule in settings_of(section).values()}
    strays = [
        name for name in env if name.startswith("PEEL_") and name not in {*known, "PEEL_CONFIG", "PEEL_DEBUG"}
    ]
    return [f"{name} is no setting of peel and does nothing{hint(name, known)}" for name in sorted(strays)]


def _from_yaml(
    yaml: Mapping[Any, Any], known: Sequence[type], source: str, mistakes: list[str]
) -> dict[type, dict[str, Any]]:
    by_name = {section_name(section): section for section in known}
    found: dict[type, dict[str, Any]] = {}
    for title, body in yaml.items():
        section = by_name.get(title.replace("-", "_")) if isinstance(title, str) else None
        if section is None:
            mistakes.append(f"{source}: {_key(title)}: no such section{_where(title, by_name)}")
        elif not isinstance(body, Mapping | None):
            mistakes.append(f"{source}: {title}: expected settings under it, found {short_repr(body)}")
        else:
            found[section] = _section_from_yaml(section_name(section), body or {}, by_name, source, mistakes)
    return found


def _section_from_yaml(
    title: str, body: Mapping[Any, Any], by_name: Mapping[str, type], source: str, mistakes: list[str]
) -> dict[str, Any]:
    rules = {rule.key: rule for rule in settings_of(by_name[title]).values()}
    values: dict[str, Any] = {}
    for key, raw in body.items():
        label = f"{source}: {title}.{_key(key)}"
        rule = rules.get(key.replace("-", "_")) if isinstance(key, str) else None
        if rule is None:
            mistakes.append(f"{label}: no such setting in {title!r}{_where(key, by_name, rules)}")
        elif rule.name in values:
            mistakes.append(f"{label}: stands twice, with a hyphen and with an underscore; keep one")
        else:
            values[rule.name] = _checked(label, rule.from_value, raw, mistakes)
    return values


def _where(key: Any, by_name: Mapping[str, type], rules: Mapping[str, Setting] | None = None) -> str:
    """The remedy for an unknown key: the section it belongs in, or a similar known name."""
    name = str(key).replace("-", "_")
    homes = [title for title, section in by_name.items() if name in settings_of(section)]
    if homes:
        return f"; it belongs under {' or '.join(repr(title + ':') for title in homes)}"
    return hint(name, rules or by_name) or f"; known are {', '.join(rules or by_name)}"


def _from_env(
    env: Mapping[str, str], sections: Sequence[type], mistakes: list[str]
) -> dict[type, dict[str, Any]]:
    found: dict[type, dict[str, Any]] = {}
    for section, rule in _targets(sections):
        if env.get(rule.variable):  # set but empty is the same as not set, as everywhere
            value = _checked(rule.variable, rule.from_text, env[rule.variable], mistakes)
            found.setdefault(section, {})[rule.name] = value
    return found


def _from_flags(
    flags: Mapping[str, Any], sections: Sequence[type], mistakes: list[str]
) -> dict[type, dict[str, Any]]:
    found: dict[type, dict[str, Any]] = {}
    given = {name: value for name, value in flags.items() if value not in (None, [], ())}
    for section, rule in _targets(sections):
        if rule.name in given:
            value = _checked(rule.flag, rule.from_flag, given[rule.name], mistakes)
            found.setdefault(section, {})[rule.name] = value
    names = {rule.name for _, rule in _targets(sections)}
    mistakes += [
        f"--{name.replace('_', '-')}: no such setting{hint(name, names)}"
        for name in given
        if name not in names
    ]
    return found


def _targets(sections: Sequence[type]) -> list[tuple[type, Setting]]:
    """The section of a flag or variable: all sections that have it if it is shared, else the last one."""
    owner = {name: section for section in sections for name in settings_of(section)}
    return [
        (section, rule)
        for section in sections
        for name, rule in settings_of(section).items()
        if rule.shared or owner[name] is section
    ]


def _checked(label: str, convert: Callable[[Any], Any], raw: Any, mistakes: list[str]) -> Any:
    try:
        return convert(raw)
    except ValueError as error:
        mistakes.append(f"{label}: {error}")
        return None  # never used: a mistake ends in UsageError


def _spread(values: Mapping[str, Any], rules: Mapping[str, Setting]) -> dict[str, Any]:
    """`values` with each total divided among its parts. Parts given by name at the same level keep their value."""
    spread = dict(values)
    for name, total in values.items():
        parts = rules[name].split if total is not None else ()
        whole, before = sum(weight for _, weight in parts), 0
        for part, weight in parts:  # cuts at running sums, so that the parts add up to the total
            share = total * (before + weight) // whole - total * before // whole
            spread.setdefault(part, share)
            before += weight
    return spread


def _key(key: Any) -> str:
    return key if isinstance(key, str) else short_repr(key)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
