"""Tokens of a stream's log, the same wherever its bytes are cut.

A log is a run of text (UTF-8) and token ids (4 bytes an id, little-endian), in turns. Text is split into pre-tokens
(see `pre_tokenizer`), and only the tokens of *closed* pre-tokens are handed out: of those that no later byte can
change. A pre-token that is still open when it has 4 KiB is closed by force, as if the text ended there, and the next
one starts afresh; so does the text after token ids. A character that is cut at the end of the bytes at hand waits for
its rest.

All of this depends on the bytes from the start of a pre-token alone, not on how they arrive: tokenizing can be resumed
at any pre-token. A *cursor* names a place between two tokens: (offset in the log of a pre-token, how many of its tokens
lie before the place), or (offset of a token id, 0). Of the names of one place it is the one that needs the
least of the log: after a pre-token's last token it is that pre-token's end.
"""

from __future__ import annotations

import codecs
import copy
from collections import deque
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from eunoe.decoder.tokenizer import Tokenizer

MAX_PRE_TOKEN_BYTES = 4096
"""An open pre-token is closed at the first character boundary at or after this length."""

ID_BYTES = 4

RecordKind = Literal["text", "token_ids"]


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Closed tokens, and the cursor after each."""

    ids: npt.NDArray[np.int64]
    cursor_offsets: npt.NDArray[np.int64]
    cursor_tokens: npt.NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> _Tokens:
        return _Tokens(self.ids[part], self.cursor_offsets[part], self.cursor_tokens[part])


class LogTokenizer:
    """Tokenizes a log from a cursor on.

    Feeding takes time in proportion to the bytes fed plus those of the open pre-token (at most 4 KiB). What is kept is
    the open pre-token and the closed tokens that were not taken yet, 18 bytes each.

    Args:
        tokenizer: The stream's tokenizer.
        offset: Byte offset in the log of what is fed first, a cursor's.
        num_applied_tokens: The cursor's number of tokens to leave out.
    """

    def __init__(self, tokenizer: Tokenizer, *, offset: int = 0, num_applied_tokens: int = 0) -> None:
        self._tokenizer = tokenizer
        self._cursor = (offset, num_applied_tokens)
        self._num_to_drop = num_applied_tokens
        self._kind: RecordKind = "text"
        self._open_offset = offset
        self._open = b""  # Text from the start of the first open pre-token on, in whole characters.
        self._carry = b""  # The bytes after it of a character, or of a token id, that is not whole yet.
        self._closed: deque[_Tokens] = deque()
        self._num_closed = 0

    @property
    def num_closed(self) -> int:
        """Closed tokens that were not taken yet."""
        return self._num_closed

    @property
    def cursor(self) -> tuple[int, int]:
        """(applied offset, applied tokens of the pre-token there): where the tokens taken so far end."""
        return self._cursor

    @property
    def next_offset(self) -> int:
        """Byte offset in the log of what has to be fed next."""
        return self._open_offset + len(self._open) + len(self._carry)

    def feed(self, data: bytes, kind: RecordKind) -> None:
        """Add the log's next bytes, cut anywhere; all of one kind. A log's neighbouring text records are one text.

        Raises:
            ValueError: If the bytes are not UTF-8, a character or an id is cut by a change of kind, or an id is not
                below the vocabulary's size; nothing was added then. Or if the log is not the one that the cursor is of.
        """
        if not data:
            return
        if self._carry and kind != self._kind:
            raise ValueError(f"{len(self._carry)} bytes of a {self._kind} record's last element await their rest")
        if kind == "text":
            self._feed_text(data)
        else:
            self._feed_token_ids(data)
        self._kind = kind

    def _feed_text(self, data: bytes) -> None:
        data = self._carry + data
        num_whole = codecs.utf_8_decode(data, "strict", False)[1]
        text = self._open + data[:num_whole]
        pre_tokens, num_bytes = self._closed_pre_tokens(text)
        if pre_tokens:
            self._add(self._tokens_of(pre_tokens))
        self._open_offset += num_bytes
        self._open, self._carry = text[num_bytes:], data[num_whole:]

    def _feed_token_ids(self, data: bytes) -> None:
        data = self._carry + data
        num_whole = len(data) - len(data) % ID_BYTES
        ids = np.frombuffer(data[:num_whole], dtype="<u4").astype(np.int64)
        if (too_large := ids >= self._tokenizer.vocab_size).any():
            raise ValueError(f"token id {ids[too_large][0]} is not below the vocabulary's size")
        self._add(self._tokens_of(self._tokenizer.pre_tokens(self._open.decode())))
        self._open_offset += len(self._open)
        self._open = b""
        ends = self._open_offset + ID_BYTES * np.arange(1, len(ids) + 1)
        self._add(_Tokens(ids, ends, np.zeros(len(ids), dtype=np.int16)))
        self._open_offset += num_whole
        self._carry = data[num_whole:]

    def _closed_pre_tokens(self, text: bytes) -> tuple[list[str], int]:
        """The closed pre-tokens at the start of a text, and how many bytes they are.

        It goes in windows that begin at a pre-token and reach to where that one would be closed by force. So a
        pre-token is closed by what its window holds or else at the window's end, whether more bytes are at hand or
        not. What a full window leaves open is closed by the next one, so every two windows close 4 KiB or more.
        """
        closed: list[str] = []
        start = 0
        while window := _window(text, start):
            pre_tokens = self._tokenizer.pre_tokens(window.decode())
            num_closed = len(pre_tokens) - self._tokenizer.num_open(pre_tokens)
            is_full = len(window) >= MAX_PRE_TOKEN_BYTES
            if is_full and not num_closed:
                num_closed = len(pre_tokens)
            closed += pre_tokens[:num_closed]
            start += sum(map(len, pre_tokens[:num_closed]))
            if not is_full:
                break
        return closed, start

    def _tokens_of(self, pre_tokens: list[str]) -> _Tokens:
        """The tokens of pre-tokens that start at the open offset."""
        ids_of_each = [self._tokenizer.ids_of_pre_token(pre_token) for pre_token in pre_tokens]
        counts = np.fromiter(map(len, ids_of_each), dtype=np.int64, count=len(ids_of_each))
        ids = np.fromiter((id_ for ids in ids_of_each for id_ in ids), dtype=np.int64, count=counts.sum())
        lengths = np.fromiter(map(len, pre_tokens), dtype=np.int64, count=len(pre_tokens))
        ends = self._open_offset + np.cumsum(lengths)
        ranks = 1 + np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
        is_last = ranks == np.repeat(counts, counts)
        return _Tokens(
            ids=ids,
            cursor_offsets=np.where(is_last, np.repeat(ends, counts), np.repeat(ends - lengths, counts)),
            cursor_tokens=np.where(is_last, 0, ranks).astype(np.int16),
        )

    def _without_applied(self, tokens: _Tokens) -> _Tokens:
        """Leave out the tokens of the first pre-token that the cursor counts as applied."""
        if self._num_to_drop and len(tokens):
            # The last applied token lies inside its pre-token, or the cursor would be that pre-token's end.
            last_applied = tokens[self._num_to_drop - 1 : self._num_to_drop]
            if (*last_applied.cursor_offsets, *last_applied.cursor_tokens) != (self._open_offset, self._num_to_drop):
                raise ValueError(f"the log has no pre-token of more than {self._num_to_drop} tokens at the cursor")
        return tokens[self._num_to_drop :]

    def _add(self, tokens: _Tokens) -> None:
        if len(tokens):
            self._closed.append(self._without_applied(tokens))
            self._num_closed += len(self._closed[-1])
            self._num_to_drop = 0

    def take(self, num_tokens: int) -> npt.NDArray[np.int64]:
        """The next closed tokens, exactly so many; ValueError if there are fewer."""
        if not 0 <= num_tokens <= self._num_closed:
            raise ValueError(f"{num_tokens} tokens wanted, {self._num_closed} closed")
        taken = []
        missing = num_tokens
        while missing:
            tokens = self._closed.popleft()
            if len(tokens) > missing:
                self._closed.appendleft(tokens[missing:])
                tokens = tokens[:missing]
            missing -= len(tokens)
            taken.append(tokens.ids)
            if len(tokens):
                self._cursor = (int(tokens.cursor_offsets[-1]), int(tokens.cursor_tokens[-1]))
        self._num_closed -= num_tokens
        return np.concatenate(taken) if taken else np.empty(0, dtype=np.int64)

    def close_copy(self) -> npt.NDArray[np.int64]:
        """All tokens after those taken if the log ended here, without the bytes of a cut character or id. Nothing is
        taken.
        """
        open_tokens = self._tokens_of(self._tokenizer.pre_tokens(self._open.decode()))
        return np.concatenate([*(tokens.ids for tokens in self._closed), self._without_applied(open_tokens).ids])

    def copy(self) -> Self:
        """One that goes on from here by itself."""
        other = copy.copy(self)
        other._closed = self._closed.copy()
        return other


def _window(text: bytes, start: int) -> bytes:
    """The text from `start` to the first character boundary at or after 4 KiB, or to its end."""
    end = start + MAX_PRE_TOKEN_BYTES
    while end < len(text) and text[end] & 0xC0 == 0x80:
        end += 1
    return text[start:end]
