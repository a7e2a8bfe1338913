"""How eunoe-nano is trained: four layers learn to recall, eight go on from them, and then read a book as well."""

from dataclasses import replace
from pathlib import Path

import torch

from eunoe.training.decoder.corpus import FillerName
from eunoe.training.decoder.curriculum import Stage
from eunoe.training.decoder.differentiable import NanoConfig, NanoDecoder
from eunoe.training.decoder.growth import grown
from eunoe.training.decoder.passkey import PasskeyTask
from eunoe.training.decoder.training import OnStep, TrainingConfig, train

SEGMENT_LENGTH = 128
LONGEST = 5120
"""Bytes of the longest sequences that are ever trained on."""

_SENTENCES: tuple[tuple[FillerName, float], ...] = (("paper", 0.8), ("shuffled", 0.2))
_ALL: tuple[tuple[FillerName, float], ...] = (("paper", 0.6), ("shuffled", 0.12), ("book", 0.28))
_MOSTLY_BOOK: tuple[tuple[FillerName, float], ...] = (("paper", 0.2), ("shuffled", 0.05), ("book", 0.75))

SHALLOW = TrainingConfig(
    model=NanoConfig(num_layers=4),
    stages=(
        # The make-or-break stage: the key has just left a window of 32 to 64 bytes, and is asked for again and again.
        Stage(
            task=PasskeyTask(length=256, first_gap=(64, 90), gap=(0, 60), questions_bytes=130),
            segment_length=32,
            bytes_per_step=4096,
            max_steps=4000,
            far_accuracy=0.95,
        ),
        Stage(
            task=PasskeyTask(512, (128, 300), (0, 150), 200, _SENTENCES, introduction_share=0.2),
            segment_length=64,
            bytes_per_step=4096,
            max_steps=500,
            far_accuracy=0.95,
            shortest=0.6,
        ),
        Stage(
            task=PasskeyTask(1024, (0, 700), (0, 150), 250, _ALL, introduction_share=0.3),
            segment_length=SEGMENT_LENGTH,
            bytes_per_step=4096,
            max_steps=500,
            far_accuracy=0.95,
            shortest=0.6,
        ),
        Stage(
            task=PasskeyTask(1024, (0, 700), (0, 150), 250, _ALL, introduction_share=0.4),
            segment_length=SEGMENT_LENGTH,
            bytes_per_step=8192,
            max_steps=200,
            max_dilution=50.0,
            far_accuracy=0.96,
            shortest=0.6,
        ),
        Stage(
            task=PasskeyTask(2048, (0, 700), (0, 150), 250, _ALL, two_keys_share=0.05, introduction_share=0.5),
            segment_length=SEGMENT_LENGTH,
            bytes_per_step=8192,
            max_steps=125,
            max_dilution=1600.0,
            far_accuracy=1.1,
            shortest=0.4,
        ),
    ),
)
"""0.77M parameters; dilution of 1,600 makes 2 KiB of filler weigh as much as 3 MB."""

DEEP = TrainingConfig(
    model=replace(SHALLOW.model, num_layers=8),
    learning_rate=1.2e-3,
    num_warmup_steps=30,
    text_weight=0.2,
    seed=3,
    stages=(
        Stage(
            task=PasskeyTask(
                2048, (0, 700), (0, 200), 250, _ALL, two_keys_share=0.05, introduction_share=0.6, near_share=0.4
            ),
            segment_length=SEGMENT_LENGTH,
            bytes_per_step=8192,
            max_steps=450,
            max_dilution=1600.0,
            shortest=0.3,
            far_accuracy=1.1,
            final_rate=0.25,
        ),
        Stage(
            task=PasskeyTask(
                LONGEST, (0, 700), (0, 200), 150, _ALL, two_keys_share=0.05, introduction_share=0.9, near_share=0.3
            ),
            segment_length=SEGMENT_LENGTH,
            bytes_per_step=10_240,
            max_steps=90,
            max_dilution=1000.0,
            shortest=0.5,
            far_accuracy=1.1,
            rate=0.25,
            final_rate=0.1,
        ),
    ),
)
"""1.51M parameters; the last stage reads the longest sequences."""

READING = replace(
    DEEP,
    learning_rate=2e-3,
    text_weight=1.0,
    answer_weight=0.5,
    seed=5,
    stages=(
        Stage(
            task=PasskeyTask(
                2048, (0, 700), (0, 300), 200, _MOSTLY_BOOK, two_keys_share=0.05, introduction_share=0.5, near_share=0.3
            ),
            segment_length=SEGMENT_LENGTH,
            bytes_per_step=12_288,
            max_steps=550,
            max_dilution=1600.0,
            diluted_share=0.4,
            shortest=0.75,
            far_accuracy=1.1,
            final_rate=0.05,
        ),
    ),
)
"""All of a text counts as much as an answer: what the memory holds is to help with any byte."""

TWIN = replace(READING, uses_memory=False, answer_weight=0.0)
"""The same start, data and steps without reading the memory: what `READING` is compared with."""


def train_nano(run_directory: Path, on_step: OnStep | None = None) -> NanoDecoder:
    """All three runs, each resumable from its own directory below `run_directory`."""
    shallow = train(SHALLOW, run_directory / "shallow", on_step)
    start = grown(shallow, DEEP.model.num_layers, torch.Generator().manual_seed(DEEP.seed))
    deep = train(DEEP, run_directory / "deep", on_step, start)
    return train(READING, run_directory / "reading", on_step, deep)
