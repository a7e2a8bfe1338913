"""Requests of any content against a real platform: each must get an answer or a typed refusal, and harm nobody else.

hypothesis makes the messages, straight from the API's descriptors, and shrinks one that gets another answer.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c
import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.api.v1 import long_context_pb2_grpc
from eunoe.gateway.export_format import MAGIC, FrameKind, FrameReader, frame
from eunoe.internal.v1 import state_store_pb2 as store_pb
from eunoe.runtime.grpc_channel import open_channel

_SERVICE = api.DESCRIPTOR.services_by_name["LongContextService"]
_ID = "victim"
# A refusal is one of these; anything else says that something broke, or that nobody answered in time.
_REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
}
_REFUSAL_NUMBERS = {code.value[0] for code in _REFUSALS}
_TIMEOUT_SECONDS = 15.0
_MAX_RESPONSES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class HostileFigures:
    """How many calls were made, and what they were answered: RPC, then status."""

    num_calls: int
    answers: dict[str, dict[str, int]]
    seconds: float


@dataclass(frozen=True, slots=True)
class Hostile:
    """A call: the requests of one RPC, and what an intruder did to the bytes of the last one."""

    method: str
    requests: tuple[Message, ...]
    # (place in the bytes, value xored there); value 0 cuts the bytes there instead.
    damage: tuple[int, int] | None

    def on_the_wire(self) -> list[bytes]:
        """Each request's bytes."""
        wire = [request.SerializeToString() for request in self.requests]
        if self.damage and wire and wire[-1]:
            place, value = self.damage[0] % len(wire[-1]), self.damage[1]
            damaged = bytearray(wire[-1])
            if value:
                damaged[place] ^= value
            else:
                del damaged[place:]
            wire[-1] = bytes(damaged)
        return wire


