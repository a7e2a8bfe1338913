"""What does a policy's memory still know, at equal bytes? Questions about a book and about code, and perplexity.

A context is read, compressed, and only then asked about; its memory has 25% or 50% of the full cache's bytes, with all
that a policy keeps of each slot. Every policy answers the same cases. Intervals are of 95%: Wilson's of a share,
bootstrap ones of a paired difference.
Held-out cases have templates, whole kinds of needles, verses and sources that training never has; trained ones are new
draws of what it has. Scores are kept in a file, so that a run can go on and policies be added.

retrieval_share_*: held-out cases that the first --policy answers, as a share of those that the full cache answers.
lead_over_best_25_lower: the lower end of the interval of its lead over the best other that is no --policy, as a share
of the cases.
perplexity_ratio_*: its perplexity over that of sinks and recent at the same bytes, on the book's end as a stream.
"""

import argparse
import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import get_args

import numpy as np
from _quality_plot import plot
from _quality_results import Key, Results
from _report import Report, arguments, existing_file

from eunoe.decoder.decoder import Decoder
from eunoe.decoder.tokenizer import Tokenizer, load_tokenizer
from eunoe.embedded.models import DEFAULT_MODEL, resolve_model
from eunoe.eviction import POLICIES, EvictionPolicy, Namm
from eunoe.eviction.novelty import NovelSpectrogram
from eunoe.eviction.policy_files import SHIPPED
from eunoe.eviction.spectrogram import AttentionSpectrogram
from eunoe.training.bootstrap import difference_interval, share_interval
from eunoe.training.evaluation import Evaluation, Score
from eunoe.training.tasks.case import Case
from eunoe.training.tasks.haystack import HaystackName, lines
from eunoe.training.tasks.suite import suite

OUT = Path(__file__).parents[1] / "out"
# Ours without parameters, by label.
OTHERS = {name.partition("/")[0]: policy for name, policy in POLICIES.items()}
_BASELINE = "sinks-recent"
# Of kvpress' presses those that need no question, no training and no second reading, and what it puts around others,
# around the best of them. PyramidKV is none of them: at 25% of such contexts it is SnapKV, and at 50% its layers differ
# in length, for which `transformers` has no mask.
PRESSES = (
    "RandomPress",
    "StreamingLLMPress",
    "KnormPress",
    "KeyDiffPress",
    "LagKVPress",
    "CURPress",
    "CapPress",
    "LeverageScorePress",
    "NonCausalAttnPress",
    "CompactorPress",
    "AdaKVPress(CompactorPress)",
    "CriticalKVPress(CompactorPress)",
    "CriticalAdaKVPress(CompactorPress)",
    "ChunkKVPress(CompactorPress)",
    "EntropyGatedChunkKVPress(CompactorPress)",
    "TOVAPress",
    "SnapKVPress",
    "CriticalKVPress(SnapKVPress)",
    "ExpectedAttentionPress",
    "AdaKVPress(ExpectedAttentionPress)",
    "ObservedAttentionPress",
)
# Not a seed that anybody trains with.
SEED = 20_000


@dataclass(frozen=True)
class Contender:
    """Somebody who answers. `name` is its own in the file of scores; ours have a policy, the full cache and presses
    have none.
    """

    label: str
    name: str
    policy: EvictionPolicy | None = None


