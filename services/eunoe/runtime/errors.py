"""Errors that cross a process border: one tree, mapped once to gRPC status codes, and back in the client.

* EunoeError                 INTERNAL
  + InvalidRequest           INVALID_ARGUMENT      the caller's input can never work
  |   + InvalidUtf8, BadChecksum, RecordTooLarge, BadTokenId, PromptTooLong, BadExport, CarryAtFinish
  + Unauthenticated          UNAUTHENTICATED
  + NotFound                 NOT_FOUND
  |   + StreamNotFound, ModelNotFound, KeyNotFound, OutcomeNotFound, PolicyNotFound
  + AlreadyExists            ALREADY_EXISTS
  + OffsetGap                OUT_OF_RANGE          the record starts above the accepted offset
  + FailedPrecondition       FAILED_PRECONDITION   true input, wrong state
  |   + ContentMismatch, CarryOpen, OffsetUnavailable, ModelMismatch, MissingChunk, KeyUnavailable,
  |     UnknownVersion, VocabularyMismatch, FoldFailed
  + Conflict                 ABORTED               somebody else was first: look again
  |   + NotOwner, LeaseLost, VersionConflict
  + Overloaded               RESOURCE_EXHAUSTED    retry after `retry_after_seconds`
  |   + QuotaExceeded
  + Unavailable              UNAVAILABLE           retry with back-off
  + DeadlineTooShort         DEADLINE_EXCEEDED
  + StateLost                DATA_LOSS
      + CorruptState

On the wire an error is a google.rpc.Status with exactly one ErrorInfo: `domain` is "eunoe", `reason` names the class,
`metadata` holds its typed attributes. Errors with `retry_after_seconds` carry a RetryInfo beside it.
"""

import re
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, get_type_hints

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2

DOMAIN = "eunoe"


@dataclass(eq=False)
class EunoeError(Exception):
    """Root of the tree. Subclasses add keyword attributes, which travel as strings.

    Attributes:
        message: One sentence for people.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    message: str

    def __str__(self) -> str:
        return self.message

    @classmethod
    def reason(cls) -> str:
        """The class's name in capitals: OffsetGap is OFFSET_GAP."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).upper()

    def to_status(self) -> status_pb2.Status:
        """This error as google.rpc.Status."""
        values = {f.name: str(getattr(self, f.name)) for f in fields(self) if f.name != "message"}
        info = error_details_pb2.ErrorInfo(domain=DOMAIN, reason=self.reason(), metadata=values)
        status = status_pb2.Status(code=self.code.value[0], message=self.message, details=[_packed(info)])
        if "retry_after_seconds" in values:
            delay = duration_pb2.Duration()
            delay.FromNanoseconds(int(float(values["retry_after_seconds"]) * 1e9))
            status.details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
        return status


@dataclass(eq=False)
class InvalidRequest(EunoeError):
    """The caller's input can never work."""

    code = grpc.StatusCode.INVALID_ARGUMENT


@dataclass(eq=False)
class InvalidUtf8(InvalidRequest):
    """A text record is not UTF-8. `offset` is the first bad byte's place in the stream."""

    offset: int = field(kw_only=True)


@dataclass(eq=False)
class BadChecksum(InvalidRequest):
    """A record's CRC-32C is not that of its bytes."""


@dataclass(eq=False)
class RecordTooLarge(InvalidRequest):
    """A record has no byte or more than `limit_bytes`."""

    limit_bytes: int = field(kw_only=True)


@dataclass(eq=False)
class BadTokenId(InvalidRequest):
    """A token-id record is no multiple of 4 bytes or has an id at or above the vocabulary's size."""


@dataclass(eq=False)
class PromptTooLong(InvalidRequest):
    """A prompt or scored text has `num_tokens` tokens, more than `limit_tokens`."""

    num_tokens: int = field(kw_only=True)
    limit_tokens: int = field(kw_only=True)


