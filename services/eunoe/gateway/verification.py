"""VerifyStream: finds a worker that can verify a stream, preferably not the one that serves it."""

import logging
from collections.abc import AsyncIterator
from contextlib import aclosing

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.gateway.placement import Placement
from eunoe.runtime.errors import Overloaded, Unavailable, UnknownVersion

logger = logging.getLogger(__name__)


async def verify_stream(
    placement: Placement, name: str, timeout_seconds: float | None
) -> AsyncIterator[api.VerifyStreamResponse]:
    """Progress, then the first verdict of a worker that has all it takes; of none, what the last one lacks.

    Raises:
        Unavailable, Overloaded: If no worker is free to verify now.
    """
    try:
        workers = await placement.bystanders(name)
    except UnknownVersion as error:
        yield _of_unknown_format(error)
        return
    unverifiable: api.VerifyStreamResponse | None = None
    failure: Unavailable | Overloaded = Unavailable("no worker of the stream's model can be reached")
    for worker in workers:
        try:
            async with aclosing(worker.verify_stream(api.VerifyStreamRequest(name=name), timeout_seconds)) as responses:
                async for response in responses:
                    if response.summary.verdict == api.VERDICT_UNVERIFIABLE:
                        unverifiable = response
                        continue
                    yield response
                    if response.HasField("summary"):
                        return
        except (Unavailable, Overloaded) as error:
            logger.info("a worker does not verify", extra={"stream": name, "reason": error.reason()})
            failure = error
    if unverifiable is None:
        raise failure
    yield unverifiable


def _of_unknown_format(error: UnknownVersion) -> api.VerifyStreamResponse:
    missing = api.Missing(kind=api.MISSING_KIND_RECORD_FORMAT, recorded=str(error.found), available=str(error.known))
    summary = api.VerifySummary(verdict=api.VERDICT_UNVERIFIABLE, missing=[missing])
    return api.VerifyStreamResponse(summary=summary)
