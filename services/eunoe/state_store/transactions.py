"""Read records, decide with the pure rules, swap; where somebody else was faster, all of it again."""

import asyncio
import random
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from eunoe.runtime.errors import CorruptState, MissingChunk, QuotaExceeded, StreamNotFound, Unavailable
from eunoe.state_store import keys
from eunoe.state_store.config import StateStoreConfig
from eunoe.state_store.effects import (
    AddToTotal,
    Change,
    Effect,
    ForgetPendingKey,
    ForgetStaged,
    KeepChunk,
    ListName,
    RecordEntry,
    RemoveChunk,
    RemoveOutcome,
    RemoveRecord,
    Total,
    UnlistName,
    WriteOutcome,
    WriteRecord,
)
from eunoe.state_store.metadata import Reference, StreamMetadata
from eunoe.state_store.metadata_codec import decode, encode
from eunoe.state_store.sealing import Keyring, Seal
from eunoe.state_store.storage import (
    AddTotal,
    BuryRecord,
    Conflict,
    Delete,
    Expectation,
    ExpectRoom,
    ExpectStaged,
    ExpectVersion,
    IndexAdd,
    IndexRemove,
    NoRoom,
    NotStaged,
    Persist,
    PutRecord,
    PutValue,
    Storage,
    Write,
)

Result = TypeVar("Result")

_MAX_ATTEMPTS = 100
_LONGEST_PAUSE_SECONDS = 0.02
# Far longer than a command can be on its way: the database closes a connection that stalls.
MARK_MS = 600_000