def main() -> None:
    """Ask everybody everything, and print and plot what came of it."""
    options = parsed_options()
    report = Report("eviction_quality", as_json=options.json)
    _, directory = resolve_model(DEFAULT_MODEL, on_step=report.say)
    tokenizer, decoder = load_tokenizer(directory), Decoder.load(directory, num_threads=options.threads)
    dtype = str(decoder.dtypes.compute).partition(".")[2]
    of_model = f", {decoder.model_digest[:12]}, {dtype}"
    suffix = f", {options.positions}{of_model}"
    full = Contender("full cache", f"full-cache{suffix}")
    namms = {path.stem: Namm.load(path) for path in options.policy}
    if options.faithful:
        namms |= {f"{label} faithful": faithful(namm) for label, namm in namms.items()}
    policies: dict[str, EvictionPolicy] = {**namms}
    policies |= {label: OTHERS[label] for label in options.against}
    ours = [Contender(label, policy.name + suffix, policy) for label, policy in policies.items()]
    presses: list[Contender] = []
    if options.kvpress_python:
        command = "from importlib.metadata import version; print(version('kvpress'))"
        version = subprocess.check_output([options.kvpress_python, "-c", command], text=True).strip()
        presses = [
            Contender(f"kvpress {press.replace('Press', '')}", f"kvpress/{version}/{press}{of_model}")
            for press in options.presses
        ]
        their_full = Contender("kvpress full cache", f"kvpress/{version}/full-cache{of_model}")

    cases = {case.digest[:16]: case for case in drawn_cases(options, tokenizer)}
    results = Results(options.results)

    def evaluation(share: float) -> Evaluation:
        return Evaluation(decoder=decoder, share=share, positions=options.positions)

    ask_ours(report, results, cases, [full], [1.0], evaluation)
    ask_ours(report, results, cases, ours, options.shares, evaluation)
    if options.kvpress_python:
        ask_presses(report, results, cases, their_full, presses, options, directory, dtype)
        compare_full_caches(report, results, cases, full, their_full)

    for share in options.shares:
        tabulate(report, results, cases, full, [*ours, *presses], share)
        lead(report, results, cases, full, ours[0], [*ours[1:], *presses], share)
    if options.perplexity_tokens:
        perplexities(report, tokenizer, evaluation, ours, options)
    if options.shares:
        held_out = [name for name, case in cases.items() if case.is_held_out]
        exact = {
            share: {each.label: results.exact(each.name, share, held_out) for each in [*ours, *presses]}
            for share in options.shares
        }
        plot(options.plot, exact, full=mean(results.exact(full.name, 1.0, held_out)))
        report.say(f"  plotted in {options.plot}")
    report.finish()


def faithful(namm: Namm) -> Namm:
    """The same, watching every query of a segment: more bytes a slot, so that fewer slots stay."""
    statistics = namm.statistics
    if isinstance(statistics, NovelSpectrogram):
        return replace(namm, statistics=replace(statistics, spectrogram=AttentionSpectrogram()))
    return replace(namm, statistics=AttentionSpectrogram())


def parsed_options() -> argparse.Namespace:
    """Sizes that --quick makes smaller are options too."""
    parser = arguments(__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--policy", type=existing_file, action="append", help="a NAMM's file; may come again (default: the shipped one)"
    )
    parser.add_argument("--kvpress-python", type=Path, help="of an environment with kvpress (make kvpress-env)")
    parser.add_argument("--faithful", action="store_true", help="each --policy also as it watches all queries")
    parser.add_argument("--against", nargs="*", choices=OTHERS, default=list(OTHERS), help="of ours (default: all)")
    parser.add_argument("--presses", nargs="+", default=PRESSES, metavar="PRESS", help="of kvpress (default: many)")
    parser.add_argument("--check-presses", type=int, default=0, help="on so many cases, against kvpress' own pipeline")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of the contexts (default: 1024 2048 4096)")
    parser.add_argument("--shares", type=float, nargs="+", help="of the full cache's bytes (default: 0.25 0.5)")
    parser.add_argument("--cases", type=int, help="held out, a length (default: 60)")
    parser.add_argument("--trained-cases", type=int, help="of trained kinds, a length (default: a third as many)")
    parser.add_argument(
        "--haystacks", nargs="+", choices=get_args(HaystackName), default=["book", "code"], help="of held-out cases"
    )
    parser.add_argument("--positions", choices=("compact", "original"), default="compact", help="as of a stream")
    parser.add_argument("--perplexity-tokens", type=int, help="of the book's end (default: 8192; 0: none)")
    parser.add_argument("--results", type=Path, default=OUT / "eviction_quality.jsonl", help="where scores are kept")
    parser.add_argument("--plot", type=Path, default=OUT / "eviction_quality.png")
    options = parser.parse_args()
    options.policy = options.policy or [SHIPPED / "smollm2-namm.safetensors"]
    options.lengths = options.lengths or ([1024] if options.quick else [1024, 2048, 4096])
    options.shares = options.shares or ([0.25] if options.quick else [0.25, 0.5])
    options.cases = options.cases or (12 if options.quick else 60)
    if options.trained_cases is None:
        options.trained_cases = options.cases // 3
    if options.perplexity_tokens is None:
        options.perplexity_tokens = 2048 if options.quick else 8192
    return options


