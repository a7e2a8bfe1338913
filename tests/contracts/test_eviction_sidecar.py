"""What the eviction sidecar promises to workers."""

import asyncio
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

import grpc
import pytest
import torch

from eunoe.clients.eviction_sidecar import EvictionSidecarClient
from eunoe.eviction import POLICIES, HeavyHitter, Namm, ScoringPolicy, SnapKV, tensor_payload
from eunoe.eviction.backward_attention import NUM_PARAMETERS, BackwardAttention
from eunoe.eviction.namm import Normalization
from eunoe.eviction.policy import score, scoring_numerics
from eunoe.eviction.tensor_payload import from_message, scores_digest, to_message
from eunoe.eviction_sidecar.config import EvictionSidecarConfig
from eunoe.eviction_sidecar.sidecar import running_sidecar
from eunoe.internal.v1 import eviction_sidecar_pb2 as pb
from eunoe.internal.v1 import eviction_sidecar_pb2_grpc
from eunoe.runtime.config import to_env
from eunoe.runtime.errors import EunoeError, InvalidRequest, Overloaded, PolicyNotFound, Unavailable, from_rpc_error
from eunoe.runtime.grpc_channel import open_channel
from eunoe.runtime.payload_files import PayloadWriter

STREAM = "tenants/acme/streams/book"


def a_namm() -> Namm:
    parameters = 0.3 * torch.randn(NUM_PARAMETERS, generator=torch.Generator().manual_seed(0))
    return Namm(BackwardAttention(parameters), Normalization(torch.zeros(17), torch.ones(17)))


def features(num_features: int, num_slots: int = 300) -> torch.Tensor:
    return torch.randn(2, 3, num_slots, num_features, generator=torch.Generator().manual_seed(1))


@dataclass
class Sidecar:
    config: EvictionSidecarConfig
    stub: eviction_sidecar_pb2_grpc.EvictionSidecarServiceStub

    @property
    def payloads(self) -> Path:
        assert self.config.payload_dir is not None
        return self.config.payload_dir


@asynccontextmanager
async def serving(config: EvictionSidecarConfig) -> AsyncIterator[Sidecar]:
    async with running_sidecar(config) as server:
        await server.start()
        assert server.address == config.listen_address
        async with open_channel(server.address) as channel:
            yield Sidecar(config, eviction_sidecar_pb2_grpc.EvictionSidecarServiceStub(channel))
        await server.drain(0)


@pytest.fixture
async def sidecar() -> AsyncIterator[Sidecar]:
    """With the policy "namm", and rotated audit logs of 1,000 bytes."""
    # Not pytest's tmp_path: a socket's path ends at 107 bytes.
    with tempfile.TemporaryDirectory(prefix="eunoe-sidecar-") as name:
        directory = Path(name)
        a_namm().save(directory / "namm.safetensors")
        (directory / "rules.toml").write_text(
            f'[[rules]]\nstreams = "{STREAM}"\npolicy = "namm"\nshadow = "key-norm/1"'
        )
        config = EvictionSidecarConfig(
            listen_address=f"unix:{directory}/sidecar.sock",
            policies_dir=directory,
            payload_dir=directory,
            audit_file=directory / "audit" / "evictions.jsonl",
            audit_file_bytes=1000,
            num_audit_files=3,
            reload_seconds=0.02,
        )
        async with serving(config) as sidecar:
            yield sidecar


@pytest.fixture(autouse=True)
def all_logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")


def write_rules(sidecar: Sidecar, text: str) -> None:
    partial = sidecar.payloads / "rules.partial"
    partial.write_text(text)
    partial.replace(sidecar.payloads / "rules.toml")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_stream_has_the_policy_and_shadow_of_its_rule(sidecar: Sidecar) -> None:
    ruled = await sidecar.stub.ChoosePolicy(pb.ChoosePolicyRequest(stream=STREAM))
    other = await sidecar.stub.ChoosePolicy(pb.ChoosePolicyRequest(stream="tenants/acme/streams/other"))

    assert (ruled.policy, ruled.shadow_policy) == (a_namm().name, "key-norm/1")
    assert (other.policy, other.shadow_policy) == ("sinks-recent/1", "")


