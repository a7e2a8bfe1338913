import json

import pytest

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
from eunoe.state_store.metadata_codec import decode, encode

FULL = StreamMetadata(
    name="tenants/t/streams/a",
    uid="u1",
    model="m",
    settings=Settings(64, 16, 4, 2, True),
    create_time_ns=5,
    expire_time_ns=6,
    create_request_id="r",
    own_start_offset=7,
    start_version=3,
    accepted_offset=90,
    carry=b"\xe2\x82",
    sources=(Source("s", 4),),
    epoch=2,
    lease=Lease("w", 2, "h:1"),
    checkpoints=(
        Manifest(1, 4, 50, 2, 64, 99, "d", "md", (DecisionRun(0, "p", "n"),), (ChunkRef("c", 3, "ab" * 16),), "u0", 60),
    ),
    holds=(Hold(4, 50, 80, 2),),
    references=(Reference("tenants/t/streams/p", "u0", 4, 50, 70),),
    is_deleted=True,
)


def test_a_record_reads_back_as_it_was() -> None:
    assert decode(encode(FULL)) == FULL


def test_what_an_earlier_release_wrote_still_reads() -> None:
    written = (
        b'{"format":1,"name":"tenants/t/streams/a","uid":"u1","model":"m","settings":[64,16,4,2,false],'
        b'"create_time_ns":5,"expire_time_ns":null,"create_request_id":"","own_start_offset":0,"start_version":0,'
        b'"accepted_offset":9,"carry":"c3","sources":[["s",4]],"epoch":1,"lease":["w",1,"h:1"],"checkpoints":'
        b'[{"encoding_version":1,"version":1,"applied_offset":5,"applied_pretoken_tokens":0,"tokens":16,'
        b'"state_bytes":9,"state_digest":"d","model_digest":"m","decisions":[[0,"p","n"]],"chunks":[["c",3,"00"]],'
        b'"owner_uid":"u1","read_to":9}],"holds":[[1,5,8,2]],"references":[],"is_deleted":false}'
    )

    assert encode(decode(written)) == written


@pytest.mark.parametrize(
    "change", [{"format": 2}, {"carry": "zz"}, {"settings": [1]}, {"lease": 5}, {"unknown": 1}, {"checkpoints": [{}]}]
)
def test_a_damaged_or_later_record_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(CorruptState):
        decode(json.dumps({**json.loads(encode(FULL)), **change}).encode())


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff"])
def test_what_is_no_record_is_refused(data: bytes) -> None:
    with pytest.raises(CorruptState):
        decode(data)
