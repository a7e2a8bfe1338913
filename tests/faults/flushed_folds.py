"""Folds of one log, in one process: cut into records anywhere, flushed at any time, taken up again from a checkpoint.

However that goes, the memory must come out as that of a fold that nobody disturbed, byte for byte.
"""

import random
import tempfile
from pathlib import Path

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.decoder import state_codec
from eunoe.decoder.decoder import Decoder
from eunoe.decoder.memory_state import MemorySettings
from eunoe.decoder.tiny import write_tiny_model
from eunoe.decoder.tokenizer import Tokenizer, load_tokenizer
from eunoe.eviction import DEFAULT_POLICY
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.model_worker.fold import Snapshot, StreamFold

_SETTINGS = MemorySettings(kv_budget_tokens=64, segment_length=16, num_sink_tokens=4)
_NUM_BYTES = 2_000
_FLUSH_RATE, _MOVE_RATE = 0.4, 0.2


def flushed_folds(num_lives: int, seed: int) -> str:
    """Fold logs undisturbed and disturbed until they differ; returns how, or "" if they never do."""
    with tempfile.TemporaryDirectory(prefix="eunoe-folds-") as directory:
        write_tiny_model(Path(directory))
        folds = _Folds(Decoder.load(Path(directory), num_threads=1), load_tokenizer(Path(directory)))
    for number in range(num_lives):
        chance = random.Random(seed + number)
        text = chance.randbytes(_NUM_BYTES // 2).hex().encode()
        undisturbed, disturbed = folds.undisturbed(text), folds.disturbed(text, chance)
        if undisturbed != disturbed:
            return f"seed {seed + number}: flushed it ends as {disturbed}, undisturbed as {undisturbed}"
    return ""


class _Folds:
    def __init__(self, decoder: Decoder, tokenizer: Tokenizer) -> None:
        self._decoder = decoder
        self._tokenizer = tokenizer

    def undisturbed(self, text: bytes) -> str:
        """The digest of the memory of the text."""
        fold = self._fold(None)
        _read(fold, text)
        return fold.snapshot().manifest.state_digest

    def disturbed(self, text: bytes, chance: random.Random) -> str:
        """The same, of a stream whose clients flush and whose workers change."""
        fold, start = self._fold(None), 0
        while start < len(text):
            end = min(len(text), start + chance.randint(1, 200))
            if chance.random() < _FLUSH_RATE:
                fold.at_offset(end, lambda: None)
            _read(fold, text[start:end])
            start = end
            if chance.random() < _MOVE_RATE:
                fold = self._fold(fold.snapshot())
                start = fold.read_offset
        return fold.snapshot().manifest.state_digest

    def _fold(self, snapshot: Snapshot | None) -> StreamFold:
        """A fold of a new stream, or one that goes on from a checkpoint."""
        manifest = pb.Manifest() if snapshot is None else snapshot.manifest
        if snapshot is None:
            state = self._decoder.new_state(_SETTINGS)
        else:
            chunks = [data for _, data in snapshot.chunks]
            state = state_codec.decode(chunks, self._decoder.config, _SETTINGS, self._decoder.dtypes)
        return StreamFold(self._decoder, self._tokenizer, DEFAULT_POLICY, state, manifest, max_uncommitted_segments=999)


def _read(fold: StreamFold, data: bytes) -> None:
    fold.offer(pb.ReadLogResponse(offset=fold.read_offset, data=data, kind=api.RECORD_KIND_TEXT))
    for _ in fold.fold():
        pass
