"""Whether what is stored of a stream is what became of it: both hash chains, over all that is retained.

A chain is checked from the oldest link whose predecessor is known: from the start where the log or the commits still
begin there, else behind the oldest record or commit that is left, which is taken as recorded.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass

from eunoe.runtime.errors import CorruptState, StreamNotFound
from eunoe.state_store.chains import checkpoint_chain, record_chain
from eunoe.state_store.log import Logs
from eunoe.state_store.metadata import StreamMetadata
from eunoe.state_store.streams import Streams

# Between two signs of progress.
_PROGRESS_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a chain is not what was recorded: at a record's start, or at a checkpoint's applied offset.

    Attributes:
        of_log: Of the log, else of the commits.
        recorded: Chain, hex.
        found: Chain, hex; "" where a record cannot be read at all.
    """

    of_log: bool
    offset: int
    recorded: str
    found: str
    message: str


@dataclass(frozen=True, slots=True)
class Checked:
    """How far a check is: bytes of the log that are done, and of how many."""

    done_bytes: int
    log_bytes: int


@dataclass(frozen=True, slots=True)
class History:
    """The end of a check: the stream as it was then, and the first difference."""

    metadata: StreamMetadata
    difference: Difference | None


async def check_history(streams: Streams, logs: Logs, name: str) -> AsyncIterator[Checked | History]:
    """Check the log up to where it ends at the call, then the commits up to then. The last item is the History.

    Raises:
        StreamNotFound.
        OffsetUnavailable: If the log was trimmed while it was read.
    """
    before = await streams.get(name)
    start, num_bytes = before.log_start_offset, before.accepted_offset - before.log_start_offset
    yield Checked(0, num_bytes)
    difference, done, said = None, 0, 0
    chain = "" if start == 0 else None
    try:
        # 0 bytes would mean all that come.
        async for piece in logs.read(name, start, max(num_bytes, 1)):
            # A first record that begins elsewhere than the whole log is cut, and what it follows is trimmed.
            if chain is not None:
                found = record_chain(chain, piece.offset, piece.kind, piece.data)
                if found != piece.chain:
                    difference = _of_log(piece.offset, piece.chain, found)
                    break
            chain = piece.chain
            done = piece.offset + len(piece.data) - start
            if done == num_bytes and chain != before.log_chain:
                difference = _of_log(before.accepted_offset, before.log_chain, chain)
            if done - said >= _PROGRESS_BYTES:
                said = done
                yield Checked(done, num_bytes)
    except CorruptState as error:
        difference = Difference(True, error.lost_from, "", "", error.message)
    after = await streams.get(name)
    if after.uid != before.uid:
        raise StreamNotFound(f"the stream {name} was deleted")
    yield Checked(done, num_bytes)
    yield History(after, difference or broken_commit(after))


def broken_commit(metadata: StreamMetadata) -> Difference | None:
    """The first commit whose chain does not follow from the one before it and from what it says of itself. Pure."""
    version, chain = 0, ""
    for manifest in metadata.checkpoints:
        if manifest.version == version + 1:
            found = checkpoint_chain(chain, manifest)
            if found != manifest.chain:
                message = f"commit {manifest.version} does not have the chain that its contents give"
                return Difference(False, manifest.applied_offset, manifest.chain, found, message)
        version, chain = manifest.version, manifest.chain
    return None


def _of_log(offset: int, recorded: str, found: str) -> Difference:
    return Difference(True, offset, recorded, found, f"the log's chain is another from offset {offset} on")
