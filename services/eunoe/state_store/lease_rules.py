"""Who owns a stream. Pure: (record, event, facts) -> record.

The lease is a fencing token: safety rests on the equality of (worker, epoch) at a commit, never on a clock. That the
owner seems dead only decides whether it is polite to take the stream.
"""

from dataclasses import replace

from eunoe.runtime.errors import InvalidRequest, LeaseLost, NotOwner
from eunoe.state_store.metadata import Lease, StreamMetadata


def acquire(
    metadata: StreamMetadata, by: Lease, *, suspect: tuple[str, int] | None, owner_is_alive: bool
) -> StreamMetadata:
    """The record with the lease of `by`, whose epoch is ignored.

    Args:
        metadata: The stream.
        by: Who wants it.
        suspect: Fence that the caller knows to be dead by its own probe.
        owner_is_alive: The present owner has renewed its key.

    Raises:
        NotOwner: If a living worker owns the stream and `suspect` is not its fence.
    """
    if not by.worker or not by.address:
        raise InvalidRequest("a lease needs a worker and its address")
    lease = metadata.lease
    if lease is not None and lease.worker == by.worker:
        return replace(metadata, lease=lease._replace(address=by.address))
    if lease is not None and owner_is_alive and suspect != lease.fence:
        raise NotOwner(f"{lease.worker} owns the stream", worker=lease.worker, epoch=lease.epoch, address=lease.address)
    epoch = metadata.epoch + 1
    return replace(metadata, epoch=epoch, lease=Lease(by.worker, epoch, by.address))


def release(metadata: StreamMetadata, fence: tuple[str, int]) -> StreamMetadata:
    """The record without an owner; a repeated release changes nothing.

    Raises:
        LeaseLost: If the lease is not the newest.
    """
    if metadata.lease is None and fence[1] == metadata.epoch > 0:
        return metadata
    check_fence(metadata, fence)
    return replace(metadata, lease=None)


def check_fence(metadata: StreamMetadata, fence: tuple[str, int]) -> None:
    """Refuse every lease but the stream's own.

    Raises:
        LeaseLost.
    """
    if metadata.lease is None or metadata.lease.fence != fence:
        raise LeaseLost(f"{fence[0]} under epoch {fence[1]} does not own the stream")
