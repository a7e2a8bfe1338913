"""What a worker makes of its sidecar's choices, and what it logs of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
from prometheus_client import REGISTRY

from eunoe.clients.eviction_sidecar import EvictionSidecarClient
from eunoe.eviction import POLICIES, KeyNorm
from eunoe.eviction.policy_files import PolicyFiles
from eunoe.internal.v1 import eviction_sidecar_pb2 as pb
from eunoe.model_worker.evictions import StreamEvictions
from eunoe.model_worker.sidecar import Sidecar
from eunoe.runtime.errors import Unavailable

STREAM = "tenants/t/streams/s"
KEYS_LHSD = torch.arange(2 * 3 * 32 * 4).view(2, 3, 32, 4).float()
POSITIONS_LHS = torch.arange(32, dtype=torch.int32).expand(2, 3, 32)
LOST = "a shadow was not compared"
LEFT_OUT = "the sidecar chose a shadow that is left out"
WITHOUT, AGAIN = "a stream is decided without its policy", "a stream is decided by its policy again"


@dataclass
class FakeClient:
    """A sidecar that chooses what it is told, and has no scores."""

    policy: str = "key-norm/1"
    shadow: str = ""
    is_comparing: bool = False
    compared: list[str] = field(default_factory=list)
    lost: str = ""

    def choose_policy(self, stream: str) -> pb.ChoosePolicyResponse:
        return pb.ChoosePolicyResponse(policy=self.policy, shadow_policy=self.shadow)

    def score_slots(self, request: pb.ScoreSlotsRequest, spent_seconds: float) -> pb.ScoreSlotsResponse:
        raise Unavailable("it is away")

    def compare_policies(self, request: pb.ComparePoliciesRequest, on_lost: Callable[[str], None]) -> None:
        self.compared.append(request.shadow_policy)
        if self.lost:
            on_lost(self.lost)

    def record_eviction(self, request: pb.RecordEvictionRequest, on_lost: Callable[[], None]) -> None:
        pass


@dataclass(frozen=True)
class FakeWindow:
    """Two layers of three heads under a policy without statistics."""

    keys_LHSD: torch.Tensor = KEYS_LHSD
    positions_LHS: torch.Tensor = POSITIONS_LHS
    statistics_LHSB: None = None
    num_slots: int = 32
    num_sink_tokens: int = 4


@pytest.fixture
def client() -> FakeClient:
    return FakeClient()


@pytest.fixture
def make_sidecar(client: FakeClient) -> Callable[..., Sidecar]:
    def made(*, scores_in_process: bool = True) -> Sidecar:
        return Sidecar(
            cast(EvictionSidecarClient, client),
            PolicyFiles(None),
            deadline_seconds=1.0,
            scores_in_process=scores_in_process,
            payload_dir=None,
            stem="worker",
        )

    return made


@pytest.mark.parametrize(
    ("policy", "shadow"),
    [
        ("sinks-recent/1", "heavy-hitter/1"),
        ("key-norm/1", "snapkv/1"),
        ("heavy-hitter/1", "snapkv/1"),
        ("key-norm/1", "sinks-recent/1"),
        ("key-norm/1", "namm/1/0123456789abcdef"),
    ],
    ids=["no statistics", "none of two", "other statistics", "no scores", "unknown"],
)
def test_a_shadow_that_cannot_be_scored_is_left_out_and_its_policy_taken(
    client: FakeClient,
    make_sidecar: Callable[..., Sidecar],
    caplog: pytest.LogCaptureFixture,
    policy: str,
    shadow: str,
) -> None:
    client.policy, client.shadow = policy, shadow
    sidecar = make_sidecar()

    choices = [sidecar.choose(STREAM, POLICIES["snapkv/1"]) for _ in range(3)]

    assert {choice.policy.name for choice in choices} == {policy}
    assert [choice.shadow for choice in choices] == [None] * 3
    assert caplog.messages == [LEFT_OUT]


@pytest.mark.parametrize(("policy", "shadow"), [("sinks-recent/1", "key-norm/1"), ("heavy-hitter/1", "heavy-hitter/1")])
def test_a_shadow_of_the_same_statistics_or_of_none_stays(
    client: FakeClient, make_sidecar: Callable[..., Sidecar], policy: str, shadow: str
) -> None:
    client.policy, client.shadow = policy, shadow

    choice = make_sidecar().choose(STREAM, POLICIES["snapkv/1"])

    assert choice.shadow is not None
    assert (choice.policy.name, choice.shadow.name) == (policy, shadow)


def test_a_stream_evicts_beside_a_shadow_whose_statistics_it_has_not(
    client: FakeClient, make_sidecar: Callable[..., Sidecar]
) -> None:
    window: Any = FakeWindow()
    evictions = StreamEvictions(STREAM, KeyNorm(), make_sidecar())

    client.shadow = "heavy-hitter/1"
    beside = evictions.choose(0).keep(window, 16)
    client.shadow = "key-norm/1"
    evictions.choose(1).keep(window, 16)

    assert torch.equal(beside, KeyNorm().keep(window, 16))
    assert client.compared == ["key-norm/1"]


def test_every_comparison_that_fails_is_counted_and_the_first_of_a_kind_logged(
    client: FakeClient, make_sidecar: Callable[..., Sidecar], caplog: pytest.LogCaptureFixture
) -> None:
    window: Any = FakeWindow()
    evictions = StreamEvictions(STREAM, KeyNorm(), make_sidecar())
    client.shadow = "key-norm/1"
    before = REGISTRY.get_sample_value("eunoe_worker_lost_comparisons_total") or 0.0

    for segment, client.lost in enumerate(["too large", "too large", "", "not here"]):
        evictions.choose(segment).keep(window, 16)

    assert REGISTRY.get_sample_value("eunoe_worker_lost_comparisons_total") == before + 3
    logged = [(record.message, vars(record)["problem"]) for record in caplog.records]
    assert logged == [(LOST, "too large"), (LOST, "not here")]


def test_a_policy_that_is_not_here_is_logged_once(
    client: FakeClient, make_sidecar: Callable[..., Sidecar], caplog: pytest.LogCaptureFixture
) -> None:
    sidecar = make_sidecar()
    client.policy = "namm/1/0123456789abcdef"

    for _ in range(3):
        sidecar.choose(STREAM, KeyNorm())

    assert caplog.messages == ["the sidecar chose a policy that is not here"]


def test_a_fallback_is_logged_when_it_begins_and_when_it_ends(
    client: FakeClient, make_sidecar: Callable[..., Sidecar], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    window: Any = FakeWindow()
    evictions = StreamEvictions(STREAM, KeyNorm(), make_sidecar(scores_in_process=False))

    names = []
    for segment, policy in enumerate(["sinks-recent/1", *3 * ["key-norm/1"], *2 * ["sinks-recent/1"], "key-norm/1"]):
        client.policy = policy
        decider = evictions.choose(segment)
        decider.keep(window, 16)
        names.append(decider.name)

    fallback = "fallback:unavailable:key-norm/1"
    assert names == ["sinks-recent/1", *3 * [fallback], *2 * ["sinks-recent/1"], fallback]
    logged = [(record.levelname, record.message, vars(record)["policy"]) for record in caplog.records]
    assert logged == [
        ("WARNING", WITHOUT, fallback),
        ("INFO", AGAIN, "sinks-recent/1"),
        ("WARNING", WITHOUT, fallback),
    ]
    assert {vars(record)["stream"] for record in caplog.records} == {STREAM}


def test_a_policy_without_room_waits_beside_the_one_before_it(
    client: FakeClient, make_sidecar: Callable[..., Sidecar], caplog: pytest.LogCaptureFixture
) -> None:
    room = {"key-norm/1"}
    evictions = StreamEvictions(STREAM, KeyNorm(), make_sidecar(), has_room=lambda policy: policy.name in room)
    client.policy = "heavy-hitter/1"

    waiting = [evictions.choose(segment).name for segment in range(2)]
    room.add("heavy-hitter/1")
    admitted = evictions.choose(2).name

    assert (waiting, admitted) == (["key-norm/1"] * 2, "heavy-hitter/1")
    assert caplog.messages == ["a policy waits for room for its statistics"]
