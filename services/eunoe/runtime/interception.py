"""Server interceptors as context managers: one way around the handlers of all four kinds of RPC."""

import logging
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from eunoe.runtime.errors import EunoeError, InvalidRequest, Unavailable

logger = logging.getLogger(__name__)


class AroundInterceptor(grpc.aio.ServerInterceptor):
    """Runs every call inside `around(method, context)`. Handlers are coroutines or asynchronous generators."""

    @abstractmethod
    def around(self, method: str, context: Any) -> AbstractAsyncContextManager[None]:
        """What surrounds one call of `method` ("/package.Service/Method")."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        if not handler.response_streaming:
            make_handler = (
                grpc.stream_unary_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_unary_rpc_method_handler
            )
            behavior = self._unary(method, handler.stream_unary or handler.unary_unary)
        else:
            make_handler = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            behavior = self._streaming(method, handler.stream_stream or handler.unary_stream)
        return make_handler(behavior, handler.request_deserializer, handler.response_serializer)

    def _unary(self, method: str, inner: Any) -> Any:
        async def behavior(request: Any, context: Any) -> Any:
            async with self.around(method, context):
                return await inner(request, context)

        return behavior

    def _streaming(self, method: str, inner: Any) -> Any:
        # A coroutine that writes, not a generator: a cancelled call then unwinds the handler at once instead of leaving
        # a suspended generator to the garbage collector.
        async def behavior(request: Any, context: Any) -> None:
            async with self.around(method, context):
                result = inner(request, context)
                if hasattr(result, "__aiter__"):
                    async with aclosing(result) as responses:
                        async for response in responses:
                            await context.write(response)
                else:
                    await result

        return behavior


class ErrorInterceptor(AroundInterceptor):
    """Turns what a handler raises into a rich status: the error tree as it says, ValueError into INVALID_ARGUMENT.

    A request that is no message of its type is INVALID_ARGUMENT too. Anything else is logged and answered INTERNAL,
    without a word about its cause.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        async def continued(details: grpc.HandlerCallDetails) -> Any:
            handler = await continuation(details)
            return None if handler is None else _refusing_malformed(handler)

        return await super().intercept_service(continued, handler_call_details)

    @asynccontextmanager
    async def around(self, method: str, context: Any) -> AsyncIterator[None]:
        try:
            yield
        except EunoeError as error:
            await _abort(context, error)
        except ValueError as error:
            await _abort(context, InvalidRequest(str(error)))
        except grpc.aio.AbortError:
            raise
        except grpc.aio.InternalError:
            # A write met the end of the caller's connection, before the context knows that the call is over.
            await _abort(context, Unavailable("the connection broke during the response"))
        except NotImplementedError:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{method} is not implemented")
        except Exception as error:
            if context.cancelled() or context.done():
                return  # the client went away: writing to it failed, and nobody waits for an answer
            logger.exception("a call failed unexpectedly", extra={"method": method, "error": type(error).__name__})
            await _abort(context, EunoeError("internal error"))


def _refusing_malformed(handler: Any) -> Any:
    # grpc parses a call's only request before any interceptor runs, and by itself answers UNKNOWN: so the error takes
    # the request's place until the handler is called. A stream's requests are parsed while the handler reads them.
    def parse(data: bytes) -> Any:
        try:
            return handler.request_deserializer(data)
        except DecodeError:
            error = InvalidRequest("a request's bytes are no message of its type")
            if handler.request_streaming:
                raise error from None
            return error

    def checked(behavior: Any) -> Any:
        def run(request: Any, context: Any) -> Any:
            if isinstance(request, InvalidRequest):
                raise request
            return behavior(request, context)

        return behavior and run

    if handler.request_streaming:
        return handler._replace(request_deserializer=parse)
    return handler._replace(
        request_deserializer=parse,
        unary_unary=checked(handler.unary_unary),
        unary_stream=checked(handler.unary_stream),
    )


async def _abort(context: Any, error: EunoeError) -> None:
    # Fails where the caller is gone, of which the context may not know yet: then nobody waits for the status.
    with suppress(grpc.aio.InternalError):
        await context.abort_with_status(rpc_status.to_status(error.to_status()))
