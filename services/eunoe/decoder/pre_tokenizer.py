"""How text is split before byte-pair encoding, and which pieces of the split are final.

A *pre-token* is a stretch of text that byte-pair encoding handles alone. Both splits known here scan from left to
right, never look back, and every pre-token starts where the one before it ended. So from the start of any of its
pre-tokens on, a text is split as if it began there, which is what makes tokenizing resumable.

Pre-tokens are written in the byte-level alphabet of GPT-2 (Radford et al. 2019, section 2.2): one character a byte,
ASCII letters, digits and punctuation standing for themselves.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

PreTokenizerName = Literal["smollm", "llama-bpe"]
"""A split, named as GGUF's `tokenizer.ggml.pre` names it."""

_LLAMA_3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEFINITIONS: dict[PreTokenizerName, list[dict[str, Any]]] = {
    # Each digit alone; between them the pattern of GPT-2, which ByteLevel's use_regex stands for:
    # 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
    "smollm": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
    "llama-bpe": [
        {"type": "Split", "pattern": {"Regex": _LLAMA_3_PATTERN}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}
# What can grow no longer. ASCII digits only: Python and the tokenizers library may know different versions of Unicode.
_COMPLETE: dict[PreTokenizerName, re.Pattern[str]] = {
    "smollm": re.compile(r"'(s|t|re|ve|m|ll|d)|[0-9]"),
    "llama-bpe": re.compile(r"(?i:'(s|t|re|ve|m|ll|d))|[0-9]{3}", re.ASCII),
}
_LINE_BREAKS = "\u010a\u010d"  # LF and CR in the byte-level alphabet.


def pre_tokenizer_definition(name: str) -> dict[str, Any]:
    """The `pre_tokenizer` entry of tokenizer.json for a split; ValueError for an unknown one."""
    if name not in _DEFINITIONS:
        raise ValueError(f"pre-tokenizer {name!r} is not supported, only {', '.join(_DEFINITIONS)}")
    return {"type": "Sequence", "pretokenizers": _DEFINITIONS[name]}


def pre_tokenizer_name(definition: dict[str, Any] | None) -> PreTokenizerName:
    """Which split the `pre_tokenizer` entry of a tokenizer.json is; ValueError if it is none of ours."""
    steps = (definition or {}).get("pretokenizers", [])
    for name, expected in _DEFINITIONS.items():
        # trim_offsets only moves the offsets that the library reports.
        if [{**step, "trim_offsets": True} for step in steps] == [{**step, "trim_offsets": True} for step in expected]:
            return name
    raise ValueError(f"pre-tokenizer {definition} is not supported, only {', '.join(_DEFINITIONS)}")


def num_open_pre_tokens(name: PreTokenizerName, pre_tokens: Sequence[str]) -> int:
    """How many pre-tokens at the end of a text more text could still change: 0, 1 or 2.

    The others are closed: whatever follows, the split of the longer text begins with them. For a match depends only
    on the text from its start to the character after it or, at the end of white space, the one after that (the last
    space goes to the word that follows); where another pre-token follows, these are known. There is one exception in
    each split, an alternative that comes earlier in the pattern and can still win, with more text, over the last but
    one: in smollm "'" before "r", "v" or "l" may become "'re", "'ve" or "'ll"; in llama-bpe white space that ends in
    a line break, before other white space, becomes one pre-token with it if another line break follows. The last one
    is closed only if nothing in its alternative can grow and none before it can match: contractions and full groups
    of digits.

    Args:
        name: The split.
        pre_tokens: All pre-tokens of the text, or the last ones from the start of the first that is open.
    """
    if not pre_tokens or _COMPLETE[name].fullmatch(pre_tokens[-1]):
        return 0
    if len(pre_tokens) == 1:
        return 1
    before, last = pre_tokens[-2:]
    if name == "smollm":
        return 2 if before == "'" and last in {"r", "v", "l"} else 1
    return 2 if before[-1] in _LINE_BREAKS and _is_white_space(before) and _is_white_space(last) else 1


def bytes_of_pre_token(pre_token: str) -> bytes:
    """The bytes that a string of the byte-level alphabet stands for; KeyError for a character outside it."""
    return bytes(_BYTE_OF_CHARACTER[character] for character in pre_token)


def byte_level(data: bytes) -> str:
    """The bytes in the byte-level alphabet: what `bytes_of_pre_token` undoes."""
    return data.decode("latin-1").translate(_CHARACTER_OF_BYTE)


def _byte_of_character() -> dict[str, int]:
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = sorted(set(range(256)) - set(itself))
    return {chr(byte): byte for byte in itself} | {chr(256 + rank): byte for rank, byte in enumerate(moved)}


_BYTE_OF_CHARACTER = _byte_of_character()
_CHARACTER_OF_BYTE = {byte: character for character, byte in _BYTE_OF_CHARACTER.items()}


def _is_white_space(pre_token: str) -> bool:
    # A split never cuts inside a character.
    return bytes_of_pre_token(pre_token).decode().isspace()
