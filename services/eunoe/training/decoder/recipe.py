"""How eunoe-nano is trained: four layers learn to recall, eight go on, read a book, and then recall again.

Reading does not look at the memory: what a head says of it would be noise to a language model that is still to be
learned, and the one head that recalls is found again in a few steps.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from eunoe.training.decoder.corpus import FillerName
from eunoe.training.decoder.curriculum import Stage
from eunoe.training.decoder.differentiable import NanoConfig, NanoDecoder
from eunoe.training.decoder.growth import grown
from eunoe.training.decoder.margin import shut_idle_gates
from eunoe.training.decoder.passkey import PasskeyTask
from eunoe.training.decoder.training import OnCheckpoint, OnStep, TrainingConfig, train

SEGMENT_LENGTH = 128
LONGEST = 5120
"""Bytes of the longest sequences that are ever trained on."""

_SENTENCES: tuple[tuple[FillerName, float], ...] = (("paper", 0.8), ("shuffled", 0.2))
_ALL: tuple[tuple[FillerName, float], ...] = (("paper", 0.6), ("shuffled", 0.12), ("book", 0.28))
_MOSTLY_BOOK: tuple[tuple[FillerName, float], ...] = (("paper", 0.2), ("shuffled", 0.05), ("book", 0.75))

SHALLOW = TrainingConfig(
    model=NanoConfig(num_layers=4),
    stages=(
        # The make-or-break stage: the key has left a window of 32 to 64 bytes, and is asked for again and again.
        Stage(
            task=PasskeyTask(length=256, least_gap=64, gap=(0, 60), questions_bytes=130),
            segment_length=32,
            bytes_per_step=4096,
            max_steps=4000,
            far_accuracy=0.95,
        ),
        Stage(
            task=PasskeyTask(512, 128, (0, 150), 200, _SENTENCES, introduction_share=0.2),
            segment_length=64,
            bytes_per_step=4096,
            max_steps=500,
            far_accuracy=0.95,
            shortest=0.6,
        ),
        Stage(
            task=PasskeyTask(1024, 0, (0, 150), 250, _ALL, introduction_share=0.3),
            segment_length=SEGMENT_LENGTH,
            bytes_per_step=4096,
            max_steps=500,
            far_accuracy=0.95,
            shortest=0.6,
        ),
        Stage(
            task=PasskeyTask(1024, 0, (0, 150), 250, _ALL, introduction_share=0.4),
            segment_length=SEGMENT_LENGTH,
            bytes_per_step=8192,
            max_steps=200,
            max_dilution=50.0,
            far_accuracy=0.96,
            shortest=0.6,
        ),
        Stage(
            task=PasskeyTask(2048, 0, (0, 150), 250, _ALL, two_keys_share=0.05, introduction_share=0.5),
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
            task=PasskeyTask(2048, 0, (0, 200), 250, _ALL, two_keys_share=0.05, introduction_share=0.6, near_share=0.4),
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
                LONGEST, 0, (0, 200), 150, _ALL, two_keys_share=0.05, introduction_share=0.9, near_share=0.3
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

_BOOK = Stage(
    task=PasskeyTask(2048, 0, (0, 300), 200, _MOSTLY_BOOK, two_keys_share=0.05, introduction_share=0.5, near_share=0.3),
    segment_length=SEGMENT_LENGTH,
    bytes_per_step=12_288,
    max_steps=400,
    max_dilution=1600.0,
    diluted_share=0.4,
    shortest=0.75,
    far_accuracy=1.1,
    final_rate=0.05,
)

READING = replace(
    DEEP,
    learning_rate=2e-3,
    uses_memory=False,
    text_weight=1.0,
    answer_weight=0.0,
    seed=5,
    stages=(_BOOK, replace(_BOOK, max_steps=150, rate=0.5)),
)
"""All of a text counts, from the window alone."""

_RECALL = replace(_BOOK, task=replace(_BOOK.task, two_keys_share=0.0, plain_share=0.5), max_steps=300)

RECALLING = replace(
    READING,
    learning_rate=1e-3,
    uses_memory=True,
    answer_weight=0.05,
    seed=8,
    stages=(_RECALL, replace(_RECALL, task=replace(_RECALL.task, length=LONGEST), shortest=0.5)),
)
"""The same with answers, and the memory of the one head that recalls; half of the samples are text alone."""

TWIN = replace(RECALLING, uses_memory=False, answer_weight=0.0)
"""The same start, data and steps without reading the memory: what `RECALLING` is compared with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Runs, each from where the one before ended.

    Between the first two the model becomes deeper; before the last, all memory gates are shut but the recalling head's.
    """

    shallow: TrainingConfig
    deep: TrainingConfig
    reading: TrainingConfig
    recalling: TrainingConfig

    def runs(self) -> dict[str, TrainingConfig]:
        """The runs in their order, by the names of their directories."""
        return {"shallow": self.shallow, "deep": self.deep, "reading": self.reading, "recalling": self.recalling}

    def longest(self) -> int:
        """Bytes of the longest samples."""
        return max(stage.task.length for config in self.runs().values() for stage in config.stages)

    def seeded(self, seed: int) -> "Recipe":
        """The same with other samples and first weights; 0 is the recipe as it stands."""
        return Recipe(**{name: replace(config, seed=config.seed + 100 * seed) for name, config in self.runs().items()})

    def in_a_few_steps(self) -> "Recipe":
        """The same on a tiny model: shows that everything works, and learns nothing."""
        return Recipe(**{name: _in_a_few_steps(config) for name, config in self.runs().items()})


def _in_a_few_steps(config: TrainingConfig) -> TrainingConfig:
    """All that a run does, on a tiny model and short samples."""
    model = NanoConfig(
        num_layers=config.model.num_layers // 4,
        hidden_size=16,
        num_query_heads=2,
        num_kv_heads=1,
        head_dim=8,
        intermediate_size=24,
    )
    stages = tuple(
        replace(stage, task=replace(stage.task, length=512), segment_length=32, bytes_per_step=1024, max_steps=4)
        for stage in (config.stages[0], config.stages[-1])
    )
    return replace(config, model=model, stages=stages, num_warmup_steps=2, steps_per_report=2, steps_per_checkpoint=6)


NANO = Recipe(shallow=SHALLOW, deep=DEEP, reading=READING, recalling=RECALLING)
NANO_TWIN = replace(NANO, recalling=TWIN)


def train_nano(
    recipe: Recipe,
    run_directory: Path,
    on_step: OnStep | None = None,
    on_checkpoint: OnCheckpoint | None = None,
) -> NanoDecoder:
    """All runs of a recipe, each resumable from its own directory below `run_directory`.

    Args:
        on_step: See `train`; a report also has the name of its run.
        on_checkpoint: See `train`.
    """

    def told(name: str) -> OnStep:
        return lambda report: on_step({"run": name} | report) if on_step is not None else None

    model: NanoDecoder | None = None
    for name, config in recipe.runs().items():
        if model is not None and model.config != config.model:
            model = grown(model, config.model.num_layers, torch.Generator().manual_seed(config.seed))
        if model is not None and config is recipe.recalling:
            shut_idle_gates(model, config.stages[0].segment_length)
        model = train(config, run_directory / name, told(name), model, on_checkpoint)
    assert model is not None
    return model
