"""Deletions that answer when nothing of the stream is left on the database's disk, and their receipts.

A receipt is kept before anything is removed, under the request's id: whatever fails, the same request can be made
again until it succeeds, although its stream is already gone.
"""

import json
from dataclasses import asdict, dataclass, replace

from eunoe.runtime.errors import CorruptState, InvalidRequest
from eunoe.state_store import keys
from eunoe.state_store.sealing import DigestSeal
from eunoe.state_store.storage import PutValue
from eunoe.state_store.streams import Streams
from eunoe.state_store.transactions import Environment

# How long an erasure can be repeated, and its receipt be had again.
RECEIPT_SECONDS = 86_400

_SEAL = DigestSeal()


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What became of a stream that was erased.

    Attributes:
        name: The stream's name, free again.
        uid: Of the stream.
        delete_time_ns: When it was deleted, ns since 1970.
        erase_time_ns: When the last of it had left the disk; 0 while that is not done.
        is_shared: A fork, or a stream that it was a fork of, still keeps part of its past.
        num_values_removed: Records, chunks and outcomes that the request removed; a sweep may have been faster.
    """

    name: str
    uid: str
    delete_time_ns: int
    erase_time_ns: int = 0
    is_shared: bool = False
    num_values_removed: int = 0


@dataclass(frozen=True, slots=True)
class _Erasure:
    """A receipt so far, and (name, uid) of the streams that the erased one was a fork of."""

    receipt: Receipt
    owners: tuple[tuple[str, str], ...]


class Erasures:
    """Erases streams of all tenants."""

    def __init__(self, environment: Environment, streams: Streams) -> None:
        self._environment = environment
        self._streams = streams

    async def erase(self, name: str, request_id: str) -> Receipt:
        """Delete a stream and wait until the database's files hold nothing of it that no other stream needs.

        Raises:
            StreamNotFound: If there is none, and `request_id` has not erased it in the last day.
            InvalidRequest: If `request_id` has erased another stream.
            Unavailable: If the database does not write its files anew; repeat it.
        """
        tenant, _ = keys.parse_name(name)
        erasure = await self._kept(tenant, request_id)
        if erasure is None:
            metadata = await self._streams.get(name)
            receipt = Receipt(name=name, uid=metadata.uid, delete_time_ns=self._environment.clock_ns())
            owners = dict.fromkeys((r.owner_name, r.owner_uid) for r in metadata.references)
            erasure = _Erasure(receipt, tuple(owners))
            await self._keep(tenant, request_id, erasure)
        receipt = erasure.receipt
        if receipt.name != name:
            raise InvalidRequest("the request_id was used to erase another stream")
        if receipt.erase_time_ns:
            return receipt
        num_removed = await self._streams.remove(name, receipt.uid)
        places = [(name, receipt.uid), *erasure.owners]
        is_shared = any([await self._streams.is_left(*place) for place in places])
        num_removed += receipt.num_values_removed
        receipt = replace(receipt, num_values_removed=num_removed, is_shared=is_shared)
        await self._keep(tenant, request_id, replace(erasure, receipt=receipt))
        await self._environment.storage.erase_history()
        receipt = replace(receipt, erase_time_ns=self._environment.clock_ns())
        await self._keep(tenant, request_id, replace(erasure, receipt=receipt))
        return receipt

    async def _kept(self, tenant: str, request_id: str) -> _Erasure | None:
        (sealed,) = await self._environment.storage.get([keys.erasure(tenant, request_id)])
        if sealed is None:
            return None
        try:
            fields = json.loads(_SEAL.open(_identity(tenant, request_id), sealed))
            owners = tuple((name, uid) for name, uid in fields["owners"])
            return _Erasure(Receipt(**fields["receipt"]), owners)
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptState(f"the receipt of erasure {request_id} cannot be read: {error}") from error

    async def _keep(self, tenant: str, request_id: str, erasure: _Erasure) -> None:
        sealed = _SEAL.close(_identity(tenant, request_id), json.dumps(asdict(erasure)).encode())
        await self._environment.storage.apply(
            [PutValue(keys.erasure(tenant, request_id), sealed, RECEIPT_SECONDS * 1000)]
        )


def _identity(tenant: str, request_id: str) -> str:
    return f"erasure {request_id} of {tenant}"
