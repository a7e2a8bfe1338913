"""Text to token ids and back: byte-level byte-pair encoding (GPT-2's, as SmolLM2 and Llama 3 use it), or bytes.

Text never becomes a special token, whatever it contains: "<|im_start|>" in a document is twelve bytes. Special tokens
come from the chat template alone.
"""

from __future__ import annotations

import codecs
import functools
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import tokenizers

from eunoe.decoder.byte_tokenizer import ByteTokenizer
from eunoe.decoder.chat_template import ChatTemplate
from eunoe.decoder.pre_tokenizer import (
    bytes_of_pre_token,
    num_open_pre_tokens,
    pre_tokenizer_definition,
    pre_tokenizer_name,
)

_MAX_CACHED_PRE_TOKEN_BYTES = 32
_NUM_CACHED_PRE_TOKENS = 1 << 15


class Tokenizer(Protocol):
    """The tokenizer of one model."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""

    @property
    def end_of_turn_ids(self) -> frozenset[int]:
        """Ids that end an answer."""

    def pre_tokens(self, text: str) -> list[str]:
        """The text's pre-tokens, in the byte-level alphabet (one character a byte), as if the text ended there."""

    def num_open(self, pre_tokens: Sequence[str]) -> int:
        """How many of the last pre-tokens more text could still change."""

    def ids_of_pre_token(self, pre_token: str) -> tuple[int, ...]:
        """Token ids of one pre-token; none if the vocabulary lacks all of its bytes, as SmolLM2's lacks 0x04."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, never a special token."""

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for; for a special token its name. Empty for an id inside the vocabulary that names
        no token, ValueError outside it.
        """

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of the tokens; bytes that are not UTF-8 become U+FFFD."""

    def render_chat(self, turns: Sequence[tuple[str, str]], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of chat turns in the model's own template. Special tokens come from the template only.

        Args:
            turns: (role, content) pairs; roles are "system", "user", "assistant" and "tool".
            add_generation_prompt: Whether to end with the opening of an answer.

        Raises:
            ValueError: If the model has no template, a role is unknown, or the template refuses the turns.
        """


def load_tokenizer(directory: Path | str) -> Tokenizer:
    """The tokenizer of a model directory: bytes if config.json says `"tokenizer": "bytes"`, else `BytePairTokenizer`.

    Raises:
        FileNotFoundError: If a file of the tokenizer is missing.
        ValueError: If the tokenizer is of an unsupported kind.
    """
    path = Path(directory) / "config.json"
    kind = json.loads(path.read_bytes()).get("tokenizer") if path.is_file() else None
    if kind not in (None, "bytes"):
        raise ValueError(f"tokenizer {kind!r} of {path} is not supported, only 'bytes' or that of a tokenizer.json")
    return ByteTokenizer() if kind == "bytes" else BytePairTokenizer.load(directory)


class BytePairTokenizer:
    """A `Tokenizer` by byte-level byte-pair encoding.

    Args:
        tokenizer_json: Content of tokenizer.json.
        tokenizer_config: Content of tokenizer_config.json: names of special tokens, `chat_template`.
        end_of_turn_ids: Ids that end an answer, beside the `eos_token` of tokenizer_config.

    Raises:
        ValueError: If the model is no byte-level byte-pair encoding with a supported split.
    """

    def __init__(
        self, tokenizer_json: dict[str, Any], tokenizer_config: dict[str, Any], end_of_turn_ids: Iterable[int] = ()
    ) -> None:
        model = tokenizer_json["model"]
        # Old files leave out the type.
        if model.get("type", "BPE") != "BPE" or tokenizer_json.get("normalizer"):
            raise ValueError(f"tokenizer model {model.get('type')!r} is not supported, only BPE without a normalizer")
        self._pre_tokenizer_name = pre_tokenizer_name(tokenizer_json["pre_tokenizer"])
        self._special_ids = {token["content"]: int(token["id"]) for token in tokenizer_json.get("added_tokens", [])}
        text_vocab = {token: id_ for token, id_ in model["vocab"].items() if token not in self._special_ids}
        # Without added tokens the library cannot make a special token out of text.
        library = tokenizers.Tokenizer.from_str(
            json.dumps(
                {
                    "version": "1.0",
                    "added_tokens": [],
                    "pre_tokenizer": tokenizer_json["pre_tokenizer"],
                    "model": model | {"vocab": text_vocab},
                }
            )
        )
        self._split = library.pre_tokenizer.pre_tokenize_str
        self._tokenize = library.model.tokenize
        self._cached_ids = functools.lru_cache(_NUM_CACHED_PRE_TOKENS)(self._ids_of_pre_token)

        self._bytes_of_id = {id_: bytes_of_pre_token(token) for token, id_ in text_vocab.items()}
        self._bytes_of_id |= {id_: content.encode() for content, id_ in self._special_ids.items()}
        self.vocab_size = max(self._bytes_of_id) + 1
        contents = {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in tokenizer_config.items()
            if name.endswith("_token")
        }
        named = {name: content for name, content in contents.items() if isinstance(content, str)}
        ends = (self._special_ids.get(named.get(name, "")) for name in ("eos_token", "eot_token"))
        self.end_of_turn_ids = frozenset(end_of_turn_ids).union(end for end in ends if end is not None)
        self._template = ChatTemplate(tokenizer_config.get("chat_template"), self._special_ids, named)

    @classmethod
    def load(cls, directory: Path | str) -> Self:
        """Read a model directory of Hugging Face's layout: tokenizer.json, tokenizer_config.json; if there,
        config.json and generation_config.json (`eos_token_id`) and chat_template.jinja.

        Raises:
            FileNotFoundError: If one of the first two is missing.
            ValueError: If the tokenizer is of an unsupported kind.
        """
        directory = Path(directory)
        tokenizer_json = json.loads((directory / "tokenizer.json").read_bytes())
        tokenizer_config = json.loads((directory / "tokenizer_config.json").read_bytes())
        if (template := directory / "chat_template.jinja").exists():
            tokenizer_config["chat_template"] = template.read_text(encoding="utf-8")
        end_of_turn_ids: set[int] = set()
        for name in ("config.json", "generation_config.json"):
            if (path := directory / name).exists():
                ids = json.loads(path.read_bytes()).get("eos_token_id")
                end_of_turn_ids.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
        return cls(tokenizer_json, tokenizer_config, end_of_turn_ids)

    def pre_tokens(self, text: str) -> list[str]:
        return [pre_token for pre_token, _ in self._split(text)]

    def num_open(self, pre_tokens: Sequence[str]) -> int:
        return num_open_pre_tokens(self._pre_tokenizer_name, pre_tokens)

    def ids_of_pre_token(self, pre_token: str) -> tuple[int, ...]:
        if len(pre_token) <= _MAX_CACHED_PRE_TOKEN_BYTES:
            return self._cached_ids(pre_token)
        return self._ids_of_pre_token(pre_token)

    def _ids_of_pre_token(self, pre_token: str) -> tuple[int, ...]:
        return tuple(token.id for token in self._tokenize(pre_token))

    def encode(self, text: str) -> list[int]:
        return [id_ for pre_token in self.pre_tokens(text) for id_ in self.ids_of_pre_token(pre_token)]

    def token_bytes(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is not below the vocabulary's size {self.vocab_size}")
        return self._bytes_of_id.get(token_id, b"")

    def decode(self, token_ids: Iterable[int]) -> str:
        return b"".join(self.token_bytes(int(token_id)) for token_id in token_ids).decode("utf-8", "replace")

    def render_chat(self, turns: Sequence[tuple[str, str]], add_generation_prompt: bool = True) -> list[int]:
        token_ids: list[int] = []
        for part in self._template.render(turns, add_generation_prompt):
            token_ids.extend([part] if isinstance(part, int) else self.encode(part))
        return token_ids


class TextDecoder:
    """Turns tokens into text one at a time, holding back characters that are not whole yet."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """U+FFFD for a character that never became whole, else nothing."""
        return self._decoder.decode(b"", final=True)


class _Field(Protocol):
    def contents(self) -> Any: ...


class _GgufReader(Protocol):
    @property
    def fields(self) -> dict[str, _Field]: ...


_GGUF_CONTROL, _GGUF_USER_DEFINED = 3, 4


def tokenizer_files_from_gguf(reader: _GgufReader) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tokenizer that a GGUF file describes, as the contents of tokenizer.json and tokenizer_config.json.

    Args:
        reader: A `gguf.GGUFReader`.

    Raises:
        ValueError: If `tokenizer.ggml.model` is not "gpt2" or `tokenizer.ggml.pre` is a split not supported here.
    """

    def read(name: str, default: Any = None) -> Any:
        field = reader.fields.get(f"tokenizer.{name}")
        return default if field is None else field.contents()

    if (model := read("ggml.model")) != "gpt2":
        raise ValueError(f"tokenizer.ggml.model {model!r} is not supported, only 'gpt2'")
    tokens, split = read("ggml.tokens"), read("ggml.pre", "default")
    tokenizer_json = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(token_id, tokens[token_id], is_special=kind == _GGUF_CONTROL)
            for token_id, kind in enumerate(read("ggml.token_type"))
            if kind in (_GGUF_CONTROL, _GGUF_USER_DEFINED)
        ],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer_definition(split),
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            # Llama 3 has words in its vocabulary that its merges do not reach.
            "ignore_merges": split == "llama-bpe",
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in read("ggml.merges")],
        },
    }
    tokenizer_config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for name, key in {"bos": "bos", "eos": "eos", "eot": "eot", "unk": "unknown", "pad": "padding"}.items():
        if (token_id := read(f"ggml.{key}_token_id")) is not None:
            tokenizer_config[f"{name}_token"] = tokens[token_id]
    if template := read("chat_template"):
        tokenizer_config["chat_template"] = template
    return tokenizer_json, tokenizer_config


