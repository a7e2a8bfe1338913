"""Streams through the whole platform: gateway, state store, Redis, Ray, two workers."""

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from eunoe.client import AlreadyExists, AppendProgress, AsyncClient, Client, Stream, StreamNotFound
from eunoe.clients.state_store import StateStoreClient
from eunoe.embedded.platform import Platform
from eunoe.internal.v1 import state_store_pb2 as internal
from eunoe.runtime.grpc_channel import open_channel

TEXT = " ".join(
    random.Random(5).choices(["light", "water", "earth", "seed", "día", "夜", "and", "of"], k=2_500)
).encode()


@pytest.fixture(scope="module")
def undisturbed(client: Client) -> Stream:
    """A stream that read the text in one go."""
    client.create_stream("undisturbed")
    return client.append("undisturbed", TEXT)


def test_a_stream_reads_all_but_less_than_a_segment(undisturbed: Stream) -> None:
    assert undisturbed.accepted_offset == len(TEXT)
    assert 0 < undisturbed.tokens == undisturbed.tokens // 512 * 512
    assert undisturbed.applied_offset <= len(TEXT)
    assert undisturbed.policy == "sinks-recent/1"
    assert undisturbed.state_digest


def test_the_same_bytes_cut_elsewhere_make_the_same_memory(client: Client, undisturbed: Stream) -> None:
    generator = random.Random(11)
    cuts = sorted(generator.sample(range(1, len(TEXT)), 12))
    client.create_stream("cut")
    pieces = [TEXT[start:end] for start, end in zip([0, *cuts], [*cuts, len(TEXT)], strict=True)]
    assert client.append("cut", iter(pieces)).state_digest == undisturbed.state_digest


def test_an_answer_is_the_same_when_asked_again(client: Client, undisturbed: Stream) -> None:
    answers = [client.ask("undisturbed", "What is there?", max_tokens=12) for _ in range(2)]
    assert answers[0].text == answers[1].text
    assert answers[0].num_answer_tokens <= 12
    assert answers[0].state_bytes == undisturbed.state_bytes
    assert client.get_stream("undisturbed") == undisturbed


def test_a_remembered_answer_is_in_the_log(client: Client) -> None:
    client.create_stream("remembering")
    client.append("remembering", "Once upon a time. ")
    before = client.get_stream("remembering").accepted_offset
    summary = client.ask("remembering", "And then?", max_tokens=4, remember=True)
    num_tokens = summary.num_prompt_tokens + summary.num_answer_tokens
    # A turn's end that closes the answer is remembered with it.
    grown = client.get_stream("remembering").accepted_offset - before
    assert grown in (4 * num_tokens, 4 * (num_tokens + 1))


def test_a_fork_goes_its_own_way(client: Client, undisturbed: Stream) -> None:
    child = client.fork_stream("undisturbed", "child")
    assert child.state_digest == undisturbed.state_digest
    client.append("child", TEXT)
    assert client.get_stream("child").state_digest != undisturbed.state_digest
    assert client.get_stream("undisturbed") == undisturbed
    with pytest.raises(AlreadyExists):
        client.fork_stream("undisturbed", "child")


def test_an_import_goes_on_where_the_export_stood(client: Client, undisturbed: Stream, tmp_path: Path) -> None:
    client.export_stream("undisturbed", tmp_path / "export")
    imported = client.import_stream((tmp_path / "export").read_bytes(), "imported")
    assert (imported.state_digest, imported.accepted_offset) == (undisturbed.state_digest, undisturbed.accepted_offset)
    client.create_stream("twice")
    client.append("twice", TEXT)
    assert client.append("imported", TEXT).state_digest == client.append("twice", TEXT).state_digest


def test_scores_are_log_probabilities_of_the_text(client: Client, undisturbed: Stream) -> None:
    scores = client.score("undisturbed", "light and water")
    assert len(scores.token_ids) == len(scores.log_probs) > 0
    assert all(log_prob < 0 for log_prob in scores.log_probs)


def test_sinks_and_recent_tokens_are_what_is_kept(client: Client, undisturbed: Stream) -> None:
    memory = client.inspect_memory("undisturbed")
    budget = undisturbed.settings.kv_budget_tokens
    newest = [*range(4), *range(undisturbed.tokens - budget + 4, undisturbed.tokens)]
    assert all(list(head.positions) == newest for head in memory.heads)


def test_a_deleted_stream_is_not_found(client: Client) -> None:
    client.create_stream("short-lived")
    client.append("short-lived", TEXT[:100])
    client.delete_stream("short-lived")
    with pytest.raises(StreamNotFound):
        client.get_stream("short-lived")


async def test_a_worker_killed_in_the_middle_changes_nothing_but_the_time(
    platform: Platform, undisturbed: Stream
) -> None:
    half = len(TEXT) // 2
    first_half_is_read, owner_is_dead = asyncio.Event(), asyncio.Event()

    async def pieces() -> AsyncIterator[bytes]:
        yield TEXT[:half]
        await first_half_is_read.wait()
        yield TEXT[half : half + 1000]
        await owner_is_dead.wait()
        yield TEXT[half + 1000 :]

    def note(progress: AppendProgress) -> None:
        if progress.folded_offset > 0:
            first_half_is_read.set()

    async with AsyncClient(platform.address) as client, open_channel(platform.state_store_address) as channel:
        store = StateStoreClient(channel)
        request = internal.GetStreamRequest(name="tenants/default/streams/killed")
        await client.create_stream("killed")
        async with asyncio.TaskGroup() as tasks:
            appending = tasks.create_task(client.append("killed", pieces(), on_progress=note))
            await first_half_is_read.wait()
            owner = (await store.get_stream(request)).record.lease
            _process_at(owner.address).kill()
            owner_is_dead.set()
        heir = (await store.get_stream(request)).record.lease
    assert heir.worker != owner.worker
    assert appending.result().state_digest == undisturbed.state_digest


def _process_at(address: str) -> psutil.Process:
    port = int(address.rpartition(":")[2])
    (pid,) = {
        connection.pid
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }
    return psutil.Process(pid)
