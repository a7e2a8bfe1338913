"""Payloads in files: the one that was meant, or an error."""

import os
import shutil
from pathlib import Path

import pytest

from eunoe.runtime.payload_files import PayloadWriter, read_payload, remove_stale


def read(directory: Path, name: str, generation: int, length: int) -> bytes:
    into = bytearray(length)
    read_payload(directory, name, generation, memoryview(into))
    return bytes(into)


def test_what_was_written_is_read_also_after_something_longer(tmp_path: Path) -> None:
    writer = PayloadWriter(tmp_path, "worker")

    first = writer.write(memoryview(b"a long payload"))
    assert read(tmp_path, writer.name, first, 14) == b"a long payload"
    second = writer.write(memoryview(b"short"))
    assert read(tmp_path, writer.name, second, 5) == b"short"

    assert second > first
    writer.close()
    assert not list(tmp_path.iterdir())


def test_a_reader_that_comes_late_is_told_so(tmp_path: Path) -> None:
    writer = PayloadWriter(tmp_path, "worker")
    first = writer.write(memoryview(b"first"))
    PayloadWriter(tmp_path, "worker").write(memoryview(b"other"))

    with pytest.raises(ValueError, match="of generation"):
        read(tmp_path, writer.name, first, 5)


@pytest.mark.parametrize("place", [0, 10, 20, 30, 64, 68])
def test_a_flipped_bit_is_noticed(tmp_path: Path, place: int) -> None:
    writer = PayloadWriter(tmp_path, "worker")
    generation = writer.write(memoryview(b"first"))
    data = bytearray((tmp_path / writer.name).read_bytes())
    data[place] ^= 1
    (tmp_path / writer.name).write_bytes(data)

    with pytest.raises(ValueError, match="payload"):
        read(tmp_path, writer.name, generation, 5)


@pytest.mark.parametrize("size", [0, 63, 64, 68])
def test_a_file_that_is_cut_short_is_noticed(tmp_path: Path, size: int) -> None:
    writer = PayloadWriter(tmp_path, "worker")
    generation = writer.write(memoryview(b"first"))
    os.truncate(tmp_path / writer.name, size)

    with pytest.raises(ValueError, match="payload"):
        read(tmp_path, writer.name, generation, 5)


@pytest.mark.parametrize("name", ["", "..", "../outside.payload", "{outside}", ".hidden.payload", "link.payload"])
def test_nothing_but_payloads_of_the_directory_is_read(tmp_path: Path, name: str) -> None:
    directory, outside = tmp_path / "payloads", PayloadWriter(tmp_path, "outside")
    directory.mkdir()
    generation = outside.write(memoryview(b"first"))
    shutil.copy(tmp_path / outside.name, directory / ".hidden.payload")
    (directory / "link.payload").symlink_to(tmp_path / outside.name)
    assert read(tmp_path, outside.name, generation, 5) == b"first"

    with pytest.raises(ValueError, match="payload"):
        read(directory, name.format(outside=tmp_path / outside.name), generation, 5)


def test_what_is_no_file_is_refused_at_once_and_leaves_nothing_open(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    before = len(os.listdir("/proc/self/fd"))

    for name in ("folder", "pipe", "missing"):
        with pytest.raises(ValueError, match=f"the payload {name} cannot be read"):
            read(tmp_path, name, 1, 5)

    assert len(os.listdir("/proc/self/fd")) == before


def test_only_payloads_that_nobody_writes_any_more_are_removed(tmp_path: Path) -> None:
    for stem in ("old", "new"):
        PayloadWriter(tmp_path, stem).write(memoryview(b"x"))
    (tmp_path / "sidecar.sock").touch()
    for name in ("old.payload", "sidecar.sock"):
        os.utime(tmp_path / name, (1, 1))

    remove_stale(tmp_path, 60)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.payload", "sidecar.sock"]
