"""The public Python SDK.

    from eunoe.client import Client

    with Client() as client:
        client.create_stream("book")
        client.append("book", Path("book.txt").open("rb"))
        print(client.ask("book", "Who built the ark?").text)

`AsyncClient` has the same methods for asyncio; `Client` runs one on a thread of its own. Results are the messages of
the public protocol. Errors are those of `eunoe.runtime.errors`, all below `EunoeError`. Whatever can be repeated safely
is repeated while the platform is away; an append goes on by itself where it was cut off.
"""

from eunoe.api.v1.long_context_pb2 import (
    ChatTurn,
    DeletionReceipt,
    Difference,
    Freshness,
    GeneratedTokens,
    GenerateSummary,
    HeadMemory,
    LogTokens,
    Missing,
    Model,
    PositionMode,
    RecordKind,
    ScoredTokens,
    Stream,
    StreamSettings,
    Verdict,
    VerifiedPart,
    VerifyProgress,
    VerifySummary,
)
from eunoe.client.append import AppendProgress
from eunoe.client.asynchronous import AsyncClient, MemoryInspection
from eunoe.client.generation import AsyncGeneration
from eunoe.client.synchronous import Client, Generation
from eunoe.runtime.auth import TlsConfig
from eunoe.runtime.errors import (
    AlreadyExists,
    EunoeError,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    Overloaded,
    QuotaExceeded,
    StateLost,
    StreamNotFound,
    Unauthenticated,
    Unavailable,
)

__all__ = [
    "AlreadyExists",
    "AppendProgress",
    "AsyncClient",
    "AsyncGeneration",
    "ChatTurn",
    "Client",
    "DeletionReceipt",
    "Difference",
    "EunoeError",
    "FailedPrecondition",
    "Freshness",
    "GenerateSummary",
    "GeneratedTokens",
    "Generation",
    "HeadMemory",
    "InvalidRequest",
    "LogTokens",
    "MemoryInspection",
    "Missing",
    "Model",
    "NotFound",
    "Overloaded",
    "PositionMode",
    "QuotaExceeded",
    "RecordKind",
    "ScoredTokens",
    "StateLost",
    "Stream",
    "StreamNotFound",
    "StreamSettings",
    "TlsConfig",
    "Unauthenticated",
    "Unavailable",
    "Verdict",
    "VerifiedPart",
    "VerifyProgress",
    "VerifySummary",
]
