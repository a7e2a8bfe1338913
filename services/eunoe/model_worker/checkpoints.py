"""Memory states on their way to the state store and back."""

import logging

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.clients.state_store import StateStoreClient
from eunoe.decoder import state_codec
from eunoe.decoder.decoder import Decoder
from eunoe.decoder.memory_state import MemorySettings, MemoryState
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.model_worker.engine import Engine
from eunoe.model_worker.fold import Snapshot
from eunoe.runtime.errors import CorruptState, MissingChunk, ModelMismatch
from eunoe.runtime.failpoints import failpoint

logger = logging.getLogger(__name__)

# A commit finds its chunks gone only if staging took longer than they are kept, or the store lost them.
_MAX_STAGINGS = 3


class Checkpoints:
    """Loads and commits the checkpoints of one model's streams.

    Args:
        store: The state store.
        engine: Where states are decoded.
        decoder: The model.
    """

    def __init__(self, store: StateStoreClient, engine: Engine, decoder: Decoder) -> None:
        self._store = store
        self._engine = engine
        self._decoder = decoder

    async def load(self, name: str, manifest: pb.Manifest, settings: MemorySettings) -> MemoryState:
        """The memory state that `manifest` names.

        Raises:
            ModelMismatch: If it belongs to other weights.
            UnknownVersion: If another version of the encoding wrote it.
            CorruptState: If its chunks are not what was committed.
        """
        expected = self._decoder.model_digest
        if manifest.model_digest != expected:
            raise ModelMismatch(f"{name} belongs to other weights", expected=expected, found=manifest.model_digest)
        failpoint("worker.before-load")
        chunks: list[bytes] = []
        request = pb.ReadChunksRequest(name=name, chunks=manifest.chunks)
        async for chunk in self._store.read_chunks(request):
            chunks.append(chunk.data)

        failpoint("worker.chunks-read")

        def decoded() -> MemoryState:
            state = state_codec.decode(chunks, self._decoder.config, settings, self._decoder.dtypes)
            digest = state_codec.state_digest(state, manifest.applied_offset, manifest.applied_pretoken_tokens)
            if digest != manifest.state_digest:
                raise CorruptState(f"the checkpoint of {name} has digest {digest}, not {manifest.state_digest}")
            return state

        return await self._engine.call(decoded)

    async def commit(self, name: str, lease: pb.Lease, snapshot: Snapshot, before: api.Stream) -> pb.StreamRecord:
        """Stage the chunks and commit the manifest as the next of `before`, the stream; returns the stream after it.

        Raises:
            LeaseLost, VersionConflict: If another worker took the stream.
            StateLost: If the store was rolled back behind what the state was folded from.
            Unavailable: If the state store cannot be reached.
        """
        snapshot.manifest.version = before.checkpoint_version + 1
        request = pb.CommitCheckpointRequest(
            name=name,
            lease=lease,
            manifest=snapshot.manifest,
            read=snapshot.read,
            parent_chain=before.checkpoint_chain,
        )
        for num_stagings in range(1, _MAX_STAGINGS + 1):
            failpoint("worker.before-stage")
            await self._store.stage_chunks(name, snapshot.chunks)
            failpoint("worker.chunks-staged")
            try:
                return (await self._store.commit_checkpoint(request)).record
            except MissingChunk:
                if num_stagings == _MAX_STAGINGS:
                    raise
                logger.warning("a checkpoint's chunks are gone; staging them again", extra={"stream": name})
        raise AssertionError("unreachable")
