"""What a configuration is held to: one clear line for every wrong file, name, type or value.

draccus alone would take a string for a list of letters, answer a section without fields with a
traceback, and an unknown option with its whole usage.
"""

from __future__ import annotations

import difflib
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml


class ConfigError(ValueError):
    """A configuration that cannot work: says what was got, what was expected, what to do."""

    def __init__(self, field_name: str, got: Any, expected: str, remedy: str = "") -> None:
        self.parts = (field_name, got, expected, remedy)
        remedy = remedy or f"set {field_name} accordingly"
        super().__init__(f"{field_name}: got {got!r}, expected {expected}. remedy: {remedy}.")

    def __reduce__(self) -> Any:  # so that it survives the way back from another process
        return type(self), self.parts


def require(condition: bool, field_name: str, got: Any, expected: str, remedy: str = "") -> None:
    if not condition:
        raise ConfigError(field_name, got, expected, remedy)


def one_of(field_name: str, got: Any, choices: Any) -> None:
    require(got in choices, field_name, got, "one of " + ", ".join(map(str, choices)))


def read_yaml(path: Path) -> Any:
    """The content of a YAML file. Raises ConfigError when there is none to read."""
    remedy = "see configs/ for examples"
    require(path.is_file(), "file", str(path), "a YAML file", remedy)
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), str(error), "valid YAML", remedy) from error


def apply_arguments(tree: dict[str, Any], argv: list[str], cls: Any) -> None:
    """Set fields of a nested mapping by `--a.b=c` (or `--a.b c`); a mapping as c replaces the old one.

    Raises ConfigError for anything else, for an unknown a.b and for a c that does not fit.
    """
    rest = list(argv)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        require(name.startswith("--"), "argument", name, "--a.b=c", "the YAML file comes first; see --help")
        hint: Any = cls
        parts = name[2:].split(".")
        for i, part in enumerate(parts):
            hint = field_type(hint, part, ".".join(parts[:i]))
        require(bool(equals or rest), name, "no value", f"{name}=<value>", "give it one")
        text = value if equals else rest.pop(0)
        try:
            parsed = text if hint is str else yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(name[2:], text, "a value in YAML's notation") from None
        check(parsed, hint, name[2:])
        node = tree
        for part in parts[:-1]:
            node = node.setdefault(part, {})
        node[parts[-1]] = parsed


def field_type(cls: Any, name: str, prefix: str) -> Any:
    """The type of a field. Raises ConfigError with close names when there is no such field."""
    if get_origin(cls) is dict and is_dataclass(get_args(cls)[1]):
        return get_args(cls)[1]  # any name goes
    hints = get_type_hints(cls) if is_dataclass(cls) else {}
    full = f"{prefix}.{name}" if prefix else str(name)
    if name not in hints:
        close = difflib.get_close_matches(str(name), hints, n=3) or sorted(hints)
        expected = "one of " + ", ".join(close) if hints else f"nothing below {prefix}"
        raise ConfigError(full, "an unknown field", expected, "correct the name; --help lists all")
    return hints[name]


def check(value: Any, hint: Any, name: str = "") -> None:
    """Raise ConfigError unless a value read from YAML, a section or a scalar, fits its type."""
    if is_dataclass(hint):
        require(
            isinstance(value, dict), name or "file", value, "fields with values", "see configs/ for examples"
        )
        for key, inner in value.items():
            check(inner, field_type(hint, key, name), f"{name}.{key}" if name else str(key))
    elif hint is bool:
        require(isinstance(value, bool), name, value, "true or false")
    elif hint is int:
        require(isinstance(value, int) and not isinstance(value, bool), name, value, "a whole number")
    elif hint is float:
        require(is_number(value), name, value, "a number")
    elif hint is str:
        require(value is not None and not isinstance(value, dict | list), name, value, "text")
    elif get_origin(hint) is tuple:
        inner = get_args(hint)
        n = "some" if inner[-1] is ... else len(inner)
        fits = isinstance(value, list) and n in ("some", len(value))
        require(fits, name, value, f"a list of {n} values", "write it as [a, b]")
        for x in value:
            check(x, inner[0], name)
    elif get_origin(hint) is dict:
        require(isinstance(value, dict), name, value, "a mapping", "write it as {a: 1, b: {c: 2}}")
        for key, inner in value.items():
            if is_dataclass(get_args(hint)[1]):
                check(inner, get_args(hint)[1], f"{name}.{key}")


def is_number(value: Any) -> bool:
    try:  # YAML 1.1 reads 1e-3 as text
        return not isinstance(value, bool) and float(value) == float(value)
    except (TypeError, ValueError):
        return False


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}, as fields are named."""
    rows: dict[str, Any] = {}
    for name, value in nested.items():
        rows |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return rows