def random_id() -> str:
    """128 random bits in hex."""
    return secrets.token_hex(16)


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What decisions cannot make up themselves: storage, limits, keys, clock (ns since 1970) and randomness."""

    storage: Storage
    config: StateStoreConfig
    keyring: Keyring = field(default_factory=Keyring)
    clock_ns: Callable[[], int] = time.time_ns
    new_id: Callable[[], str] = random_id

    def now_ms(self) -> int:
        """The clock in ms, as indexes have it."""
        return self.clock_ns() // 1_000_000

    def quota(self, total: Total) -> int:
        """Most that a tenant may have of a total."""
        limits = {
            Total.STREAMS: self.config.max_streams,
            Total.LOG_BYTES: self.config.max_log_bytes,
            Total.CHECKPOINT_BYTES: self.config.max_checkpoint_bytes,
        }
        return limits[total]


class _ConflictError(Exception):
    """A record that was read has changed."""


@dataclass
class Transaction:
    """One try: remembers the version of every record it read, and commits only if none has changed."""

    environment: Environment
    tenant: str
    _versions: dict[str, str] = field(default_factory=dict)
    _key_of_uid: dict[str, str] = field(default_factory=dict)

    async def stream(self, name: str) -> StreamMetadata:
        """A living stream.

        Raises:
            StreamNotFound: If there is none of that name or it has expired.
        """
        metadata = await self.stream_or_none(name)
        if metadata is None or metadata.is_expired(self.environment.clock_ns()):
            raise StreamNotFound(f"there is no stream {name}")
        return metadata

    async def stream_or_none(self, name: str) -> StreamMetadata | None:
        """The stream of that name, expired or not."""
        return (await self._read(keys.live_stream(name)))[0]

    async def deleted(self, uid: str) -> StreamMetadata | None:
        """What is left of a deleted stream."""
        return (await self._read(keys.deleted_stream(self.tenant, uid)))[0]

    async def owner(self, reference: Reference) -> StreamMetadata:
        """The stream that a reference names, alive or deleted."""
        places = keys.live_stream(reference.owner_name), keys.deleted_stream(self.tenant, reference.owner_uid)
        for metadata in await self._read(*places):
            if metadata is not None and metadata.uid == reference.owner_uid:
                return metadata
        raise AssertionError(f"{reference.owner_name} is gone although a fork refers to it")

    async def check_unchanged(self) -> None:
        """Start the transaction anew if anything that it read has changed."""
        await self._read()

    async def commit(self, change: Change) -> None:
        """Apply the change if nothing that was read has changed.

        Raises:
            MissingChunk, QuotaExceeded.
        """
        if change == Change():
            return
        expectations, writes = self._operations(change)
        token = self.environment.new_id()
        refusal = await self.environment.storage.compare_and_swap(token, expectations, writes)
        match refusal:
            case None:
                return
            case Conflict():
                raise _ConflictError
            case NotStaged(key):
                raise MissingChunk(f"chunk {key.rpartition(':')[2]} is not staged; stage it again")
            case NoRoom(total):
                raise QuotaExceeded(f"the tenant's quota {total} is used up", quota=total, retry_after_seconds=60.0)

    async def _read(self, *places: str) -> list[StreamMetadata | None]:
        """The streams at these places, as of one moment at which everything read before had not changed either.

        The rules could make no sense of records that never stood beside each other.
        """
        all_places = list(dict.fromkeys((*places, *self._versions)))
        records = dict(zip(all_places, await self.environment.storage.read(all_places), strict=True))
        for key, record in records.items():
            if self._versions.setdefault(key, record.version) != record.version:
                raise _ConflictError
        found = [decode(records[key].data) if records[key].data else None for key in places]
        self._key_of_uid |= {m.uid: key for key, m in zip(places, found, strict=True) if m is not None}
        return found

    def _operations(self, change: Change) -> tuple[list[Expectation], list[Write]]:
        expectations: list[Expectation] = [ExpectVersion(*item) for item in self._versions.items()]
        writes: list[Write] = []
        for record in change.records:
            key = keys.deleted_stream(self.tenant, record.uid) if record.is_deleted else keys.live_stream(record.name)
            former_key = self._key_of_uid.get(record.uid, key)
            if former_key != key:
                writes += (
                    BuryRecord(former_key, MARK_MS),
                    IndexAdd(keys.deleted_uids(self.tenant), 0, record.uid),
                )
            writes.append(PutRecord(key, encode(record)))
        for record in change.dropped:
            writes += (
                Delete(keys.deleted_stream(self.tenant, record.uid)),
                Delete(keys.log_index(self.tenant, record.uid)),
                Delete(keys.outcome_index(self.tenant, record.uid)),
                Delete(keys.staged_index(self.tenant, record.uid)),
                IndexRemove(keys.deleted_uids(self.tenant), record.uid),
            )
        for effect in change.effects:
            self._add_effect(effect, expectations, writes)
        return expectations, writes

    def _add_effect(self, effect: Effect, expectations: list[Expectation], writes: list[Write]) -> None:
        tenant = self.tenant
        match effect:
            case AddToTotal(total, delta):
                if delta > 0:
                    expectations.append(ExpectRoom(keys.totals(tenant), total, delta, self.environment.quota(total)))
                writes.append(AddTotal(keys.totals(tenant), total, delta))
            case ListName(name):
                writes.append(IndexAdd(keys.stream_ids(tenant), 0, keys.parse_name(name)[1]))
            case UnlistName(name):
                writes.append(IndexRemove(keys.stream_ids(tenant), keys.parse_name(name)[1]))
            case WriteRecord(uid, wrapped_key, entry, data):
                sealed = self._seal(wrapped_key).close(record_identity(uid, entry), data)
                writes.append(PutValue(keys.log_record(tenant, uid, entry.start), sealed, 0))
                writes.append(IndexAdd(keys.log_index(tenant, uid), entry.end, entry_as_member(entry)))
            case RemoveRecord(uid, entry):
                writes.append(Delete(keys.log_record(tenant, uid, entry.start)))
                writes.append(IndexRemove(keys.log_index(tenant, uid), entry_as_member(entry)))
            case WriteOutcome(uid, wrapped_key, request_id, outcome):
                ttl_ms = int(self.environment.config.outcome_seconds * 1000)
                sealed = self._seal(wrapped_key).close(outcome_identity(uid, request_id), outcome)
                writes.append(PutValue(keys.outcome(tenant, uid, request_id), sealed, ttl_ms))
                writes.append(IndexAdd(keys.outcome_index(tenant, uid), self.environment.now_ms() + ttl_ms, request_id))
            case RemoveOutcome(uid, request_id):
                writes.append(Delete(keys.outcome(tenant, uid, request_id)))
                writes.append(IndexRemove(keys.outcome_index(tenant, uid), request_id))
            case KeepChunk(uid, chunk, wrapped_key):
                key = keys.chunk(tenant, chunk.chunk_id)
                expectations.append(ExpectStaged(key, chunk.length + self._seal(wrapped_key).overhead_bytes))
                writes.append(Persist(key))
                writes.append(IndexRemove(keys.staged_index(tenant, uid), chunk.chunk_id))
            case RemoveChunk(chunk):
                writes.append(Delete(keys.chunk(tenant, chunk.chunk_id)))
            case ForgetStaged(uid, chunk_id, removes):
                if removes:
                    writes.append(Delete(keys.chunk(tenant, chunk_id)))
                writes.append(IndexRemove(keys.staged_index(tenant, uid), chunk_id))
            case ForgetPendingKey(name):
                writes.append(Delete(keys.pending_key(*keys.parse_name(name))))

    def _seal(self, wrapped_key: str) -> Seal:
        return self.environment.keyring.seal(self.tenant, wrapped_key)


async def transact(environment: Environment, tenant: str, decide: Callable[[Transaction], Awaitable[Result]]) -> Result:
    """Run `decide`, which reads and commits, until no other change comes between.

    Raises:
        Unavailable: If others were faster every time.
    """
    for attempt in range(_MAX_ATTEMPTS):
        try:
            return await decide(Transaction(environment, tenant))
        except _ConflictError:
            await asyncio.sleep(random.uniform(0, min(0.001 * attempt, _LONGEST_PAUSE_SECONDS)))
    raise Unavailable(f"{_MAX_ATTEMPTS} changes of others came first")


def record_identity(uid: str, entry: RecordEntry) -> str:
    """What the value of a record is sealed under: all that the index says of it, so that no part of that can change."""
    return f"record {entry_as_member(entry)}:{entry.end} of {uid}"


def outcome_identity(uid: str, request_id: str) -> str:
    """What the outcome of a request is sealed under."""
    return f"outcome {request_id} of {uid}"


def entry_as_member(entry: RecordEntry) -> str:
    """A record's place in the log's index: all of it but the end, which is the score."""
    return f"{entry.start}:{entry.kind}:{entry.carry_bytes}:{entry.chain}"


def member_as_entry(member: str, end: int) -> RecordEntry:
    try:
        start, kind, carry_bytes, chain = member.split(":")
        return RecordEntry(int(start), end, int(kind), int(carry_bytes), chain)
    except ValueError:
        raise CorruptState(f"the log's index says {member!r} of the record that ends at {end}") from None