@dataclass(eq=False)
class BadExport(InvalidRequest):
    """An export to import is torn, corrupt, or of an unknown version."""


@dataclass(eq=False)
class CarryAtFinish(InvalidRequest):
    """`finish` came while a character was cut: `carry_bytes` of it are in the log."""

    carry_bytes: int = field(kw_only=True)


@dataclass(eq=False)
class Unauthenticated(EunoeError):
    """No credential, or one that is not valid."""

    code = grpc.StatusCode.UNAUTHENTICATED


@dataclass(eq=False)
class NotFound(EunoeError):
    """Nothing of that name for this caller."""

    code = grpc.StatusCode.NOT_FOUND


@dataclass(eq=False)
class StreamNotFound(NotFound):
    """No such stream for this tenant, or it has expired."""


@dataclass(eq=False)
class ModelNotFound(NotFound):
    """No worker serves that model."""


@dataclass(eq=False)
class KeyNotFound(NotFound):
    """No such API key."""


@dataclass(eq=False)
class OutcomeNotFound(NotFound):
    """No remembering call of that id in the last 10 minutes."""


@dataclass(eq=False)
class PolicyNotFound(NotFound):
    """There is no eviction policy of that name and version."""


@dataclass(eq=False)
class AlreadyExists(EunoeError):
    """The name is taken."""

    code = grpc.StatusCode.ALREADY_EXISTS


@dataclass(eq=False)
class OffsetGap(EunoeError):
    """A record starts above the accepted offset; send from `expected_offset`."""

    code = grpc.StatusCode.OUT_OF_RANGE
    expected_offset: int = field(kw_only=True)


@dataclass(eq=False)
class FailedPrecondition(EunoeError):
    """True input in the wrong state."""

    code = grpc.StatusCode.FAILED_PRECONDITION


@dataclass(eq=False)
class ContentMismatch(FailedPrecondition):
    """Other bytes stand in the log where the record wants to be."""

    expected_offset: int = field(kw_only=True)


@dataclass(eq=False)
class CarryOpen(FailedPrecondition):
    """A token-id record cannot follow a cut character of `carry_bytes` bytes."""

    carry_bytes: int = field(kw_only=True)


@dataclass(eq=False)
class OffsetUnavailable(FailedPrecondition):
    """The log or no checkpoint reaches there; `available` lists offsets that exist, or a range, for people."""

    available: str = field(kw_only=True)


@dataclass(eq=False)
class ModelMismatch(FailedPrecondition):
    """A memory state belongs to other weights: `expected` and `found` are model digests."""

    expected: str = field(kw_only=True)
    found: str = field(kw_only=True)


@dataclass(eq=False)
class MissingChunk(FailedPrecondition):
    """A commit names a chunk that is not staged (any more): stage it again."""


@dataclass(eq=False)
class KeyUnavailable(FailedPrecondition):
    """A stream is encrypted, and the state store does not have the key."""


@dataclass(eq=False)
class UnknownVersion(FailedPrecondition):
    """Something was written in version `found` of its encoding, and this process reads version `known`."""

    found: int = field(kw_only=True)
    known: int = field(kw_only=True)


@dataclass(eq=False)
class VocabularyMismatch(FailedPrecondition):
    """A log has token ids of another vocabulary than the model's, the first of them at `offset`."""

    offset: int = field(kw_only=True)


@dataclass(eq=False)
class FoldFailed(FailedPrecondition):
    """The stream's log broke its worker's fold; the worker tries again after `retry_after_seconds`, not before."""

    retry_after_seconds: float = field(default=1.0, kw_only=True)


@dataclass(eq=False)
class Conflict(EunoeError):
    """Somebody else was first."""

    code = grpc.StatusCode.ABORTED


@dataclass(eq=False)
class NotOwner(Conflict):
    """Another worker owns the stream: `worker` at `address` under `epoch`, all empty where nobody is known."""

    worker: str = field(default="", kw_only=True)
    epoch: int = field(default=0, kw_only=True)
    address: str = field(default="", kw_only=True)


