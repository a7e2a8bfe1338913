"""Hash chains over a stream's records and over its commits: what makes a rolled-back database visible.

A stale replica that takes over forgets acknowledged changes without a word. But whoever saw a change remembers the
chain after it, and two histories that differ anywhere have different chains from there on. The chains find accidents;
they are no signatures: who can write to the database can make new ones.
"""

import hashlib
import json
import struct
from typing import NamedTuple

import xxhash

from eunoe.state_store.metadata import Manifest

_CHAIN_BYTES = 16


class LogMark(NamedTuple):
    """The end of a record and the chain there, in hex."""

    offset: int
    chain: str


def record_chain(before: str, start: int, kind: int, data: bytes) -> str:
    """The log's chain after a record that follows `before`, in hex."""
    return _linked(before, struct.pack("<QI", start, kind) + xxhash.xxh3_128_digest(data))


def checkpoint_chain(parent: str, manifest: Manifest) -> str:
    """The chain over commits after `manifest`, in hex: its place, its state, and the decisions that led to it."""
    content = (
        manifest.version,
        manifest.applied_offset,
        manifest.applied_pretoken_tokens,
        manifest.tokens,
        manifest.state_digest,
        manifest.model_digest,
        manifest.decisions,
    )
    return _linked(parent, json.dumps(content, separators=(",", ":")).encode())


def _linked(before: str, content: bytes) -> str:
    # SHA-256 is over a few dozen bytes here: the record itself goes through XXH3, 15 times faster.
    return hashlib.sha256(bytes.fromhex(before) + content).digest()[:_CHAIN_BYTES].hex()
