"""The client for everybody else: an `AsyncClient` on an event loop thread of its own."""

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.client.asynchronous import AsyncClient
from eunoe.client.generation import AsyncGeneration
from eunoe.runtime.auth import TlsConfig

P = ParamSpec("P")
T = TypeVar("T")


class _LoopThread:
    """An event loop that runs on a daemon thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="eunoe-client", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run to the end; an interrupt (Ctrl-C) cancels the coroutine."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def call(self, function: Callable[[], object]) -> None:
        self._loop.call_soon_threadsafe(function)

    @property
    def is_running(self) -> bool:
        return not self._loop.is_closed()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Generation:
    """An answer as it comes: an iterator of `GeneratedTokens`. See `AsyncGeneration`."""

    def __init__(self, generation: AsyncGeneration, thread: _LoopThread) -> None:
        self._generation = generation
        self._thread = thread

    def __iter__(self) -> Iterator[api.GeneratedTokens]:
        return self

    def __next__(self) -> api.GeneratedTokens:
        tokens = self._thread.run(_next_or_none(self._generation))
        if tokens is None:
            raise StopIteration
        return tokens

    @property
    def summary(self) -> api.GenerateSummary | None:
        """Set when the answer has ended."""
        return self._generation.summary

    def finish(self) -> api.GenerateSummary:
        """Read to the end; returns the summary, whose `text` is the whole answer."""
        return self._thread.run(self._generation.finish())

    def cancel(self) -> None:
        """Stop decoding; nothing is remembered."""
        self._thread.call(self._generation.cancel)


async def _next_or_none(iterator: AsyncIterator[T]) -> T | None:
    # StopAsyncIteration must not leave a coroutine.
    return await anext(iterator, None)


def _blocking(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]],
) -> "Callable[Concatenate[Client, P], T]":
    @functools.wraps(method)
    def call(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._thread.run(method(self._client, *args, **kwargs))

    return call


def _iterating(
    method: Callable[Concatenate[AsyncClient, P], AsyncIterator[T]],
) -> "Callable[Concatenate[Client, P], Iterator[T]]":
    @functools.wraps(method)
    def call(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        iterator = method(self._client, *args, **kwargs)
        while (item := self._thread.run(_next_or_none(iterator))) is not None:
            yield item

    return call


def _generating(
    method: Callable[Concatenate[AsyncClient, P], AsyncGeneration],
) -> "Callable[Concatenate[Client, P], Generation]":
    @functools.wraps(method)
    def call(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> Generation:
        return Generation(method(self._client, *args, **kwargs), self._thread)

    return call


class Client:
    """A client of one gateway: `AsyncClient`'s methods with the same arguments, each of which waits for its result.

    May be used from several threads. Callbacks run on the client's own thread and must not call the client.

    Args:
        address: host:port; default is the variable EUNOE_ADDRESS, then 127.0.0.1:8400, where `eunoe up` listens.
        api_key: The key's secret; default is the variable EUNOE_API_KEY, then none (loopback needs none).
        tls: Certificates; None speaks plain text.
        retry_seconds: How long to go on trying while the platform is away and nothing goes forward.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        api_key: str | None = None,
        tls: TlsConfig | None = None,
        retry_seconds: float = 60.0,
    ) -> None:
        self._client = AsyncClient(address, api_key=api_key, tls=tls, retry_seconds=retry_seconds)
        self._thread = _LoopThread()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; running calls are cancelled."""
        if self._thread.is_running:
            self._thread.run(self._client.close())
            self._thread.stop()

    create_stream = _blocking(AsyncClient.create_stream)
    get_stream = _blocking(AsyncClient.get_stream)
    list_streams = _iterating(AsyncClient.list_streams)
    delete_stream = _blocking(AsyncClient.delete_stream)
    append = _blocking(AsyncClient.append)
    flush = _blocking(AsyncClient.flush)
    finish = _blocking(AsyncClient.finish)
    generate = _generating(AsyncClient.generate)
    ask = _blocking(AsyncClient.ask)
    score = _blocking(AsyncClient.score)
    fork_stream = _blocking(AsyncClient.fork_stream)
    export_stream = _blocking(AsyncClient.export_stream)
    import_stream = _blocking(AsyncClient.import_stream)
    inspect_memory = _blocking(AsyncClient.inspect_memory)
    verify_stream = _blocking(AsyncClient.verify_stream)
    list_models = _blocking(AsyncClient.list_models)
    get_usage = _blocking(AsyncClient.get_usage)
