"""One stream with a writer whose every step is random, and the same log folded with nobody in its way."""

import asyncio
import random
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.clients.model_worker import ModelWorkerClient
from eunoe.clients.state_store import StateStoreClient
from eunoe.decoder.decoder import Decoder
from eunoe.decoder.tokenizer import Tokenizer, load_tokenizer
from eunoe.eviction import DEFAULT_POLICY
from eunoe.gateway.follower import Follower
from eunoe.gateway.placement import Placement
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.model_worker.fold import StreamFold
from eunoe.model_worker.stream import memory_settings
from eunoe.runtime.errors import CarryOpen, Conflict, DeadlineTooShort, Overloaded, Unavailable

WORDS = ["the", "of", "and", "to", "in", "that", "was", "he", "for", "größe", "his", "with", "雨が", "as", "be", "they"]
CUTS = (1, 2, 3, 17, 60, 120, 400)
# What waiting helps against.
PASSING = (Unavailable, DeadlineTooShort, Overloaded, Conflict)
PATIENCE_SECONDS = 60.0
PROMPT = "so"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Shape:
    """What the streams of a run are like: about `num_bytes` of text, and the settings of their memory."""

    num_bytes: tuple[int, int] = (1200, 3000)
    segment_length: int = 16
    kv_budget_tokens: int = 48


@dataclass(frozen=True, slots=True)
class Memory:
    """A committed memory state, with all that must be equal however it came about."""

    digest: str
    tokens: int
    cursor: tuple[int, int]
    decisions: tuple[bytes, ...]
    content: bytes


