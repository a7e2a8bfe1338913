"""The passkey task of Infini-attention (arXiv 2404.07143, appendix B) as bytes with loss weights.

A sample hides one or more keys in filler and asks for them several times: a short sequence carries many answers.
"""

from dataclasses import dataclass

import numpy as np

from eunoe.training.decoder.corpus import FillerName, filler
from eunoe.training.tasks.haystack import Split

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there. "
)
NUM_DIGITS = 5
OTHER_NAMES = ("door", "bank", "safe", "gate", "ship", "book")

PLAIN, MASKED, COPY, ANSWER = 0, 1, 2, 3
"""What a byte is: ordinary text, a digit that cannot be foretold, a digit of a key's second mention, an answer."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence.

    Attributes:
        tokens: `[L]` uint8.
        kinds: `[L]` uint8, one of PLAIN, MASKED, COPY, ANSWER a byte.
        distances: `[L]` int32, bytes from an answer back to the newest mention of its key; 0 for other bytes.
    """

    tokens: np.ndarray
    kinds: np.ndarray
    distances: np.ndarray


@dataclass(frozen=True, slots=True)
class PasskeyTask:
    """How samples are drawn.

    Attributes:
        length: Bytes of a sample.
        least_gap: Fewest bytes of filler between the needle and the first question; at most all that there is room for.
        near_share: Share of samples whose first gap is drawn from `near_gap` instead, so that no needle is too near.
        gap: Fewest and most bytes of filler between questions.
        questions_bytes: Most bytes left at the end for questions; what is left beyond them lies before the needle.
        fillers: What is drawn from, with its shares.
        two_keys_share: Share of samples with a second key of another name.
        introduction_share: Share of samples that begin with the paper's introduction.
        plain_share: Share of samples that hide and ask for nothing.
    """

    length: int
    least_gap: int
    gap: tuple[int, int]
    questions_bytes: int
    fillers: tuple[tuple[FillerName, float], ...] = (("paper", 1.0),)
    two_keys_share: float = 0.0
    introduction_share: float = 0.0
    plain_share: float = 0.0
    near_share: float = 0.0
    near_gap: tuple[int, int] = (0, 300)
    split: Split = "train"


def needle(key: str, name: str = "pass") -> str:
    """Both mentions of a key."""
    return f"The {name} key is {key}. Remember it. {key} is the {name} key. "


def question(name: str = "pass") -> str:
    """What the answer follows, without the space that begins the answer."""
    return f"What is the {name} key? The {name} key is"


def draw(task: PasskeyTask, generator: np.random.Generator) -> Sample:
    """One sample of exactly `task.length` bytes."""
    writer = _Writer()
    names, shares = zip(*task.fillers, strict=True)
    name = names[int(generator.choice(len(names), p=np.array(shares) / sum(shares)))]

    def fill(low: int, high: int) -> None:
        for piece in filler(name, int(generator.integers(low, high + 1)), task.split, generator):
            writer.add(piece, PLAIN)

    # No number is drawn where the share is 0, so that older recipes draw what they drew.
    if task.plain_share and generator.random() < task.plain_share:
        while writer.length < task.length:
            fill(task.length, task.length)
        return writer.sample(task.length)
    keys = {"pass": draw_key(generator)}
    if generator.random() < task.two_keys_share:
        keys[OTHER_NAMES[int(generator.integers(len(OTHER_NAMES)))]] = draw_key(generator)
    if generator.random() < task.introduction_share:
        writer.add(INTRODUCTION, PLAIN)
    order = generator.permutation(len(keys))
    least_room = len(question()) + NUM_DIGITS + 2
    room = int(generator.integers(least_room, max(task.questions_bytes, least_room) + 1))
    num_left = task.length - writer.length - len(keys) * (len(needle("")) + 2 * NUM_DIGITS) - room
    low, high = task.near_gap if generator.random() < task.near_share else (task.least_gap, task.length)
    first_gap = min(int(generator.integers(low, high + 1)), max(0, num_left))
    fill(max(0, num_left - first_gap), max(0, num_left - first_gap))
    for index in order:
        key_name = list(keys)[index]
        writer.add_needle(keys[key_name], key_name)
    fill(first_gap, first_gap)
    while writer.length < task.length:
        asked = list(keys)[int(generator.integers(len(keys)))]
        writer.add_question(keys[asked], asked)
        fill(*task.gap)
    return writer.sample(task.length)


def draw_key(generator: np.random.Generator) -> str:
    """Digits, each as likely as any other."""
    return "".join(str(digit) for digit in generator.integers(0, 10, NUM_DIGITS))


class _Writer:
    def __init__(self) -> None:
        self.length = 0
        self._pieces: list[bytes] = []
        self._kinds: list[np.ndarray] = []
        self._distances: list[np.ndarray] = []
        self._mentioned_at: dict[str, int] = {}

    def add(self, text: str, kind: int, distance: int = 0) -> None:
        piece = text.encode()
        self._pieces.append(piece)
        self._kinds.append(np.full(len(piece), kind, np.uint8))
        self._distances.append(np.full(len(piece), distance, np.int32))
        self.length += len(piece)

    def add_needle(self, key: str, name: str) -> None:
        self.add(f"The {name} key is ", PLAIN)
        self.add(key, MASKED)
        self.add(". Remember it. ", PLAIN)
        self.add(key, COPY)
        self._mentioned_at[name] = self.length
        self.add(f" is the {name} key. ", PLAIN)

    def add_question(self, key: str, name: str) -> None:
        self.add(question(name) + " ", PLAIN)
        self.add(key + ".", ANSWER, self.length - self._mentioned_at[name])
        self._mentioned_at[name] = self.length
        self.add(" ", PLAIN)

    def sample(self, length: int) -> Sample:
        tokens = np.frombuffer(b"".join(self._pieces), np.uint8)[:length]
        return Sample(tokens, np.concatenate(self._kinds)[:length], np.concatenate(self._distances)[:length])
