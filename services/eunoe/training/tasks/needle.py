"""What is hidden: sentences that give a key a value. Whole kinds, and of the other kinds one template, never train.

Most questions are how the sentence begins, so that a small model can answer by going on.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from eunoe.training.tasks.haystack import Split


@dataclass(frozen=True, slots=True)
class Template:
    """A sentence with {key} and {value}, and how the question for the value begins."""

    sentence: str
    question: str


@dataclass(frozen=True, slots=True)
class NeedleKind:
    """One sort of values.

    Attributes:
        keys: What a sentence may be about; empty if it names nothing.
        draw: Makes a value.
        training: Templates that a policy is trained on; a kind without any is held out as a whole.
        test: Those that it is tested on.
    """

    keys: tuple[str, ...]
    draw: Callable[[random.Random], str]
    training: tuple[Template, ...]
    test: tuple[Template, ...]

    def templates(self, split: Split) -> tuple[Template, ...]:
        """Those of a split."""
        return self.training if split == "train" else self.test


def _of(sentence: str) -> Template:
    """Asked by its own beginning."""
    return Template(sentence, sentence[: sentence.rindex(" {value}")])


def _listed(words: str) -> tuple[str, ...]:
    return tuple(words.split())


def _five_digits(generator: random.Random) -> str:
    return str(generator.randrange(10_000, 100_000))


def _name(generator: random.Random) -> str:
    return f"{generator.choice(_FIRST_NAMES)} {generator.choice(_LAST_NAMES)}"


def _word(generator: random.Random) -> str:
    return generator.choice(_WORDS)


def _identifier(generator: random.Random) -> str:
    return "_".join(generator.choice(part) for part in (_VERBS, _ADJECTIVES, _NOUNS))


_CITIES = _listed(
    "Lisbon Oslo Nairobi Quebec Kyoto Perth Geneva Havana Dublin Athens Cairo Lima Boston Vienna Prague Warsaw"
)
_PEOPLE = _listed(
    "gardener captain librarian surgeon carpenter pilot tailor baker painter lawyer plumber teacher sailor"
)
_FILES = _listed("header payload index journal catalog archive manifest ledger schema registry snapshot")
_FIRST_NAMES = _listed("Margaret Thomas Alice Oscar Helen Victor Julia Edwin Clara Walter Nora Felix Irene Hugo")
_LAST_NAMES = _listed("Holloway Whitfield Brennan Lindgren Ashworth Castellan Okafor Petrov Delacroix Yamada Novak")
_WORDS = _listed(
    "marble lantern copper walnut velvet anchor pepper saddle thunder candle ribbon kettle feather orchard magnet"
    " violin basket hammer pillow tunnel"
)
_VERBS = _listed("parse load merge flush fetch decode verify rebuild")
_ADJECTIVES = _listed("sorted frozen remote nested hidden empty binary stale")
_NOUNS = _listed("frames users events blocks tokens packets queues tables")

KINDS: dict[str, NeedleKind] = {
    "digits": NeedleKind(
        keys=(),
        draw=_five_digits,
        training=(
            Template(
                "The pass key is {value}. Remember it. {value} is the pass key.",
                "The important information: the pass key is",
            ),
            Template("The door code is {value}. Do not forget that the door code is {value}.", "The door code is"),
        ),
        test=(Template("Write down {value}. The account number is {value}.", "The account number is"),),
    ),
    "numbers": NeedleKind(
        keys=_CITIES,
        draw=_five_digits,
        training=(
            _of("One of the special magic numbers for {key} is: {value}."),
            _of("The hotel in {key} has {value} beds."),
        ),
        test=(_of("The telephone number of the office in {key} is {value}."),),
    ),
    "names": NeedleKind(
        keys=_PEOPLE,
        draw=_name,
        training=(_of("The name of the {key} is {value}."), _of("The {key} is called {value}.")),
        test=(_of("Letters to the {key} are answered by {value}."),),
    ),
    "words": NeedleKind(
        keys=_PEOPLE,
        draw=_word,
        training=(),
        test=(_of("The password of the {key} is {value}."), _of("The {key} always carries the {value}.")),
    ),
    "identifiers": NeedleKind(
        keys=_FILES,
        draw=_identifier,
        training=(),
        test=(
            _of("The function that reads the {key} is called {value}."),
            _of("To read the {key}, call {value}."),
        ),
    ),
    "votes": NeedleKind(
        keys=(),
        draw=_word,
        training=(),
        test=(_of("The winner is {value}."), _of("Another vote for {value}.")),
    ),
}
