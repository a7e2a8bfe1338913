"""The engine thread: it alone touches the decoder, and decides whose turn it is.

Work comes as *jobs*: generators that run on the engine thread and yield where others may have a turn. `yield None`
ends a turn of at most one segment's pass; `logits = yield Decode(state, token_id, policy)` asks to append one token,
which the engine does for up to 16 states in one batch. Jobs take turns in a circle, so one stream's backlog of a
thousand segments delays another's single segment by one pass. While both segments and decode steps wait, each kind gets
half of the time.
"""

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from eunoe.decoder.decoder import Decoder
from eunoe.decoder.memory_state import MemoryState
from eunoe.eviction.policy import EvictionPolicy
from eunoe.model_worker import metrics
from eunoe.runtime.errors import EunoeError, Unavailable

logger = logging.getLogger(__name__)

MAX_DECODE_BATCH = 16
"""States in one decode step, as `Decoder.decode` takes them."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Decode:
    """A job's wish to append one token to its state; the job is resumed with the logits, float32 [vocab]."""

    state: MemoryState
    token_id: int
    policy: EvictionPolicy


Job = Generator[Decode | None, Any, T]


def _do_nothing() -> None: ...


@dataclass(slots=True, eq=False)
class _Running:
    job: Job[Any]
    future: Future[Any]
    on_close: Callable[[], None]
    wish: Decode | None = None


class Engine:
    """Runs jobs on a thread of its own.

    Args:
        load: Makes the decoder, on the engine thread: numbers of threads are settings of the thread that sets them.
        on_death: Called on the engine thread when it dies of an error of its own; the default ends the process, because
            a worker without its engine can neither fold nor checkpoint, and its leases should pass on at once.
    """

    def __init__(self, load: Callable[[], Decoder], on_death: Callable[[], None] | None = None) -> None:
        self._load = load
        self._decoder: Decoder | None = None
        self._on_death = on_death or _end_process
        self._inbox: deque[_Running] = deque()
        self._has_work = threading.Condition()
        self._is_stopping = False
        self._segment_jobs: deque[_Running] = deque()
        self._decode_jobs: deque[_Running] = deque()
        # Seconds that segments had beyond decode steps since both kinds wait.
        self._segment_lead_seconds = 0.0
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    async def start(self) -> Decoder:
        """Start the thread and load the decoder; raises what loading raises."""
        self._thread.start()
        self._decoder = await self.call(self._load)
        return self._decoder

    def submit(self, job: Job[T], on_close: Callable[[], None] = _do_nothing) -> "asyncio.Future[T]":
        """Start a job; the future is its return value. Cancelling the future closes the job at its next turn.

        A job that raises ends with that error and disturbs no other. `on_close` is called on the engine thread when the
        job has ended, however it did.
        """
        future: Future[T] = Future()
        with self._has_work:
            if self._is_stopping:
                on_close()
                raise Unavailable("the engine has stopped")
            self._inbox.append(_Running(job, future, on_close))
            self._has_work.notify()
        return asyncio.wrap_future(future)

    def call(self, function: Callable[[], T]) -> "asyncio.Future[T]":
        """Run a short function between two turns."""
        return self.submit(_as_job(function))

    def stop(self) -> None:
        """Close all jobs and end the thread; waits for the running turn."""
        with self._has_work:
            self._is_stopping = True
            self._has_work.notify()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def decoder(self) -> Decoder:
        """The decoder, once started; for the engine thread."""
        assert self._decoder is not None, "used before it was started"
        return self._decoder

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def is_idle(self) -> bool:
        """Whether no job waits or runs."""
        return self._busy_since is None and not self._inbox

    def stalled_seconds(self) -> float:
        """How long the present turn has taken; 0 between turns."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def _run(self) -> None:
        died = True
        try:
            while self._wait_for_work():
                self._busy_since = time.monotonic()
                self._turn()
            died = False
        finally:
            if died:
                logger.critical("the engine thread died", exc_info=True)
                self._on_death()

    def _wait_for_work(self) -> bool:
        """Take new jobs in; False when the engine stops."""
        with self._has_work:
            if not (self._inbox or self._segment_jobs or self._decode_jobs):
                self._busy_since = None
            self._has_work.wait_for(lambda: self._is_stopping or self._inbox or self._segment_jobs or self._decode_jobs)
            while self._inbox:
                self._segment_jobs.append(self._inbox.popleft())
        if self._is_stopping:
            for running in (*self._segment_jobs, *self._decode_jobs):
                _close(running)
            return False
        return True

    def _turn(self) -> None:
        start = time.monotonic()
        if not (self._segment_jobs and self._decode_jobs):
            self._segment_lead_seconds = 0.0
        if self._decode_jobs and (not self._segment_jobs or self._segment_lead_seconds >= 0.0):
            self._decode_step()
            self._segment_lead_seconds -= time.monotonic() - start
            return
        self._resume(self._segment_jobs.popleft(), None)
        self._segment_lead_seconds += time.monotonic() - start

    def _decode_step(self) -> None:
        """One token for each of the first waiting states."""
        batch: list[_Running] = []
        while self._decode_jobs and len(batch) < MAX_DECODE_BATCH:
            running = self._decode_jobs.popleft()
            if running.future.cancelled():
                _close(running)
            else:
                batch.append(running)
        wishes = [running.wish for running in batch if running.wish is not None]
        if not wishes:
            return
        metrics.DECODE_BATCH.observe(len(wishes))
        try:
            logits_BV = self.decoder.decode(
                [wish.state for wish in wishes],
                [wish.token_id for wish in wishes],
                [wish.policy for wish in wishes],
            )
        except Exception as error:
            logger.exception("a decode step failed", extra={"batch": len(wishes)})
            for running in batch:
                running.job.close()
                _finish(running, error=error)
            return
        for running, logits_V in zip(batch, logits_BV, strict=True):
            self._resume(running, logits_V)

    def _resume(self, running: _Running, value: torch.Tensor | None) -> None:
        """Run a job until it yields, ends or fails.

        Here ends what a single stream can break: a bug that one stream's bytes bring out must not end the process, or
        that stream would take down one worker after the other.
        """
        if running.future.cancelled():
            _close(running)
            return
        try:
            running.wish = running.job.send(value)
        except StopIteration as end:
            _finish(running, result=end.value)
        except (EunoeError, ValueError) as error:
            _finish(running, error=error)
        except Exception as error:
            logger.exception("a job failed")
            _finish(running, error=error)
        else:
            (self._segment_jobs if running.wish is None else self._decode_jobs).append(running)


def _as_job(function: Callable[[], T]) -> Job[T]:
    return function()
    yield


def _close(running: _Running) -> None:
    running.job.close()
    _finish(running, error=Unavailable("the engine has stopped"))


def _finish(running: _Running, *, result: Any = None, error: BaseException | None = None) -> None:
    running.on_close()
    # Whoever waited may have gone in this very moment; set_running_or_notify_cancel settles which came first.
    if running.future.set_running_or_notify_cancel():
        if error is None:
            running.future.set_result(result)
        else:
            running.future.set_exception(error)


def _end_process() -> None:
    os._exit(70)