def _added_token(token_id: int, content: str, is_special: bool = True) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, "special": is_special, **flags}


_TINY_WORDS = (
    "the of and to in that it was he for his with as on be at by had not but from they which she we were their all "
    "there said when who one would into more them out him time then now made over did down only way find use water "
    "long little very after words called just where most know get through back much before go good new write our me "
    "man too any day same right look think also around another came come work three word must because does part even "
    "place well such here take why help put years different away again off went old number great tell men say small "
    "In The And It He She But stream memory segment token reader river forget remember"
)
_TINY_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tiny_tokenizer(directory: Path | str, seed: int = 0) -> None:
    """Write tokenizer.json and tokenizer_config.json of a small tokenizer for tests: 512 ids in all, every byte among
    them, <|im_start|> (0) and <|im_end|> (1, ends a turn), a ChatML template. Equal seeds write equal files.
    """
    words = random.Random(seed).choices(_TINY_WORDS.split(), k=4000)
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.train_from_iterator(
        [" ".join(words)],
        tokenizers.trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=["<|im_start|>", "<|im_end|>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer_json = json.loads(library.to_str()) | {"pre_tokenizer": pre_tokenizer_definition("smollm")}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "chat_template": _TINY_CHAT_TEMPLATE,
    }
    directory = Path(directory)
    for name, content in {"tokenizer.json": tokenizer_json, "tokenizer_config.json": tokenizer_config}.items():
        (directory / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
