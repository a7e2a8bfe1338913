"""Does a policy trained on SmolLM2's keys and values serve a model that it never saw? eunoe-nano as a plain decoder.

The policy is used as it is: its features are means over a sixth of the layers, or per slot, so that they exist in any
model. The other model reads bytes instead of tokens, has 8 layers instead of 30, and heads of 32 instead of 64. Its
compressive memory is shut, so that only what stays in the cache can answer. Contexts of a passkey in verses that the
model was not trained on are compressed to a quarter of the full cache's bytes before the question comes, and verses
alone are read on in such a memory. It was trained on distances of up to 255 bytes: beyond these its full cache is no
upper bound, and answers nothing. Every policy gets the same cases, and intervals are paired bootstrap ones of 95%.
"""

import math
from pathlib import Path

import numpy as np
import torch
from _report import Report, arguments, existing_file
from language_model import CHECKPOINT, WINDOW, a_decoder, pieces

from eunoe.eviction import POLICIES, EvictionPolicy, Namm
from eunoe.eviction.policy_files import SHIPPED
from eunoe.training.bootstrap import mean_interval
from eunoe.training.decoder.passkey import question
from eunoe.training.decoder.passkey_evaluation import passkey_case
from eunoe.training.evaluation import Evaluation
from eunoe.training.tasks.case import Case

SHARE = 0.25


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--policy", type=existing_file, default=SHIPPED / "smollm2-namm.safetensors")
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="its directory (default: eunoe-nano)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[320, 1024, 2048], help="bytes of the contexts")
    parser.add_argument("--cases", type=int, help="a length (default: 60)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = Report("eviction_transfer", as_json=options.json)
    num_cases = options.cases or (6 if options.quick else 60)
    evaluation = Evaluation(
        decoder=a_decoder(options.model, has_open_gates=False), share=SHARE, segment_length=WINDOW.segment_length
    )
    policies: dict[str, EvictionPolicy | None] = {"full_cache": None, "namm": Namm.load(options.policy)}
    policies |= {name.partition("/")[0].replace("-", "_"): policy for name, policy in POLICIES.items()}
    for length in options.lengths:
        cases = [a_case(length, np.random.default_rng((1, index))) for index in range(num_cases)]
        texts = [text.astype(np.int64) for text in pieces("test", length, num_cases)]
        exact, losses = {}, {}
        for label, policy in policies.items():
            report.progress(f"{length} bytes, {label}")
            exact[label] = np.array([evaluation.score(case, policy).is_exact for case in cases], float)
            losses[label] = np.log([evaluation.perplexity(text, policy) for text in texts])
            report.add(f"exact_{label}_{length}", exact[label].mean(), f"of {num_cases}")
            report.add(f"perplexity_{label}_{length}", math.exp(losses[label].mean()), f"a byte, of {num_cases} texts")
        for label in list(policies)[2:]:
            low, high = mean_interval(exact["namm"] - exact[label])
            report.add(f"lead_over_{label}_{length}_lower", low, f"to {high:.3f}, of the cases")
            difference = losses["namm"] - losses[label]
            low, high = np.exp(mean_interval(difference))
            ratio = math.exp(difference.mean())
            report.add(f"perplexity_ratio_{label}_{length}", ratio, f"namm's over it: {low:.4f} to {high:.4f}")
    report.finish()


def a_case(length: int, generator: np.random.Generator) -> Case:
    """A passkey in the first 60% of a context of the book's held-out verses."""
    prompt = passkey_case(length + len(question()), float(generator.uniform(0.0, 0.6)), generator, "book")
    context = prompt.prompt.removesuffix(question().encode())
    start = context.index(b"The pass key is ")
    return Case(
        task="passkey",
        kind="digits",
        haystack="book",
        is_held_out=True,
        context=as_ids(context),
        question=as_ids(question().encode()),
        answer=as_ids(prompt.answer),
        needles=((start, context.index(b" is the pass key. ")),),
    )


def as_ids(text: bytes) -> np.ndarray:
    """One byte a token."""
    return np.frombuffer(text, np.uint8).astype(np.int64)


if __name__ == "__main__":
    main()
