"""InspectMemory: which tokens a stream's committed memory still keeps, and the log that they are of."""

from collections.abc import AsyncIterator, Callable
from contextlib import closing
from functools import partial

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.decoder.log_tokenizer import MAX_PRE_TOKEN_BYTES, LogTokenizer, RecordKind
from eunoe.decoder.memory_state import MemoryState
from eunoe.decoder.tokenizer import Tokenizer
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.model_worker.copies import BorrowedCopy, Outbox
from eunoe.model_worker.engine import Job
from eunoe.model_worker.fold import FEED_BYTES, RECORD_KINDS
from eunoe.model_worker.stream import OwnedStream, WorkerParts


async def inspect_memory(
    parts: WorkerParts, stream: OwnedStream, *, with_log: bool = False
) -> AsyncIterator[api.InspectMemoryResponse]:
    """The stream first, then each head's slots, of the newest committed checkpoint; then the log below it."""
    borrowed = BorrowedCopy(parts, stream)
    with stream.in_use(), closing(borrowed):
        async for _ in borrowed.take(api.FRESHNESS_APPLIED):
            pass
        record = (await parts.store.get_stream(pb.GetStreamRequest(name=stream.name))).record
        yield api.InspectMemoryResponse(stream=record.stream)
        outbox = Outbox[api.HeadMemory]()
        running = borrowed.run(_read_heads(borrowed.taken().state, parts.tokenizer, outbox.put))
        async for head in outbox.until_done(running):
            yield api.InspectMemoryResponse(head=head)
        running.result()
    if with_log and record.HasField("manifest"):
        async for tokens in _read_log(parts, record):
            yield api.InspectMemoryResponse(log=tokens)


def _read_heads(state: MemoryState, tokenizer: Tokenizer, send: Callable[[api.HeadMemory], None]) -> Job[None]:
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
                    texts=[_text(tokenizer.token_bytes(token_id)) for token_id in token_ids],
                )
            )
        yield None


async def _read_log(parts: WorkerParts, record: pb.StreamRecord) -> AsyncIterator[api.LogTokens]:
    """Tokens from the log's start, which is a pre-token's, to the newest checkpoint's end; a few segments a turn."""
    applied_offset = record.manifest.applied_offset
    end = (applied_offset, record.manifest.applied_pretoken_tokens)
    log = LogTokenizer(parts.tokenizer, offset=record.stream.log_start_offset)

    def tokens_of(data: bytes, kind: RecordKind) -> api.LogTokens:
        log.feed(data, kind)
        token_ids = log.take(log.num_closed).tolist() if log.next_offset <= applied_offset else []
        while log.num_closed and log.cursor != end:
            token_ids += log.take(1).tolist()
        return api.LogTokens(token_ids=token_ids, pieces=map(parts.tokenizer.token_bytes, token_ids))

    request = pb.ReadLogRequest(
        name=record.stream.name,
        offset=log.next_offset,
        # What closes the last pre-token lies after it.
        max_bytes=applied_offset - log.next_offset + 2 * MAX_PRE_TOKEN_BYTES,
    )
    async for piece in parts.store.read_log(request):
        for start in range(0, len(piece.data), FEED_BYTES):
            if log.cursor != end:
                data = piece.data[start : start + FEED_BYTES]
                yield await parts.engine.call(partial(tokens_of, data, RECORD_KINDS[piece.kind]))


def _text(token: bytes) -> str:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "\ufffd"
