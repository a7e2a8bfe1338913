"""What the audit log has after a failure."""

import json
from pathlib import Path

import pytest

from eunoe.eviction_sidecar.audit import AuditLog
from eunoe.internal.v1 import eviction_sidecar_pb2 as pb
from eunoe.runtime.errors import Unavailable

needs_a_full_device = pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="there is no device that is always full"
)


def an_eviction(segment: int) -> pb.RecordEvictionRequest:
    return pb.RecordEvictionRequest(stream="tenants/t/streams/s", segment=segment, policy="key-norm/1")


def segments(path: Path) -> list[int]:
    return [json.loads(line)["segment"] for line in path.read_text().splitlines()]


@needs_a_full_device
def test_a_log_that_could_not_be_written_is_written_as_soon_as_there_is_room(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "audit.jsonl"
    path.symlink_to("/dev/full")
    log = AuditLog(path, 1 << 20, 2)

    for segment in range(3):
        with pytest.raises(Unavailable, match="No space left"):
            log.write(an_eviction(segment))
    path.unlink()
    log.write(an_eviction(3))
    log.write(an_eviction(4))
    log.close()

    assert segments(path) == [3, 4]
    assert capfd.readouterr().err == ""


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_text('{"time":"2026-11-')
    log = AuditLog(path, 1 << 20, 2)

    log.write(an_eviction(1))
    log.write(an_eviction(2))
    log.close()

    torn, *whole = path.read_text().splitlines()
    assert torn == '{"time":"2026-11-'
    assert [json.loads(line)["segment"] for line in whole] == [1, 2]


def test_a_log_that_cannot_be_rotated_is_written_again_once_it_can_be(tmp_path: Path) -> None:
    path, obstacle = tmp_path / "audit.jsonl", tmp_path / "audit.jsonl.1"
    obstacle.mkdir()
    log = AuditLog(path, 200, 2)
    log.write(an_eviction(1))

    with pytest.raises(Unavailable):
        log.write(an_eviction(2))
    obstacle.rmdir()
    log.write(an_eviction(3))
    log.close()

    assert (segments(path), segments(obstacle)) == ([3], [1])
