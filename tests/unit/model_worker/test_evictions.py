"""What is recorded of an eviction, and what follows from it."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from eunoe.eviction import POLICIES, EvictionPolicy, HeavyHitter, SnapKV
from eunoe.eviction.fallback import Fallback
from eunoe.internal.v1.state_store_pb2 import DecisionRun
from eunoe.model_worker.evictions import StreamEvictions, dropped_runs, recorded_policy


@given(st.integers(1, 40), st.data())
def test_dropped_runs_are_the_positions_that_no_head_keeps_any_more(num_slots: int, data: st.DataObject) -> None:
    heads = [data.draw(st.sets(st.integers(0, 60), min_size=num_slots, max_size=num_slots)) for _ in range(6)]
    num_kept = data.draw(st.integers(1, num_slots))
    slots = st.sets(st.integers(0, num_slots - 1), min_size=num_kept, max_size=num_kept)
    kept = [sorted(data.draw(slots)) for _ in heads]
    positions_LHS = torch.tensor([sorted(head) for head in heads], dtype=torch.int32).view(2, 3, -1)
    kept_LHS = torch.tensor(kept).view(2, 3, -1)

    runs = [*zip(*map(list, dropped_runs(positions_LHS, kept_LHS)), strict=True)]

    after = set(positions_LHS.gather(2, kept_LHS).flatten().tolist())
    expected = set(positions_LHS.flatten().tolist()) - after
    assert {position for first, last in runs for position in range(first, last + 1)} == expected
    assert all(after_last + 1 < first for (_, after_last), (first, _) in pairwise(runs))


def test_segments_that_were_folded_before_are_folded_as_it_was_recorded() -> None:
    decisions = [
        DecisionRun(first_segment=2, policy="heavy-hitter/1"),
        DecisionRun(first_segment=4, policy="fallback:late:heavy-hitter/1"),
        DecisionRun(first_segment=5, policy="namm/1/of-another-machine"),
        DecisionRun(first_segment=6, policy="heavy-hitter/1"),
    ]

    def recorded(segment: int) -> EvictionPolicy | None:
        return recorded_policy(segment, decisions, 7, POLICIES)

    evictions = StreamEvictions("tenants/t/streams/s", SnapKV(), None, recorded)
    chosen = [evictions.choose(segment).name for segment in range(8)]

    fallback = Fallback("late", HeavyHitter()).name
    heavy_hitter, now = HeavyHitter().name, SnapKV().name
    assert chosen == [now, now, heavy_hitter, heavy_hitter, fallback, now, heavy_hitter, now]