@pytest.mark.parametrize(
    ("policy", "num_slots"),
    [(a_namm(), 1), (a_namm(), 300), (a_namm(), 2000), (HeavyHitter(), 300), (SnapKV(), 300)],
    ids=lambda value: str(getattr(value, "name", value)).split("/")[0],
)
async def test_scores_are_those_of_the_policy_bit_for_bit(
    sidecar: Sidecar, policy: ScoringPolicy, num_slots: int
) -> None:
    feature_LHSI = features(25 if isinstance(policy, Namm) else 1, num_slots)
    message = to_message(feature_LHSI, PayloadWriter(sidecar.payloads, "test"))

    response = await sidecar.stub.ScoreSlots(pb.ScoreSlotsRequest(policy=policy.name, features=message))

    scores_LHS = score(policy, feature_LHSI)
    assert torch.equal(from_message(response.scores, sidecar.payloads), scores_LHS)
    assert response.numerics == scoring_numerics()
    assert response.digest == scores_digest(policy.name, feature_LHSI, scores_LHS)


async def test_more_than_a_message_holds_comes_and_goes_in_files(sidecar: Sidecar) -> None:
    feature_LHSI = features(1, 60_000)
    message = to_message(feature_LHSI, PayloadWriter(sidecar.payloads, "test"))

    response = await sidecar.stub.ScoreSlots(pb.ScoreSlotsRequest(policy="heavy-hitter/1", features=message))

    assert message.HasField("file")
    assert response.scores.HasField("file")
    assert torch.equal(from_message(response.scores, sidecar.payloads), feature_LHSI[..., 0])


async def test_half_precision_is_taken(sidecar: Sidecar) -> None:
    feature_LHSI = features(25).half()

    response = await sidecar.stub.ScoreSlots(
        pb.ScoreSlotsRequest(policy=a_namm().name, features=to_message(feature_LHSI, None))
    )

    assert torch.equal(from_message(response.scores, None), score(a_namm(), feature_LHSI.float()))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("sinks-recent/1", to_message(features(1), None)),
        ("heavy-hitter/1", pb.Tensor()),
        ("heavy-hitter/1", to_message(features(1)[0], None)),
        ("heavy-hitter/1", pb.Tensor(shape=[2, 3, 300, 1], dtype=pb.TENSOR_DTYPE_FLOAT32, data=b"short")),
        ("heavy-hitter/1", pb.Tensor(shape=[1 << 20] * 4, dtype=pb.TENSOR_DTYPE_FLOAT32)),
        ("heavy-hitter/1", pb.Tensor(shape=[2, 3, 9, 1], dtype=pb.TENSOR_DTYPE_FLOAT32, file=pb.PayloadFile(name="x"))),
        (a_namm().name, to_message(features(24), None)),
    ],
    ids=["no scores", "nothing", "three axes", "too short", "gigabytes", "no such file", "24 of 25 features"],
)
async def test_features_that_are_none_are_invalid(sidecar: Sidecar, policy: str, message: pb.Tensor) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await sidecar.stub.ScoreSlots(pb.ScoreSlotsRequest(policy=policy, features=message))

    assert isinstance(from_rpc_error(caught.value), InvalidRequest)


async def test_a_payload_that_was_overwritten_is_invalid(sidecar: Sidecar) -> None:
    writer = PayloadWriter(sidecar.payloads, "test")
    message = to_message(features(25, 4000), writer)
    to_message(features(25, 4000), writer)

    with pytest.raises(grpc.aio.AioRpcError, match="of generation"):
        await sidecar.stub.ScoreSlots(pb.ScoreSlotsRequest(policy=a_namm().name, features=message))


