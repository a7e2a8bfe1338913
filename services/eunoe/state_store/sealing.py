"""What is stored opens only where it was put, and only as it was put: an envelope around every value.

Form 1 has a digest over the value and its identity (its key and what the index says of it): a flipped, torn, moved or
swapped value is noticed, not hidden. Form 2 is AES-256-GCM with the identity as associated data: noticed and hidden.

Each stream made under a master key gets a data key of its own, which its forks share because they share values. The
data key lies wrapped in the stream's record. With the family's last record it is gone, and with it whatever copies of
values lie in backups and old append-only files.
"""

import secrets
import struct
from functools import lru_cache
from typing import Protocol

import xxhash
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from eunoe.runtime.errors import CorruptState, KeyUnavailable

KEY_BYTES = 32
_DIGESTED, _ENCRYPTED = b"\x01", b"\x02"
_DIGEST_BYTES = 16
_NONCE_BYTES = 12
_TAG_BYTES = 16


class Seal(Protocol):
    """Closes and opens the values of one fork family."""

    overhead_bytes: int
    """How much longer a sealed value is."""

    def close(self, identity: str, data: bytes) -> bytes:
        """The value as it is stored under this identity."""

    def open(self, identity: str, sealed: bytes) -> bytes:
        """The value that was closed under this identity.

        Raises:
            CorruptState: If it was not, or is not what it was.
        """


class DigestSeal:
    """Form 1: kind, XXH3-128 over identity and value, value."""

    overhead_bytes = len(_DIGESTED) + _DIGEST_BYTES

    def close(self, identity: str, data: bytes) -> bytes:
        return b"".join((_DIGESTED, _digest(identity, data), data))

    def open(self, identity: str, sealed: bytes) -> bytes:
        _check_form(identity, sealed, _DIGESTED)
        data = sealed[self.overhead_bytes :]
        if sealed[1 : self.overhead_bytes] != _digest(identity, data):
            raise _not_as_written(identity)
        return data


class CipherSeal:
    """Form 2: kind, nonce, AES-256-GCM of the value with the identity as associated data, tag.

    Args:
        key: 256 bits; nonces are random, which is safe for 2^32 values of a family.
    """

    overhead_bytes = len(_ENCRYPTED) + _NONCE_BYTES + _TAG_BYTES

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)

    def close(self, identity: str, data: bytes) -> bytes:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return b"".join((_ENCRYPTED, nonce, self._cipher.encrypt(nonce, data, identity.encode())))

    def open(self, identity: str, sealed: bytes) -> bytes:
        _check_form(identity, sealed, _ENCRYPTED)
        start = len(_ENCRYPTED) + _NONCE_BYTES
        if len(sealed) < self.overhead_bytes:
            raise _not_as_written(identity)
        try:
            return self._cipher.decrypt(sealed[1:start], sealed[start:], identity.encode())
        except InvalidTag:
            raise _not_as_written(identity) from None


class Keyring:
    """Makes the data keys of streams and unwraps them.

    Args:
        master_key: 32 bytes; None makes streams without encryption and cannot open those with it.
    """

    def __init__(self, master_key: bytes | None = None) -> None:
        if master_key is not None and len(master_key) != KEY_BYTES:
            raise ValueError(f"a master key has {KEY_BYTES} bytes, not {len(master_key)}")
        self._master_key = master_key
        self._unwrapped = lru_cache(maxsize=10_000)(self._unwrap)

    def new_key(self, tenant: str) -> str:
        """A new data key of the tenant, wrapped, in hex; "" where nothing is encrypted."""
        if self._master_key is None:
            return ""
        return CipherSeal(self._tenant_key(tenant)).close(_key_identity(tenant), secrets.token_bytes(KEY_BYTES)).hex()

    def seal(self, tenant: str, wrapped_key: str) -> Seal:
        """The seal of the streams that have this wrapped key.

        Raises:
            KeyUnavailable: If they are encrypted and there is no master key, or another one.
        """
        return self._unwrapped(tenant, wrapped_key) if wrapped_key else _DIGEST_SEAL

    def _unwrap(self, tenant: str, wrapped_key: str) -> Seal:
        if self._master_key is None:
            raise KeyUnavailable("the stream is encrypted, and this state store has no encryption key")
        try:
            key = CipherSeal(self._tenant_key(tenant)).open(_key_identity(tenant), bytes.fromhex(wrapped_key))
        except CorruptState:
            raise KeyUnavailable("the stream is encrypted under another key than this state store's") from None
        return CipherSeal(key)

    def _tenant_key(self, tenant: str) -> bytes:
        assert self._master_key is not None
        derived = HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=f"eunoe tenant {tenant}".encode())
        return derived.derive(self._master_key)


_DIGEST_SEAL = DigestSeal()


def _key_identity(tenant: str) -> str:
    return f"data key of {tenant}"


def _digest(identity: str, data: bytes) -> bytes:
    name = identity.encode()
    hasher = xxhash.xxh3_128(struct.pack("<I", len(name)) + name)
    hasher.update(data)
    return hasher.digest()


def _check_form(identity: str, sealed: bytes, form: bytes) -> None:
    if sealed[:1] != form:
        found = sealed[0] if sealed else "none"
        raise CorruptState(f"{identity} is sealed in form {found}, and must be in form {form[0]}")


def _not_as_written(identity: str) -> CorruptState:
    return CorruptState(f"{identity} is not what was written")
