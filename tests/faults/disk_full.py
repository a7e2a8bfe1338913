"""The disk under Redis is full: what was acknowledged stays, clients are told to try again, and room mends everything.

Redis cannot take back a write that it has made in memory, so with `appendfsync always` it exits at the first write
that does not fit into its file, and answers none of the writes of that moment. Whoever starts it again on the full
disk gets the same again. A file beside Redis' own takes all room but a few bytes, and goes away afterwards.
"""

import asyncio
import contextlib
import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from redis.exceptions import RedisError
from store_faults import RealFaultFigures, Writer, work
from store_processes import HarnessError, StoreSite, storage_at, until

from eunoe.clients.state_store import StateStoreClient

_DISK_BYTES = 64 << 20
_NUM_WRITERS = 3
_NUM_STARTS_WHILE_FULL = 3
_PAGE_BYTES = 4096


class NoMountError(Exception):
    """This user may not mount a file system."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFullFigures:
    """What a full disk did.

    Attributes:
        num_fillings: How often the disk was filled and cleared.
        exits: How Redis ended on the full disk, by exit status.
        errors: Status codes, other than OK, that calls ended with; repeated, all succeeded in the end.
        num_checkpoints: Committed, and those found torn among them.
    """

    num_fillings: int
    exits: dict[int, int]
    errors: dict[str, int]
    acknowledged_bytes: int
    acknowledged_bytes_lost: int
    records_applied_twice: int
    num_checkpoints: int
    torn_checkpoints: int
    seconds: float


async def disk_full(num_fillings: int, seed: int, directory: Path) -> DiskFullFigures:
    """Fill the disk under Redis while clients write, start Redis on it again and again, make room, compare everything.

    Args:
        num_fillings: How often.
        seed: Of sizes.
        directory: The disk is mounted below it; its path has at most 80 bytes.

    Raises:
        NoMountError: Where nothing can be mounted.
    """
    start, chance, found = time.monotonic(), random.Random(seed), RealFaultFigures()
    exits: Counter[int] = Counter()
    answers = _Answers()
    with _small_disk(directory / "disk") as disk:
        async with (
            StoreSite(seed=seed, redis_directory=disk.directory) as site,
            grpc.aio.insecure_channel(
                site.proxy.address, interceptors=[_UnaryCalls(answers), _StagingCalls(answers)]
            ) as channel,
        ):
            client = StateStoreClient(channel, deadline_seconds=20.0)
            writers = [Writer(client, f"tenants/t/streams/s{number}", chance) for number in range(_NUM_WRITERS)]
            for writer in writers:
                await writer.create()
            for _ in range(num_fillings):
                stop = asyncio.Event()
                async with asyncio.TaskGroup() as working:
                    for writer in writers:
                        working.create_task(work(writer, stop, found))
                    disk.fill(chance.randint(0, 50 * _PAGE_BYTES))
                    if chance.random() < 0.3:
                        await _rewrite(site)
                    exits[await _exit_status(site)] += 1
                    await answers.one_more_error()
                    for _ in range(_NUM_STARTS_WHILE_FULL):
                        disk.fill(chance.randint(0, 5 * _PAGE_BYTES))
                        # It may be gone again before it answers us: writers have not stopped trying.
                        with contextlib.suppress(HarnessError):
                            await site.redis.restart()
                        exits[await _exit_status(site)] += 1
                    disk.clear()
                    await site.redis.restart()
                    stop.set()
                assert site.store.exit_status is None, "the state store ended"
                for writer in writers:
                    found.records_applied_twice += await writer.append()
                    await writer.check(found)
    return DiskFullFigures(
        num_fillings=num_fillings,
        exits=dict(exits),
        errors=dict(answers.errors),
        acknowledged_bytes=sum(writer.num_acknowledged for writer in writers),
        acknowledged_bytes_lost=found.acknowledged_bytes_lost,
        records_applied_twice=found.records_applied_twice,
        num_checkpoints=sum(writer.num_checkpoints for writer in writers),
        torn_checkpoints=found.torn_checkpoints,
        seconds=time.monotonic() - start,
    )


class _Answers:
    """Counts how calls end, those too that the client then repeats by itself."""

    def __init__(self) -> None:
        self.errors: Counter[str] = Counter()

    async def noted(self, call: Any) -> Any:
        """The call, once it has ended."""
        if (code := await call.code()) != grpc.StatusCode.OK:
            self.errors[code.name] += 1
        return call

    async def one_more_error(self) -> None:
        """Wait for a call that fails from now on."""
        num_before = self.errors.total()

        async def condition() -> bool:
            return self.errors.total() > num_before

        await until(condition, "no client hears of the full disk")


class _UnaryCalls(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self, answers: _Answers) -> None:
        self._answers = answers

    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return await self._answers.noted(await continuation(details, request))


class _StagingCalls(grpc.aio.StreamUnaryClientInterceptor):
    def __init__(self, answers: _Answers) -> None:
        self._answers = answers

    async def intercept_stream_unary(self, continuation: Any, details: Any, requests: Any) -> Any:
        return await self._answers.noted(await continuation(details, requests))


async def _rewrite(site: StoreSite) -> None:
    """Have Redis write its file anew, for which there may be no room."""
    async with storage_at(site.redis.url) as storage:
        with contextlib.suppress(RedisError):
            await storage.client.bgrewriteaof()


async def _exit_status(site: StoreSite) -> int:
    async def condition() -> bool:
        return site.redis.exit_status is not None

    await until(condition, "Redis goes on although its disk is full")
    assert site.redis.exit_status is not None
    return site.redis.exit_status


class _Disk:
    """A file system of fixed size, of which a file can take what is free."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._filler = directory / "filler"

    def fill(self, num_bytes: int) -> None:
        """Take all but so many bytes."""
        with self._filler.open("wb") as file:
            free = os.statvfs(self.directory)
            num_taken = free.f_bavail * free.f_frsize - num_bytes
            if num_taken > 0:
                os.posix_fallocate(file.fileno(), 0, num_taken)

    def clear(self) -> None:
        """Make room."""
        self._filler.unlink()


@contextlib.contextmanager
def _small_disk(directory: Path) -> Iterator[_Disk]:
    directory.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(directory)]
    try:
        subprocess.run(mount, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NoMountError(f"a tmpfs cannot be mounted here: {getattr(error, 'stderr', error)}") from error
    try:
        yield _Disk(directory)
    finally:
        # Lazy: a child of Redis that was rewriting its file may still be there.
        subprocess.run(["umount", "--lazy", str(directory)], check=True)
