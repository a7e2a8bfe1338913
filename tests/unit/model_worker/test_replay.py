"""Which decisions a fold from a checkpoint on needs, and what of them is missing."""

from types import SimpleNamespace
from typing import Any

import pytest

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.eviction import SinksRecent
from eunoe.eviction.fallback import Fallback
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.model_worker.replay import Recorded

POLICIES = {"a": SinksRecent("a"), "b": SinksRecent("b")}
DECODER: Any = SimpleNamespace(model_digest="weights", numerics_id="here")


def checkpoint(num_segments: int, *runs: tuple[int, str, str], **fields: Any) -> pb.Manifest:
    decisions = [pb.DecisionRun(first_segment=first, policy=policy, numerics_id=where) for first, policy, where in runs]
    values = {"encoding_version": 1, "model_digest": "weights"} | fields
    return pb.Manifest(tokens=16 * num_segments, decisions=decisions, **values)


def recorded(start: pb.Manifest, *checkpoints: pb.Manifest) -> Recorded:
    return Recorded(start, checkpoints, 16, POLICIES)


def missing(start: pb.Manifest, *checkpoints: pb.Manifest) -> list[tuple[str, str, int]]:
    return [
        (api.MissingKind.Name(each.kind).removeprefix("MISSING_KIND_"), each.recorded, each.first_segment)
        for each in recorded(start, *checkpoints).missing(DECODER)
    ]


def test_each_segment_has_the_policy_of_its_run() -> None:
    newest = checkpoint(9, (0, "a", "here"), (4, "b", "here"), (5, "a", "here"))

    of = recorded(pb.Manifest(), newest)

    assert [of.policy_at(segment).name for segment in range(9)] == [*"aaaabaaaa"]
    assert of.num_segments == 9


@pytest.mark.parametrize(
    ("start", "named"),
    [
        (0, [("NUMERICS", "long ago", 0), ("POLICY", "x", 0), ("NUMERICS", "elsewhere", 3)]),
        (2, [("NUMERICS", "long ago", 0), ("POLICY", "x", 0), ("NUMERICS", "elsewhere", 3)]),
        (3, [("NUMERICS", "elsewhere", 3)]),
        (4, [("NUMERICS", "elsewhere", 3)]),
        (5, []),
        (7, []),
        (8, []),
    ],
)
def test_only_runs_with_a_segment_to_fold_can_be_missing(start: int, named: list[tuple[str, str, int]]) -> None:
    newest = checkpoint(8, (0, "x", "long ago"), (3, "a", "elsewhere"), (5, "b", "here"))

    assert missing(checkpoint(start), newest) == named


def test_a_run_whose_record_was_dropped_is_missing() -> None:
    newest = checkpoint(8, (5, "a", "here"))

    assert missing(checkpoint(3), newest) == [("NUMERICS", "", 3), ("POLICY", "", 3)]
    assert missing(checkpoint(5), newest) == []
    assert missing(checkpoint(3), checkpoint(8)) == [("NUMERICS", "", 3), ("POLICY", "", 3)]


def test_what_several_checkpoints_lack_is_named_once() -> None:
    run = (0, "a", "here")
    checkpoints = [
        checkpoint(1, run, encoding_version=7),
        checkpoint(2, run, encoding_version=7, model_digest="others"),
        checkpoint(3, run, model_digest="others"),
    ]

    assert missing(checkpoints[0], *checkpoints) == [("ENCODING", "7", 0), ("MODEL", "others", 0)]


def test_a_fallback_is_folded_as_one_and_needs_the_policy_whose_statistics_go_on() -> None:
    newest = checkpoint(6, (0, "a", "here"), (3, "fallback:late:a", "here"), (4, "fallback:late:x", "here"))

    of = recorded(pb.Manifest(), newest)

    assert of.policy_at(3) == Fallback("late", POLICIES["a"])
    assert missing(pb.Manifest(), newest) == [("POLICY", "x", 4)]
