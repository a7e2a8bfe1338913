"""Which memory learns to recall, and through how much filler? Update rules, write gates, dilution and state passing.

Four layers learn to recall from just beyond a window of 32 bytes (the first stage of eunoe-nano's recipe). From there
each variant goes on for 200 steps of the same samples, of up to 1,024 bytes in segments of 128. Then it answers 16
samples of 2,048 bytes whose filler is written 1, 200, 1,000 and 4,000 times over: under the linear rule that is as much
repeated filler, under the delta rule a write so much heavier. `<variant>_<filler>_<times>` is the share of digits that
are right (guessing: 0.1), `<variant>_margin` how far a needle stands out in the head that shows it best, in nats.

It takes about an hour of one core, and goes on where it was interrupted if `--out` is the same.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from _report import Report, arguments

from eunoe.training.decoder.corpus import FillerName
from eunoe.training.decoder.curriculum import dilution
from eunoe.training.decoder.differentiable import NanoDecoder, SegmentPlan, UpdateRule
from eunoe.training.decoder.margin import head_margins
from eunoe.training.decoder.passkey import ANSWER, PasskeyTask, draw
from eunoe.training.decoder.passkey_evaluation import passkey_case
from eunoe.training.decoder.recipe import SEGMENT_LENGTH, SHALLOW
from eunoe.training.decoder.training import TrainingConfig, tokens_of, train


@dataclass(frozen=True, slots=True)
class Variant:
    """A memory and how it is trained."""

    update_rule: UpdateRule = "linear"
    has_write_gate: bool = True
    uses_gamma: bool = False
    max_dilution: float = 1600.0
    carried_bytes: int = 0


VARIANTS = {
    "linear_gated": Variant(),
    "linear": Variant(has_write_gate=False),
    "delta_gated": Variant("delta"),
    "delta": Variant("delta", has_write_gate=False),
    "delta_gated_gamma": Variant("delta", uses_gamma=True),
    "linear_gated_undiluted": Variant(max_dilution=1.0),
    "linear_gated_carried": Variant(max_dilution=1.0, carried_bytes=8192),
    "linear_undiluted": Variant(has_write_gate=False, max_dilution=1.0),
    "delta_undiluted": Variant("delta", has_write_gate=False, max_dilution=1.0),
}
# The recipe's last stage of samples that short, without needles so near that the window still has them.
_RECIPE = SHALLOW.stages[3]
STAGE = replace(
    _RECIPE,
    task=replace(_RECIPE.task, least_gap=256, near_share=0.3),
    bytes_per_step=6144,
    far_accuracy=1.1,
    final_rate=0.1,
)
FILLERS: tuple[FillerName, ...] = ("paper", "book")
TIMES = (1, 200, 1000, 4000)
LEAST_GATE = 0.3
"""Of a head whose margin counts: what it says of the memory is heard."""


def main() -> None:
    """Train and print."""
    parser = arguments(__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="(default: all)")
    parser.add_argument("--out", type=Path, help="keeps what was trained (default: a temporary directory)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = Report("memory_variants", as_json=options.json)
    num_steps = 4 if options.quick else STAGE.max_steps
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        first = replace(SHALLOW.stages[0], max_steps=num_steps) if options.quick else SHALLOW.stages[0]
        start = train(
            replace(SHALLOW, stages=(first,)), out / "start", lambda step: report.progress(f"start: {step['step']}")
        )
        for name in options.variants:
            model = trained(report, name, num_steps, start, out)
            add_results(report, name, model)
    report.finish()


def trained(report: Report, name: str, num_steps: int, start: NanoDecoder, out: Path) -> NanoDecoder:
    """A variant after its steps."""
    variant = VARIANTS[name]
    config = TrainingConfig(
        model=replace(
            start.config,
            update_rule=variant.update_rule,
            has_write_gate=variant.has_write_gate,
            uses_gamma=variant.uses_gamma,
        ),
        stages=(
            replace(STAGE, max_dilution=variant.max_dilution, carried_bytes=variant.carried_bytes, max_steps=num_steps),
        ),
        learning_rate=1.5e-3,
        num_warmup_steps=20,
        seed=7,
        steps_per_report=10,
    )
    model = NanoDecoder(config.model)
    weights = start.state_dict()
    model.load_state_dict({each: weights[each] for each in model.state_dict()})
    return train(config, out / name, lambda step: report.progress(f"{name}: {step['step']} of {num_steps}"), model)


def add_results(report: Report, name: str, model: NanoDecoder) -> None:
    """What a variant recalls."""
    heads = head_margins(model, passkey_case(3000, 0.5, np.random.default_rng(0)), SEGMENT_LENGTH)
    best = max(heads, key=lambda head: head.margin * (head.gate > LEAST_GATE))
    where = f"layer {best.layer}, head {best.query_head}, gate {best.gate:.2f}"
    report.add(f"{name}_margin", best.margin, f"{best.worst_margin:.1f} over the heaviest byte of filler; {where}")
    for filler in FILLERS:
        for times in TIMES:
            report.add(f"{name}_{filler}_{times}", share_right(model, filler, times), "of the digits")


@torch.no_grad()
def share_right(model: NanoDecoder, filler: FillerName, times: int) -> float:
    """Of the digits of the answers to held-out samples whose filler is written `times` over."""
    task = PasskeyTask(2048, 256, (0, 50), 60, ((filler, 1.0),), introduction_share=1.0, split="test")
    generator = np.random.default_rng(5)
    samples = [draw(task, generator) for _ in range(16)]
    tokens = tokens_of(samples)
    kinds = torch.from_numpy(np.stack([sample.kinds for sample in samples]))
    scale = dilution(kinds, torch.full((len(samples),), float(times)), SEGMENT_LENGTH)
    hidden, _ = model(tokens, SegmentPlan(model.config, SEGMENT_LENGTH, scale))
    targets = tokens[:, 1:]
    is_digit = (kinds[:, 1:] == ANSWER) & (targets != ord("."))
    is_right = model.logits(hidden[:, :-1]).argmax(-1) == targets
    return is_right[is_digit].float().mean().item()


if __name__ == "__main__":
    main()
