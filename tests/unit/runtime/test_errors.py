import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from eunoe.runtime.errors import (
    ContentMismatch,
    DeadlineTooShort,
    EunoeError,
    InvalidRequest,
    NotOwner,
    QuotaExceeded,
    Unavailable,
    from_rpc_error,
    from_status,
)


def an_info(**info: object) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(error_details_pb2.ErrorInfo(domain="eunoe", **info))
    return packed


@pytest.mark.parametrize(
    "error",
    [
        NotOwner("it moved", worker="w1", epoch=3, address="127.0.0.1:1"),
        QuotaExceeded("too much", quota="log_bytes", retry_after_seconds=1.5),
        ContentMismatch("other bytes", expected_offset=2**40),
    ],
)
def test_an_error_survives_the_wire_with_its_attributes(error: EunoeError) -> None:
    found = from_status(status_pb2.Status.FromString(error.to_status().SerializeToString()))

    assert type(found) is type(error)
    assert vars(found) == vars(error)


@pytest.mark.parametrize(("code", "expected"), [(3, InvalidRequest), (4, DeadlineTooShort), (14, Unavailable)])
def test_a_foreign_status_is_the_class_of_its_code(code: int, expected: type[EunoeError]) -> None:
    assert type(from_status(status_pb2.Status(code=code, message="by a proxy"))) is expected


def test_a_status_of_an_unknown_code_is_the_root() -> None:
    assert type(from_status(status_pb2.Status(code=99))) is EunoeError


@pytest.mark.parametrize(
    "detail",
    [
        any_pb2.Any(type_url=an_info().type_url, value=b"\xff\xff"),
        an_info(reason="NOT_OWNER", metadata={"epoch": "the last one"}),
        an_info(reason="OFFSET_GAP"),
        an_info(reason="OF_A_RELEASE_TO_COME", metadata={"a": "b"}),
    ],
    ids=["no message", "an attribute of another type", "an attribute missing", "an unknown reason"],
)
def test_details_that_cannot_be_understood_leave_the_class_of_the_code(detail: any_pb2.Any) -> None:
    found = from_status(status_pb2.Status(code=14, message="away", details=[detail]))

    assert type(found) is Unavailable
    assert found.message == "away"


def test_a_status_that_is_no_message_leaves_the_class_of_the_code() -> None:
    error = grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE,
        grpc.aio.Metadata(),
        grpc.aio.Metadata(("grpc-status-details-bin", b"\xff")),
        "away",
    )

    assert type(from_rpc_error(error)) is Unavailable
