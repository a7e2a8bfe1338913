"""The client for asyncio."""

import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Self

import grpc
from google.protobuf import timestamp_pb2

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.client.append import Append, AppendProgress
from eunoe.client.connection import UNARY_TIMEOUT_SECONDS, Connection, error_of
from eunoe.client.generation import AsyncGeneration
from eunoe.client.source import Source, SourceLike
from eunoe.runtime.auth import TlsConfig
from eunoe.runtime.errors import StreamNotFound, Unavailable

# The database writes its files anew meanwhile: some seconds for each GB.
_ERASE_TIMEOUT_SECONDS = 600.0

DEFAULT_ADDRESS = "127.0.0.1:8400"

Turn = api.ChatTurn | tuple[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryInspection:
    """What a stream's committed memory still holds: the stream, and the slots of every KV source layer and head.

    `log` has the tokens of the retained log that the memory was folded from, if asked for; the last of them has the
    position `stream.tokens - 1`.
    """

    stream: api.Stream
    heads: tuple[api.HeadMemory, ...]
    log: api.LogTokens


class AsyncClient:
    """A client of one gateway.

    Streams are named by their id ("book") or in full ("tenants/-/streams/book").

    Args:
        address: host:port; default is the variable EUNOE_ADDRESS, then 127.0.0.1:8400, where `eunoe up` listens.
        api_key: The key's secret; default is the variable EUNOE_API_KEY, then none (loopback needs none).
        tls: Certificates; None speaks plain text.
        retry_seconds: How long to go on trying while the platform is away and nothing goes forward.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        api_key: str | None = None,
        tls: TlsConfig | None = None,
        retry_seconds: float = 60.0,
    ) -> None:
        self._connection = Connection(
            address or os.environ.get("EUNOE_ADDRESS") or DEFAULT_ADDRESS,
            api_key=api_key or os.environ.get("EUNOE_API_KEY") or None,
            tls=tls,
            retry_seconds=retry_seconds,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; running calls are cancelled."""
        await self._connection.close()

    async def create_stream(
        self,
        stream_id: str = "",
        *,
        model: str = "",
        settings: api.StreamSettings | None = None,
        expire_time: datetime | None = None,
        request_id: str = "",
    ) -> api.Stream:
        """Make a stream; the server fills in what is left out.

        Raises:
            AlreadyExists: If another call has made one of that id.
            ModelNotFound: If no worker serves the model.
        """
        request = api.CreateStreamRequest(
            stream_id=stream_id,
            model=model,
            settings=settings,
            expire_time=_timestamp(expire_time),
            request_id=request_id or _new_id(),
        )
        return _stream_of(await self._connection.unary("CreateStream", request))

    async def get_stream(self, stream: str) -> api.Stream:
        """Read a stream: its settings, its offsets, its memory's size and digest."""
        return _stream_of(await self._connection.unary("GetStream", api.GetStreamRequest(name=stream_name(stream))))

    async def list_streams(self, *, page_size: int = 0) -> AsyncIterator[api.Stream]:
        """All streams in the order of their names, fetched page by page."""
        page_token = ""
        while True:
            request = api.ListStreamsRequest(page_size=page_size, page_token=page_token)
            response = await self._connection.unary("ListStreams", request)
            for stream in response.streams:
                yield stream
            page_token = response.next_page_token
            if not page_token:
                return

    async def delete_stream(
        self, stream: str, *, erase: bool = False, request_id: str = ""
    ) -> api.DeletionReceipt | None:
        """Remove a stream with everything that no fork shares.

        Args:
            stream: Which.
            erase: Wait until the database's files hold nothing of it any more, and return a receipt.
            request_id: Of an earlier erasure that failed, to go on with it although the stream is gone.
        """
        request = api.DeleteStreamRequest(name=stream_name(stream), erase=erase, request_id=request_id or _new_id())
        num_attempts = 0

        async def attempt() -> api.DeleteStreamResponse:
            nonlocal num_attempts
            num_attempts += 1
            return await self._connection.stub.DeleteStream(  # type: ignore[no-any-return]
                request,
                metadata=self._connection.metadata,
                timeout=_ERASE_TIMEOUT_SECONDS if erase else UNARY_TIMEOUT_SECONDS,
            )

        try:
            response = await self._connection.retry(attempt)
        except StreamNotFound:
            # A repeated call finds what the first one did; a repeated erasure finds its receipt.
            if num_attempts == 1 or erase:
                raise
            return None
        return response.receipt if erase else None

    async def append(
        self,
        stream: str,
        source: SourceLike,
        *,
        source_id: str = "",
        kind: api.RecordKind = api.RECORD_KIND_TEXT,
        finish: bool = True,
        on_progress: Callable[[AppendProgress], None] | None = None,
    ) -> api.Stream:
        """Append a source; it goes on by itself after broken connections, restarts and beside other writers.

        Args:
            stream: Where to.
            source: Bytes, text, a binary file (from where it stands), or an iterable of pieces, asynchronous or not.
            source_id: Names the source, such as by a file's digest: an append that was broken off goes on where it
                stopped when the same source is appended again, and its records travel several at a time.
            kind: Text, or token ids of 4 bytes each, unsigned, little-endian.
            finish: Wait until the memory has taken in every full segment; else only until all is durable.
            on_progress: Called about once a record and once a second, on the client's thread.

        Raises:
            InvalidUtf8: If the text is not UTF-8; what lies before the bad record is durable.
            CarryAtFinish: If the source ends within a character.
            StateLost: If the server lost acknowledged bytes and they cannot be read again.
            ValueError: If the stream has accepted more of `source_id` than the source has.
        """
        name = stream_name(stream)
        appended = await Append(
            self._connection,
            name,
            Source(source),
            source_id=source_id,
            kind=kind,
            finishes=finish,
            on_progress=on_progress,
        ).run()
        return appended if appended is not None else await self.get_stream(name)

    async def flush(self, stream: str) -> api.Stream:
        """Take in every full segment and commit a checkpoint; returns the stream after it."""

        async def attempt() -> api.Stream:
            requests = (
                api.AppendRequest(open=api.AppendOpen(stream=stream_name(stream))),
                api.AppendRequest(flush=api.AppendFlush()),
            )
            call = self._connection.stub.Append(metadata=self._connection.metadata)
            try:
                for request in requests:
                    await call.write(request)
                while (response := await call.read()) is not grpc.aio.EOF:
                    if response.HasField("flushed"):
                        return _stream_of(response.flushed)
                raise Unavailable("the server ended the call before the checkpoint")
            finally:
                call.cancel()

        return await self._connection.retry(attempt)

    async def finish(self, stream: str) -> api.Stream:
        """End a document that was appended with `finish=False`: wait until less than a segment is unapplied."""
        return await self.append(stream, b"")

    def generate(
        self,
        stream: str,
        prompt: str | Sequence[Turn] = "",
        *,
        max_tokens: int = 0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 0.0,
        seed: int = 0,
        stop: Iterable[str] = (),
        freshness: api.Freshness = api.FRESHNESS_ACCEPTED,
        remember: bool = False,
        request_id: str = "",
        on_catching_up: Callable[[api.CatchingUp], None] | None = None,
        timeout_seconds: float | None = None,
    ) -> AsyncGeneration:
        """Continue a stream, token by token.

        Args:
            stream: Whose memory to answer from.
            prompt: Text, continued as it stands, or chat turns such as [("user", "Who built the ark?")], which go
                through the model's own template.
            max_tokens: Most tokens to answer with; 0 means 128.
            temperature: 0 chooses the likeliest token.
            top_k: Only so many of the likeliest tokens; 0 means all.
            top_p: Only the likeliest tokens that together have this probability; 0 means all.
            seed: Seed of the draw.
            stop: The answer ends before the first of these.
            freshness: ACCEPTED waits until everything accepted is taken in; APPLIED reads the committed memory.
            remember: Append prompt and answer to the stream.
            request_id: Makes a repeated remembering call harmless; made up if left out.
            on_catching_up: Called about once a second until the memory is fresh.
            timeout_seconds: Deadline of the whole answer; None sets none.
        """
        request = api.GenerateRequest(
            stream=stream_name(stream),
            max_tokens=max_tokens,
            sampling=api.Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed),
            stop=stop,
            freshness=freshness,
            remember=remember,
            request_id=request_id or (_new_id() if remember else ""),
        )
        if isinstance(prompt, str):
            request.text = prompt
        else:
            turns = [
                api.ChatTurn(role=turn[0], content=turn[1]) if isinstance(turn, tuple) else turn for turn in prompt
            ]
            request.chat.CopyFrom(api.ChatPrompt(turns=turns))
        return AsyncGeneration(self._connection, request, on_catching_up, timeout_seconds)

    async def ask(
        self,
        stream: str,
        question: str,
        *,
        max_tokens: int = 0,
        temperature: float = 0.0,
        seed: int = 0,
        remember: bool = False,
    ) -> api.GenerateSummary:
        """Ask one question through the model's chat template; the answer is the summary's `text`."""
        turns = [("user", question)]
        return await self.generate(
            stream, turns, max_tokens=max_tokens, temperature=temperature, seed=seed, remember=remember
        ).finish()

    async def score(
        self, stream: str, text: str, *, freshness: api.Freshness = api.FRESHNESS_ACCEPTED
    ) -> api.ScoredTokens:
        """The log-probability of each of the text's tokens, given the stream's memory."""
        request = api.ScoreRequest(stream=stream_name(stream), text=text, freshness=freshness)

        async def attempt() -> api.ScoredTokens:
            scores = api.ScoredTokens()
            async for response in self._connection.stub.Score(request, metadata=self._connection.metadata):
                scores.MergeFrom(response.tokens)
            return scores

        return await self._connection.retry(attempt)

    async def fork_stream(
        self,
        stream: str,
        stream_id: str,
        *,
        at_offset: int | None = None,
        model: str = "",
        expire_time: datetime | None = None,
        request_id: str = "",
    ) -> api.Stream:
        """Make a stream that shares another's past up to a record's end; default is all that was accepted.

        With a model it shares the log alone, and is rebuilt: the model, the same or another, reads the log from its
        start into a memory that is empty at first.

        Raises:
            OffsetUnavailable: If no record ends there, or the log to rebuild from does not start at 0 any more.
            VocabularyMismatch: If it has token ids of another vocabulary than the model's.
        """
        request = api.ForkStreamRequest(
            name=stream_name(stream),
            stream_id=stream_id,
            at_offset=at_offset,
            model=model,
            expire_time=_timestamp(expire_time),
            request_id=request_id or _new_id(),
        )
        return _stream_of(await self._connection.unary("ForkStream", request))

    async def export_stream(self, stream: str, target: Path | IO[bytes]) -> int:
        """Write a stream's memory and the log after it to a file; returns its bytes.

        A path gets its file whole or not at all. Into an open file a broken export is not repeated.
        """
        request = api.ExportStreamRequest(name=stream_name(stream))

        async def write_to(file: IO[bytes]) -> int:
            num_bytes = 0
            async for response in self._connection.stub.ExportStream(request, metadata=self._connection.metadata):
                num_bytes += file.write(response.data)
            return num_bytes

        if not isinstance(target, Path):
            try:
                return await write_to(target)
            except grpc.RpcError as rpc_error:
                raise error_of(rpc_error) from None
        partial = target.with_name(f"{target.name}.{_new_id()}.partial")

        async def attempt() -> int:
            with partial.open("wb") as file:
                return await write_to(file)

        try:
            num_bytes = await self._connection.retry(attempt)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        return num_bytes

    async def import_stream(self, source: SourceLike, stream_id: str = "", *, request_id: str = "") -> api.Stream:
        """Make a stream from an export: same offsets, same digest.

        Raises:
            BadExport: If the export is torn, corrupt or of an unknown version.
            ModelMismatch: If it belongs to other weights.
        """
        reader = Source(source)
        first = api.ImportStreamRequest(stream_id=stream_id, request_id=request_id or _new_id())

        async def requests() -> AsyncIterator[api.ImportStreamRequest]:
            yield first
            while data := await reader.read():
                yield api.ImportStreamRequest(data=data)

        async def attempt() -> api.Stream:
            if reader.position:
                await reader.move(0)
            return _stream_of(await self._connection.stub.ImportStream(requests(), metadata=self._connection.metadata))

        return await self._connection.retry(attempt)

    async def inspect_memory(self, stream: str, *, with_log: bool = False) -> MemoryInspection:
        """Which tokens the committed memory still keeps, per KV source layer and head.

        Args:
            with_log: Also the tokens of the retained log, kept or not.
        """
        request = api.InspectMemoryRequest(name=stream_name(stream), with_log=with_log)

        async def attempt() -> MemoryInspection:
            found, heads, log = api.Stream(), [], api.LogTokens()
            async for response in self._connection.stub.InspectMemory(request, metadata=self._connection.metadata):
                if response.HasField("stream"):
                    found = response.stream
                elif response.HasField("head"):
                    heads.append(response.head)
                else:
                    log.MergeFrom(response.log)
            return MemoryInspection(stream=found, heads=tuple(heads), log=log)

        return await self._connection.retry(attempt)

    async def verify_stream(
        self, stream: str, *, on_progress: Callable[[api.VerifyProgress], None] | None = None
    ) -> api.VerifySummary:
        """Check a stream against its own past, and fold its log anew: is its memory what its log makes of it?

        Args:
            stream: Which.
            on_progress: Called about once a second, on the client's thread.

        Raises:
            Conflict: If the stream goes on faster than it can be verified.
            Overloaded: If all workers are busy with other verifications.
        """
        request = api.VerifyStreamRequest(name=stream_name(stream))

        async def attempt() -> api.VerifySummary:
            async for response in self._connection.stub.VerifyStream(request, metadata=self._connection.metadata):
                if response.HasField("summary"):
                    summary: api.VerifySummary = response.summary
                    return summary
                if on_progress is not None:
                    on_progress(response.progress)
            raise Unavailable("the server ended the verification before its verdict")

        return await self._connection.retry(attempt)

    async def list_models(self) -> list[api.Model]:
        """The served models with their limits and the bytes a stream's memory takes."""
        response = await self._connection.unary("ListModels", api.ListModelsRequest())
        return list(response.models)

    async def get_usage(self) -> api.GetUsageResponse:
        """What the tenant uses of its quotas."""
        usage: api.GetUsageResponse = await self._connection.unary("GetUsage", api.GetUsageRequest())
        return usage


def stream_name(stream: str) -> str:
    """The resource name of a stream given by its id; a full name stays as it is."""
    return stream if "/" in stream else f"tenants/-/streams/{stream}"


def _new_id() -> str:
    return uuid.uuid4().hex


def _timestamp(time: datetime | None) -> timestamp_pb2.Timestamp | None:
    if time is None:
        return None
    stamp = timestamp_pb2.Timestamp()
    stamp.FromDatetime(time)
    return stamp


def _stream_of(response: Any) -> api.Stream:
    stream: api.Stream = response.stream
    return stream
