"""Server interceptors as context managers: one way around the handlers of all four kinds of RPC."""

import logging
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any

import grpc
from grpc_status import rpc_status

from eunoe.runtime.errors import EunoeError, InvalidRequest

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

    Anything else is logged and answered INTERNAL, without a word about its cause.
    """

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
        except NotImplementedError:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{method} is not implemented")
        except Exception as error:
            if context.cancelled() or context.done():
                return  # the client went away: writing to it failed, and nobody waits for an answer
            logger.exception("a call failed unexpectedly", extra={"method": method, "error": type(error).__name__})
            await _abort(context, EunoeError("internal error"))


async def _abort(context: Any, error: EunoeError) -> None:
    await context.abort_with_status(rpc_status.to_status(error.to_status()))
