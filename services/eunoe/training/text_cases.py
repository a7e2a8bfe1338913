"""Cases without a question: pieces of a text, whose own next tokens are the answer."""

import gzip
import hashlib
from pathlib import Path

import numpy as np

from eunoe.decoder.tokenizer import Tokenizer
from eunoe.training.tasks.case import Case

_NUM_QUESTION_TOKENS = 16
_NUM_ANSWER_TOKENS = 64


def read_text(path: Path) -> tuple[str, str]:
    """A text file's content and the SHA-256 of its bytes; `.gz` is unpacked first.

    Raises:
        ValueError: If it is not UTF-8, or no gzip file in spite of its name.
        OSError: If it cannot be read.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    try:
        return content.decode(), hashlib.sha256(content).hexdigest()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None


def text_cases(tokenizer: Tokenizer, text: str, *, num_cases: int, num_context_tokens: int, seed: int) -> list[Case]:
    """Cases at random places of a text.

    Raises:
        ValueError: If the text is shorter than one case.
    """
    token_ids = np.array(tokenizer.encode(text), dtype=np.int64)
    num_tokens = num_context_tokens + _NUM_QUESTION_TOKENS + _NUM_ANSWER_TOKENS
    if len(token_ids) < num_tokens:
        raise ValueError(f"the text has {len(token_ids):,} tokens, a case takes {num_tokens:,}")
    starts = np.random.default_rng([seed, 0]).integers(0, len(token_ids) - num_tokens + 1, num_cases)
    ends = np.cumsum([num_context_tokens, _NUM_QUESTION_TOKENS, _NUM_ANSWER_TOKENS])[:-1]
    pieces = (np.split(token_ids[start : start + num_tokens], ends) for start in starts)
    return [
        Case(
            task="continuation",
            kind="",
            haystack="book",
            is_held_out=False,
            context=context,
            question=question,
            answer=answer,
            needles=(),
        )
        for context, question, answer in pieces
    ]
