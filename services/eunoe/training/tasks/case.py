"""One question about one context, as tokens of the model that is asked."""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """A context is read first; the question comes when it is compressed already.

    Attributes:
        task: Such as "single" or "multi-value".
        kind: What the needle is, such as "digits" or "names"; "" where there is none.
        haystack: "book", "code" or "manual".
        is_held_out: Neither its needle's kind and template nor its piece of haystack is ever trained on.
        context: [n] token ids.
        question: [q] token ids; the answer continues them.
        answer: [a] token ids that a right greedy continuation begins with.
        needles: (start, stop) of each piece of the context that the answer needs.
    """

    task: str
    kind: str
    haystack: str
    is_held_out: bool
    context: TokenIds
    question: TokenIds
    answer: TokenIds
    needles: tuple[tuple[int, int], ...]

    @property
    def digest(self) -> str:
        """SHA-256 of everything that is read, asked and expected, in hex."""
        hashed = hashlib.sha256()
        for part in (self.context, self.question, self.answer):
            hashed.update(f"{len(part)} ".encode() + part.tobytes())
        return hashed.hexdigest()
