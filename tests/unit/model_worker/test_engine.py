import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import torch

from eunoe.decoder.decoder import Decoder
from eunoe.decoder.memory_state import MemorySettings
from eunoe.eviction import DEFAULT_POLICY
from eunoe.model_worker.engine import Decode, Engine, Job
from eunoe.runtime.errors import InvalidRequest, Unavailable

SETTINGS = MemorySettings(kv_budget_tokens=16, segment_length=8, num_sink_tokens=2)


@pytest.fixture
async def engine(tiny_model: Path) -> AsyncIterator[Engine]:
    engine = Engine(lambda: Decoder.load(tiny_model, num_threads=1), on_death=lambda: None)
    await engine.start()
    yield engine
    engine.stop()


def turns(log: list[str], name: str, num_turns: int) -> Job[str]:
    for _ in range(num_turns):
        log.append(name)
        yield None
    return name


def gated(gate: threading.Event) -> Callable[[], bool]:
    """Holds the engine until the test has submitted all it wants to see side by side."""
    return lambda: gate.wait(10)


async def test_a_long_job_does_not_delay_a_short_one_by_more_than_a_turn(engine: Engine) -> None:
    log: list[str] = []
    gate = threading.Event()
    held = engine.call(gated(gate))
    long_job, short_job = engine.submit(turns(log, "long", 200)), engine.submit(turns(log, "short", 1))
    gate.set()
    assert await short_job == "short"
    assert log.index("short") <= 1
    assert await long_job == "long"
    assert await held


async def test_a_failing_job_disturbs_no_other(engine: Engine) -> None:
    def failing() -> Job[None]:
        yield None
        raise InvalidRequest("no")

    log: list[str] = []
    failed, other = engine.submit(failing()), engine.submit(turns(log, "other", 3))
    with pytest.raises(InvalidRequest):
        await failed
    assert await other == "other"


async def test_a_bug_in_a_job_ends_that_job_only(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ZeroDivisionError):
        await engine.call(lambda: 1 // 0)
    assert "a job failed" in caplog.text
    assert await engine.call(lambda: 1) == 1


async def test_a_cancelled_job_is_closed_and_says_so(engine: Engine) -> None:
    closed = asyncio.Event()
    loop = asyncio.get_running_loop()

    def endless() -> Job[None]:
        while True:
            yield None

    def on_close() -> None:
        loop.call_soon_threadsafe(closed.set)

    running = engine.submit(endless(), on_close)
    await engine.call(lambda: None)
    running.cancel()
    await asyncio.wait_for(closed.wait(), 5)
    await until(lambda: engine.is_idle)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


async def test_decode_steps_of_different_streams_share_a_batch(engine: Engine, tiny_model: Path) -> None:
    decoder = Decoder.load(tiny_model, num_threads=1)
    sizes: list[int] = []
    loaded = await engine.call(lambda: engine.decoder)
    plain_decode = loaded.decode

    def counted(states, token_ids, policy):  # type: ignore[no-untyped-def]
        sizes.append(len(states))
        return plain_decode(states, token_ids, policy)

    loaded.decode = counted  # type: ignore[method-assign]

    def three_tokens(token_id: int) -> Job[torch.Tensor]:
        state = decoder.new_state(SETTINGS)
        for _ in range(3):
            logits = yield Decode(state, token_id, DEFAULT_POLICY)
        return logits

    gate = threading.Event()
    held = engine.call(gated(gate))
    answers = [engine.submit(three_tokens(token_id)) for token_id in range(20)]
    gate.set()
    await asyncio.gather(held, *answers)
    assert max(sizes) == 16
    assert sum(sizes) == 60


async def test_ingest_and_decoding_both_go_on_side_by_side(engine: Engine) -> None:
    decoder = engine.decoder
    log: list[str] = []

    def decoding() -> Job[None]:
        state = decoder.new_state(SETTINGS)
        for _ in range(20):
            yield Decode(state, 1, DEFAULT_POLICY)
            log.append("decode")

    gate = threading.Event()
    held = engine.call(gated(gate))
    state = decoder.new_state(SETTINGS)

    def ingesting() -> Job[None]:
        for _ in range(20):
            decoder.prefill(state, [2] * 8, DEFAULT_POLICY)
            log.append("segment")
            yield None

    both = [engine.submit(decoding()), engine.submit(ingesting())]
    gate.set()
    await asyncio.gather(held, *both)
    first_half = log[: len(log) // 2]
    assert "decode" in first_half
    assert "segment" in first_half


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_an_engine_that_dies_says_so(tiny_model: Path) -> None:
    died = threading.Event()
    engine = Engine(lambda: Decoder.load(tiny_model, num_threads=1), on_death=died.set)
    await engine.start()
    ended = engine.call(sys.exit)
    assert await asyncio.to_thread(died.wait, 5)
    await until(lambda: not engine.is_alive)
    assert not ended.done()


async def test_a_stopped_engine_takes_no_more_jobs(tiny_model: Path) -> None:
    engine = Engine(lambda: Decoder.load(tiny_model, num_threads=1), on_death=lambda: None)
    await engine.start()
    engine.stop()
    with pytest.raises(Unavailable):
        engine.call(lambda: None)


async def test_stopping_ends_waiting_jobs(engine: Engine) -> None:
    def endless() -> Job[None]:
        while True:
            yield None

    running = engine.submit(endless())
    engine.stop()
    with pytest.raises(Unavailable):
        await running
