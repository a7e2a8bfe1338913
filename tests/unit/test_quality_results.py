"""`benchmarks/_quality_results.py`: scores outlive a run that was killed anywhere."""

import sys
from pathlib import Path

import pytest

from eunoe.training.evaluation import Score

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from _quality_results import Key, Results

FIRST, SECOND = Key("a, compact", 0.25, "one"), Key("a, compact", 0.25, "two")
RIGHT, WRONG = Score(is_exact=True, log_likelihood=-0.5, num_slots=7), Score(False, -9.0, 7)


def test_of_a_file_that_ends_anywhere_every_whole_line_counts_and_the_run_goes_on(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    results = Results(whole)
    results.add(FIRST, RIGHT)
    num_first = whole.stat().st_size
    results.add(SECOND, WRONG)
    content = whole.read_bytes()

    for size in range(len(content) + 1):
        cut = tmp_path / "cut.jsonl"
        cut.write_bytes(content[:size])
        found = Results(cut)
        assert (FIRST in found, SECOND in found) == (size >= num_first, size == len(content))
        for key, score in ((FIRST, RIGHT), (SECOND, WRONG)):
            if key not in found:
                found.add(key, score)

        again = Results(cut)

        assert (again[FIRST], again[SECOND]) == (RIGHT, WRONG)


def test_scores_are_told_apart_by_policy_share_and_case(tmp_path: Path) -> None:
    results = Results(tmp_path / "scores" / "all.jsonl")
    results.add(FIRST, RIGHT)
    results.add(SECOND, WRONG)

    assert results.exact("a, compact", 0.25, ["two", "one"]) == [0.0, 1.0]
    assert results.log_likelihoods("a, compact", 0.25, ["one", "two"]) == [-0.5, -9.0]
    for policy, share in (("b, compact", 0.25), ("a, compact", 0.5)):
        with pytest.raises(KeyError):
            results.exact(policy, share, ["one"])
