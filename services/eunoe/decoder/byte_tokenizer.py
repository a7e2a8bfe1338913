"""Text to token ids and back where a byte is a token: the id is the byte's value, and there are no special tokens."""

from collections.abc import Iterable, Sequence
from typing import NoReturn

from eunoe.decoder.pre_tokenizer import byte_level, bytes_of_pre_token


class ByteTokenizer:
    """A `Tokenizer` of 256 ids.

    Each character is a pre-token of its own, because a log may be read from any pre-token on: so every cursor without
    applied tokens lies between two characters.
    """

    vocab_size = 256
    end_of_turn_ids: frozenset[int] = frozenset()

    def pre_tokens(self, text: str) -> list[str]:
        """The text's characters, in the byte-level alphabet."""
        written = byte_level(text.encode())
        if len(written) == len(text):
            return list(written)
        pre_tokens, start = [], 0
        for character in text:
            end = start + len(character.encode())
            pre_tokens.append(written[start:end])
            start = end
        return pre_tokens

    def num_open(self, pre_tokens: Sequence[str]) -> int:
        """None: whatever follows, a whole character has the tokens that it has."""
        return 0

    def ids_of_pre_token(self, pre_token: str) -> tuple[int, ...]:
        return tuple(bytes_of_pre_token(pre_token))

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        """The byte; ValueError outside of 0 to 255."""
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is not below the vocabulary's size {self.vocab_size}")
        return bytes((token_id,))

    def decode(self, token_ids: Iterable[int]) -> str:
        return b"".join(self.token_bytes(int(token_id)) for token_id in token_ids).decode("utf-8", "replace")

    def render_chat(self, turns: Sequence[tuple[str, str]], add_generation_prompt: bool = True) -> NoReturn:
        """Raise ValueError: nothing but bytes could mark a turn, and they may be anybody's text."""
        raise ValueError("this model has no chat template, it only goes on with texts")
