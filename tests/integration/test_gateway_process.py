"""The gateway as a process: it says where it listens, and SIGTERM ends it in order."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.api.v1 import long_context_pb2_grpc
from eunoe.gateway.config import GatewayConfig
from eunoe.runtime.config import to_env
from eunoe.runtime.errors import Unavailable, from_rpc_error
from eunoe.runtime.grpc_channel import open_channel


@pytest.fixture
async def process(state_store: Any, tmp_path: Path, until: Any) -> AsyncIterator[tuple[Any, str]]:
    """`python -m eunoe.gateway` and its address."""
    config = GatewayConfig(
        state_store_address=state_store.address,
        listen_address="127.0.0.1:0",
        requires_key=False,
        ready_file=tmp_path / "ready.json",
        log_format="json",
    )
    environment = os.environ | to_env(config, "EUNOE_GATEWAY") | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    started = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "eunoe.gateway", env=environment, stderr=asyncio.subprocess.PIPE
    )
    await until((tmp_path / "ready.json").exists)
    ready = json.loads((tmp_path / "ready.json").read_text())
    assert ready["pid"] == started.pid
    yield started, ready["address"]
    if started.returncode is None:
        started.kill()
        await started.wait()


async def test_sigterm_ends_appends_finishes_answers_and_exits_0(
    process: tuple[Any, str], worker: Any, model: str, a_stream: Any, append_to: Any
) -> None:
    started, address = process
    async with open_channel(address) as channel:
        stub = long_context_pb2_grpc.LongContextServiceStub(channel)
        name = await a_stream(stub, model)
        append = await append_to(stub, name)
        await append.record(b"durable")
        answer = stub.Generate(api.GenerateRequest(stream=name, max_tokens=3))
        await answer.read()
        worker.is_open.clear()

        started.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as caught:
            await append.next()
        worker.is_open.set()
        kinds = []
        while response := await answer.read():
            kinds.append(response.WhichOneof("response"))
        _, errors = await asyncio.wait_for(started.communicate(), 20)

    assert isinstance(from_rpc_error(caught.value), Unavailable)
    assert kinds[-1] == "summary"
    assert started.returncode == 0
    assert [json.loads(line)["message"] for line in errors.splitlines()][-1] == "drained"


async def test_a_misspelt_setting_stops_the_process() -> None:
    environment = os.environ | {
        "EUNOE_GATEWAY_LISTEN_ADRESS": "x",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    started = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "eunoe.gateway", env=environment, stderr=asyncio.subprocess.PIPE
    )
    _, errors = await started.communicate()

    assert started.returncode != 0
    assert b"EUNOE_GATEWAY_LISTEN_ADRESS is no setting" in errors
