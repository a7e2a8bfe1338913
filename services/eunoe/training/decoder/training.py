"""The training loop: deterministic from a seed, resumable from one file, shared by any number of workers."""

import io
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from eunoe.training.decoder.curriculum import Stage
from eunoe.training.decoder.data_parallel import rank_and_count, sum_gradients, summed
from eunoe.training.decoder.differentiable import NanoConfig, NanoDecoder, SegmentPlan
from eunoe.training.decoder.margin import recalling_head
from eunoe.training.decoder.passkey import ANSWER, COPY, PLAIN, Sample, draw
from eunoe.training.run_directory import BadRunDirectory, write_whole

OnStep = Callable[[dict[str, Any]], None]
OnCheckpoint = Callable[[], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """One run.

    Attributes:
        gate_learning_rate: Of memory and write gates, which move too little at the others' rate.
        uses_memory: Whether the memory is read; without, the same model learns from its window alone.
        recomputes_layers: For steps whose activations do not fit: 10 KB of samples then take 1.0 GB instead of 2.1, and
            a seventh more time.
        answer_weight, copy_weight, text_weight: What the mean losses of answers, second mentions and text count.
        steps_per_report, steps_per_checkpoint: How often a line is written, and the checkpoint.
    """

    model: NanoConfig
    stages: tuple[Stage, ...]
    seed: int = 0
    learning_rate: float = 2e-3
    gate_learning_rate: float = 1e-2
    weight_decay: float = 0.01
    num_warmup_steps: int = 100
    gradient_clip: float = 1.0
    uses_memory: bool = True
    recomputes_layers: bool = False
    answer_weight: float = 1.0
    copy_weight: float = 0.3
    text_weight: float = 0.1
    steps_per_report: int = 25
    steps_per_checkpoint: int = 100


@dataclass(slots=True)
class _Progress:
    step: int = 0
    stage: int = 0
    stage_step: int = 0
    accuracies: list[float] = field(default_factory=list)


def train(
    config: TrainingConfig,
    run_directory: Path,
    on_step: OnStep | None = None,
    start: NanoDecoder | None = None,
    on_checkpoint: OnCheckpoint | None = None,
) -> NanoDecoder:
    """Train through all stages, from `run_directory`'s checkpoint if there is one.

    The first worker writes `checkpoint.pt` (atomically) and one line a report to `curve.jsonl`; any other must find
    the same checkpoint in its own directory.

    Args:
        config: The run; a resumed run goes on only under the same one.
        run_directory: Made if missing.
        on_step: Called with each report; what it raises ends the run, which can be resumed.
        start: Weights to begin from instead of random ones.
        on_checkpoint: Called by every worker whenever the first has written a checkpoint.

    Raises:
        BadRunDirectory: If the checkpoint is that of another run.
    """
    run_directory.mkdir(parents=True, exist_ok=True)
    model = NanoDecoder(config.model)
    model.initialize(torch.Generator().manual_seed(config.seed))
    if start is not None:
        model.load_state_dict(start.state_dict())
    optimizer = torch.optim.AdamW(_parameter_groups(model, config), betas=(0.9, 0.95), eps=1e-8)
    progress = _Progress()
    path = run_directory / "checkpoint.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        if saved["config"] != asdict(config):
            raise BadRunDirectory(f"{path} is of another run: remove it, or choose another directory")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        progress = _Progress(**saved["progress"])
    is_first = rank_and_count()[0] == 0
    started = time.monotonic()
    num_bytes = 0
    while progress.stage < len(config.stages):
        stage = config.stages[progress.stage]
        factor = min(1.0, (progress.step + 1) / config.num_warmup_steps) * stage.rate_factor(progress.stage_step)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        report = _step(model, optimizer, config, stage, progress)
        progress.step += 1
        progress.stage_step += 1
        num_bytes += report["num_bytes"]
        progress.accuracies = [*progress.accuracies[-49:], report["far_accuracy"]]
        mean_accuracy = sum(progress.accuracies) / len(progress.accuracies)
        if is_first and progress.step % config.steps_per_report == 0:
            report |= {
                "step": progress.step,
                "stage": progress.stage,
                "stage_step": progress.stage_step,
                "mean_far_accuracy": mean_accuracy,
                "learning_rate": config.learning_rate * factor,
                "bytes_per_second": num_bytes / (time.monotonic() - started),
                "memory_gates": [[round(gate, 3) for gate in layer] for layer in model.memory_gates()],
                "margin": recalling_head(model, stage.segment_length).margin if config.uses_memory else None,
            }
            with (run_directory / "curve.jsonl").open("a") as curve:
                curve.write(json.dumps(report) + "\n")
            if on_step is not None:
                on_step(report)
        is_learned = len(progress.accuracies) == 50 and mean_accuracy >= stage.far_accuracy
        is_over = progress.stage_step >= stage.max_steps or (is_learned and progress.stage_step >= stage.min_steps)
        if is_over:
            progress.stage, progress.stage_step, progress.accuracies = progress.stage + 1, 0, []
        if is_over or progress.step % config.steps_per_checkpoint == 0:
            if is_first:
                _save(path, config, model, optimizer, progress)
            if on_checkpoint is not None:
                on_checkpoint()
    return model


def tokens_of(samples: list[Sample]) -> Tensor:
    """Samples of one length as int64 `[B, L]`."""
    return torch.from_numpy(np.stack([sample.tokens for sample in samples]).astype(np.int64))


def _parameter_groups(model: NanoDecoder, config: TrainingConfig) -> list[dict[str, Any]]:
    gates: list[nn.Parameter] = []
    scales: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if "gate" in name and "gate_proj" not in name:
            gates.append(parameter)
        else:
            (matrices if parameter.dim() == 2 else scales).append(parameter)
    rates = (config.gate_learning_rate, config.learning_rate, config.learning_rate)
    decays = (0.0, 0.0, config.weight_decay)
    return [
        {"params": parameters, "lr": rate, "initial_lr": rate, "weight_decay": decay}
        for parameters, rate, decay in zip((gates, scales, matrices), rates, decays, strict=True)
    ]


def _step(
    model: NanoDecoder, optimizer: torch.optim.Optimizer, config: TrainingConfig, stage: Stage, progress: _Progress
) -> dict[str, Any]:
    # The step alone seeds the data, so that a resumed run draws what an undisturbed one would have drawn.
    generator = np.random.default_rng((config.seed, progress.step))
    task = stage.draw_task(generator)
    samples = [draw(task, generator) for _ in range(max(1, stage.bytes_per_step // task.length))]
    # No number is drawn where nothing is carried, so that older recipes draw what they drew.
    carried = stage.draw_carried(task, len(samples), generator) if stage.carried_bytes else []
    tokens = tokens_of(samples)
    kinds = torch.from_numpy(np.stack([sample.kinds for sample in samples]))
    distances = torch.from_numpy(np.stack([sample.distances for sample in samples]))
    write_scale = stage.write_scale(kinds, generator)
    num_bytes = tokens.numel()
    # Each worker draws all samples and reads its own, which may be none; means are over those of all workers.
    rank, num_workers = rank_and_count()
    tokens, kinds, distances = tokens[rank::num_workers], kinds[rank::num_workers], distances[rank::num_workers]
    if isinstance(write_scale, Tensor):
        write_scale = write_scale[rank::num_workers]
    past = None
    if carried:
        with torch.no_grad():
            plan = SegmentPlan(config.model, stage.segment_length, uses_memory=config.uses_memory)
            _, past = model(tokens_of(carried)[rank::num_workers], plan)
    plan = SegmentPlan(
        config.model,
        stage.segment_length,
        write_scale,
        uses_memory=config.uses_memory,
        recomputes=config.recomputes_layers,
    )
    hidden, _ = model(tokens, plan, past)
    targets, kinds, distances = tokens[:, 1:], kinds[:, 1:], distances[:, 1:]
    logits = model.logits(hidden[:, :-1])
    losses = functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none")
    losses = losses.view_as(targets)
    is_answer = kinds == ANSWER
    masks = {
        "answer": is_answer,
        "far_answer": is_answer & (distances > 2 * stage.segment_length),
        "near_answer": is_answer & (distances <= stage.segment_length),
        "copy": kinds == COPY,
        "text": kinds == PLAIN,
    }
    counts = summed(torch.stack([mask.sum() for mask in masks.values()])).clamp(min=1)
    # What this worker adds to each mean.
    means = {name: (losses * mask).sum() / count for (name, mask), count in zip(masks.items(), counts, strict=True)}
    loss = (
        config.answer_weight * means["answer"] + config.copy_weight * means["copy"] + config.text_weight * means["text"]
    )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    sum_gradients(list(model.parameters()))
    others = [parameter for group in optimizer.param_groups[1:] for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(others, config.gradient_clip)
    optimizer.step()
    with torch.no_grad():
        is_right = (logits.argmax(-1) == targets).float()
        shares = {
            f"{name}_accuracy": (is_right * masks[f"{name}_answer"]).sum() / count
            for name, count in (("far", counts[1]), ("near", counts[2]))
        }
        added = {
            "loss": loss,
            **{f"{name}_loss": mean for name, mean in means.items() if name != "near_answer"},
            **shares,
        }
        totals = summed(torch.stack(list(added.values())).detach()).tolist()
    return {"num_bytes": num_bytes, **dict(zip(added, totals, strict=True)), "gradient_norm": norm.item()}


def _save(
    path: Path, config: TrainingConfig, model: NanoDecoder, optimizer: torch.optim.Optimizer, progress: _Progress
) -> None:
    content = io.BytesIO()
    saved = {
        "config": asdict(config),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": asdict(progress),
    }
    torch.save(saved, content)
    write_whole(path, content.getvalue())