def drawn_cases(options: argparse.Namespace, tokenizer: Tokenizer) -> list[Case]:
    """Of all lengths, held-out ones and trained ones."""
    drawn = []
    for num_tokens in options.lengths:
        drawn += suite(
            num_tokens, options.cases, seed=SEED, split="test", tokenizer=tokenizer, haystacks=options.haystacks
        )
        drawn += suite(num_tokens, options.trained_cases, seed=SEED, split="train", tokenizer=tokenizer)
    return drawn


def ask_ours(
    report: Report,
    results: Results,
    cases: dict[str, Case],
    contenders: list[Contender],
    shares: list[float],
    evaluation: Callable[[float], Evaluation],
) -> None:
    """Score what is not known yet, case by case: what a stopped run leaves is paired."""
    for index, (case_digest, case) in enumerate(cases.items()):
        for share in shares:
            for contender in contenders:
                key = Key(contender.name, share, case_digest)
                if key not in results:
                    report.progress(f"{contender.label}: case {index + 1} of {len(cases)}, {len(case.context)} tokens")
                    results.add(key, evaluation(share).score(case, contender.policy))


def ask_presses(
    report: Report,
    results: Results,
    cases: dict[str, Case],
    full: Contender,
    presses: list[Contender],
    options: argparse.Namespace,
    model: Path,
    dtype: str,
) -> None:
    """Have kvpress score what is not known yet, in its own environment, a case a job. It needs no more bytes of a slot
    than keys and values, so that it keeps a quarter of the slots at a quarter of the bytes.
    """
    wanted = [(full, 1.0), *((press, share) for share in options.shares for press in presses)]
    # As kvpress' environment calls them.
    names = {contender.name.rpartition("/")[2].partition(", ")[0]: contender.name for contender in (full, *presses)}
    theirs = {name: press for press, name in names.items()}
    jobs = []
    for index, (case_digest, case) in enumerate(cases.items()):
        is_checked = index < options.check_presses
        missing = [
            (theirs[contender.name], share)
            for contender, share in wanted
            if is_checked or Key(contender.name, share, case_digest) not in results
        ]
        if missing:
            jobs.append(
                {
                    "case": case_digest,
                    "context": case.context.tolist(),
                    "question": case.question.tolist(),
                    "answer": case.answer.tolist(),
                    "presses": missing,
                    "is_checked": is_checked,
                }
            )
    if not jobs:
        return
    command = [options.kvpress_python, Path(__file__).with_name("_kvpress_peer.py")]
    given = json.dumps({"model": str(model), "dtype": dtype, "threads": options.threads, "jobs": jobs})
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(given)
        process.stdin.close()
        for index, line in enumerate(process.stdout):
            report.progress(f"kvpress: {index + 1} of {sum(len(job['presses']) for job in jobs)}")
            found = json.loads(line)
            key = Key(names[found.pop("press")], found.pop("share"), found.pop("case"))
            results.add(key, Score(**found))
    if process.returncode:
        raise SystemExit(f"kvpress ended with status {process.returncode}")


def compare_full_caches(
    report: Report, results: Results, cases: dict[str, Case], ours: Contender, theirs: Contender
) -> None:
    """Do full caches answer alike on both sides? A line for people: if so, policies and presses are compared alone."""
    exact = [results.exact(full.name, 1.0, cases) for full in (ours, theirs)]
    likelihoods = [results.log_likelihoods(full.name, 1.0, cases) for full in (ours, theirs)]
    num_alike = sum(own == other for own, other in zip(*exact, strict=True))
    apart = [abs(own - other) for own, other in zip(*likelihoods, strict=True)]
    report.say(
        f"  our full cache and that of kvpress are right or wrong alike in {num_alike} of {len(cases)} cases, "
        f"{median(apart):.3f} nats an answer apart (median; at most {max(apart):.3f})"
    )


