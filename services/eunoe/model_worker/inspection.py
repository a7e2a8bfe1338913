"""InspectMemory: which tokens a stream's committed memory still keeps, and the log that they are of.

All of it is of one checkpoint, although the stream may commit others meanwhile.

Shape suffixes: L KV source layer, H KV head, G query head of its group, S slot.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from functools import partial

import torch

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.decoder.log_tokenizer import MAX_PRE_TOKEN_BYTES, LogTokenizer, RecordKind
from eunoe.decoder.memory_state import MemoryState
from eunoe.decoder.tokenizer import Tokenizer
from eunoe.eviction import EvictionPolicy, ScoringPolicy
from eunoe.eviction.fallback import policy_in_charge
from eunoe.eviction.policy import score
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.model_worker.copies import BorrowedCopy, Outbox
from eunoe.model_worker.engine import Job
from eunoe.model_worker.fold import FEED_BYTES, RECORD_KINDS
from eunoe.model_worker.stream import OwnedStream, WorkerParts
from eunoe.runtime.errors import OffsetUnavailable


async def inspect_memory(
    parts: WorkerParts, stream: OwnedStream, *, with_log: bool = False
) -> AsyncIterator[api.InspectMemoryResponse]:
    """The stream first, then each head's slots, of the newest committed checkpoint; then the log below it.

    Raises:
        Overloaded: If a copy of the memory does not fit beside the streams in use.
        NotOwner: If the stream is not this worker's any more.
    """
    borrowed = BorrowedCopy(parts, stream)
    with stream.in_use(), closing(borrowed):
        async for _ in borrowed.take(api.FRESHNESS_APPLIED):
            pass
        copy = borrowed.taken()
        assert copy.record is not None, "a committed copy has its record"
        record = copy.record
        yield api.InspectMemoryResponse(stream=record.stream)
        # The one in charge may have come since the stream was loaded, while its sidecar was away.
        await asyncio.to_thread(parts.policies.refresh)
        outbox = Outbox[api.HeadMemory]()
        running = borrowed.run(_read_heads(parts, copy.state, _policy_of(parts, record), outbox.put))
        async for head in outbox.until_done(running):
            yield api.InspectMemoryResponse(head=head)
        running.result()
    if with_log and record.HasField("manifest"):
        async for tokens in _read_log(parts, record):
            yield api.InspectMemoryResponse(log=tokens)


def _policy_of(parts: WorkerParts, record: pb.StreamRecord) -> EvictionPolicy | None:
    """The policy in charge of a checkpoint, whose statistics it has, also where a fallback decided for it."""
    decisions = record.manifest.decisions
    return parts.policies.by_name.get(policy_in_charge(decisions[-1].policy)) if decisions else None


def _read_heads(
    parts: WorkerParts, state: MemoryState, policy: EvictionPolicy | None, send: Callable[[api.HeadMemory], None]
) -> Job[None]:
    scores_LHS = _scores(state, policy)
    yield None
    gates_LHG = parts.decoder.memory_gates_LHG
    num_layers, num_heads, _ = state.positions.shape
    for layer in range(num_layers):
        for head in range(num_heads):
            token_ids = state.token_ids_LHS[layer, head].tolist()
            send(
                api.HeadMemory(
                    layer=layer,
                    head=head,
                    positions=state.positions_LHS[layer, head].tolist(),
                    token_ids=token_ids,
                    texts=[_text(parts.tokenizer.token_bytes(token_id)) for token_id in token_ids],
                    scores=None if scores_LHS is None else scores_LHS[layer, head].tolist(),
                    memory_gates=None if gates_LHG is None else gates_LHG[layer, head].tolist(),
                )
            )
        yield None


def _scores(state: MemoryState, policy: EvictionPolicy | None) -> torch.Tensor | None:
    """The policy's scores of a copy's slots, float32 [L, H, S]; None where there are none."""
    if not isinstance(policy, ScoringPolicy) or not state.num_slots:
        return None
    # What the fold does too before it has a policy decide.
    state.use_statistics(policy.statistics)
    return score(policy, policy.features(state))


async def _read_log(parts: WorkerParts, record: pb.StreamRecord) -> AsyncIterator[api.LogTokens]:
    """Tokens from the log's start, which is a pre-token's, to the record's checkpoint; a few segments a turn."""
    end = (record.manifest.applied_offset, record.manifest.applied_pretoken_tokens)
    log: LogTokenizer | None = None
    async for piece in _pieces(parts, record):
        if log is None:
            log = LogTokenizer(parts.tokenizer, offset=piece.offset)
        for start in range(0, len(piece.data), FEED_BYTES):
            if log.cursor != end:
                data = piece.data[start : start + FEED_BYTES]
                kind = RECORD_KINDS[piece.kind]
                yield await parts.engine.call(partial(_tokens_below, end, log, parts.tokenizer, data, kind))


async def _pieces(parts: WorkerParts, record: pb.StreamRecord) -> AsyncIterator[pb.ReadLogResponse]:
    """The log below the record's checkpoint, and what closes its last pre-token, from where it starts by now.

    Raises:
        OffsetUnavailable: If it is not the log of this stream any more.
    """
    start = record.stream.log_start_offset
    if record.stream.settings.retain_log:
        async for piece in parts.store.read_log(_log_request(record, start)):
            yield piece
        return
    while start <= record.manifest.applied_offset:
        try:
            # At once, as newer checkpoints cut its start off. It is no longer than what lies between a few of them.
            pieces = [piece async for piece in parts.store.read_log(_log_request(record, start))]
        except OffsetUnavailable:
            now = (await parts.store.get_stream(pb.GetStreamRequest(name=record.stream.name))).record.stream
            if now.create_time != record.stream.create_time or now.log_start_offset <= start:
                raise
            start = now.log_start_offset
        else:
            for piece in pieces:
                yield piece
            return


def _log_request(record: pb.StreamRecord, start: int) -> pb.ReadLogRequest:
    # What closes the last pre-token lies after the applied offset.
    max_bytes = record.manifest.applied_offset - start + 2 * MAX_PRE_TOKEN_BYTES
    return pb.ReadLogRequest(name=record.stream.name, offset=start, max_bytes=max_bytes)


def _tokens_below(
    end: tuple[int, int], log: LogTokenizer, tokenizer: Tokenizer, data: bytes, kind: RecordKind
) -> api.LogTokens:
    """The tokens that the log's next bytes close, up to the cursor `end`."""
    log.feed(data, kind)
    token_ids = log.take(log.num_closed).tolist() if log.next_offset <= end[0] else []
    while log.num_closed and log.cursor != end:
        token_ids += log.take(1).tolist()
    return api.LogTokens(token_ids=token_ids, pieces=map(tokenizer.token_bytes, token_ids))


def _text(token: bytes) -> str:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "\ufffd"
