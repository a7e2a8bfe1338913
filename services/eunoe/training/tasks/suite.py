"""Tasks in the manner of RULER (Hsieh et al. 2024, arXiv:2404.06654), over real text and code.

Nothing that is read before it tells the question.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from eunoe.decoder.tokenizer import Tokenizer
from eunoe.training.tasks.case import Case
from eunoe.training.tasks.haystack import HaystackName, Split
from eunoe.training.tasks.hiding import hide
from eunoe.training.tasks.needle import KINDS, NeedleKind, Template

# A needle in code is a comment.
_PREFIXES: dict[HaystackName, str] = {"book": "", "code": "# ", "manual": ""}
_HAYSTACKS: tuple[HaystackName, ...] = ("book", "code")

SUITE: tuple[tuple[str, str], ...] = (
    ("single", "digits"),
    ("single", "numbers"),
    ("single", "names"),
    ("single", "words"),
    ("single", "identifiers"),
    ("multi-key", "numbers"),
    ("multi-key", "names"),
    ("multi-key", "words"),
    ("multi-key", "identifiers"),
    ("multi-value", "numbers"),
    ("multi-value", "words"),
    ("common-words", "votes"),
)
"""Every (task, kind). RULER's variable tracking is not among them: with its full cache a 135M model tracks none."""


def suite(
    num_tokens: int,
    num_cases: int,
    *,
    seed: int,
    split: Split,
    tokenizer: Tokenizer,
    haystacks: Sequence[HaystackName] = _HAYSTACKS,
) -> list[Case]:
    """Cases of every task and kind that the split has, in turns; arguments as of `cases`."""
    cells = [(task, kind) for task, kind in SUITE if KINDS[kind].templates(split)]
    made = [
        cases(
            task,
            kind,
            num_tokens,
            len(range(index, num_cases, len(cells))),
            seed=seed,
            split=split,
            tokenizer=tokenizer,
            haystacks=haystacks,
        )
        for index, (task, kind) in enumerate(cells)
    ]
    return [made[index % len(cells)][index // len(cells)] for index in range(num_cases)]


def cases(
    task: str,
    kind: str,
    num_tokens: int,
    count: int,
    *,
    seed: int,
    split: Split,
    tokenizer: Tokenizer,
    haystacks: Sequence[HaystackName] = _HAYSTACKS,
) -> list[Case]:
    """Cases of one task, in the haystacks by turns, with the needle that is asked for at evenly spread depths.

    Args:
        task: Of `TASKS`.
        kind: Of `KINDS`; the pairs that make sense are in `SUITE`.
        num_tokens: Of each context, exactly.
        count: How many.
        seed: Equal arguments make equal cases, on one version of the interpreter and of torch.
        split: Nothing that `train` has is in `test`: neither template nor piece of haystack.
        tokenizer: Of the model that will be asked.
        haystacks: One or more.

    Raises:
        ValueError: If there is no such task or kind, the split has none of that kind or of a haystack, or the context
            has no room.
    """
    if task not in TASKS or kind not in KINDS:
        raise ValueError(f"there is no task {task!r} with needles of the kind {kind!r}")
    if not KINDS[kind].templates(split):
        raise ValueError(f"the kind {kind!r} is held out: it has nothing to {split}")
    generator = random.Random(f"{task}/{kind}/{num_tokens}/{seed}/{split}")
    order = list(haystacks)
    generator.shuffle(order)
    made = []
    for index in range(count):
        haystack = order[index % len(order)]
        asked = TASKS[task](generator, KINDS[kind], generator.choice(KINDS[kind].templates(split)))
        context, spans = hide(
            [f"{_PREFIXES[haystack]}{sentence}\n" for sentence in asked.sentences],
            depth=(index + generator.random()) / count,
            haystack=haystack,
            split=split,
            num_tokens=num_tokens,
            generator=generator,
            tokenizer=tokenizer,
        )
        question = f"\n{_PREFIXES[haystack]}{asked.question}"
        question_ids, whole_ids = tokenizer.encode(question), tokenizer.encode(f"{question} {asked.answer}")
        assert whole_ids[: len(question_ids)] == question_ids, "the answer changes the question's tokens"
        made.append(
            Case(
                task=task,
                kind=kind,
                haystack=haystack,
                is_held_out=split == "test",
                context=context,
                question=np.asarray(question_ids, dtype=np.int64),
                answer=np.asarray(whole_ids[len(question_ids) :], dtype=np.int64),
                needles=tuple(spans[: asked.num_needed]),
            )
        )
    return made


@dataclass(frozen=True, slots=True)
class Asked:
    """What is hidden and asked: sentences, of which the answer needs the first `num_needed`."""

    sentences: list[str]
    question: str
    answer: str
    num_needed: int


def _single(generator: random.Random, kind: NeedleKind, template: Template) -> Asked:
    """One needle."""
    key = generator.choice(kind.keys) if kind.keys else ""
    value = kind.draw(generator)
    return Asked([template.sentence.format(key=key, value=value)], template.question.format(key=key), value, 1)


def _multi_key(generator: random.Random, kind: NeedleKind, template: Template) -> Asked:
    """Three needles of one template; the question names the key of one."""
    keys, values = generator.sample(kind.keys, 3), _different_values(generator, kind, 3)
    sentences = [template.sentence.format(key=key, value=value) for key, value in zip(keys, values, strict=True)]
    return Asked(sentences, template.question.format(key=keys[0]), values[0], 1)


def _multi_value(generator: random.Random, kind: NeedleKind, template: Template) -> Asked:
    """A key with two values; the question repeats one, so that the other is the answer."""
    key, values = generator.choice(kind.keys), _different_values(generator, kind, 2)
    asked, repeated = (template.sentence.format(key=key, value=value) for value in values)
    return Asked([asked, repeated], f"{repeated} {template.question.format(key=key)}", values[0], 2)


def _common_words(generator: random.Random, kind: NeedleKind, template: Template) -> Asked:
    """A sentence six times with one word and twice with others; which word comes most often?"""
    word, *others = _different_values(generator, kind, 3)
    sentences = [template.sentence.format(value=word)] * 6
    sentences += [template.sentence.format(value=value) for value in others]
    return Asked(sentences, template.question, word, 6)


def _different_values(generator: random.Random, kind: NeedleKind, count: int) -> list[str]:
    values: dict[str, None] = {}
    while len(values) < count:
        values[kind.draw(generator)] = None
    return list(values)


TASKS: dict[str, Callable[[random.Random, NeedleKind, Template], Asked]] = {
    "single": _single,
    "multi-key": _multi_key,
    "multi-value": _multi_value,
    "common-words": _common_words,
}
