"""Disturbed streams in small numbers; `make faults` and benchmarks/faults.py have the large ones."""

from pathlib import Path

import pytest
from disturbed_stream import Shape
from worker_faults import FAILPOINTS, byte_equality, kills_at_failpoints, stale_commits


async def test_disturbed_streams_end_with_the_memory_of_undisturbed_ones(tiny_model: Path) -> None:
    figures = await byte_equality(10, seed=1, model_path=tiny_model)

    assert figures.unequal == ()
    assert figures.num_equal == 10
    assert sum(figures.faults.values()) >= 5


async def test_what_a_worker_commits_after_its_lease_is_refused(tiny_model: Path) -> None:
    figures = await stale_commits(25, seed=1, model_path=tiny_model)

    assert figures.num_pauses >= 25
    assert figures.num_accepted == 0
    assert figures.num_equal == figures.num_streams


async def test_a_worker_may_die_at_every_failpoint(tiny_model: Path) -> None:
    figures = await kills_at_failpoints(1, seed=1, model_path=tiny_model)

    assert figures.wrong == ()
    assert set(figures.kills) == set(FAILPOINTS)
    assert figures.num_equal == figures.num_remembered_once == len(FAILPOINTS)


@pytest.mark.faults
@pytest.mark.timeout(900)
async def test_500_disturbed_streams_end_with_the_memory_of_undisturbed_ones(tiny_model: Path) -> None:
    figures = await byte_equality(500, seed=7, model_path=tiny_model)
    print(figures)

    assert figures.unequal == ()
    assert figures.num_equal == 500
    assert figures.faults["kill"] + figures.faults["kill at a failpoint"] >= 60


@pytest.mark.faults
@pytest.mark.timeout(600)
async def test_no_commit_of_500_is_accepted_after_the_lease(tiny_model: Path) -> None:
    figures = await stale_commits(500, seed=7, model_path=tiny_model)
    print(figures)

    assert figures.num_pauses >= 500
    assert figures.num_accepted == 0
    assert figures.num_inside_commits > 0
    assert figures.num_equal == figures.num_streams


@pytest.mark.faults
@pytest.mark.timeout(600)
async def test_a_worker_may_die_at_every_failpoint_eight_times(tiny_model: Path) -> None:
    figures = await kills_at_failpoints(8, seed=7, model_path=tiny_model)
    print(figures)

    assert figures.wrong == ()
    assert set(figures.kills.values()) == {8}


@pytest.mark.model
@pytest.mark.full
@pytest.mark.timeout(900)
async def test_disturbed_streams_of_a_real_model_end_equal(smollm2_directory: Path) -> None:
    shape = Shape(num_bytes=(2500, 3500), segment_length=64, kv_budget_tokens=128)
    figures = await byte_equality(10, seed=7, model_path=smollm2_directory, shape=shape)
    print(figures)

    assert figures.unequal == ()
    assert figures.num_equal == 10