async def hostile_requests(address: str, model: str, *, num_calls: int, seed_number: int) -> HostileFigures:
    """Make so many calls, each against a fresh small stream.

    Args:
        address: Of a gateway that needs no key, with a worker of `model` behind it.
        model: A model's name.
        num_calls: Calls.
        seed_number: Of what is sent.

    Raises:
        AssertionError: For the smallest call found that got something else than an answer or a typed refusal.
    """
    start, loop = time.monotonic(), asyncio.get_running_loop()
    async with open_channel(address) as channel:
        victim = _Victim(channel, model)
        calls = _calls(model, await victim.export())

        @seed(seed_number)
        @settings(
            max_examples=num_calls,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(calls)
        def attack(hostile: Hostile) -> None:
            asyncio.run_coroutine_threadsafe(victim.suffer(hostile), loop).result()

        await asyncio.to_thread(attack)
    return HostileFigures(
        num_calls=victim.num_calls,
        answers={method: dict(counts) for method, counts in victim.answers.items()},
        seconds=time.monotonic() - start,
    )


class _Victim:
    """One stream of id `_ID`, made anew for each call."""

    def __init__(self, channel: grpc.aio.Channel, model: str) -> None:
        self._channel = channel
        self._stub = long_context_pb2_grpc.LongContextServiceStub(channel)
        self._model = model
        self.num_calls = 0
        self.answers: dict[str, Counter[str]] = {method.name: Counter() for method in _SERVICE.methods}

    async def suffer(self, hostile: Hostile) -> None:
        """The call; then what it made is looked at, and deleted."""
        await self._create()
        self.num_calls += 1
        for response in await self._answer(hostile):
            if isinstance(response, api.AppendResponse) and response.HasField("verdict"):
                _check_status(response.verdict.status, hostile)
            elif isinstance(response, api.ImportStreamResponse | api.ForkStreamResponse):
                # What came in must not break whoever reads it: a worker takes it and answers from it.
                ask = api.GenerateRequest(stream=response.stream.name, text="so", max_tokens=1)
                await self._answer(Hostile("Generate", (ask,), None), after=hostile)
        await self._delete_all()

    async def export(self) -> tuple[bytes, ...]:
        """The payloads of an honest export's frames, kind first, with a checkpoint and a log behind it."""
        await self._create()
        call = self._stub.Append()
        await call.write(api.AppendRequest(open=api.AppendOpen(stream=_name(_ID))))
        text = b"It is a truth universally acknowledged. " * 20
        await call.write(api.AppendRequest(record=_record(0, text)))
        await call.write(api.AppendRequest(flush=api.AppendFlush()))
        await call.write(api.AppendRequest(record=_record(len(text), b"And so on.")))
        await call.done_writing()
        async for _ in call:
            pass
        pieces = self._stub.ExportStream(api.ExportStreamRequest(name=_name(_ID)))
        data = b"".join([piece.data async for piece in pieces])
        frames = tuple(bytes([kind]) + payload for kind, payload in FrameReader().feed(data))
        assert {one[0] for one in frames} == set(FrameKind), "an export without a checkpoint or without a log"
        await self._delete_all()
        return frames

    async def _create(self) -> None:
        small = api.StreamSettings(kv_budget_tokens=64, segment_length=16, num_sink_tokens=4)
        await self._stub.CreateStream(api.CreateStreamRequest(stream_id=_ID, model=self._model, settings=small))

    async def _delete_all(self) -> None:
        listed = await self._stub.ListStreams(api.ListStreamsRequest(page_size=1000))
        for stream in listed.streams:
            await self._stub.DeleteStream(api.DeleteStreamRequest(name=stream.name))

    async def _answer(self, hostile: Hostile, after: Hostile | None = None) -> list[Message]:
        method = _SERVICE.methods_by_name[hostile.method]
        kind = "_".join("stream" if s else "unary" for s in (method.client_streaming, method.server_streaming))
        parse = message_factory.GetMessageClass(method.output_type).FromString
        wire = hostile.on_the_wire()

        async def requests() -> AsyncIterator[bytes]:
            for one in wire:
                yield one

        multicallable = getattr(self._channel, kind)(f"/{_SERVICE.full_name}/{method.name}", None, parse)
        call = multicallable(requests() if method.client_streaming else wire[0], timeout=_TIMEOUT_SECONDS)
        responses: list[Message] = []
        try:
            if not method.server_streaming:
                responses.append(await call)
            else:
                async for response in call:
                    responses.append(response)
                    if len(responses) == _MAX_RESPONSES:
                        call.cancel()
                        break
        except grpc.RpcError as error:
            code = error.code()
            self.answers[method.name][code.name] += 1
            blamed = f"{error.details()!r} to {hostile}" + (f" after {after}" if after else "")
            assert code in _REFUSALS or _is_lost_mark(hostile, code), f"{code.name} {blamed}"
            details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
            assert details is not None, f"no details: {code.name} {blamed}"
            _check_details(status_pb2.Status.FromString(details), blamed)
        else:
            self.answers[method.name]["OK"] += 1
        return responses


def _is_lost_mark(hostile: Hostile, code: grpc.StatusCode) -> bool:
    # Who presents a mark that the log does not have is told that the log was lost, as he should be.
    return hostile.method == "Append" and code is grpc.StatusCode.DATA_LOSS


def _check_status(status: status_pb2.Status, hostile: Hostile) -> None:
    if status.code:
        assert status.code in _REFUSAL_NUMBERS, f"{status} to {hostile}"
        _check_details(status, str(hostile))


def _check_details(status: status_pb2.Status, blamed: str) -> None:
    infos = [detail for detail in status.details if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR)]
    assert len(infos) == 1, f"{len(infos)} of ErrorInfo in {blamed}"
    info = error_details_pb2.ErrorInfo()
    infos[0].Unpack(info)
    assert info.domain == "eunoe", f"domain {info.domain!r} in {blamed}"
    assert info.reason, f"no reason in {blamed}"


def _calls(model: str, export: Sequence[bytes]) -> st.SearchStrategy[Hostile]:
    """Any call of any RPC, half of them for RPCs that take a stream of requests."""
    by_method: dict[str, st.SearchStrategy[tuple[Message, ...]]] = {}
    for method in _SERVICE.methods:
        request = _messages(method.input_type, model)
        by_method[method.name] = (
            st.lists(request, max_size=5).map(tuple) if method.client_streaming else request.map(lambda one: (one,))
        )
    opened = st.lists(_appends(model), max_size=5).map(
        lambda rest: (api.AppendRequest(open=api.AppendOpen(stream=_name(_ID), source_id="source")), *rest)
    )
    by_method["Append"] |= opened
    by_method["ImportStream"] |= _imports(model, export)
    often = (*by_method, *("Append", "ImportStream") * 6)
    damage = st.none() | st.none() | st.tuples(st.integers(0, 1 << 16), st.integers(0, 255))
    return st.sampled_from(often).flatmap(lambda name: st.builds(Hostile, st.just(name), by_method[name], damage))


def _appends(model: str) -> st.SearchStrategy[api.AppendRequest]:
    """What may come behind `open`: mostly records whose checksum is right."""
    data = st.binary(min_size=1, max_size=300) | st.text(min_size=1, max_size=100).map(str.encode)
    data |= st.sampled_from([b"", bytes((1 << 20) + 1), bytes(400), b"\xff\xff\xff\xff", "ä".encode()[:1]])
    records = st.builds(
        _record,
        st.sampled_from([0, 0, 0, 1, 2, 400, 1 << 40, (1 << 64) - 1]),
        data,
        kind=st.sampled_from([0, 1, 2, 2, 7]),
        source_offset=st.sampled_from([None, None, 0, 5, (1 << 64) - 1]),
    )
    return _messages(api.AppendRequest.DESCRIPTOR, model) | records.map(lambda one: api.AppendRequest(record=one))


