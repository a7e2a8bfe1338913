"""A database that comes back older than it was: no memory survives that was folded from what it forgot."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis.asyncio as redis

from eunoe.runtime.errors import NotOwner

Text = Callable[..., bytes]


@pytest.fixture
def rolled_back(redis_server: Any, platform: Any) -> Any:
    """What happens inside of the block, to all of the tenant's keys, has never happened after it."""

    @asynccontextmanager
    async def forgetting() -> AsyncIterator[None]:
        async with redis.Redis.from_url(redis_server.url) as client:
            pattern = f"eunoe:{{{platform.tenant}}}:*"
            before = {key: await client.dump(key) async for key in client.scan_iter(pattern)}
            yield
            now = [key async for key in client.scan_iter(pattern)]
            await client.delete(*now)
            for key, dumped in before.items():
                await client.restore(key, 0, dumped)

    return forgetting


async def held_by_none_any_more(platform: Any, worker: Any, name: str) -> Any:
    """Flush; the worker first finds out that its memory is worth nothing."""
    with pytest.raises(NotOwner):
        await platform.flush(worker, name)
    return await platform.flush(worker, name)


@pytest.mark.parametrize("num_bytes", [100, 700, 1000])
@pytest.mark.parametrize("is_committed", [False, True])
async def test_a_memory_of_lost_records_is_dropped_whatever_came_instead(
    platform: Any, make_text: Text, rolled_back: Any, num_bytes: int, is_committed: bool
) -> None:
    worker, kept, other = await platform.worker(), make_text(800), make_text(num_bytes, seed=2)
    name = await platform.stream()
    await platform.append(name, kept)
    await platform.flush(worker, name)
    async with rolled_back():
        await platform.append(name, make_text(700, seed=1))
        await platform.generate(worker, name, max_tokens=1, text="so")
        if is_committed:
            await platform.flush(worker, name)
    await platform.append(name, other)

    record = await held_by_none_any_more(platform, worker, name)

    assert record.stream.state_digest == await platform.digest(worker, kept + other)


async def test_only_a_checkpoint_that_is_lost_is_made_again(platform: Any, make_text: Text, rolled_back: Any) -> None:
    worker, data = await platform.worker(), make_text(800)
    name = await platform.stream()
    await platform.append(name, data)
    await platform.generate(worker, name, max_tokens=1, text="so")
    async with rolled_back():
        await platform.flush(worker, name)

    record = await held_by_none_any_more(platform, worker, name)

    assert record.stream.state_digest == await platform.digest(worker, data)


async def test_an_answer_knows_nothing_of_lost_records(platform: Any, make_text: Text, rolled_back: Any) -> None:
    worker, kept, other = await platform.worker(), make_text(800), make_text(700, seed=2)
    name, undisturbed = await platform.stream(), await platform.stream()
    await platform.append(undisturbed, kept + other)
    await platform.append(name, kept)
    await platform.flush(worker, name)
    async with rolled_back():
        await platform.append(name, make_text(700, seed=1))
        await platform.generate(worker, name, max_tokens=1, text="so")
    await platform.append(name, other)

    with pytest.raises(NotOwner):
        await platform.score(worker, name, text="the river")
    scores = await platform.score(worker, name, text="the river")

    assert scores == await platform.score(worker, undisturbed, text="the river")