@dataclass(slots=True)
class DisturbedStream:
    """A stream and its writer.

    Attributes:
        written: What the log must be: text in one piece, remembered answers as their token ids.
        counts: What the writer did, and how often it had to do it again.
    """

    name: str
    placement: Placement
    store: StateStoreClient
    randomness: random.Random
    text: bytes
    written: list[bytes | list[int]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    _offset: int = 0
    _remembered: tuple[api.GenerateRequest, list[int]] | None = None

    async def create(self, model: str, shape: Shape) -> None:
        """Make the stream; its log is kept whole."""
        settings = api.StreamSettings(
            kv_budget_tokens=shape.kv_budget_tokens,
            segment_length=shape.segment_length,
            num_sink_tokens=4,
            positions=api.POSITION_MODE_COMPACT,
            retain_log=True,
        )
        # The store may be restarted between making it and saying so.
        request = pb.CreateStreamRequest(name=self.name, model=model, settings=settings, request_id=self.name)
        await self.store.create_stream(request)

    async def write(self, disturb: Callable[[], Awaitable[None]]) -> None:
        """Append the text in random pieces, with random calls in between; `disturb` is called between two steps."""
        start = 0
        while start < len(self.text):
            end = min(len(self.text), start + self.randomness.choice(CUTS))
            await self.append(self.text[start:end])
            start = end
            await disturb()
            chance = self.randomness.random()
            if chance < 0.06:
                await self._flush_for_a_while()
            elif chance < 0.10:
                await self.generate(remember=False)
            elif chance < 0.15:
                await self.generate(remember=True)

    async def finish(self) -> pb.StreamRecord:
        """Flush all of its log; returns the stream."""
        await Follower(self.placement, self.name).flush((await self.record()).stream.accepted_offset)
        return await self.record()

    async def record(self) -> pb.StreamRecord:
        """The stream as the state store has it."""
        return (await self._again(lambda: self.store.get_stream(pb.GetStreamRequest(name=self.name)))).record

    def is_what_was_written(self, log: list[pb.ReadLogResponse], tokenizer: Tokenizer) -> bool:
        """Whether the log holds everything that was acknowledged, once and in order, and nothing else."""
        prompt_ids = tokenizer.encode(PROMPT)
        found: list[bytes | list[int]] = []
        for kind, data in _merged(log, merges_ids=False):
            if kind == api.RECORD_KIND_TOKEN_IDS:
                ids = np.frombuffer(data, dtype="<u4").tolist()
                if ids[-1] in tokenizer.end_of_turn_ids:
                    ids.pop()
                if ids[: len(prompt_ids)] != prompt_ids:
                    return False
                found.append(ids[len(prompt_ids) :])
            else:
                found.append(data)
        return found == self.written

    async def append(self, data: bytes) -> None:
        """Append a record."""
        request = pb.AppendRecordRequest(name=self.name, offset=self._offset, data=data, kind=api.RECORD_KIND_TEXT)
        response: pb.AppendRecordResponse = await self._again(lambda: self.store.append_record(request))
        self._offset += len(data)
        assert response.accepted_offset == self._offset, "the log has other bytes than those that were appended"
        if self.written and isinstance(self.written[-1], bytes):
            data = self.written.pop() + data
        self.written.append(data)

    async def is_remembered_once(self) -> bool:
        """Whether the last remembering call, made again, gets its first answer and appends nothing."""
        assert self._remembered is not None
        request, tokens = self._remembered
        repeated, summary = await self._again(lambda: self._answer(request))
        record = await self.record()
        is_same = repeated == tokens and summary.remember_result == api.REMEMBER_RESULT_REMEMBERED
        return is_same and record.stream.accepted_offset == self._offset

    async def _flush_for_a_while(self) -> None:
        """A flush that its caller may give up."""
        self.counts["flushes"] += 1
        flush = asyncio.create_task(Follower(self.placement, self.name).flush(self._offset))
        done, _ = await asyncio.wait([flush], timeout=self.randomness.choice([0.0, 0.01, 0.1, 20.0]))
        if not done:
            flush.cancel()
            await asyncio.wait([flush])
        else:
            flush.result()

    async def generate(self, *, remember: bool) -> None:
        """Have something answered; what is remembered counts as written."""
        request = api.GenerateRequest(
            stream=self.name,
            text=PROMPT,
            max_tokens=self.randomness.randint(1, 5),
            remember=remember,
            request_id=uuid.UUID(int=self.randomness.getrandbits(128)).hex if remember else "",
        )
        try:
            tokens, summary = await self._again(lambda: self._answer(request))
        except CarryOpen:
            return
        self.counts["answers"] += 1
        if not remember:
            return
        self._remembered = (request, tokens)
        assert summary.remember_result == api.REMEMBER_RESULT_REMEMBERED, "nobody else writes, and yet it conflicted"
        self.counts["remembered"] += 1
        self.written.append(tokens)
        record = await self.record()
        self._offset = record.stream.accepted_offset

    async def _answer(self, request: api.GenerateRequest) -> tuple[list[int], api.GenerateSummary]:
        """Token ids and summary of one try."""

        def call(worker: ModelWorkerClient, lease: pb.Lease) -> AsyncGenerator[api.GenerateResponse, None]:
            return worker.generate(request, lease, timeout_seconds=20.0)

        tokens: list[int] = []
        summary = api.GenerateSummary()
        async with aclosing(self.placement.stream_from_owner(self.name, call)) as responses:
            async for response in responses:
                tokens.extend(response.tokens.token_ids)
                if response.HasField("summary"):
                    summary = response.summary
        return tokens, summary

    async def _again(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """What a careful client does: the same request again, until it is answered."""
        give_up_at = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return await attempt()
            except PASSING:
                self.counts["repeated"] += 1
                if time.monotonic() > give_up_at:
                    raise
                await asyncio.sleep(0.05)


async def memory_of(store: StateStoreClient, record: pb.StreamRecord) -> Memory:
    """The committed memory as the state store has it."""
    manifest = record.manifest
    request = pb.ReadChunksRequest(name=record.stream.name, chunks=manifest.chunks)
    content = b"".join([chunk.data async for chunk in store.read_chunks(request)])
    return _memory(manifest, content)


async def read_log(store: StateStoreClient, name: str) -> list[pb.ReadLogResponse]:
    """All of the log, a piece a record."""
    return [piece async for piece in store.read_log(pb.ReadLogRequest(name=name))]


def undisturbed(
    decoder: Decoder, tokenizer: Tokenizer, log: list[pb.ReadLogResponse], settings: api.StreamSettings
) -> Memory:
    """The memory of a log that is folded from its start to its end in one go; neighbouring texts are one record."""
    fold = StreamFold(
        decoder,
        tokenizer,
        DEFAULT_POLICY,
        decoder.new_state(memory_settings(settings)),
        pb.Manifest(),
        max_uncommitted_segments=1 << 30,
    )
    offset = 0
    for kind, data in _merged(log):
        fold.offer(pb.ReadLogResponse(offset=offset, data=data, kind=kind))
        offset += len(data)
    for _ in fold.fold():
        pass
    snapshot = fold.snapshot()
    return _memory(snapshot.manifest, b"".join(data for _, data in snapshot.chunks))


@asynccontextmanager
async def placement_at(store: StateStoreClient) -> AsyncIterator[Placement]:
    """How a gateway finds a stream's owner, without Ray."""
    placement = Placement(store)
    try:
        yield placement
    finally:
        await placement.close()


def random_text(randomness: random.Random, num_bytes: int) -> bytes:
    """Words, some of more than one byte a character; whole characters only."""
    words: list[str] = []
    while len(" ".join(words).encode()) < num_bytes:
        words.extend(randomness.choices(WORDS, k=50))
    return " ".join(words).encode()[:num_bytes].decode(errors="ignore").encode()


def load_model(model_path: Path) -> tuple[Decoder, Tokenizer]:
    """The model as the workers of a site have it."""
    return Decoder.load(model_path, num_threads=1), load_tokenizer(model_path)


def _merged(log: list[pb.ReadLogResponse], *, merges_ids: bool = True) -> list[tuple[int, bytes]]:
    """(kind, bytes), neighbouring records of text as one."""
    merged: list[tuple[int, bytes]] = []
    for piece in log:
        is_mergeable = merges_ids or piece.kind == api.RECORD_KIND_TEXT
        if merged and merged[-1][0] == piece.kind and is_mergeable:
            merged[-1] = (piece.kind, merged[-1][1] + piece.data)
        else:
            merged.append((piece.kind, piece.data))
    return merged


def _memory(manifest: pb.Manifest, content: bytes) -> Memory:
    return Memory(
        digest=manifest.state_digest,
        tokens=manifest.tokens,
        cursor=(manifest.applied_offset, manifest.applied_pretoken_tokens),
        decisions=tuple(run.SerializeToString(deterministic=True) for run in manifest.decisions),
        content=content,
    )
