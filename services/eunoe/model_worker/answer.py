"""Text of an answer while it grows: what may be sent already, and where it stops."""

from collections.abc import Sequence
from dataclasses import dataclass

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.decoder.tokenizer import TextDecoder, Tokenizer

MAX_STOP_TEXTS = 8
MAX_STOP_BYTES = 64


@dataclass(frozen=True, slots=True)
class _Held:
    token_id: int
    log_prob: float
    num_chars: int
    """Characters of the answer after this token."""


class Answer:
    """Collects tokens, and holds back those whose text may turn out to begin a stop text.

    Args:
        tokenizer: Of the model.
        stop_texts: The answer ends before the first of these.

    Raises:
        ValueError: If there are too many stop texts, or one is empty or too long.

    Attributes:
        text: All text so far, whole characters only, cut before a stop text.
        token_ids: All tokens of that text that stand wholly before a stop text.
        is_stopped: Whether a stop text came.
    """

    def __init__(self, tokenizer: Tokenizer, stop_texts: Sequence[str]) -> None:
        if len(stop_texts) > MAX_STOP_TEXTS:
            raise ValueError(f"{len(stop_texts)} stop texts are more than {MAX_STOP_TEXTS}")
        for stop_text in stop_texts:
            if not 1 <= len(stop_text.encode()) <= MAX_STOP_BYTES:
                raise ValueError(f"a stop text must have 1 to {MAX_STOP_BYTES} bytes")
        self.text = ""
        self.token_ids: list[int] = []
        self.is_stopped = False
        self._tokenizer = tokenizer
        self._stop_texts = stop_texts
        self._decoder = TextDecoder(tokenizer)
        self._held: list[_Held] = []
        self._num_sent_chars = 0

    def push(self, token_id: int, log_prob: float) -> api.GeneratedTokens | None:
        """Take the next token; returns what may be sent now, if anything."""
        searched_from = max(0, len(self.text) - MAX_STOP_BYTES)
        self.text += self._decoder.push(token_id)
        self._held.append(_Held(token_id, log_prob, len(self.text)))
        places = [place for stop in self._stop_texts if (place := self.text.find(stop, searched_from)) >= 0]
        if places:
            self.is_stopped = True
            self.text = self.text[: min(places)]
            return self._sent(len(self.text))
        return self._sent(len(self.text) - self._num_chars_that_may_stop())

    def finish(self) -> api.GeneratedTokens | None:
        """What was held back; the answer ends here."""
        return self._sent(len(self.text))

    def remembered_ids(self) -> list[int]:
        """Token ids that stand for `text` exactly: those of a token cut by a stop text are made anew."""
        num_chars = 0
        decoder = TextDecoder(self._tokenizer)
        for token_id in self.token_ids:
            num_chars += len(decoder.push(token_id))
        rest = self.text[num_chars:]
        return self.token_ids + (self._tokenizer.encode(rest) if rest else [])

    def _num_chars_that_may_stop(self) -> int:
        """Length of the longest end of the text that is the beginning of a stop text."""
        return max(
            (
                length
                for stop_text in self._stop_texts
                for length in range(1, min(len(stop_text), len(self.text) + 1))
                if self.text.endswith(stop_text[:length])
            ),
            default=0,
        )

    def _sent(self, num_chars: int) -> api.GeneratedTokens | None:
        ready = [held for held in self._held if held.num_chars <= num_chars]
        self._held = self._held[len(ready) :]
        # Before the end, text goes only with its token; a stop text may cut the last one.
        end = num_chars if self.is_stopped else (ready[-1].num_chars if ready else self._num_sent_chars)
        text, self._num_sent_chars = self.text[self._num_sent_chars : end], max(end, self._num_sent_chars)
        self.token_ids += [held.token_id for held in ready]
        if not ready and not text:
            return None
        return api.GeneratedTokens(
            token_ids=[held.token_id for held in ready], text=text, log_probs=[held.log_prob for held in ready]
        )
