"""A client that appends to a stream without a stop, and knows what the stream's log must be."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

from disturbed_stream import WORDS
from worker_processes import Site

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.client import AppendProgress, AsyncClient
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.runtime.errors import EunoeError

_MEAN_PAUSE_SECONDS = 0.06


class EndlessWriter:
    """Appends words to a stream of its own, whose log is kept whole, a record about every 60 ms.

    Args:
        site: Has the stream's model.
        client: Of its gateway.
        stream_id: Of the stream.
        segment_length, kv_budget_tokens: Of its memory.
        seed: Of the words.

    Attributes:
        name: Full resource name.
        is_last: Set, it comes to an end.
        num_appends: Records.
        failures: What appends failed of, and each time that their call broke.
    """

    def __init__(
        self,
        site: Site,
        client: AsyncClient,
        stream_id: str,
        *,
        segment_length: int,
        kv_budget_tokens: int,
        seed: str,
    ) -> None:
        self.stream_id = stream_id
        self.name = f"tenants/default/streams/{stream_id}"
        self.is_last = False
        self.num_appends = 0
        self.failures: list[str] = []
        self._site = site
        self._client = client
        self._settings = api.StreamSettings(
            kv_budget_tokens=kv_budget_tokens,
            segment_length=segment_length,
            num_sink_tokens=4,
            positions=api.POSITION_MODE_COMPACT,
            retain_log=True,
        )
        self._chance = random.Random(seed)
        self._written = bytearray()
        self._num_reconnects = 0

    @property
    def num_bytes(self) -> int:
        """Appended so far."""
        return len(self._written)

    async def run(self) -> None:
        """Make the stream and append until `is_last` is set; then until all full segments are in a checkpoint."""
        request = pb.CreateStreamRequest(name=self.name, model=self._site.model_name, settings=self._settings)
        await self._site.store.create_stream(request)
        try:
            await self._client.append(self.stream_id, self._pieces(), on_progress=self._note)
            await self._client.flush(self.stream_id)
        except EunoeError as error:
            self.failures.append(f"{self.stream_id}: {error!r}")
        self.failures += [f"{self.stream_id}: a call broke"] * self._num_reconnects

    async def record(self) -> pb.StreamRecord:
        """The stream as the state store has it."""
        return (await self._site.store.get_stream(pb.GetStreamRequest(name=self.name))).record

    async def num_lost_bytes(self) -> int:
        """How many bytes the log has not as they were appended, or has beside them."""
        pieces = [piece.data async for piece in self._site.store.read_log(pb.ReadLogRequest(name=self.name))]
        log, written = b"".join(pieces), bytes(self._written)
        num_different = sum(found != expected for found, expected in zip(log, written, strict=False))
        return num_different + abs(len(log) - len(written))

    async def _pieces(self) -> AsyncIterator[bytes]:
        while not self.is_last:
            piece = (" ".join(self._chance.choices(WORDS, k=self._chance.randint(1, 12))) + " ").encode()
            self._written += piece
            self.num_appends += 1
            yield piece
            await asyncio.sleep(self._chance.uniform(0.0, 2 * _MEAN_PAUSE_SECONDS))

    def _note(self, progress: AppendProgress) -> None:
        self._num_reconnects = progress.num_reconnects


@contextlib.asynccontextmanager
async def writing(writers: list[EndlessWriter]) -> AsyncIterator[None]:
    """All of them append inside of the block, and come to their ends after it."""
    async with asyncio.TaskGroup() as tasks:
        for writer in writers:
            tasks.create_task(writer.run())
        try:
            yield
        finally:
            for writer in writers:
                writer.is_last = True