def tabulate(
    report: Report, results: Results, cases: dict[str, Case], full: Contender, contenders: list[Contender], share: float
) -> None:
    """exact_*: share of the held-out cases that are answered; below, lines of parts of them for people."""
    held_out = [name for name, case in cases.items() if case.is_held_out]
    percent = round(100 * share)
    report.say(f"  with {percent}% of the bytes, {len(held_out)} held-out cases of {len(cases)}")
    for contender in [full, *contenders]:
        at = share if contender is not full else 1.0
        exact = results.exact(contender.name, at, held_out)
        low, high = share_interval(round(sum(exact)), len(exact))
        likelihood = mean(results.log_likelihoods(contender.name, at, held_out))
        label = contender.label.replace(" ", "_")
        report.add(f"exact_{percent}_{label}", mean(exact), f"[{low:.3f}, {high:.3f}], {likelihood:.2f} nats an answer")
    parts: dict[str, list[str]] = {}
    for name, case in cases.items():
        who = "held out" if case.is_held_out else "trained"
        for part in (f"{len(case.context)} tokens", case.haystack, case.task, f"needle {case.kind}"):
            parts.setdefault(f"{who}, {part}", []).append(name)
        parts.setdefault(who, []).append(name)
    labels = [full.label, *(contender.label.removeprefix("kvpress ") for contender in contenders)]
    report.say(" " * 34 + " ".join(f"{label[:12]:>12}" for label in labels))
    for part, names in sorted(parts.items()):
        shares = [mean(results.exact(full.name, 1.0, names))]
        shares += [mean(results.exact(contender.name, share, names)) for contender in contenders]
        report.say(f"  {part:26} {len(names):4} " + " ".join(f"{value:12.2f}" for value in shares))


def lead(
    report: Report,
    results: Results,
    cases: dict[str, Case],
    full: Contender,
    subject: Contender,
    others: list[Contender],
    share: float,
) -> None:
    """retrieval_share_* and lead_over_best_*_lower of the first policy, over the held-out cases."""
    held_out = [name for name, case in cases.items() if case.is_held_out]
    percent = round(100 * share)
    own = results.exact(subject.name, share, held_out)
    answered = sum(results.exact(full.name, 1.0, held_out))
    report.add(f"retrieval_share_{percent}", sum(own) / max(answered, 1), f"of what the full cache answers, {answered}")
    lows: list[tuple[float, str]] = []
    for other in others:
        exact = results.exact(other.name, share, held_out)
        low, high = difference_interval(own, exact)
        report.say(f"  leads {other.label} by {mean(own) - mean(exact):.3f} [{low:.3f}, {high:.3f}]")
        if not isinstance(other.policy, Namm):
            lows.append((low, other.label))
    if lows:
        least, label = min(lows)
        report.add(f"lead_over_best_{percent}_lower", least, f"over {label}; over all others it is more")


def perplexities(
    report: Report,
    tokenizer: Tokenizer,
    evaluation: Callable[[float], Evaluation],
    ours: list[Contender],
    options: argparse.Namespace,
) -> None:
    """perplexity_*: of everybody, perplexity_ratio_* of the first policy over sinks and recent, who are always asked;
    shares are of the whole text's cache.
    """
    if _BASELINE not in {contender.label for contender in ours}:
        ours = [*ours, Contender(_BASELINE, OTHERS[_BASELINE].name, OTHERS[_BASELINE])]
    # More characters than so many tokens have.
    text = "".join(lines("book", "test"))[: 8 * options.perplexity_tokens]
    token_ids = np.asarray(tokenizer.encode(text)[: options.perplexity_tokens], dtype=np.int64)
    report.progress("perplexity: full cache")
    full = evaluation(1.0).perplexity(token_ids, None)
    report.add("perplexity_full_cache", full, f"of {len(token_ids)} tokens")
    for share in options.shares:
        percent = round(100 * share)
        found = {}
        for contender in ours:
            report.progress(f"perplexity: {contender.label}")
            found[contender.label] = evaluation(share).perplexity(token_ids, contender.policy)
            times = f"{found[contender.label] / full:.3f} times the full cache's"
            report.add(f"perplexity_{percent}_{contender.label}", found[contender.label], times)
        ratio = found[ours[0].label] / found[_BASELINE]
        report.add(f"perplexity_ratio_{percent}", ratio, "over sinks and recent")


if __name__ == "__main__":
    main()
