"""Calls that read a memory: passed to the owner, found again when it moves or dies, cancelled in both directions."""

import asyncio
from typing import Any

import grpc
import pytest

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.internal.v1 import model_worker_pb2
from eunoe.runtime.errors import (
    DeadlineTooShort,
    InvalidRequest,
    NotOwner,
    PromptTooLong,
    Unavailable,
    from_rpc_error,
)


async def generated(stub: Any, name: str, **values: Any) -> list[api.GenerateResponse]:
    request = api.GenerateRequest(**({"stream": name, "text": "Hello", "max_tokens": 3} | values))
    return [response async for response in stub.Generate(request)]


def kinds(responses: list[api.GenerateResponse]) -> list[str | None]:
    return [response.WhichOneof("response") for response in responses]


async def test_an_answer_streams_through(stub: Any, stream: str) -> None:
    responses = await generated(stub, stream)

    assert kinds(responses) == ["catching_up", "tokens", "tokens", "tokens", "summary"]
    assert "".join(response.tokens.text for response in responses) == "0 1 2 "


async def test_a_text_is_scored(stub: Any, stream: str) -> None:
    responses = [r async for r in stub.Score(api.ScoreRequest(stream=stream, text="ab"))]

    assert list(responses[0].tokens.token_ids) == [97, 98]


async def test_a_memory_is_inspected(stub: Any, stream: str) -> None:
    responses = [r async for r in stub.InspectMemory(api.InspectMemoryRequest(name=stream))]

    assert responses[0].head.texts == ["a"]


async def test_a_memory_is_inspected_beside_its_log(stub: Any, stream: str) -> None:
    request = api.InspectMemoryRequest(name=stream, with_log=True)
    responses = [r async for r in stub.InspectMemory(request)]

    assert [r.WhichOneof("response") for r in responses] == ["head", "log"]


async def test_the_owners_errors_reach_the_client(stub: Any, stream: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        await generated(stub, stream, text="x" * 65)

    error = from_rpc_error(caught.value)
    assert isinstance(error, PromptTooLong)
    assert (error.num_tokens, error.limit_tokens) == (65, 64)


async def test_a_bad_sampling_value_is_invalid(stub: Any, stream: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        await generated(stub, stream, sampling=api.Sampling(temperature=-1))

    assert isinstance(from_rpc_error(caught.value), InvalidRequest)


async def test_a_cancelled_answer_is_cancelled_at_the_worker(stub: Any, stream: str, worker: Any) -> None:
    worker.is_open.clear()
    call = stub.Generate(api.GenerateRequest(stream=stream, max_tokens=3))
    await call.read()

    call.cancel()

    await asyncio.wait_for(worker.has_cancelled.wait(), 10)


async def test_a_deadline_ends_the_answer_at_the_worker_too(stub: Any, stream: str, worker: Any) -> None:
    await generated(stub, stream)
    worker.is_open.clear()

    with pytest.raises(grpc.RpcError) as caught:
        async for _ in stub.Generate(api.GenerateRequest(stream=stream, max_tokens=3), timeout=0.5):
            pass

    assert isinstance(from_rpc_error(caught.value), DeadlineTooShort)
    await asyncio.wait_for(worker.has_cancelled.wait(), 10)


async def test_a_call_follows_the_stream_to_its_new_owner(stub: Any, a_worker: Any, model: str, a_stream: Any) -> None:
    first = await a_worker()
    name = await a_stream(stub, model)
    await generated(stub, name)
    await first.give_back(name)
    second = await a_worker()
    await first.stop()

    responses = await generated(stub, name)

    assert kinds(responses)[-1] == "summary"
    assert second.num_calls["Generate"] == 1


async def test_a_redirect_needs_no_directory(stub: Any, a_worker: Any, model: str, a_stream: Any, store: Any) -> None:
    first = await a_worker()
    name = await a_stream(stub, model)
    await generated(stub, name)
    await first.give_back(name)
    second = await a_worker()

    await second.TakeStream(model_worker_pb2.TakeStreamRequest(name=name), None)

    await generated(stub, name)

    assert (first.num_calls["Generate"], second.num_calls["Generate"]) == (2, 1)


async def test_an_owner_that_let_go_of_its_memory_is_asked_to_load_it_again(
    stub: Any, stream: str, worker: Any
) -> None:
    await generated(stub, stream)
    worker.memories.clear()

    responses = await generated(stub, stream)

    assert kinds(responses)[-1] == "summary"
    assert worker.num_calls["TakeStream"] == 2


async def test_an_answer_is_begun_again_elsewhere_if_no_token_was_sent(
    stub: Any, a_worker: Any, model: str, a_stream: Any
) -> None:
    first = await a_worker()
    name = await a_stream(stub, model)
    await generated(stub, name)
    second = await a_worker()
    await first.kill()

    responses = await generated(stub, name)

    assert kinds(responses)[-1] == "summary"
    assert second.num_calls["TakeStream"] == 1


async def test_an_answer_that_broke_off_behind_a_token_is_not_begun_again(
    stub: Any, a_worker: Any, model: str, a_stream: Any
) -> None:
    first = await a_worker()
    name = await a_stream(stub, model)
    await generated(stub, name)
    await a_worker()
    first.is_open.clear()
    responses = []

    with pytest.raises(grpc.RpcError) as caught:
        async for response in stub.Generate(api.GenerateRequest(stream=name, max_tokens=3)):
            responses.append(response)
            if response.HasField("tokens"):
                await first.kill()

    assert isinstance(from_rpc_error(caught.value), Unavailable)
    assert kinds(responses) == ["catching_up", "tokens"]


async def test_a_living_owner_loses_nothing_to_a_suspicion(
    stub: Any, a_worker: Any, model: str, a_stream: Any, store: Any
) -> None:
    first = await a_worker()
    name = await a_stream(stub, model)
    await generated(stub, name)
    second = await a_worker()

    with pytest.raises(NotOwner) as caught:
        request = model_worker_pb2.TakeStreamRequest(name=name, suspect=first.memories[name].lease)
        await second.TakeStream(request, None)

    assert caught.value.address == first.address


async def test_without_any_worker_the_call_is_unavailable_and_says_when_to_retry(
    stub: Any, a_worker: Any, model: str, a_stream: Any
) -> None:
    only = await a_worker()
    name = await a_stream(stub, model)
    await only.stop()

    with pytest.raises(grpc.RpcError) as caught:
        await generated(stub, name)

    error = from_rpc_error(caught.value)
    assert isinstance(error, Unavailable)
    assert error.retry_after_seconds > 0
