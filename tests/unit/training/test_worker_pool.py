"""The pool on a real Ray. Actor classes are local to functions: Ray's workers cannot import a test."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import OutOfMemoryError

from eunoe.runtime.errors import Unavailable
from eunoe.training.worker_pool import Call, WorkerPool, choose_call

# A Ray takes ten seconds to start where nothing else runs.
pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(120)]


def squares() -> type:
    class Squares:
        def __init__(self, directory: Path) -> None:
            self._directory = directory

        def square(self, number: int) -> int:
            return number**2

        def square_unless_killed(self, number: int) -> int:
            """Waits to be killed the first time that it is asked for 7."""
            mark = self._directory / "pid"
            if number == 7 and not mark.exists():
                mark.with_suffix(".new").write_text(str(os.getpid()))
                mark.with_suffix(".new").rename(mark)
                threading.Event().wait()
            return number**2

        def die(self) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def fail(self) -> None:
            raise ValueError("nothing to square")

    return Squares


def test_results_come_in_the_order_of_the_calls(tmp_path: Path) -> None:
    done: list[None] = []
    with WorkerPool(squares(), (tmp_path,), num_workers=2) as pool:
        calls = [*(Call((index,), key=index % 3) for index in range(30)), Call((pool.share(30),))]
        results = pool.map("square", calls, lambda: done.append(None))

    assert results == [index**2 for index in range(31)]
    assert len(done) == 31


def test_the_work_of_a_killed_worker_is_done_again_by_another(tmp_path: Path) -> None:
    results: list[Any] = []

    def kill_it() -> None:
        mark = tmp_path / "pid"
        stopped = threading.Event()
        while not mark.exists():
            assert not stopped.wait(0.02)
        os.kill(int(mark.read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill_it)
    killer.start()
    with WorkerPool(squares(), (tmp_path,), num_workers=2) as pool:
        results = pool.map("square_unless_killed", [Call((index,)) for index in range(12)])
        num_lost = pool.num_lost
    killer.join()

    assert results == [index**2 for index in range(12)]
    assert num_lost == 1


def test_a_worker_that_took_too_much_memory_is_one_that_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine out of memory is no test's to make: Ray tells of it once."""
    get, errors = ray.get, [OutOfMemoryError("the machine's memory ran out")]

    def get_or_fail(reference: Any) -> Any:
        value = get(reference)
        if value == 49 and errors:
            raise errors.pop()
        return value

    with WorkerPool(squares(), (tmp_path,), num_workers=1) as pool:
        monkeypatch.setattr(ray, "get", get_or_fail)
        results = pool.map("square", [Call((index,)) for index in range(9)])

        assert results == [index**2 for index in range(9)]
        assert pool.num_lost == 1


def test_a_worker_goes_on_with_its_own_keys_then_takes_new_ones_then_helps() -> None:
    calls = [Call((), key=key) for key in "aabbcc"]

    assert choose_call([0, 1, 2, 3, 4, 5], calls, own={"b"}, taken={"a", "b"}) == 2
    assert choose_call([0, 1, 4, 5], calls, own={"b"}, taken={"a", "b"}) == 4
    assert choose_call([1, 5], calls, own={"b"}, taken={"a", "b", "c"}) == 1


def test_without_a_number_there_is_a_worker_for_every_cpu(tmp_path: Path) -> None:
    with WorkerPool(squares(), (tmp_path,), num_cpus=2) as pool:
        pool.map("square", [Call((1,))])

        assert len(pool._workers) == 2


def test_an_error_of_the_method_is_the_callers_and_ends_the_pool(tmp_path: Path) -> None:
    with WorkerPool(squares(), (tmp_path,), num_workers=1) as pool:
        with pytest.raises(ValueError, match="nothing to square"):
            pool.map("fail", [Call(())])

        assert pool._workers == []


def test_a_call_that_kills_every_worker_is_an_error(tmp_path: Path) -> None:
    with WorkerPool(squares(), (tmp_path,), num_workers=1) as pool, pytest.raises(Unavailable, match="same call"):
        pool.map("die", [Call(())])


def test_workers_that_never_start_are_an_error() -> None:
    class Broken:
        def __init__(self) -> None:
            raise ValueError("no weights here")

    with WorkerPool(Broken, (), num_workers=1) as pool, pytest.raises(Unavailable, match="no weights here"):
        pool.map("anything", [Call(())])
