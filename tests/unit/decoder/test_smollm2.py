"""The decoder on real weights, against transformers on the same GGUF file."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from eunoe.decoder.config import Dtypes
from eunoe.decoder.decoder import Decoder
from eunoe.decoder.memory_state import MemorySettings
from eunoe.decoder.tokenizer import Tokenizer, load_tokenizer
from eunoe.eviction import DEFAULT_POLICY

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]

UNBOUNDED = MemorySettings(kv_budget_tokens=8192, segment_length=512)
TEXTS = (
    "The history of the lighthouse begins with fires that were lit on hills above the harbour. A keeper of the fire "
    "watched it through the night, and in the morning he wrote down the names of the ships that had passed. ",
    "def merge(left, right):\n    result = []\n    while left and right:\n        source = left if left[0] <= right[0] "
    "else right\n        result.append(source.pop(0))\n    return result + left + right\n\n",
    "Q: How far is the Moon, and how long does light take from there?\nA: About 384,400 km; light takes 1.28 s.\n"
    "Q: And from the Sun?\nA: 149.6 million km, so 499 seconds or 8 minutes 19 seconds.\n",
)
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a",
    "Water boils at a temperature of",
    "def fibonacci(n):",
    "The three primary colours are",
)


@pytest.fixture(scope="module")
def tokenizer(smollm2_directory: Path) -> Tokenizer:
    return load_tokenizer(smollm2_directory)


@pytest.fixture(scope="module")
def exact_decoder(smollm2_directory: Path) -> Decoder:
    # One thread: passes of one token are short, and on a busy machine two threads mostly wait for each other.
    return Decoder.load(smollm2_directory, Dtypes.float32(), num_threads=1)


@pytest.fixture(scope="module")
def oracle(smollm2_directory: Path) -> Any:
    """Transformers' model from the GGUF file, in float32."""
    path = Path(os.environ.get("EUNOE_TEST_GGUF", smollm2_directory / "model.gguf"))
    if not path.is_file():
        missing = pytest.fail if os.environ.get("EUNOE_REQUIRE_MODEL") else pytest.skip
        missing(f"there is no {path}, nor does EUNOE_TEST_GGUF name one")
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def tokens_of(tokenizer: Tokenizer, text: str, num_tokens: int) -> np.ndarray:
    tokens = tokenizer.encode(text * (num_tokens // 30))
    assert len(tokens) >= num_tokens
    return np.array(tokens[:num_tokens])


@pytest.mark.parametrize("text", TEXTS, ids=["prose", "code", "dialogue"])
def test_logits_equal_those_of_transformers(
    text: str, exact_decoder: Decoder, tokenizer: Tokenizer, oracle: Any
) -> None:
    tokens = tokens_of(tokenizer, text, 512)

    logits = exact_decoder.prefill(exact_decoder.new_state(UNBOUNDED), tokens, DEFAULT_POLICY, logits="all")

    with torch.inference_mode():
        expected = oracle(torch.from_numpy(tokens)[None]).logits[0]
    assert logits is not None
    difference = float((logits - expected).abs().max())
    print(f"largest difference of a logit: {difference:.1e}")
    assert difference <= 5e-4


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_equal_those_of_transformers(
    prompt: str, exact_decoder: Decoder, tokenizer: Tokenizer, oracle: Any
) -> None:
    tokens = tokenizer.encode(prompt)
    state = exact_decoder.new_state(UNBOUNDED)

    logits = exact_decoder.prefill(state, tokens, DEFAULT_POLICY, logits="last")
    assert logits is not None
    greedy = [int(logits.argmax())]
    while len(greedy) < 64:
        greedy.append(int(exact_decoder.decode([state], greedy[-1:], DEFAULT_POLICY)[0].argmax()))

    given = torch.tensor([tokens])
    expected = oracle.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=64, min_new_tokens=64, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert greedy == expected[0, len(tokens) :].tolist()


def test_logits_do_not_depend_on_the_segment_length(exact_decoder: Decoder, tokenizer: Tokenizer) -> None:
    tokens = tokens_of(tokenizer, TEXTS[0], 512)

    outputs = []
    for segment_length in (512, 37, 1):
        settings = MemorySettings(kv_budget_tokens=8192, segment_length=segment_length)
        outputs.append(exact_decoder.prefill(exact_decoder.new_state(settings), tokens, DEFAULT_POLICY, logits="all"))

    for output in outputs[1:]:
        assert output is not None
        assert outputs[0] is not None
        assert (output - outputs[0]).abs().max() <= 5e-4
