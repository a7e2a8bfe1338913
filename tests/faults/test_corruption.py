"""The database gives back other bytes than it got."""

from pathlib import Path
from typing import Any

import pytest
from corruption import DAMAGES, damage_sweep

from eunoe.decoder.decoder import Decoder


@pytest.fixture(scope="module")
def decoder(tiny_model: Path) -> Decoder:
    return Decoder.load(tiny_model, num_threads=1)


@pytest.mark.parametrize("is_encrypted", [False, True])
@pytest.mark.parametrize("num_tries", [400, pytest.param(8_000, marks=[pytest.mark.faults, pytest.mark.timeout(600)])])
async def test_every_damaged_value_is_noticed(
    decoder: Decoder, redis_server: Any, num_tries: int, is_encrypted: bool
) -> None:
    figures = await damage_sweep(decoder, redis_server.url, num_tries=num_tries, seed=1, is_encrypted=is_encrypted)

    assert figures.silent == ()
    assert set(figures.num_by_damage) == set(DAMAGES)
    assert set(figures.num_by_value) == {"metadata", "log", "log index", "chunk", "outcome", "API key"}
