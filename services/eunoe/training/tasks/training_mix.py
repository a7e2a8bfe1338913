"""What a policy is trained on: questions of every kind, and reading on."""

import random

from eunoe.decoder.tokenizer import Tokenizer
from eunoe.training.tasks.case import Case
from eunoe.training.tasks.continuation import continuations
from eunoe.training.tasks.suite import suite


def training_mix(num_tokens: int, count: int, *, seed: int, tokenizer: Tokenizer) -> list[Case]:
    """Cases of the training split, every fourth a continuation; arguments as of `suite`."""
    asking = suite(num_tokens, count - count // 4, seed=seed, split="train", tokenizer=tokenizer)
    # A suite begins with every cell's shallowest needle, and the first cases of a mix are those that validate.
    random.Random(f"mix/{num_tokens}/{count}/{seed}").shuffle(asking)
    reading = continuations(num_tokens, count // 4, seed=seed, split="train", tokenizer=tokenizer)
    return [reading[index // 4] if index % 4 == 3 else asking[index - index // 4] for index in range(count)]