@dataclass(eq=False)
class LeaseLost(Conflict):
    """A commit came under a lease that is not the stream's."""


@dataclass(eq=False)
class VersionConflict(Conflict):
    """A commit is not the successor of the newest checkpoint, whose version is `version`."""

    version: int = field(kw_only=True)


@dataclass(eq=False)
class Overloaded(EunoeError):
    """A limit of this process: retry after `retry_after_seconds`."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    retry_after_seconds: float = field(default=1.0, kw_only=True)


@dataclass(eq=False)
class QuotaExceeded(Overloaded):
    """The tenant's `quota` is used up."""

    quota: str = field(kw_only=True)


@dataclass(eq=False)
class Unavailable(EunoeError):
    """A part of the platform cannot be reached: retry with back-off."""

    code = grpc.StatusCode.UNAVAILABLE
    retry_after_seconds: float = field(default=1.0, kw_only=True)


@dataclass(eq=False)
class DeadlineTooShort(EunoeError):
    """The call's deadline ends before its work."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


@dataclass(eq=False)
class StateLost(EunoeError):
    """Durable state is gone from `lost_from` on: send it again."""

    code = grpc.StatusCode.DATA_LOSS
    lost_from: int = field(default=0, kw_only=True)


@dataclass(eq=False)
class CorruptState(StateLost):
    """A stored chunk or manifest does not have its digest."""


def from_status(status: status_pb2.Status) -> EunoeError:
    """The error that `to_status` was called on; for a foreign status, the class of its code."""
    for detail in status.details:
        if (error := _described(detail, status.message)) is not None:
            return error
    name = code_pb2.Code.Name(status.code) if status.code in code_pb2.Code.values() else "UNKNOWN"
    return _BY_CODE.get(status.code, EunoeError)(status.message or name)


def _described(detail: any_pb2.Any, message: str) -> EunoeError | None:
    """The error that a status's detail tells of; None if it tells of none that is known here."""
    info = error_details_pb2.ErrorInfo()
    try:
        if not detail.Unpack(info) or info.domain != DOMAIN or info.reason not in _BY_REASON:
            return None
        error_class = _BY_REASON[info.reason]
        hints = get_type_hints(error_class)
        known = {f.name for f in fields(error_class)} - {"message"}
        return error_class(
            message, **{name: hints[name](text) for name, text in info.metadata.items() if name in known}
        )
    except (DecodeError, TypeError, ValueError):
        # No such message, or one without the attributes of its class, or with others: the code still counts.
        return None


# grpc.aio's word for a write that met the call's end: the true status is lost, and the next attempt may get it.
_LOST_STATUS = "Internal error from Core"


def from_rpc_error(error: grpc.RpcError) -> EunoeError:
    """The error that a server raised, out of what its client caught."""
    # Any: grpc and grpc.aio type it differently, and the stubs say that neither can be iterated.
    metadata: Any = error.trailing_metadata() or ()
    for key, value in metadata:
        if key == "grpc-status-details-bin":
            with suppress(DecodeError):
                return from_status(status_pb2.Status.FromString(value))
    code: grpc.StatusCode = error.code()
    if error.details() == _LOST_STATUS:
        return Unavailable("the server ended the call while it was written to")
    return from_status(status_pb2.Status(code=code.value[0], message=error.details() or code.name))


def _packed(message: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _tree(root: type[EunoeError]) -> list[type[EunoeError]]:
    return [root, *(found for child in root.__subclasses__() for found in _tree(child))]


_BY_REASON = {error_class.reason(): error_class for error_class in _tree(EunoeError)}
# The shallowest class of each code that needs no attributes.
_BY_CODE = {
    error_class.code.value[0]: error_class
    for error_class in reversed(_tree(EunoeError))
    if error_class.__base__ is EunoeError and error_class is not OffsetGap
}
