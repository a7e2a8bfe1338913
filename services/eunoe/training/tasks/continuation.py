"""Ordinary reading as a task: the answer is how the text goes on."""

import random

import numpy as np

from eunoe.decoder.tokenizer import Tokenizer
from eunoe.training.tasks.case import Case
from eunoe.training.tasks.haystack import HaystackName, Split, lines

TASK = "continuation"
_NUM_QUESTION_TOKENS = 16
_NUM_ANSWER_TOKENS = 64


def continuations(num_tokens: int, count: int, *, seed: int, split: Split, tokenizer: Tokenizer) -> list[Case]:
    """Cases at random places of book and code by turns; arguments as of `suite`."""
    generator = random.Random(f"{TASK}/{num_tokens}/{seed}/{split}")
    ends = np.cumsum([num_tokens, _NUM_QUESTION_TOKENS, _NUM_ANSWER_TOKENS])
    made = []
    for index in range(count):
        haystack: HaystackName = ("book", "code")[index % 2]
        text = lines(haystack, split)
        token_ids: list[int] = []
        start = generator.randrange(len(text))
        while len(token_ids) < ends[-1]:
            # Beyond the end the haystack begins again.
            token_ids += tokenizer.encode("".join(text[start : start + 100]))
            start = start + 100 if start + 100 < len(text) else 0
        context, question, answer, _ = np.split(np.asarray(token_ids, dtype=np.int64), ends)
        made.append(
            Case(
                task=TASK,
                kind="",
                haystack=haystack,
                is_held_out=split == "test",
                context=context,
                question=question,
                answer=answer,
                needles=(),
            )
        )
    return made