async def test_an_unknown_policy_is_not_found(sidecar: Sidecar) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await sidecar.stub.ScoreSlots(
            pb.ScoreSlotsRequest(policy="namm/1/0123456789abcdef", features=to_message(features(25), None))
        )

    assert isinstance(from_rpc_error(caught.value), PolicyNotFound)


async def test_a_shadow_is_compared_with_what_was_kept(sidecar: Sidecar) -> None:
    feature_LHSI = features(1, 100)
    shadow = POLICIES["heavy-hitter/1"]
    own = feature_LHSI[..., 0].clone()
    own[..., 75:] = torch.inf
    own[..., :4] = torch.inf
    kept = own.sort(dim=-1).indices[..., 50:].sort(dim=-1).values

    async def compared(kept_LHS: torch.Tensor) -> tuple[int, int]:
        request = pb.ComparePoliciesRequest(
            policy="x",
            kept=to_message(kept_LHS.int(), None),
            shadow_policy=shadow.name,
            shadow_features=to_message(feature_LHSI, None),
            budget=50,
            num_sink_tokens=4,
        )
        response = await sidecar.stub.ComparePolicies(request)
        return response.num_kept, response.num_agreed

    assert await compared(kept) == (300, 300)
    assert await compared(torch.arange(50).expand(2, 3, 50)) == (300, int((kept < 50).sum()))
    with pytest.raises(grpc.aio.AioRpcError, match="are not of features"):
        await compared(torch.full((2, 3, 50), 100))


async def test_whoever_has_policies_compared_is_told_that_it_failed(sidecar: Sidecar) -> None:
    client, problems = EvictionSidecarClient(sidecar.config.listen_address, deadline_seconds=20.0), Queue[str]()
    large = pb.ComparePoliciesRequest(kept=pb.Tensor(data=bytes(5 << 20)))

    for request in (large, pb.ComparePoliciesRequest(shadow_policy="key-norm/9")):
        client.compare_policies(request, on_lost=problems.put)

    told = [await asyncio.to_thread(problems.get, timeout=20.0) for _ in range(2)]
    client.close()
    assert any("larger than max" in problem for problem in told)
    assert any("no policy 'key-norm/9'" in problem for problem in told)


async def test_scores_that_find_no_room_are_an_overload(sidecar: Sidecar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_payload, "INLINE_BYTES", 0)
    writer = PayloadWriter(sidecar.payloads, "worker")
    request = pb.ScoreSlotsRequest(policy="key-norm/1", features=to_message(features(1, 100), writer))
    # Where the scores' file would be written.
    (sidecar.payloads / f"{writer.name}-scores.payload").mkdir()

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await sidecar.stub.ScoreSlots(request)

    assert isinstance(from_rpc_error(caught.value), Overloaded)


async def test_evictions_are_lines_of_files_that_are_rotated(sidecar: Sidecar) -> None:
    for segment in range(50):
        await sidecar.stub.RecordEviction(
            pb.RecordEvictionRequest(
                stream=STREAM,
                segment=segment,
                policy="fallback:late:namm/1/x",
                num_slots_before=1536,
                num_slots_after=1024,
                dropped_first=[4, 11],
                dropped_last=[9, 11],
                time_ns=1_500_000_000_123_456_789,
            )
        )

    assert sidecar.config.audit_file is not None
    files = sorted(sidecar.config.audit_file.parent.iterdir())
    lines = [json.loads(line) for path in reversed(files) for line in path.read_text().splitlines()]
    assert [path.name for path in files] == ["evictions.jsonl", "evictions.jsonl.1", "evictions.jsonl.2"]
    assert max(path.stat().st_size for path in files) <= 1000
    assert [line["segment"] for line in lines] == list(range(50 - len(lines), 50))
    assert lines[-1] == {
        "time": "2017-07-14T02:40:00.123Z",
        "stream": STREAM,
        "segment": 49,
        "policy": "fallback:late:namm/1/x",
        "slots_before": 1536,
        "slots_after": 1024,
        "dropped": [[4, 9], [11, 11]],
    }


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
async def test_an_eviction_that_a_full_disk_has_no_room_for_is_not_recorded(
    sidecar: Sidecar, caplog: pytest.LogCaptureFixture
) -> None:
    address = f"unix:{sidecar.payloads}/full.sock"
    full = dataclasses.replace(sidecar.config, listen_address=address, audit_file=Path("/dev/full"))

    async with serving(full) as other:
        for _ in range(2):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await other.stub.RecordEviction(pb.RecordEvictionRequest(stream=STREAM))
            assert isinstance(from_rpc_error(caught.value), Unavailable)

    assert [record.message for record in caplog.records] == ["evictions are not recorded"]


