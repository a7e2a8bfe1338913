import pytest
from google.rpc import status_pb2

from eunoe.runtime.errors import (
    ContentMismatch,
    DeadlineTooShort,
    EunoeError,
    InvalidRequest,
    NotOwner,
    QuotaExceeded,
    Unavailable,
    from_status,
)


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
