"""Configuration of a process: a frozen dataclass beside its user, read once from the environment."""

import os
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

T = TypeVar("T")

_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def from_env(config_class: type[T], prefix: str, environment: Mapping[str, str] | None = None) -> T:
    """Build a config from variables named `{prefix}_{FIELD}`; a missing one leaves the field's default.

    Raises:
        ValueError: If a value does not parse, a required one is missing, or a variable names no field.
    """
    environment = os.environ if environment is None else environment
    hints = get_type_hints(config_class)
    values: dict[str, Any] = {}
    names = {f"{prefix}_{f.name.upper()}": f for f in fields(config_class)}  # type: ignore[arg-type]
    unknown = sorted(name for name in environment if name.startswith(f"{prefix}_") and name not in names)
    if unknown:
        raise ValueError(f"{unknown[0]} is no setting of {config_class.__name__}; there are {sorted(names)}")
    for name, f in names.items():
        if name in environment:
            values[f.name] = _parsed(name, environment[name], hints[f.name])
        elif f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{name} is not set")
    return config_class(**values)


def to_env(config: Any, prefix: str) -> dict[str, str]:
    """The variables from which `from_env` makes an equal config; a None leaves its variable out."""
    values = {f"{prefix}_{f.name.upper()}": getattr(config, f.name) for f in fields(config)}
    return {
        name: ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        for name, value in values.items()
        if value is not None
    }


def _parsed(name: str, text: str, hint: Any) -> Any:
    options = [option for option in get_args(hint) or (hint,) if option is not type(None)]
    if getattr(hint, "__origin__", None) is tuple:
        return tuple(part for part in text.split(",") if part)
    kind = options[0]
    try:
        if kind is bool:
            return _BOOLEANS[text.lower()]
        if kind in (int, float, str, Path):
            return kind(text)
    except (KeyError, ValueError):
        raise ValueError(f"{name}={text!r} is not {'an' if kind is int else 'a'} {kind.__name__}") from None
    raise AssertionError(f"{name}: no parser for {hint}")
