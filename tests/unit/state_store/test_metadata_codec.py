import json
from dataclasses import replace

import pytest
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
from eunoe.state_store.metadata_codec import decode, encode

FULL = StreamMetadata(
    name="tenants/t/streams/a",
    uid="u1",
    model="m",
    settings=Settings(64, 16, 4, 2, True),
    create_time_ns=5,
    expire_time_ns=6,
    create_request_id="r",
    wrapped_key="0f",
    own_start_offset=7,
    start_version=3,
    accepted_offset=90,
    log_chain="cd" * 16,
    carry=b"\xe2\x82",
    sources=(Source("s", 4),),
    epoch=2,
    lease=Lease("w", 2, "h:1"),
    checkpoints=(
        Manifest(
            1,
            4,
            50,
            2,
            64,
            99,
            "d",
            "md",
            (DecisionRun(0, "p", "n"),),
            (ChunkRef("c", 3, "ab" * 16),),
            "u0",
            60,
            "ef" * 16,
        ),
    ),
    holds=(Hold(4, 50, 80, 2),),
    references=(Reference("tenants/t/streams/p", "u0", 4, 50, 70),),
    is_deleted=True,
)


def test_a_record_reads_back_as_it_was() -> None:
    assert decode(encode(FULL)) == FULL


def test_format_2_still_reads() -> None:
    written = (
        b'b4bca2ff624c48bc2d028a01193fdf19{"format":2,"name":"tenants/t/streams/a","uid":"u1","model":"m","set'
        b'tings":[64,16,4,2,false],"create_time_ns":5,"expire_time_ns":null,"create_request_id":"","own_start_'
        b'offset":0,"start_version":0,"accepted_offset":9,"log_chain":"cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd","carr'
        b'y":"c3","sources":[["s",4]],"epoch":1,"lease":["w",1,"h:1"],"checkpoints":[{"encoding_version":1,"ve'
        b'rsion":1,"applied_offset":5,"applied_pretoken_tokens":0,"tokens":16,"state_bytes":9,"state_digest":"'
        b'd","model_digest":"m","decisions":[[0,"p","n"]],"chunks":[["c",3,"00"]],"owner_uid":"u1","read_to":9'
        b',"chain":"efefefefefefefefefefefefefefefef"}],"holds":[[1,5,8,2]],"references":[],"is_deleted":false'
        b"}"
    )

    record = decode(written)

    assert (record.accepted_offset, record.log_chain, record.version) == (9, "cd" * 16, 1)
    assert decode(encode(record)) == record


def test_fields_of_a_later_version_are_kept_for_it() -> None:
    fields = {**json.loads(encode(FULL)[32:]), "shards": [1, 2]}
    fields["checkpoints"][0]["codec"] = "zstd"

    record = decode(with_digest(fields))

    assert json.loads(encode(replace(record, accepted_offset=91))[32:]) == {**fields, "accepted_offset": 91}


@pytest.mark.parametrize("found", [1, 3])
def test_a_record_of_another_format_is_named_as_that(found: int) -> None:
    with pytest.raises(UnknownFormat) as error:
        decode(with_digest({**json.loads(encode(FULL)[32:]), "format": found}))

    assert (error.value.found, error.value.known) == (str(found), "2")


@pytest.mark.parametrize("change", [{"carry": "zz"}, {"settings": [1]}, {"lease": 5}, {"checkpoints": [{}]}])
def test_a_damaged_record_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(CorruptState):
        decode(with_digest({**json.loads(encode(FULL)[32:]), **change}))


def test_every_flipped_byte_is_noticed() -> None:
    written = encode(FULL)

    for place in range(len(written)):
        with pytest.raises(CorruptState):
            decode(written[:place] + bytes([written[place] ^ 1]) + written[place + 1 :])


def with_digest(fields: dict[str, object]) -> bytes:
    content = json.dumps(fields, separators=(",", ":")).encode()
    return xxhash.xxh3_128_hexdigest(content).encode() + content


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff"])
def test_what_is_no_record_is_refused(data: bytes) -> None:
    with pytest.raises(CorruptState):
        decode(data)
