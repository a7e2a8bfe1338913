"""API keys: 256 random bits that only the client keeps; the store has their hash."""

import hashlib
import hmac
import json
import secrets
from dataclasses import asdict, dataclass

from eunoe.runtime.errors import InvalidRequest, KeyNotFound, Unauthenticated
from eunoe.state_store import keys
from eunoe.state_store.sealing import DigestSeal
from eunoe.state_store.storage import BuryRecord, ExpectVersion, IndexAdd, IndexRemove, PutRecord
from eunoe.state_store.transactions import MARK_MS, Environment
from eunoe.state_store.workers import all_members

MAX_LABEL_LENGTH = 64

# A flipped bit in a record must not make a key another tenant's.
_SEAL = DigestSeal()


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiKey:
    """What is stored of a key; `secret_hash` in hex."""

    key_id: str
    tenant: str
    label: str
    create_time_ns: int
    secret_hash: str


class ApiKeys:
    """All API keys.

    Args:
        environment: Storage and clock.
        pepper: Secret that hashes are keyed with, so that a copy of the database alone verifies no guess.
    """

    def __init__(self, environment: Environment, pepper: bytes) -> None:
        self._environment = environment
        self._pepper = pepper

    async def create(self, tenant: str, label: str) -> tuple[ApiKey, str]:
        """Make a key: (key, secret); the secret is eunoe_{key id}_{64 hex digits} and is kept nowhere."""
        keys.check_tenant(tenant)
        if len(label) > MAX_LABEL_LENGTH:
            raise InvalidRequest(f"a label has at most {MAX_LABEL_LENGTH} characters")
        key_id = secrets.token_hex(8)
        secret = f"eunoe_{key_id}_{secrets.token_hex(32)}"
        key = ApiKey(
            key_id=key_id,
            tenant=tenant,
            label=label,
            create_time_ns=self._environment.clock_ns(),
            secret_hash=self._hash(secret),
        )
        data = _SEAL.close(_identity(key_id), json.dumps(asdict(key)).encode())
        await self._environment.storage.compare_and_swap(
            self._environment.new_id(),
            [ExpectVersion(keys.api_key(key_id), "")],
            [PutRecord(keys.api_key(key_id), data), IndexAdd(keys.API_KEYS, 0, _member(key))],
        )
        return key, secret

    async def authenticate(self, secret: str) -> str:
        """The tenant whose secret this is.

        Raises:
            Unauthenticated; CorruptState if what is stored of the key is not what was written.
        """
        prefix, _, rest = secret.partition("_")
        key_id, _, _ = rest.partition("_")
        key = await self._key(key_id) if prefix == "eunoe" and key_id else None
        # The hash is computed and compared for unknown keys too: both answers take the same time.
        found = hmac.compare_digest(self._hash(secret), key.secret_hash if key is not None else "0" * 64)
        if key is None or not found:
            raise Unauthenticated("the API key is not valid")
        return key.tenant

    async def revoke(self, key_id: str) -> None:
        """Make a key invalid from now on.

        Raises:
            KeyNotFound.
        """
        # By the index, not by the record: a key whose record is damaged can be revoked, too.
        members = await all_members(self._environment.storage, keys.API_KEYS)
        found = [member for member in members if member.rpartition(":")[2] == key_id]
        if not found:
            raise KeyNotFound(f"there is no API key {key_id!r}")
        # Whoever else revokes it at the same moment does the same: no version needs to be expected.
        await self._environment.storage.compare_and_swap(
            self._environment.new_id(),
            [],
            [BuryRecord(keys.api_key(key_id), MARK_MS), *(IndexRemove(keys.API_KEYS, member) for member in found)],
        )

    async def of_tenant(self, tenant: str) -> list[ApiKey]:
        """A tenant's keys ("" for all), sorted by tenant and id.

        Raises:
            CorruptState: If one of them is not what was written; it says which.
        """
        members = await all_members(self._environment.storage, keys.API_KEYS)
        wanted = [member.partition(":") for member in members]
        found = [await self._key(key_id) for owner, _, key_id in wanted if not tenant or owner == tenant]
        return [key for key in found if key is not None]

    async def _key(self, key_id: str) -> ApiKey | None:
        data = (await self._environment.storage.read([keys.api_key(key_id)]))[0].data
        return ApiKey(**json.loads(_SEAL.open(_identity(key_id), data))) if data else None

    def _hash(self, secret: str) -> str:
        if self._pepper:
            return hmac.new(self._pepper, secret.encode(), hashlib.sha256).hexdigest()
        return hashlib.sha256(secret.encode()).hexdigest()


def _identity(key_id: str) -> str:
    return f"API key {key_id}"


def _member(key: ApiKey) -> str:
    return f"{key.tenant}:{key.key_id}"
