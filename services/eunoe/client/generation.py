"""An answer as it comes."""

from collections.abc import Callable
from typing import Any, Self

import grpc

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.client.connection import Connection, error_of
from eunoe.runtime.errors import Unavailable


class AsyncGeneration:
    """An answer as it comes: an asynchronous iterator of `GeneratedTokens`.

    Attributes:
        summary: Set when the answer has ended; None before, and for good if the call was cancelled.
    """

    def __init__(
        self,
        connection: Connection,
        request: api.GenerateRequest,
        on_catching_up: Callable[[api.CatchingUp], None] | None,
        timeout_seconds: float | None,
    ) -> None:
        self.summary: api.GenerateSummary | None = None
        self._connection = connection
        self._request = request
        self._on_catching_up = on_catching_up
        self._timeout_seconds = timeout_seconds
        self._backoff = connection.backoff()
        self._call: Any = None
        self._has_tokens = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> api.GeneratedTokens:
        while True:
            try:
                response = await self._next_response()
            except grpc.RpcError as rpc_error:
                # What was answered already cannot be taken back: then it is the caller's to ask again.
                if self._has_tokens:
                    raise error_of(rpc_error) from None
                self._call = None
                await self._backoff.wait(error_of(rpc_error))
                continue
            match response.WhichOneof("response"):
                case "tokens":
                    self._has_tokens = True
                    tokens: api.GeneratedTokens = response.tokens
                    return tokens
                case "summary":
                    self.summary = response.summary
                case "catching_up":
                    self._backoff.went_forward()
                    if self._on_catching_up is not None:
                        self._on_catching_up(response.catching_up)

    async def _next_response(self) -> api.GenerateResponse:
        if self._call is None:
            self._call = self._connection.stub.Generate(
                self._request, metadata=self._connection.metadata, timeout=self._timeout_seconds
            )
        response = await self._call.read()
        if response is grpc.aio.EOF:
            if self.summary is None:
                raise Unavailable("the server ended the answer before its summary")
            raise StopAsyncIteration
        assert isinstance(response, api.GenerateResponse)
        return response

    async def finish(self) -> api.GenerateSummary:
        """Read to the end; returns the summary, whose `text` is the whole answer."""
        async for _ in self:
            pass
        assert self.summary is not None
        return self.summary

    def cancel(self) -> None:
        """Stop decoding; nothing is remembered."""
        if self._call is not None:
            self._call.cancel()
