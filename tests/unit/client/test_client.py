"""The client's calls: names, retries, answers, files."""

import asyncio
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import eunoe.client
from eunoe.client import AlreadyExists, AsyncClient, Client, NotFound, StreamNotFound, Unavailable

AWAY = Unavailable("away", retry_after_seconds=0.0)


@pytest.fixture
def client(gateway: Any) -> Iterator[Client]:
    with Client(gateway.address, retry_seconds=5.0) as client:
        yield client


def test_a_stream_is_named_by_id_or_in_full(gateway: Any, client: Client) -> None:
    assert client.get_stream("book") == client.get_stream("tenants/-/streams/book")
    assert gateway.requests[0] == gateway.requests[1]


def test_a_repeated_creation_carries_one_request_id(gateway: Any, client: Client) -> None:
    gateway.faults = [AWAY, AWAY]
    client.create_stream("new")
    assert len({request.request_id for request in gateway.requests}) == 1
    assert len(gateway.requests) == 3
    with pytest.raises(AlreadyExists):
        client.create_stream("new")


def test_a_deletion_that_is_repeated_finds_its_own_work_done(gateway: Any, client: Client) -> None:
    gateway.faults = [AWAY]
    client.delete_stream("book")
    with pytest.raises(StreamNotFound) as caught:
        client.delete_stream("book")
    assert isinstance(caught.value, NotFound)


def test_an_erasure_gives_a_receipt_and_a_deletion_none(gateway: Any, client: Client) -> None:
    client.create_stream("new")

    receipt = client.delete_stream("book", erase=True, request_id="e")

    assert receipt is not None
    assert receipt.name.endswith("/book")
    assert (gateway.requests[-1].erase, gateway.requests[-1].request_id) == (True, "e")
    assert client.delete_stream("new") is None
    # A server that knows the request answers with its receipt: if it does not, nothing was erased.
    gateway.faults = [AWAY]
    client.create_stream("again")
    gateway.faults = [AWAY]
    with pytest.raises(StreamNotFound):
        client.delete_stream("again", erase=True)


def test_listing_fetches_page_by_page(gateway: Any, client: Client) -> None:
    for index in range(5):
        client.create_stream(f"s{index}")
    gateway.requests.clear()
    names = [stream.name.rpartition("/")[2] for stream in client.list_streams(page_size=2)]
    assert names == ["book", "s0", "s1", "s2", "s3", "s4"]
    assert len(gateway.requests) == 3


def test_the_api_key_is_sent_as_bearer_token(gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with Client(gateway.address, api_key="secret") as client:
        client.get_stream("book")
    assert gateway.metadata["authorization"] == "Bearer secret"
    monkeypatch.setenv("EUNOE_ADDRESS", gateway.address)
    monkeypatch.setenv("EUNOE_API_KEY", "other")
    with Client() as client:
        client.get_stream("book")
    assert gateway.metadata["authorization"] == "Bearer other"


def test_an_answer_comes_piece_by_piece_and_ends_with_its_summary(gateway: Any, client: Client) -> None:
    gateway.answers = [["In ", "the ", "beginning"]]
    lags: list[int] = []
    answer = client.generate(
        "book", [("user", "How does it start?")], on_catching_up=lambda lag: lags.append(lag.accepted_offset)
    )
    assert answer.summary is None
    assert [tokens.text for tokens in answer] == ["In ", "the ", "beginning"]
    assert answer.summary is not None
    assert answer.summary.text == "In the beginning"
    assert lags == [2]
    assert gateway.requests[-1].chat.turns[0].content == "How does it start?"


def test_an_answer_is_asked_for_again_only_before_its_first_token(gateway: Any, client: Client) -> None:
    gateway.answers = [["cut"], ["yes"]]
    assert client.ask("book", "Well?").text == "yes"
    gateway.answers = [["y", "cut"], ["yes"]]
    answer = client.generate("book", "Well?")
    with pytest.raises(Unavailable):
        answer.finish()


def test_a_remembering_call_repeats_under_one_request_id(gateway: Any, client: Client) -> None:
    gateway.answers = [["cut"], ["yes"]]
    client.ask("book", "Well?", remember=True)
    first, second = gateway.requests
    assert first.request_id == second.request_id != ""


def test_an_export_that_breaks_off_leaves_no_file_or_is_repeated(gateway: Any, client: Client, tmp_path: Path) -> None:
    gateway.faults = [AWAY]
    assert client.export_stream("book", tmp_path / "book.eunoe") == 3000
    assert (tmp_path / "book.eunoe").read_bytes() == b"".join(bytes([index]) * 1000 for index in range(3))
    (tmp_path / "book.eunoe").unlink()
    gateway.faults = [StreamNotFound("gone")]
    with pytest.raises(StreamNotFound):
        client.export_stream("book", tmp_path / "book.eunoe")
    assert list(tmp_path.iterdir()) == []


def test_an_import_is_repeated_from_its_start(gateway: Any, client: Client) -> None:
    gateway.faults = [AWAY]
    data = b"e" * 300_000
    client.import_stream(io.BytesIO(data), "copy")
    assert bytes(gateway.streams["tenants/default/streams/copy"].log) == data


def test_flush_and_finish_answer_with_the_stream(client: Client) -> None:
    client.append("book", "text", finish=False)
    assert client.flush("book").accepted_offset == client.finish("book").accepted_offset == 4


async def test_many_calls_share_one_client(gateway: Any) -> None:
    async with AsyncClient(gateway.address) as client:
        streams = await asyncio.gather(*(client.get_stream("book") for _ in range(20)))
    assert len(streams) == 20


def test_the_public_names_are_exactly_those_listed() -> None:
    public = {name for name, value in vars(eunoe.client).items() if not name.startswith("_")}
    modules = {"append", "asynchronous", "connection", "generation", "source", "synchronous"}
    assert public - modules == set(eunoe.client.__all__)


def test_the_client_needs_neither_torch_nor_ray() -> None:
    program = "import sys, eunoe.client; sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'numpy')))"
    subprocess.run([sys.executable, "-c", program], check=True)
