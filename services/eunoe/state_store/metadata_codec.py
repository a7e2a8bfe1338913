"""A stream's record as bytes: its digest, then JSON with a format number.

A field that this version does not know is kept as it is and written back, so that a store of the next version can run
beside this one.
"""

import json
from collections.abc import Sequence
from typing import Any

import xxhash

from eunoe.runtime.errors import CorruptState, UnknownFormat
from eunoe.state_store.metadata import (
    ChunkRef,
    DecisionRun,
    Hold,
    Lease,
    Manifest,
    Reference,
    Settings,
    Source,
    StreamMetadata,
)

# Format 1, which no release wrote, had neither digest nor chains.
FORMAT = 2
_DIGEST_BYTES = 32


def encode(metadata: StreamMetadata) -> bytes:
    """The record's bytes; equal records have equal bytes."""
    fields = _fields(metadata, StreamMetadata.__slots__)
    fields["carry"] = metadata.carry.hex()
    fields["checkpoints"] = [_fields(manifest, Manifest.__slots__) for manifest in metadata.checkpoints]
    content = json.dumps({"format": FORMAT, **fields}, separators=(",", ":")).encode()
    return xxhash.xxh3_128_hexdigest(content).encode() + content


def decode(data: bytes) -> StreamMetadata:
    """The record that `encode` was called on.

    Raises:
        CorruptState: If the bytes are no record, or are not those that were written.
        UnknownFormat: If they are of another format.
    """
    try:
        fields = json.loads(_verified(data))
        found_format = fields.pop("format")
        if found_format != FORMAT:
            raise UnknownFormat(
                f"a stream's record has format {found_format}; this version reads {FORMAT}",
                found=str(found_format),
                known=str(FORMAT),
            )
        fields["settings"] = Settings(*fields["settings"])
        fields["carry"] = bytes.fromhex(fields["carry"])
        fields["sources"] = tuple(Source(*source) for source in fields["sources"])
        fields["lease"] = None if fields["lease"] is None else Lease(*fields["lease"])
        fields["checkpoints"] = tuple(_manifest(manifest) for manifest in fields["checkpoints"])
        fields["holds"] = tuple(Hold(*hold) for hold in fields["holds"])
        fields["references"] = tuple(Reference(*reference) for reference in fields["references"])
        return StreamMetadata(**_with_unknown(fields, StreamMetadata.__slots__))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptState(f"a stream's record cannot be read: {error}") from error


def _verified(data: bytes) -> bytes:
    content = data[_DIGEST_BYTES:]
    if xxhash.xxh3_128_hexdigest(content).encode() != data[:_DIGEST_BYTES]:
        raise CorruptState("a stream's record does not have its digest")
    return content


def _manifest(fields: dict[str, Any]) -> Manifest:
    fields["decisions"] = tuple(DecisionRun(*run) for run in fields["decisions"])
    fields["chunks"] = tuple(ChunkRef(*chunk) for chunk in fields["chunks"])
    return Manifest(**_with_unknown(fields, Manifest.__slots__))


def _fields(record: StreamMetadata | Manifest, names: Sequence[str]) -> dict[str, Any]:
    """The record's fields by name, those of a later version among them."""
    known = {name: getattr(record, name) for name in names if name != "unknown"}
    return known | (json.loads(record.unknown) if record.unknown else {})


def _with_unknown(fields: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The fields for a constructor: what it does not know goes into `unknown`."""
    unknown = {name: fields.pop(name) for name in list(fields) if name not in names}
    return fields | {"unknown": json.dumps(unknown, sort_keys=True) if unknown else ""}
