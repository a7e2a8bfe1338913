import numpy as np
import pytest
import torch

from eunoe.decoder.config import DecoderConfig, Dtypes
from eunoe.decoder.decoder import Decoder
from eunoe.decoder.memory_state import MemorySettings
from eunoe.decoder.tiny import tiny_config
from eunoe.eviction import POLICIES, EvictionPolicy, Namm, SinksRecent
from eunoe.training.evaluation import Evaluation, KeepAll, full_cache_bytes, slots_within
from eunoe.training.tasks.case import Case

SMOLLM2 = DecoderConfig(
    name="smollm2-135m's shape", vocab_size=512, dim=576, num_layers=30, num_query_heads=9, num_kv_heads=3,
    head_dim=64, ffn_dim=1536, ties_embeddings=True,
)  # fmt: skip
BFLOAT16 = Dtypes(weights=torch.bfloat16, kv=torch.bfloat16, compute=torch.float32)
ALL: dict[str, EvictionPolicy] = {**POLICIES, "namm": Namm.untrained()}


class FiftyFourBytes:
    """Statistics of a size that no policy has."""

    name = "fifty-four/1"
    num_bytes = 54


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder.random(tiny_config(), seed=0)


def an_evaluation(decoder: Decoder, share: float = 0.5) -> Evaluation:
    return Evaluation(decoder=decoder, share=share, segment_length=32)


def some_tokens(num_tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 512, num_tokens)


def a_case(answer: np.ndarray, num_tokens: int = 96) -> Case:
    return Case(
        task="single", kind="", haystack="book", is_held_out=True, needles=(),
        context=some_tokens(num_tokens), question=some_tokens(7, seed=1), answer=answer,
    )  # fmt: skip


def greedy_answer(decoder: Decoder, case: Case, num_tokens: int) -> np.ndarray:
    """What the decoder with its full cache says, token by token."""
    state = decoder.new_state(MemorySettings(kv_budget_tokens=256, segment_length=32))
    policy = SinksRecent()
    logits = decoder.prefill(state, np.concatenate([case.context, case.question]), policy, logits="last")
    answer: list[int] = []
    while logits is not None:
        answer.append(int(logits.argmax()))
        if len(answer) == num_tokens:
            break
        logits = decoder.prefill(state, answer[-1:], policy, logits="last")
    return np.asarray(answer)


def test_a_quarter_of_the_bytes_is_less_than_a_quarter_of_the_slots() -> None:
    quarter = 0.25 * full_cache_bytes(1024, SMOLLM2, BFLOAT16)

    assert quarter == 256 * 256
    assert slots_within(quarter, SMOLLM2, BFLOAT16, None) == 248
    assert slots_within(quarter, SMOLLM2, BFLOAT16, FiftyFourBytes()) == 206  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ALL.values(), ids=ALL)
def test_no_memory_has_more_bytes_than_its_share(decoder: Decoder, policy: EvictionPolicy) -> None:
    score = an_evaluation(decoder).score(a_case(some_tokens(3), num_tokens=90), policy)

    slot_bytes = 2 * 16 * 2 + 8 + (policy.statistics.num_bytes if policy.statistics else 0)
    share = 0.5 * 90 * 2 * 16 * 2
    assert score.num_slots * slot_bytes <= share < (score.num_slots + 1) * slot_bytes


def test_an_answer_is_exact_if_greedy_decoding_gives_it(decoder: Decoder) -> None:
    answer = greedy_answer(decoder, a_case(some_tokens(1)), 5)
    wrong = answer.copy()
    wrong[-1] = (wrong[-1] + 1) % 512
    evaluation = an_evaluation(decoder)

    assert evaluation.score(a_case(answer), None).is_exact
    assert not evaluation.score(a_case(wrong), None).is_exact
    assert evaluation.score(a_case(answer), None).log_likelihood > evaluation.score(a_case(wrong), None).log_likelihood


@pytest.mark.parametrize("policy", ALL.values(), ids=ALL)
def test_a_budget_for_all_slots_scores_as_the_full_cache(decoder: Decoder, policy: EvictionPolicy) -> None:
    case = a_case(some_tokens(4))

    assert an_evaluation(decoder, share=4).score(case, policy) == an_evaluation(decoder).score(case, None)


@pytest.mark.parametrize("policy", ALL.values(), ids=ALL)
def test_a_shared_start_changes_no_score_and_is_left_as_it_is(decoder: Decoder, policy: EvictionPolicy) -> None:
    case, evaluation = a_case(some_tokens(4)), an_evaluation(decoder, share=0.3)
    alone = evaluation.score(case, policy)
    start = decoder.new_state(evaluation.settings(len(case.context), policy), policy)
    decoder.prefill(start, case.context[:32], KeepAll(policy.statistics))

    assert [evaluation.score(case, policy, start) for _ in range(2)] == [alone, alone]
    assert start.num_slots == 32


def test_what_was_evicted_changes_the_score(decoder: Decoder) -> None:
    case, evaluation = a_case(some_tokens(4)), an_evaluation(decoder)

    scores = {evaluation.score(case, policy).log_likelihood for policy in (None, *ALL.values())}

    assert len(scores) > 3


def test_perplexity_with_room_for_all_is_that_of_one_pass(decoder: Decoder) -> None:
    tokens = some_tokens(100)
    state = decoder.new_state(MemorySettings(kv_budget_tokens=256, segment_length=256))
    logits = decoder.prefill(state, tokens[:-1], SinksRecent(), logits="all")
    assert logits is not None
    losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(tokens[1:]), reduction="none")

    expected = float(losses[32:].mean().exp())

    assert an_evaluation(decoder).perplexity(tokens, None) == pytest.approx(expected, rel=1e-3)
    assert an_evaluation(decoder, share=4).perplexity(tokens, SinksRecent()) == pytest.approx(expected, rel=1e-3)
    assert an_evaluation(decoder, share=0.2).perplexity(tokens, SinksRecent()) != pytest.approx(expected, rel=1e-3)


def test_a_text_of_one_segment_has_no_perplexity(decoder: Decoder) -> None:
    with pytest.raises(ValueError, match="more than a segment"):
        an_evaluation(decoder).perplexity(some_tokens(33), None)


def test_a_share_for_sinks_only_is_refused(decoder: Decoder) -> None:
    with pytest.raises(ValueError, match="num_sink_tokens"):
        an_evaluation(decoder, share=0.01).score(a_case(some_tokens(3)), SinksRecent())
