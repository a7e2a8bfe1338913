import pytest

from eunoe.gateway.resources import checked_request_id, new_name, page_token, resolved, stream_id_before_page
from eunoe.runtime.errors import InvalidRequest, StreamNotFound


@pytest.mark.parametrize("name", ["tenants/-/streams/book", "tenants/acme/streams/book"])
def test_a_name_of_ones_own_tenant_is_resolved(name: str) -> None:
    assert resolved(name, "acme") == "tenants/acme/streams/book"


def test_another_tenants_name_is_not_found() -> None:
    with pytest.raises(StreamNotFound):
        resolved("tenants/other/streams/book", "acme")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "book",
        "tenants/-/streams/",
        "tenants/-/streams/a/b",
        "tenants/-/streams/a b",
        "tenants/-/streams/" + "a" * 129,
    ],
)
def test_what_is_no_name_is_invalid(name: str) -> None:
    with pytest.raises(InvalidRequest):
        resolved(name, "acme")


def test_a_stream_without_an_id_gets_one_of_its_own() -> None:
    assert new_name("", "acme") != new_name("", "acme")


@pytest.mark.parametrize("stream_id", ["a/b", "ä", "x" * 129, "a\n"])
def test_a_bad_id_is_invalid(stream_id: str) -> None:
    with pytest.raises(InvalidRequest):
        new_name(stream_id, "acme")


def test_a_page_token_leads_behind_the_last_stream() -> None:
    assert stream_id_before_page(page_token("tenants/acme/streams/book-7")) == "book-7"


@pytest.mark.parametrize("token", ["!", "====", "YS9i", "w6Q="])
def test_a_token_of_somebody_else_is_invalid(token: str) -> None:
    with pytest.raises(InvalidRequest):
        stream_id_before_page(token)


def test_a_request_id_above_64_bytes_is_invalid() -> None:
    with pytest.raises(InvalidRequest):
        checked_request_id("ä" * 33)