def _imports(model: str, export: Sequence[bytes]) -> st.SearchStrategy[tuple[Message, ...]]:
    """The honest export with fields of its header, chunk or record overwritten, and with every checksum right."""
    kinds = {
        FrameKind.HEADER: store_pb.StreamRecord,
        FrameKind.CHUNK: store_pb.ReadChunksResponse,
        FrameKind.RECORD: store_pb.ReadLogResponse,
    }
    payloads = []
    for one in export:
        kind, payload = FrameKind(one[0]), one[1:]
        if kind is FrameKind.END:
            payloads.append(st.just(frame(kind)))
            continue
        honest = kinds[kind].FromString(payload)
        changed = _messages(honest.DESCRIPTOR, model, depth=4).map(lambda other, honest=honest: _merged(honest, other))
        weighed = (
            (st.just(honest) | changed) if kind is FrameKind.HEADER else (st.just(honest) | st.just(honest) | changed)
        )
        payloads.append(weighed.map(lambda message, kind=kind: frame(kind, message.SerializeToString())))
    whole = st.tuples(*payloads).map(lambda frames: MAGIC + b"".join(frames))
    return whole.map(lambda data: (api.ImportStreamRequest(stream_id="imported", data=data),))


def _merged(honest: Message, other: Message) -> Message:
    """`honest` with every singular field that `other` has set; its repeated fields stay."""
    merged = type(honest)()
    merged.CopyFrom(honest)
    for field, value in other.ListFields():
        if field.is_repeated:
            continue
        if field.message_type is not None:
            getattr(merged, field.name).CopyFrom(_merged(getattr(merged, field.name), value))
        else:
            setattr(merged, field.name, value)
    return merged


def _messages(descriptor: Descriptor, model: str, depth: int = 3) -> st.SearchStrategy[Any]:
    """Messages of a type with any of their fields set to anything, often to something that is nearly right."""
    fields = {}
    for field in descriptor.fields:
        if field.message_type is not None and depth == 0:
            continue
        value = _values(field, model, depth)
        fields[field.name] = st.lists(value, max_size=10) if field.is_repeated else value
    return st.fixed_dictionaries({}, optional=fields).map(
        lambda values: message_factory.GetMessageClass(descriptor)(**values)
    )


def _values(field: FieldDescriptor, model: str, depth: int) -> st.SearchStrategy[Any]:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_MESSAGE:
            return _messages(field.message_type, model, depth - 1)
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
            return st.binary(max_size=64) | st.sampled_from([b"", bytes((1 << 20) + 1), bytes(16)])
        case FieldDescriptor.CPPTYPE_STRING:
            return st.sampled_from(_strings(field.name, model)) | st.text(max_size=200)
        case FieldDescriptor.CPPTYPE_BOOL:
            return st.booleans()
        case FieldDescriptor.CPPTYPE_ENUM:
            return st.sampled_from([0, 1, 2, 3, 99, -1, (1 << 31) - 1])
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            return st.floats(width=32)
        case FieldDescriptor.CPPTYPE_INT32:
            low, high = -(1 << 31), (1 << 31) - 1
        case FieldDescriptor.CPPTYPE_INT64:
            low, high = -(1 << 63), (1 << 63) - 1
        case FieldDescriptor.CPPTYPE_UINT32:
            low, high = 0, (1 << 32) - 1
        case FieldDescriptor.CPPTYPE_UINT64:
            low, high = 0, (1 << 64) - 1
        case other:
            raise AssertionError(f"{field.full_name} is of a C++ type that nobody makes here: {other}")
    return st.sampled_from([low, 0, 1, 2, 16, 64, 800, high]) | st.integers(low, high)


def _strings(field_name: str, model: str) -> list[str]:
    if field_name in ("name", "stream"):
        return [_name(_ID), _name(_ID), _name(_ID), f"tenants/default/streams/{_ID}", f"tenants/other/streams/{_ID}",
                _name("absent"), _name("../../x"), _name("{x}:log"), _name("a" * 129), ""]  # fmt: skip
    return ["", model, model, _ID, "new", "user", "a" * 64, "a" * 65, "ä" * 64, "a" * 128, "\0", "../new", "a\nb"]


def _name(stream_id: str) -> str:
    return f"tenants/-/streams/{stream_id}"


def _record(offset: int, data: bytes, kind: int = 1, source_offset: int | None = None) -> api.AppendRecord:
    checksum = google_crc32c.value(data)
    return api.AppendRecord(offset=offset, data=data, crc32c=checksum, kind=kind, source_offset=source_offset)  # type: ignore[arg-type]
