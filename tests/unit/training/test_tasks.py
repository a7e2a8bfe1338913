import numpy as np
import pytest

from eunoe.decoder.tokenizer import Tokenizer
from eunoe.training.tasks.case import Case
from eunoe.training.tasks.haystack import Split, lines
from eunoe.training.tasks.needle import KINDS
from eunoe.training.tasks.suite import SUITE, cases, suite
from eunoe.training.tasks.training_mix import training_mix

NUM_TOKENS = 1024
SPLITS: tuple[Split, ...] = ("train", "test")
CELLS = [(*cell, split) for cell in SUITE for split in SPLITS if KINDS[cell[1]].templates(split)]


def some_cases(tokenizer: Tokenizer, task: str, kind: str, split: Split, seed: int = 0) -> list[Case]:
    return cases(task, kind, NUM_TOKENS, 4, seed=seed, split=split, tokenizer=tokenizer)


def all_tokens(case: Case) -> np.ndarray:
    return np.concatenate([case.context, case.question, case.answer])


@pytest.mark.parametrize(("task", "kind", "split"), CELLS)
def test_the_answer_is_in_the_tokens_of_its_needle(tokenizer: Tokenizer, task: str, kind: str, split: Split) -> None:
    for case in some_cases(tokenizer, task, kind, split):
        start, stop = case.needles[0]

        assert tokenizer.decode(case.answer).strip() in tokenizer.decode(case.context[start:stop])


@pytest.mark.parametrize(("task", "kind", "split"), CELLS)
def test_contexts_have_the_very_length_and_their_needles_within(
    tokenizer: Tokenizer, task: str, kind: str, split: Split
) -> None:
    for case in some_cases(tokenizer, task, kind, split):
        assert len(case.context) == NUM_TOKENS
        assert all(0 < start < stop <= NUM_TOKENS for start, stop in case.needles)


@pytest.mark.parametrize(("task", "kind", "split"), CELLS)
def test_the_answer_continues_the_question_token_by_token(
    tokenizer: Tokenizer, task: str, kind: str, split: Split
) -> None:
    for case in some_cases(tokenizer, task, kind, split):
        text = tokenizer.decode(case.question) + tokenizer.decode(case.answer)

        assert tokenizer.encode(text) == [*case.question, *case.answer]


def test_equal_arguments_make_equal_cases_and_another_seed_makes_others(tokenizer: Tokenizer) -> None:
    first, again, other = (suite(NUM_TOKENS, 24, seed=seed, split="test", tokenizer=tokenizer) for seed in (5, 5, 6))

    assert all(np.array_equal(all_tokens(a), all_tokens(b)) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a.context, b.context) for a, b in zip(first, other, strict=True))


def test_a_suite_has_every_task_and_kind_in_both_haystacks(tokenizer: Tokenizer) -> None:
    made = suite(NUM_TOKENS, 2 * len(SUITE), seed=0, split="test", tokenizer=tokenizer)

    assert {(case.task, case.kind) for case in made} == set(SUITE)
    assert {(case.task, case.kind, case.haystack) for case in made} == {
        (*cell, haystack) for cell in SUITE for haystack in ("book", "code")
    }


def test_needles_are_spread_over_the_whole_context(tokenizer: Tokenizer) -> None:
    made = cases("single", "digits", NUM_TOKENS, 8, seed=0, split="train", tokenizer=tokenizer)

    depths = [case.needles[0][0] / NUM_TOKENS for case in made]

    assert min(depths) < 0.25
    assert max(depths) > 0.75


def test_the_first_cases_of_a_mix_which_validate_have_needles_everywhere(tokenizer: Tokenizer) -> None:
    for count in (24, 64):
        mix = training_mix(NUM_TOKENS, count, seed=0, tokenizer=tokenizer)

        depths = [case.needles[0][0] / NUM_TOKENS for case in mix[:8] if case.needles]

        assert len(depths) == 6
        assert min(depths) < 0.3
        assert max(depths) > 0.7


def test_the_manual_tests_and_never_trains(tokenizer: Tokenizer) -> None:
    made = suite(NUM_TOKENS, 3, seed=0, split="test", tokenizer=tokenizer, haystacks=["manual"])

    assert {case.haystack for case in made} == {"manual"}
    assert len(lines("manual", "test")) > 5_000
    with pytest.raises(ValueError, match="manual is held out"):
        suite(NUM_TOKENS, 3, seed=0, split="train", tokenizer=tokenizer, haystacks=["manual"])


def test_no_template_trains_and_tests() -> None:
    for kind in KINDS.values():
        assert kind.test
        assert not set(kind.training) & set(kind.test)


def test_whole_kinds_are_held_out(tokenizer: Tokenizer) -> None:
    held_out = {name for name, kind in KINDS.items() if not kind.training}

    trained = suite(NUM_TOKENS, 20, seed=0, split="train", tokenizer=tokenizer)

    assert len(held_out) >= 2
    assert not held_out & {case.kind for case in trained}
    assert not any(case.is_held_out for case in trained)
    for kind in held_out:
        with pytest.raises(ValueError, match="held out"):
            cases("single", kind, NUM_TOKENS, 1, seed=0, split="train", tokenizer=tokenizer)


def test_no_verse_and_no_source_trains_and_tests() -> None:
    library, other = set(lines("code", "train")), set(lines("code", "test"))

    assert not set(lines("book", "train")) & set(lines("book", "test"))
    assert "class Linear(Module):\n" in other - library
    assert "class ABC(metaclass=ABCMeta):\n" in library - other


def test_a_context_without_room_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="no room"):
        cases("single", "digits", 64, 1, seed=0, split="train", tokenizer=tokenizer)


def test_an_unknown_task_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="no task 'double'"):
        cases("double", "digits", NUM_TOKENS, 1, seed=0, split="train", tokenizer=tokenizer)