@pytest.mark.parametrize(
    "rules",
    ['[rules]\nstreams = "*"\npolicy = "namm"', '[[rules]]\nstreams = "*"\npolicy = ["namm"]', "rules = 1"],
    ids=["one table", "a list", "a number"],
)
async def test_rules_are_followed_again_once_a_typo_is_corrected(
    sidecar: Sidecar, caplog: pytest.LogCaptureFixture, rules: str
) -> None:
    write_rules(sidecar, rules)
    await until(lambda: "the rules stay as they were" in caplog.messages)
    kept = await sidecar.stub.ChoosePolicy(pb.ChoosePolicyRequest(stream=STREAM))

    write_rules(sidecar, 'default = "key-norm/1"')
    await until(lambda: "there are new policies or rules" in caplog.messages)
    corrected = await sidecar.stub.ChoosePolicy(pb.ChoosePolicyRequest(stream=STREAM))

    assert (kept.policy, corrected.policy) == (a_namm().name, "key-norm/1")
    assert caplog.messages.count("the rules stay as they were") == 1


async def test_a_payload_that_cannot_be_removed_ends_no_watch(
    sidecar: Sidecar, caplog: pytest.LogCaptureFixture
) -> None:
    irremovable, stale = sidecar.payloads / "a-directory.payload", sidecar.payloads / "stale.payload"
    irremovable.mkdir()
    stale.touch()
    for path in (irremovable, stale):
        os.utime(path, (0, 0))
    await until(lambda: "a directory cannot be looked after" in caplog.messages)

    write_rules(sidecar, 'default = "key-norm/1"')
    await until(lambda: "there are new policies or rules" in caplog.messages)

    assert caplog.messages.count("a directory cannot be looked after") == 1
    assert not stale.exists()


def test_an_answer_of_no_message_is_an_error() -> None:
    service = pb.DESCRIPTOR.services_by_name["EvictionSidecarService"].full_name
    # For which the server may send as many messages as it likes.
    handler = grpc.unary_stream_rpc_method_handler(lambda request, context: iter(()))
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"ScoreSlots": handler}),))
    with tempfile.TemporaryDirectory(prefix="eunoe-sidecar-") as directory:
        server.add_insecure_port(f"unix:{directory}/sidecar.sock")
        server.start()
        client = EvictionSidecarClient(f"unix:{directory}/sidecar.sock", deadline_seconds=20.0)

        with pytest.raises(EunoeError, match="answered nothing"):
            client.score_slots(pb.ScoreSlotsRequest())

        client.close()
        server.stop(None).wait()


async def test_a_sidecar_that_nobody_can_connect_to_any_more_ends_and_says_so() -> None:
    with tempfile.TemporaryDirectory(prefix="eunoe-sidecar-") as name:
        directory = Path(name)
        config = EvictionSidecarConfig(
            listen_address=f"unix:{directory}/sidecar.sock", reload_seconds=0.02, ready_file=directory / "ready"
        )
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "eunoe.eviction_sidecar",
            env={**os.environ, **to_env(config, "EUNOE_EVICTION_SIDECAR")},
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(50):
            while not config.ready_file.exists():
                assert process.returncode is None, "the sidecar ended"
                await asyncio.sleep(0.02)

            config.socket_path.unlink()
            _, log = await process.communicate()

        assert process.returncode == 1
        assert b"nobody can connect any more" in log
