"""A model's own chat template, rendered so that nobody but the template can write a special token."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

ROLES = frozenset({"system", "user", "assistant", "tool"})


class ChatTemplate:
    """Renders turns into text and special token ids.

    Inside a turn's content, every character that could begin a special token is followed by a marker, a character
    that occurs nowhere else, until the rendered text has been cut at its special tokens. So the template may trim,
    split or join contents as it likes, and a special token still cannot begin in one.

    Args:
        source: The Jinja template, or None for a model without one; a list of {"name", "template"} has it as
            "default".
        special_ids: Special tokens by name.
        variables: What the template sees beside the turns: bos_token, eos_token, ...

    Raises:
        ValueError: If the template is not valid Jinja.
    """

    def __init__(
        self,
        source: str | list[dict[str, str]] | None,
        special_ids: Mapping[str, int],
        variables: Mapping[str, str],
    ) -> None:
        if isinstance(source, list):
            source = next((entry["template"] for entry in source if entry["name"] == "default"), None)
        self._source = source or ""
        self._special_ids = special_ids
        self._variables = variables
        self._first_characters = {name[0] for name in special_ids}
        longest_first = sorted(special_ids, key=len, reverse=True)
        self._specials = re.compile(f"({'|'.join(map(re.escape, longest_first))})" if special_ids else "(?!)()")
        try:
            self._template = _environment().from_string(self._source) if source else None
        except jinja2.TemplateError as error:
            raise ValueError(f"chat template is not valid: {error}") from error

    def render(self, turns: Sequence[tuple[str, str]], add_generation_prompt: bool) -> list[str | int]:
        """Text and special token ids in their order; texts are not empty and never neighbours.

        Raises:
            ValueError: If the model has no template, a role is unknown, or the template refuses the turns.
        """
        if self._template is None:
            raise ValueError("this model has no chat template, it only goes on with texts")
        for role, _ in turns:
            if role not in ROLES:
                raise ValueError(f"role {role!r} is not one of {', '.join(sorted(ROLES))}")
        marker = _unused_character([self._source, *(content for _, content in turns)])
        marked = str.maketrans({character: character + marker for character in self._first_characters})
        messages = [{"role": role, "content": content.translate(marked)} for role, content in turns]
        try:
            rendered = self._template.render(
                {**self._variables, "messages": messages, "add_generation_prompt": add_generation_prompt}
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"chat template: {error}") from error
        # re.split with one group: texts at even places, special tokens at odd ones.
        parts: list[str | int] = []
        for place, part in enumerate(self._specials.split(rendered)):
            if place % 2:
                parts.append(self._special_ids[part])
            elif part:
                parts.append(part.replace(marker, ""))
        return parts


def _unused_character(texts: list[str]) -> str:
    """A private-use character that is in none of the texts."""
    used = set().union(*texts)
    return next(character for code in range(0x10FFFD, 0xFFFFF, -1) if (character := chr(code)) not in used)


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as templates on the Hugging Face hub expect it."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    # ASCII only would escape the marker, and is not what models were trained on.
    return json.dumps(value, indent=indent, ensure_ascii=False)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
