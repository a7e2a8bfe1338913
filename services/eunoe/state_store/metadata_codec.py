"""A stream's record as bytes: JSON with a format number, so that the next version can read what this one wrote."""

import json
from typing import Any

from eunoe.runtime.errors import CorruptState
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

FORMAT = 1


def encode(metadata: StreamMetadata) -> bytes:
    """The record's bytes; equal records have equal bytes."""
    fields: dict[str, Any] = {name: getattr(metadata, name) for name in StreamMetadata.__slots__}
    fields["carry"] = metadata.carry.hex()
    fields["checkpoints"] = [
        {name: getattr(manifest, name) for name in Manifest.__slots__} for manifest in metadata.checkpoints
    ]
    return json.dumps({"format": FORMAT, **fields}, separators=(",", ":")).encode()


def decode(data: bytes) -> StreamMetadata:
    """The record that `encode` was called on.

    Raises:
        CorruptState: If the bytes are no record, or one of a later format.
    """
    try:
        fields = json.loads(data)
        found_format = fields.pop("format")
        if found_format != FORMAT:
            raise CorruptState(f"a stream's record has format {found_format}; this version reads {FORMAT}")
        fields["settings"] = Settings(*fields["settings"])
        fields["carry"] = bytes.fromhex(fields["carry"])
        fields["sources"] = tuple(Source(*source) for source in fields["sources"])
        fields["lease"] = None if fields["lease"] is None else Lease(*fields["lease"])
        fields["checkpoints"] = tuple(_manifest(manifest) for manifest in fields["checkpoints"])
        fields["holds"] = tuple(Hold(*hold) for hold in fields["holds"])
        fields["references"] = tuple(Reference(*reference) for reference in fields["references"])
        return StreamMetadata(**fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptState(f"a stream's record cannot be read: {error}") from error


def _manifest(fields: dict[str, Any]) -> Manifest:
    fields["decisions"] = tuple(DecisionRun(*run) for run in fields["decisions"])
    fields["chunks"] = tuple(ChunkRef(*chunk) for chunk in fields["chunks"])
    return Manifest(**fields)
