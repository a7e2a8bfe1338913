"""InspectMemory: which tokens a stream's committed memory still keeps."""

from collections.abc import AsyncIterator, Callable
from contextlib import closing

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.decoder.memory_state import MemoryState
from eunoe.decoder.tokenizer import Tokenizer
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.model_worker.copies import BorrowedCopy, Outbox
from eunoe.model_worker.engine import Job
from eunoe.model_worker.stream import OwnedStream, WorkerParts


async def inspect_memory(parts: WorkerParts, stream: OwnedStream) -> AsyncIterator[api.InspectMemoryResponse]:
    """The stream first, then each head's slots, of the newest committed checkpoint."""
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


def _text(token: bytes) -> str:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "\ufffd"
