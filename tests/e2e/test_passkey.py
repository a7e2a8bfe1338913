"""Passkeys in a book's text, through the whole platform on SmolLM2: a needle that fits the KV budget is found.

The budget is the model's trained range, so nothing is evicted and the figures are those of a full cache.
"""

import gzip
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from eunoe.client import Client, StreamSettings
from eunoe.decoder.tokenizer import Tokenizer, load_tokenizer
from eunoe.embedded.platform import Platform

BOOK = Path(__file__).parents[2] / "examples" / "kjv.txt.gz"
PREAMBLE = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key.\n"
# Chosen among ten on documents of other seeds: a plain "What is the pass key?" is often continued as scripture.
QUESTION = "\nThe important information: the pass key is"
UNBOUNDED = 8192
NUM_CASES = 12
# At 4K the model itself starts to lose it: its full cache finds 10 of 12.
GOALS = {1024: 12, 2048: 12, 4096: 10}

pytestmark = [pytest.mark.model, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def tokenizer(smollm2_directory: Path) -> Tokenizer:
    return load_tokenizer(smollm2_directory)


@pytest.fixture(scope="module")
def client_of_smollm2(smollm2_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A platform of its own, with one worker on both cores."""
    with (
        Platform(home=tmp_path_factory.mktemp("home"), model=smollm2_directory, threads=2) as platform,
        Client(platform.address) as client,
    ):
        yield client


def a_document(tokenizer: Tokenizer, num_tokens: int, case: int) -> tuple[str, str]:
    """A document that has at most `num_tokens` tokens with the question, and its key; depths are spread evenly."""
    generator = random.Random(1000 * num_tokens + case)
    key = str(generator.randrange(10_000, 100_000))
    verses = gzip.decompress(BOOK.read_bytes()).decode().splitlines(keepends=True)
    first = generator.randrange(len(verses) - 2_000)
    needle = NEEDLE.format(key=key)
    # A few tokens less, because joined texts may have other tokens at their seams.
    room = num_tokens - len(tokenizer.encode(PREAMBLE + needle + QUESTION)) - 4
    body: list[str] = []
    for verse in verses[first:]:
        room -= len(tokenizer.encode(verse))
        if room < 0:
            break
        body.append(verse)
    place = int((case + 0.5) / NUM_CASES * len(body))
    return PREAMBLE + "".join(body[:place]) + needle + "".join(body[place:]), key


def num_found(client: Client, tokenizer: Tokenizer, num_tokens: int, cases: range) -> int:
    """In how many cases the raw continuation of the question has the key."""
    found = 0
    for case in cases:
        document, key = a_document(tokenizer, num_tokens, case)
        stream = f"passkey-{num_tokens}-{case}"
        client.create_stream(stream, settings=StreamSettings(kv_budget_tokens=UNBOUNDED))
        client.append(stream, document)
        answer = client.generate(stream, QUESTION, max_tokens=8).finish().text
        client.delete_stream(stream)
        found += key in answer
        print(f"{num_tokens} tokens, case {case}: {key}, answered {answer!r}")
    print(f"passkey at {num_tokens} tokens: {found} of {len(cases)}")
    return found


@pytest.mark.parametrize("num_tokens", GOALS)
def test_some_passkeys_are_found(client_of_smollm2: Client, tokenizer: Tokenizer, num_tokens: int) -> None:
    cases = range(1, NUM_CASES, 3)
    missed_at_most = NUM_CASES - GOALS[num_tokens]

    assert num_found(client_of_smollm2, tokenizer, num_tokens, cases) >= len(cases) - missed_at_most


@pytest.mark.full
@pytest.mark.parametrize("num_tokens", GOALS)
def test_all_passkeys_are_found(client_of_smollm2: Client, tokenizer: Tokenizer, num_tokens: int) -> None:
    assert num_found(client_of_smollm2, tokenizer, num_tokens, range(NUM_CASES)) >= GOALS[num_tokens]
