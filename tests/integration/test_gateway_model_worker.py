"""The gateway before real model workers with a tiny model: one document, the whole way."""

import dataclasses
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.decoder.tiny import write_tiny_byte_model, write_tiny_model
from eunoe.model_worker.config import WorkerConfig
from eunoe.model_worker.worker import ModelWorker

TEXT = "The quick brown fox jumps over the lazy dog, and the river goes on. " * 8


@pytest.fixture(scope="module")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    write_tiny_model(directory)
    return directory


@pytest.fixture
async def workers(state_store: Any, tiny_directory: Path) -> AsyncIterator[list[ModelWorker]]:
    """Two workers of one model of the test's own."""
    config = WorkerConfig(
        model_name=f"tiny-{uuid.uuid4().hex[:8]}",
        model_path=tiny_directory,
        state_store_address=state_store.address,
        num_threads=1,
        checkpoint_segments=2,
        drain_seconds=0.1,
    )
    started = [ModelWorker(config, on_engine_death=lambda: None) for _ in range(2)]
    for worker in started:
        await worker.start()
    yield started
    for worker in started:
        await worker.drain()


async def ingested(
    stub: Any, append_to: Any, model: str, pieces: list[bytes], kill: Any = None, retain_log: bool = False
) -> api.Stream:
    settings = api.StreamSettings(segment_length=16, kv_budget_tokens=32, retain_log=retain_log)
    name = (await stub.CreateStream(api.CreateStreamRequest(model=model, settings=settings))).stream.name
    client = await append_to(stub, name)
    for i, piece in enumerate(pieces):
        assert (await client.record(piece)).status.code == 0
        if kill is not None and i == len(pieces) // 2:
            await client.flush()
            await kill(name)
    finished: api.Stream = await client.finish()
    return finished


async def test_a_document_is_read_and_answered_about(stub: Any, workers: list[ModelWorker], append_to: Any) -> None:
    stream = await ingested(stub, append_to, workers[0].config.model_name, [TEXT.encode()])
    request = api.GenerateRequest(stream=stream.name, text="The", max_tokens=4)
    responses = [response async for response in stub.Generate(request)]
    heads = [r async for r in stub.InspectMemory(api.InspectMemoryRequest(name=stream.name))]
    scores = [r async for r in stub.Score(api.ScoreRequest(stream=stream.name, text="a river"))]

    assert stream.applied_offset > len(TEXT) // 2
    assert responses[-1].summary.num_answer_tokens in range(1, 5)
    assert max(len(head.head.positions) for head in heads) == 32
    assert sum(len(score.tokens.log_probs) for score in scores) > 0


async def test_a_document_its_fork_and_its_import_are_verified(
    stub: Any, workers: list[ModelWorker], append_to: Any
) -> None:
    pieces = [TEXT.encode()[i : i + 50] for i in range(0, len(TEXT), 50)]
    stream = await ingested(stub, append_to, workers[0].config.model_name, pieces)
    fork = (await stub.ForkStream(api.ForkStreamRequest(name=stream.name))).stream
    exported = [r.data async for r in stub.ExportStream(api.ExportStreamRequest(name=stream.name))]
    imported = (await stub.ImportStream(iter([api.ImportStreamRequest(data=b"".join(exported))]))).stream

    for each in (stream, fork, imported):
        for _ in range(2):
            now = (await stub.GetStream(api.GetStreamRequest(name=each.name))).stream
            summary = await verified(stub, each.name)
            assert (summary.verdict, summary.to_offset) == (api.VERDICT_VERIFIED, now.applied_offset)
            client = await append_to(stub, each.name)
            await client.record(TEXT.encode())
            await client.finish()
        assert (await verified(stub, each.name)).tokens_folded > 0


async def verified(stub: Any, name: str) -> api.VerifySummary:
    *_, last = [r async for r in stub.VerifyStream(api.VerifyStreamRequest(name=name))]
    summary: api.VerifySummary = last.summary
    return summary


async def test_a_stream_of_a_byte_model_takes_the_models_settings_and_reads_characters_cut_between_records(
    stub: Any, workers: list[ModelWorker], append_to: Any, tmp_path: Path
) -> None:
    write_tiny_byte_model(tmp_path)
    model = f"{workers[0].config.model_name}-bytes"
    workers.append(
        ModelWorker(
            dataclasses.replace(workers[0].config, model_name=model, model_path=tmp_path), on_engine_death=lambda: None
        )
    )
    await workers[-1].start()
    data = "Süß, 雨 \U0001f600. ".encode() * 20
    streams = []
    for num_bytes in (len(data), 1):
        name = (await stub.CreateStream(api.CreateStreamRequest(model=model))).stream.name
        client = await append_to(stub, name)
        for start in range(0, len(data), num_bytes):
            assert (await client.record(data[start : start + num_bytes])).status.code == 0
        streams.append(await client.finish())
    heads = [r.head async for r in stub.InspectMemory(api.InspectMemoryRequest(name=streams[1].name))]
    *_, answer = [r async for r in stub.Generate(api.GenerateRequest(stream=name, text="ß", max_tokens=5))]

    whole, cut = streams
    settings = whole.settings
    assert (settings.kv_budget_tokens, settings.segment_length, settings.num_sink_tokens) == (16, 16, 0)
    assert whole.tokens == len(data) // 16 * 16
    assert cut.state_digest == whole.state_digest
    assert max(len(head.positions) for head in heads) == 16
    assert (answer.summary.num_prompt_tokens, answer.summary.num_answer_tokens) == (2, 5)


async def test_a_worker_that_dies_in_the_middle_leaves_the_same_memory(
    stub: Any, workers: list[ModelWorker], append_to: Any
) -> None:
    model = workers[0].config.model_name
    pieces = [TEXT.encode()[i : i + 50] for i in range(0, len(TEXT), 50)]

    async def kill_the_owner(name: str) -> None:
        owner = next(worker for worker in workers if name in worker.streams)
        workers.remove(owner)
        await owner.stop()

    undisturbed = await ingested(stub, append_to, model, [TEXT.encode()])
    disturbed = await ingested(stub, append_to, model, pieces, kill=kill_the_owner)

    assert disturbed.state_digest == undisturbed.state_digest
    assert disturbed.tokens == undisturbed.tokens


@pytest.mark.parametrize("is_same", [True, False], ids=["same", "other"])
async def test_a_rebuilt_memory_is_what_the_model_makes_of_the_log(
    stub: Any, workers: list[ModelWorker], state_store: Any, append_to: Any, tmp_path: Path, is_same: bool
) -> None:
    model = reader = workers[0].config.model_name
    if not is_same:
        reader = f"{model}-other"
        write_tiny_model(tmp_path, seed=1, num_layers=3)
        other = dataclasses.replace(workers[0].config, model_name=reader, model_path=tmp_path)
        workers.append(ModelWorker(other, on_engine_death=lambda: None))
        await workers[-1].start()
    pieces = [TEXT.encode()[i : i + 90] for i in range(0, len(TEXT), 90)]
    read = await ingested(stub, append_to, model, pieces, retain_log=True)
    expected = read if is_same else await ingested(stub, append_to, reader, [TEXT.encode()])

    child = (await stub.ForkStream(api.ForkStreamRequest(name=read.name, model=reader))).stream
    rebuilt = await (await append_to(stub, child.name)).finish()

    assert read.checkpoint_version > 3
    assert (child.state_digest, child.applied_offset) == ("", 0)
    assert (rebuilt.state_digest, rebuilt.tokens) == (expected.state_digest, expected.tokens)
    assert (rebuilt.state_digest == read.state_digest) == is_same
