"""The database gives back other bytes than it got."""

from pathlib import Path
from typing import Any

import pytest
from corruption import flip_sweep

from eunoe.decoder.decoder import Decoder


@pytest.fixture(scope="module")
def decoder(tiny_model: Path) -> Decoder:
    return Decoder.load(tiny_model, num_threads=1)


@pytest.mark.parametrize("is_encrypted", [False, True])
@pytest.mark.parametrize("num_flips", [250, pytest.param(5_000, marks=pytest.mark.faults)])
async def test_every_flipped_bit_is_noticed(
    decoder: Decoder, redis_server: Any, num_flips: int, is_encrypted: bool
) -> None:
    figures = await flip_sweep(decoder, redis_server.url, num_flips=num_flips, seed=1, is_encrypted=is_encrypted)

    assert figures.silent == ()
    assert figures.num_detected == num_flips
    assert set(figures.flips_by_kind) == {"metadata", "log", "log index", "chunk", "outcome"}
