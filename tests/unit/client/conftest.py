"""A gateway in memory, with faults on demand."""

import hashlib
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

import google_crc32c
import grpc
import pytest
from google.rpc import status_pb2
from grpc_status import rpc_status

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.api.v1 import long_context_pb2_grpc
from eunoe.runtime.errors import (
    AlreadyExists,
    BadChecksum,
    ContentMismatch,
    EunoeError,
    OffsetGap,
    StateLost,
    StreamNotFound,
    Unavailable,
)


@dataclass
class FakeStream:
    log: bytearray = field(default_factory=bytearray)
    sources: dict[str, int] = field(default_factory=dict)


class FakeGateway(long_context_pb2_grpc.LongContextServiceServicer):
    """Keeps logs in memory.

    Attributes:
        faults: Errors that the next calls end with, first one first.
        cut_after: Numbers of records after which the next Append calls break off, their last verdict unsent.
        others: Before the n-th record (from 1, over all calls), this is appended by somebody else.
        answers: Pieces of the next answers.
    """

    def __init__(self) -> None:
        self.streams: dict[str, FakeStream] = {}
        self.faults: list[EunoeError] = []
        self.cut_after: list[int] = []
        self.others: dict[int, bytes] = {}
        self.answers: list[list[str]] = []
        self.requests: list[Any] = []
        self.metadata: dict[str, Any] = {}
        self.num_records = 0
        self.num_appends = 0

    def CreateStream(self, request: api.CreateStreamRequest, context: grpc.ServicerContext) -> Any:
        self._begin(request, context)
        name = f"tenants/default/streams/{request.stream_id}"
        if name in self.streams:
            _abort(context, AlreadyExists("the name is taken"))
        self.streams[name] = FakeStream()
        return api.CreateStreamResponse(stream=self._stream(name))

    def GetStream(self, request: api.GetStreamRequest, context: grpc.ServicerContext) -> Any:
        self._begin(request, context)
        return api.GetStreamResponse(stream=self._stream(self._name(request.name, context)))

    def DeleteStream(self, request: api.DeleteStreamRequest, context: grpc.ServicerContext) -> Any:
        name = self._name(request.name, context)
        del self.streams[name]
        self._begin(request, context)
        receipt = api.DeletionReceipt(name=name) if request.erase else None
        return api.DeleteStreamResponse(receipt=receipt)

    def ListStreams(self, request: api.ListStreamsRequest, context: grpc.ServicerContext) -> Any:
        self._begin(request, context)
        names = sorted(name for name in self.streams if name > request.page_token)
        page = names[: request.page_size]
        return api.ListStreamsResponse(
            streams=[self._stream(name) for name in page],
            next_page_token=page[-1] if len(names) > len(page) else "",
        )

    def Append(self, requests: Iterator[api.AppendRequest], context: grpc.ServicerContext) -> Any:
        self.num_appends += 1
        opening = next(requests).open
        self._begin(opening, context)
        name = self._name(opening.stream, context)
        stream = self.streams[name]
        if opening.HasField("seen") and opening.seen.chain != _chain(stream.log[: opening.seen.offset]):
            _abort(context, StateLost("rolled back", lost_from=len(stream.log)))
        yield api.AppendResponse(
            opened=api.AppendOpened(
                stream=self._stream(name), source_bytes_accepted=stream.sources.get(opening.source_id, 0)
            )
        )
        cut_after = self.cut_after.pop(0) if self.cut_after else None
        for index, request in enumerate(requests):
            if request.HasField("finish"):
                yield api.AppendResponse(finished=api.AppendFinished(stream=self._stream(name)))
                return
            if request.HasField("flush"):
                yield api.AppendResponse(flushed=api.AppendFlushed(stream=self._stream(name)))
                continue
            status = self._take(stream, opening.source_id, request.record)
            if cut_after == index + 1:
                _abort(context, Unavailable("cut off", retry_after_seconds=0.0))
            verdict = api.AppendVerdict(
                offset=request.record.offset,
                status=status,
                accepted_offset=len(stream.log),
                applied_offset=0,
                log_chain=_chain(stream.log),
            )
            yield api.AppendResponse(verdict=verdict)

    def Generate(self, request: api.GenerateRequest, context: grpc.ServicerContext) -> Any:
        self._begin(request, context)
        yield api.GenerateResponse(catching_up=api.CatchingUp(applied_offset=1, accepted_offset=2))
        pieces = self.answers.pop(0)
        for index, text in enumerate(pieces):
            if text == "cut":
                _abort(context, Unavailable("cut off"))
            yield api.GenerateResponse(tokens=api.GeneratedTokens(token_ids=[index], text=text, log_probs=[-1.0]))
        yield api.GenerateResponse(summary=api.GenerateSummary(text="".join(pieces), num_answer_tokens=len(pieces)))

    def ExportStream(self, request: api.ExportStreamRequest, context: grpc.ServicerContext) -> Any:
        for index in range(3):
            if index == 2:
                self._begin(request, context)
            yield api.ExportStreamResponse(data=bytes([index]) * 1000)

    def ImportStream(self, requests: Iterator[api.ImportStreamRequest], context: grpc.ServicerContext) -> Any:
        first = next(requests)
        data = b"".join(request.data for request in requests)
        self._begin(first, context)
        self.streams[f"tenants/default/streams/{first.stream_id}"] = FakeStream(log=bytearray(data))
        return api.ImportStreamResponse(stream=self._stream(f"tenants/default/streams/{first.stream_id}"))

    def _take(self, stream: FakeStream, source_id: str, record: api.AppendRecord) -> status_pb2.Status:
        """What the state store decides about a record, after its contract."""
        self.num_records += 1
        stream.log += self.others.pop(self.num_records, b"")
        if google_crc32c.value(record.data) != record.crc32c:
            return BadChecksum("wrong checksum").to_status()
        accepted = len(stream.log)
        if record.offset > accepted:
            return OffsetGap("gap", expected_offset=accepted).to_status()
        if record.offset < accepted:
            there = bytes(stream.log[record.offset : record.offset + len(record.data)])
            if there == record.data[: len(there)]:
                return AlreadyExists("there already").to_status()
            return ContentMismatch("other bytes", expected_offset=accepted).to_status()
        if record.HasField("source_offset") and stream.sources.get(source_id, 0) != record.source_offset:
            return OffsetGap("source gap", expected_offset=accepted).to_status()
        stream.log += record.data
        stream.sources[source_id] = stream.sources.get(source_id, 0) + len(record.data)
        return status_pb2.Status()

    def _begin(self, request: Any, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        self.metadata = dict(context.invocation_metadata())
        if self.faults:
            _abort(context, self.faults.pop(0))

    def _name(self, name: str, context: grpc.ServicerContext) -> str:
        name = name.replace("tenants/-/", "tenants/default/")
        if name not in self.streams:
            _abort(context, StreamNotFound("no such stream"))
        return name

    def _stream(self, name: str) -> api.Stream:
        log = self.streams[name].log
        return api.Stream(name=name, accepted_offset=len(log), log_chain=_chain(log))


def _chain(log: bytes | bytearray) -> bytes:
    """Like the store's: of the bytes up to a place, and empty before the first."""
    # A copy first: the test changes the log on another thread.
    return hashlib.sha256(bytes(log)).digest() if log else b""


def _abort(context: grpc.ServicerContext, error: EunoeError) -> None:
    context.abort_with_status(rpc_status.to_status(error.to_status()))


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    """A fake gateway with the stream "book"; its `address` is host:port."""
    fake = FakeGateway()
    fake.streams["tenants/default/streams/book"] = FakeStream()
    with futures.ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool)
        long_context_pb2_grpc.add_LongContextServiceServicer_to_server(fake, server)
        fake.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"  # type: ignore[attr-defined]
        server.start()
        yield fake
        server.stop(grace=None).wait()
