"""An inspection shows one checkpoint, whatever is committed meanwhile, its policy's scores and its model's gates."""

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.clients.model_worker import ModelWorkerClient
from eunoe.decoder.checkpoint import load_weights
from eunoe.decoder.config import CompressiveMemoryConfig
from eunoe.decoder.memory_state import MemorySettings, MemoryState
from eunoe.decoder.tiny import write_tiny_model
from eunoe.eviction import HeavyHitter
from eunoe.eviction.policy import score
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.model_worker.checkpoints import Checkpoints
from eunoe.model_worker.worker import ModelWorker
from eunoe.runtime.grpc_channel import open_channel

Text = Callable[..., bytes]


class HeldCheckpoints(Checkpoints):
    """Loads as ever, but keeps what it has loaded until `is_open`.

    Attributes:
        has_loaded: Something was loaded.
    """

    def __init__(self, worker: ModelWorker) -> None:
        parts = worker.parts
        super().__init__(parts.store, parts.engine, parts.decoder)
        worker.parts = dataclasses.replace(parts, checkpoints=self)
        self.has_loaded = asyncio.Event()
        self.is_open = asyncio.Event()

    async def load(self, name: str, manifest: pb.Manifest, settings: MemorySettings) -> MemoryState:
        state = await super().load(name, manifest, settings)
        self.has_loaded.set()
        await self.is_open.wait()
        return state


async def inspection(platform: Any, worker: ModelWorker, name: str) -> list[api.InspectMemoryResponse]:
    async with open_channel(worker.address) as channel:
        request = api.InspectMemoryRequest(name=name, with_log=True)
        call = ModelWorkerClient(channel).inspect_memory(request, await worker.place(name))
        return [response async for response in call]


@pytest.mark.parametrize("num_later", [0, 1, 4])
async def test_an_inspection_shows_one_checkpoint_although_others_are_committed_meanwhile(
    platform: Any, make_text: Text, num_later: int
) -> None:
    worker = await platform.worker()
    checkpoints = HeldCheckpoints(worker)
    name, texts = await platform.stream(), [make_text(900, seed) for seed in range(8)]
    for text in texts[:3]:
        await platform.append(name, text)
        shown = later = await platform.flush(worker, name)
    await platform.append(name, texts[3])
    # Folds what no checkpoint has, so that the newest one has to be loaded.
    await platform.generate(worker, name, text="so", max_tokens=1)

    inspecting = asyncio.create_task(inspection(platform, worker, name))
    await checkpoints.has_loaded.wait()
    for text in texts[4 : 4 + num_later]:
        later = await platform.flush(worker, name)
        await platform.append(name, text)
    checkpoints.is_open.set()
    responses = await inspecting

    assert responses[0].stream == shown.stream
    heads = [response.head for response in responses if response.HasField("head")]
    assert {head.positions[-1] for head in heads} == {shown.stream.tokens - 1}
    log = api.LogTokens()
    for response in responses:
        log.MergeFrom(response.log)
    # By then newer checkpoints may have cut off the log's start, or all of the log that was shown.
    start, end = later.stream.log_start_offset, shown.stream.applied_offset
    assert (start < end) == (num_later < 4)
    assert b"".join(texts)[start:].startswith(b"".join(log.pieces))
    assert 0 <= sum(map(len, log.pieces)) - max(0, end - start) < 16
    first_position = shown.stream.tokens - len(log.token_ids)
    kept = {p: id_ for p, id_ in zip(heads[0].positions, heads[0].token_ids, strict=True) if p >= first_position}
    assert kept == {p: log.token_ids[p - first_position] for p in kept}


async def test_an_inspection_has_the_policys_score_of_each_kept_token(platform: Any, make_text: Text) -> None:
    worker, policy = await platform.worker(policy="heavy-hitter/1"), HeavyHitter()
    name = await platform.stream()
    await platform.append(name, make_text(900))
    record = await platform.flush(worker, name)

    responses = await inspection(platform, worker, name)

    settings = MemorySettings(kv_budget_tokens=48, segment_length=16, num_sink_tokens=4)
    state = await worker.parts.checkpoints.load(name, record.manifest, settings)
    expected_LHS = score(policy, policy.features(state))
    assert expected_LHS.unique().numel() > 1
    heads = [response.head for response in responses if response.HasField("head")]
    assert [list(head.scores) for head in heads] == expected_LHS.flatten(0, 1).tolist()


async def test_an_inspection_of_a_stream_whose_policy_does_not_score_has_no_scores(
    platform: Any, make_text: Text
) -> None:
    worker = await platform.worker(policy="sinks-recent/1")
    name = await platform.stream()
    await platform.append(name, make_text(900))
    await platform.flush(worker, name)

    heads = [response.head for response in await inspection(platform, worker, name) if response.HasField("head")]

    assert [(len(head.positions), len(head.scores), len(head.memory_gates)) for head in heads] == [(48, 0, 0)] * 4


async def test_an_inspection_of_a_stream_without_a_checkpoint_has_no_tokens(platform: Any) -> None:
    worker = await platform.worker(policy="heavy-hitter/1")
    name = await platform.stream()

    first, *others = await inspection(platform, worker, name)

    assert first.stream.name == name
    assert [(len(each.head.positions), len(each.head.scores)) for each in others] == [(0, 0)] * 4


async def test_an_inspection_has_the_gates_of_a_compressive_memory(
    platform: Any, make_text: Text, tmp_path: Path
) -> None:
    write_tiny_model(tmp_path, compressive_memory=CompressiveMemoryConfig(update_rule="delta"))
    worker = await platform.worker(model_path=tmp_path)
    name = await platform.stream()
    await platform.append(name, make_text(900))
    await platform.flush(worker, name)

    heads = [response.head for response in await inspection(platform, worker, name) if response.HasField("head")]

    gates = load_weights(tmp_path, worker.parts.decoder.dtypes.weights).memory_gates
    for head in heads:
        mixing = gates[head.layer].mixing.view(worker.parts.decoder.config.num_kv_heads, -1)
        assert list(head.memory_gates) == mixing[head.head].sigmoid().tolist()
    assert len(heads) == 4
