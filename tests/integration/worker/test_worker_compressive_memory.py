"""Streams of a model with a compressive memory: what has left the window moves, forks and is verified like the rest."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.decoder.config import CompressiveMemoryConfig
from eunoe.decoder.tiny import write_tiny_model
from eunoe.internal.v1 import state_store_pb2 as pb

Text = Callable[..., bytes]
SETTINGS = {"kv_budget_tokens": 16, "segment_length": 16, "num_sink_tokens": 0}


@pytest.fixture(scope="session")
def compressive_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("compressive")
    write_tiny_model(directory, compressive_memory=CompressiveMemoryConfig(update_rule="delta", has_write_gate=True))
    return directory


async def answer(platform: Any, worker: Any, name: str) -> list[int]:
    responses = await platform.generate(worker, name, text="?", max_tokens=8)
    return [token_id for response in responses for token_id in response.tokens.token_ids]


@pytest.mark.parametrize("retain_log", [False, True])
async def test_after_a_worker_died_another_one_has_the_same_memory(
    platform: Any, make_text: Text, compressive_model: Path, retain_log: bool
) -> None:
    worker, data = await platform.worker(model_path=compressive_model), make_text(2000)
    name = await platform.stream(**SETTINGS, retain_log=retain_log)
    await platform.append(name, data[:1000])
    await platform.flush(worker, name)
    await platform.append(name, data[1000:])
    await platform.kill(worker)
    other = await platform.worker(model_path=compressive_model)

    record = await platform.flush(other, name)

    assert record.manifest.encoding_version == 3
    assert record.stream.state_digest == await platform.digest(other, data, **SETTINGS)
    assert (await platform.verify(other, name)).verdict == api.VERDICT_VERIFIED


async def test_a_moved_stream_and_its_fork_answer_alike(
    platform: Any, make_text: Text, compressive_model: Path
) -> None:
    worker, data = await platform.worker(model_path=compressive_model), make_text(2000)
    name = await platform.stream(**SETTINGS)
    await platform.append(name, data)
    before = await platform.flush(worker, name)
    expected = await answer(platform, worker, name)
    child = f"{name}-child"
    await platform.store.fork_stream(pb.ForkStreamRequest(parent=name, name=child))
    other = await platform.worker(model_path=compressive_model)
    await worker.drain()

    assert await answer(platform, other, name) == expected
    assert await answer(platform, other, child) == expected
    assert (await platform.record(child)).stream.state_digest == before.stream.state_digest


async def test_the_memory_is_as_large_after_ten_times_the_text(
    platform: Any, make_text: Text, compressive_model: Path
) -> None:
    worker = await platform.worker(model_path=compressive_model)
    name = await platform.stream(**SETTINGS)
    sizes = []
    for seed in range(2):
        await platform.append(name, make_text(500 * 10**seed, seed=seed))
        sizes.append(sum(chunk.length for chunk in (await platform.flush(worker, name)).manifest.chunks))

    assert sizes[0] == sizes[1] > 0
