"""Lives of answers that are to be remembered, beside writers of the same stream, over a simulated database.

Whoever answers has read the log to some offset, takes his time, and then remembers. Others append meanwhile, and
replies get lost. An answer that is told to be remembered stands once in the log, where its reading ended; any other
nowhere.
"""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import numpy as np
from simulated_storage import FaultRates, SimulatedDatabase, SimulatedStorage
from virtual_time import run_in_virtual_time

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.model_worker.remembering import Remembering
from eunoe.runtime.errors import ContentMismatch, Unavailable
from eunoe.state_store.config import StateStoreConfig
from eunoe.state_store.metadata import Settings
from eunoe.state_store.servicer import StateStoreServicer
from eunoe.state_store.store import StateStore
from eunoe.state_store.stream_rules import Create
from eunoe.state_store.transactions import Environment

T = TypeVar("T")

_NAME = "tenants/t/streams/a"
_RATES = FaultRates(lost_request=0.05, lost_reply=0.1, delay_seconds=0.01)
_NUM_ANSWERS, _NUM_WRITERS, _NUM_RECORDS = 4, 2, 4


def remembering_lives(num_lives: int, seed: int) -> list[str]:
    """Live lives until one breaks a promise; returns what was broken. Blocks; no loop may run in this thread."""
    for number in range(num_lives):
        life = _Life(seed + number)
        run_in_virtual_time(life.live, life.seed)
        if life.violations:
            return life.violations
    return []


class _Store:
    """What a worker calls: the state store's servicer, asked again and again while it cannot be reached."""

    def __init__(self, servicer: StateStoreServicer) -> None:
        self._servicer = servicer

    async def append_record(self, request: pb.AppendRecordRequest) -> pb.AppendRecordResponse:
        return await _insist(lambda: self._servicer.AppendRecord(request, None))

    async def get_outcome(self, request: pb.GetOutcomeRequest) -> pb.GetOutcomeResponse:
        return await _insist(lambda: self._servicer.GetOutcome(request, None))

    async def get_stream(self, request: pb.GetStreamRequest) -> pb.GetStreamResponse:
        return await _insist(lambda: self._servicer.GetStream(request, None))


class _Life:
    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.violations: list[str] = []
        self._chance = random.Random(seed)
        self._database = SimulatedDatabase(self._chance)
        self._state_store = StateStore(Environment(storage=SimulatedStorage(self._database), config=StateStoreConfig()))
        self._store: Any = _Store(StateStoreServicer(self._state_store))
        # Answers by their token ids: where their reading ended, and what was said of them.
        self._told: dict[bytes, tuple[int, int]] = {}

    async def live(self) -> None:
        await self._state_store.streams.create(
            Create(name=_NAME, model="m", settings=Settings(64, 16, 4, 2, False), request_id="create")
        )
        self._database.rates = _RATES
        await asyncio.gather(
            *(self._write() for _ in range(_NUM_WRITERS)), *(self._answer(number) for number in range(_NUM_ANSWERS))
        )
        self._database.calm()
        log = [piece async for piece in self._state_store.logs.read(_NAME, 0, 0)]
        for data, (offset, result) in self._told.items():
            found = [piece.offset for piece in log if piece.data == data]
            wanted = [offset] if result == api.REMEMBER_RESULT_REMEMBERED else []
            if found != wanted:
                said = api.RememberResult.Name(result)
                self.violations.append(f"seed {self.seed}: {said} behind {offset}, and the log has it at {found}")

    async def _write(self) -> None:
        for _ in range(_NUM_RECORDS):
            await asyncio.sleep(self._chance.uniform(0, 0.2))
            data = self._chance.randbytes(8).hex().encode()
            request = pb.AppendRecordRequest(name=_NAME, offset=await self._accepted_offset(), data=data)
            # Somebody else was first: then this writer has nothing to say any more.
            with contextlib.suppress(ContentMismatch):
                await self._store.append_record(request)

    async def _answer(self, number: int) -> None:
        await asyncio.sleep(self._chance.uniform(0, 0.5))
        offset, token_ids = await self._accepted_offset(), [number, *(self._chance.randrange(200) for _ in range(5))]
        data = np.asarray(token_ids, dtype="<u4").tobytes()
        # Decoding takes time, in which the log may go on.
        await asyncio.sleep(self._chance.choice((0.0, 0.0, 0.1, 0.3)))
        for _ in range(self._chance.randint(1, 2)):
            # The second time it is the client's library, which has not heard of the first.
            remembering = Remembering(self._store, _NAME, f"answer-{number}")
            told = await remembering.told_before()
            if told is not None:
                summary = told[-1].summary
            else:
                tokens = api.GeneratedTokens(token_ids=token_ids)
                summary = await remembering.remember(token_ids, tokens, api.GenerateSummary(offset=offset))
            self._told[data] = (summary.offset, summary.remember_result)

    async def _accepted_offset(self) -> int:
        answer = await self._store.get_stream(pb.GetStreamRequest(name=_NAME))
        return int(answer.record.stream.accepted_offset)


async def _insist(call: Callable[[], Awaitable[T]]) -> T:
    while True:
        try:
            return await call()
        except Unavailable:
            await asyncio.sleep(0.01)
