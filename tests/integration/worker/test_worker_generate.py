"""Answers and scores come from copies: they see what was accepted, and leave no trace but a remembered record."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.clients.model_worker import ModelWorkerClient
from eunoe.decoder.decoder import Decoder
from eunoe.decoder.memory_state import MemorySettings
from eunoe.decoder.tokenizer import load_tokenizer
from eunoe.eviction import DEFAULT_POLICY
from eunoe.model_worker.worker import ModelWorker
from eunoe.runtime.errors import CarryOpen, FailedPrecondition, InvalidRequest, Overloaded, PromptTooLong
from eunoe.runtime.grpc_channel import open_channel

Text = Callable[..., bytes]

# Where the decoder computes in bfloat16: 0.03 is its last place at these log-probabilities of -4 to -8, and the text
# is cut into other passes here than in the reference.
SCORE_TOLERANCE = 5e-2


def tokens_of(responses: list[api.GenerateResponse]) -> list[int]:
    return [token_id for response in responses for token_id in response.tokens.token_ids]


def summary_of(responses: list[api.GenerateResponse]) -> api.GenerateSummary:
    assert responses[-1].WhichOneof("response") == "summary"
    return responses[-1].summary


class Reference:
    """The model run by hand over a whole text, no streams about."""

    def __init__(self, worker: ModelWorker) -> None:
        self.decoder = Decoder.load(worker.config.model_path, num_threads=1)
        self.tokenizer = load_tokenizer(worker.config.model_path)

    def log_probs(self, token_ids: list[int], **settings: Any) -> np.ndarray:
        """Of every token but the first, given those before it."""
        complete: dict[str, Any] = {"kv_budget_tokens": 48, "segment_length": 16, "num_sink_tokens": 4} | settings
        state = self.decoder.new_state(MemorySettings(**complete))
        logits = self.decoder.prefill(state, token_ids, DEFAULT_POLICY, logits="all")
        assert logits is not None
        chosen = np.asarray(token_ids[1:])[:, None]
        return np.take_along_axis(logits.log_softmax(-1).numpy()[:-1], chosen, 1)[:, 0]


@pytest.fixture
async def worker(platform: Any) -> ModelWorker:
    return await platform.worker()


@pytest.mark.parametrize("num_bytes", [5, 300, 3000])
async def test_scores_are_those_of_the_whole_text(
    platform: Any, worker: ModelWorker, make_text: Text, num_bytes: int
) -> None:
    data, scored = make_text(num_bytes), " river the memory of the great"
    name = await platform.stream()
    await platform.append(name, data)
    reference = Reference(worker)
    context, ids = reference.tokenizer.encode(data.decode()), reference.tokenizer.encode(scored)
    expected = reference.log_probs(context + ids)[-len(ids) :]
    assert await platform.score(worker, name, text=scored) == pytest.approx(expected.tolist(), abs=SCORE_TOLERANCE)


async def test_scores_at_a_boundary_still_see_the_last_token(platform: Any, worker: ModelWorker) -> None:
    name = await platform.stream(kv_budget_tokens=256)
    ids = np.arange(100, 148, dtype="<u4")
    await platform.append(name, ids.tobytes(), api.RECORD_KIND_TOKEN_IDS)
    reference = Reference(worker)
    text_ids = reference.tokenizer.encode("the river")
    expected = reference.log_probs([*ids.tolist(), *text_ids], kv_budget_tokens=256)[-len(text_ids) :]
    assert await platform.score(worker, name, text="the river") == pytest.approx(expected.tolist(), abs=SCORE_TOLERANCE)


async def test_long_texts_are_scored_across_segments(platform: Any, worker: ModelWorker, make_text: Text) -> None:
    name = await platform.stream(kv_budget_tokens=512)
    await platform.append(name, make_text(100))
    text = make_text(1000, 1).decode()
    num_tokens = len(Reference(worker).tokenizer.encode(text))
    assert num_tokens > 256
    assert len(await platform.score(worker, name, text=text)) == num_tokens


async def test_an_answer_is_the_likeliest_continuation(platform: Any, worker: ModelWorker, make_text: Text) -> None:
    data, prompt = make_text(700), " and then"
    name = await platform.stream(kv_budget_tokens=400)
    await platform.append(name, data)
    responses = await platform.generate(worker, name, text=prompt, max_tokens=8)
    reference = Reference(worker)
    ids = reference.tokenizer.encode(data.decode()) + reference.tokenizer.encode(prompt)
    state = reference.decoder.new_state(MemorySettings(kv_budget_tokens=400, segment_length=16, num_sink_tokens=4))
    logits = reference.decoder.prefill(state, ids, DEFAULT_POLICY, logits="last")
    assert logits is not None
    assert tokens_of(responses)[:1] == [int(logits.argmax())]
    summary = summary_of(responses)
    assert summary.num_prompt_tokens == len(reference.tokenizer.encode(prompt))
    assert summary.offset == len(data)
    assert summary.num_answer_tokens == len(tokens_of(responses)) == 8
    assert summary.text == "".join(response.tokens.text for response in responses)
    assert summary.finish_reason == api.FINISH_REASON_LENGTH
    assert summary.state_bytes == (await platform.flush(worker, name)).stream.state_bytes
    assert 0 < summary.num_slots <= 416
    assert summary.decode_time.ToNanoseconds() > 0


async def test_equal_seeds_give_equal_answers_and_others_differ(
    platform: Any, worker: ModelWorker, make_text: Text
) -> None:
    name = await platform.stream()
    await platform.append(name, make_text(300))
    answers = [
        tokens_of(
            await platform.generate(
                worker, name, text="so", max_tokens=12, sampling=api.Sampling(temperature=2.0, seed=seed)
            )
        )
        for seed in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]


async def test_a_chat_prompt_goes_through_the_template(platform: Any, worker: ModelWorker) -> None:
    name = await platform.stream()
    turns = [api.ChatTurn(role="user", content="who?")]
    responses = await platform.generate(worker, name, chat=api.ChatPrompt(turns=turns), max_tokens=2)
    expected = Reference(worker).tokenizer.render_chat([("user", "who?")])
    assert summary_of(responses).num_prompt_tokens == len(expected)


async def test_a_stop_text_ends_the_answer(platform: Any, worker: ModelWorker, make_text: Text) -> None:
    name = await platform.stream()
    await platform.append(name, make_text(300))
    whole = summary_of(await platform.generate(worker, name, text="so", max_tokens=12)).text
    stop = whole[3:5]
    cut = summary_of(await platform.generate(worker, name, text="so", max_tokens=12, stop=[stop]))
    assert cut.finish_reason == api.FINISH_REASON_STOP
    assert cut.text == whole[: whole.index(stop)]


async def test_answers_leave_the_memory_as_it_was(platform: Any, worker: ModelWorker, make_text: Text) -> None:
    data = make_text(1000)
    name = await platform.stream()
    await platform.append(name, data[:600])
    await asyncio.gather(*(platform.generate(worker, name, text="so", max_tokens=20) for _ in range(4)))
    await platform.append(name, data[600:])
    record = await platform.flush(worker, name)
    assert record.stream.state_digest == await platform.digest(worker, data)


async def test_answers_of_many_streams_at_once_are_those_alone(
    platform: Any, worker: ModelWorker, make_text: Text
) -> None:
    names = [await platform.stream() for _ in range(5)]
    for seed, name in enumerate(names):
        await platform.append(name, make_text(300, seed))
    alone = [tokens_of(await platform.generate(worker, name, text="so", max_tokens=6)) for name in names]
    together = await asyncio.gather(*(platform.generate(worker, name, text="so", max_tokens=6) for name in names))
    assert [tokens_of(responses) for responses in together] == alone


async def test_applied_freshness_answers_from_the_committed_memory(
    platform: Any, worker: ModelWorker, make_text: Text
) -> None:
    name = await platform.stream()
    await platform.append(name, make_text(600))
    committed = await platform.flush(worker, name)
    before = await platform.generate(worker, name, text="so", max_tokens=6, freshness=api.FRESHNESS_APPLIED)
    await platform.append(name, make_text(900, 1))
    await platform.generate(worker, name, text="so", max_tokens=1)
    after = await platform.generate(worker, name, text="so", max_tokens=6, freshness=api.FRESHNESS_APPLIED)
    assert summary_of(after).offset == committed.stream.applied_offset
    assert tokens_of(after) == tokens_of(before)


async def test_a_call_on_a_stream_far_behind_tells_how_it_catches_up(
    platform: Any, worker: ModelWorker, make_text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eunoe.model_worker.stream.PROGRESS_SECONDS", 0.02)
    name = await platform.stream()
    accepted = await platform.append(name, make_text(20_000))
    responses = await platform.generate(worker, name, text="so", max_tokens=1)
    catching_up = [r.catching_up for r in responses if r.WhichOneof("response") == "catching_up"]
    assert catching_up
    assert {c.accepted_offset for c in catching_up} == {accepted}
    assert [c.applied_offset for c in catching_up] == sorted(c.applied_offset for c in catching_up)
    assert summary_of(responses).offset == accepted


async def test_a_remembered_answer_is_one_record_that_the_fold_reads(
    platform: Any, worker: ModelWorker, make_text: Text
) -> None:
    name, other = await platform.stream(), await platform.stream()
    for stream in (name, other):
        await platform.append(stream, make_text(300))
    responses = await platform.generate(worker, name, text="so", max_tokens=6, remember=True)
    assert summary_of(responses).remember_result == api.REMEMBER_RESULT_REMEMBERED
    ids = Reference(worker).tokenizer.encode("so") + tokens_of(responses)
    accepted = await platform.append(other, np.asarray(ids, dtype="<u4").tobytes(), api.RECORD_KIND_TOKEN_IDS)
    assert (await platform.record(name)).stream.accepted_offset == accepted
    both = [await platform.flush(worker, stream) for stream in (name, other)]
    assert both[0].stream.state_digest == both[1].stream.state_digest


async def test_a_repeated_request_id_gets_the_first_outcome(
    platform: Any, worker: ModelWorker, make_text: Text
) -> None:
    name = await platform.stream()
    await platform.append(name, make_text(300))
    request = {"text": "so", "max_tokens": 6, "remember": True, "request_id": "once"}
    first = await platform.generate(worker, name, **request)
    accepted = (await platform.record(name)).stream.accepted_offset
    second = await platform.generate(worker, name, **request)
    assert summary_of(second) == summary_of(first)
    assert tokens_of(second) == tokens_of(first)
    assert (await platform.record(name)).stream.accepted_offset == accepted


async def test_remembering_conflicts_with_an_append_that_came_first(
    platform: Any, worker: ModelWorker, make_text: Text
) -> None:
    name = await platform.stream()
    await platform.append(name, make_text(300))
    lease = await worker.place(name)
    request = api.GenerateRequest(stream=name, text="so", max_tokens=40, remember=True)
    async with open_channel(worker.address) as channel:
        responses = []
        async for response in ModelWorkerClient(channel).generate(request, lease):
            if not responses:
                accepted = await platform.append(name, b"I was first")
            responses.append(response)
    assert summary_of(responses).remember_result == api.REMEMBER_RESULT_CONFLICT
    assert (await platform.record(name)).stream.accepted_offset == accepted


async def test_equal_answers_of_two_calls_are_remembered_once(
    platform: Any, worker: ModelWorker, make_text: Text
) -> None:
    name = await platform.stream()
    await platform.append(name, make_text(300))
    both = await asyncio.gather(
        *(platform.generate(worker, name, text="so", max_tokens=6, remember=True) for _ in range(2))
    )
    results = sorted(summary_of(responses).remember_result for responses in both)
    offsets = {summary_of(responses).offset for responses in both}
    # Either they ran side by side, or the second one saw what the first one had remembered.
    if len(offsets) == 1:
        assert results == [api.REMEMBER_RESULT_REMEMBERED, api.REMEMBER_RESULT_CONFLICT]
    else:
        assert results == [api.REMEMBER_RESULT_REMEMBERED] * 2


async def test_a_cancelled_answer_frees_its_copy_and_remembers_nothing(
    platform: Any, worker: ModelWorker, make_text: Text
) -> None:
    name = await platform.stream(kv_budget_tokens=512)
    accepted = await platform.append(name, make_text(300))
    lease = await worker.place(name)
    request = api.GenerateRequest(stream=name, text="so", max_tokens=4096, remember=True)
    resident = None
    async with open_channel(worker.address) as channel:
        async with aclosing(ModelWorkerClient(channel).generate(request, lease)) as responses:
            async for _ in responses:
                resident = worker.ledger.reserved_bytes
                break
        stream = await worker.held(name, lease)
        assert resident == 2 * (await stream.load()).resident_bytes

        async def is_free() -> bool:
            return worker.ledger.reserved_bytes == resident / 2 and worker.parts.engine.is_idle

        await platform.until(is_free)
    assert (await platform.record(name)).stream.accepted_offset == accepted


async def test_copies_count_towards_the_memory_limit(platform: Any, worker: ModelWorker) -> None:
    name = await platform.stream()
    await platform.append(name, b"some text")
    stream = await worker.held(name, await worker.place(name))
    size = (await stream.load()).resident_bytes
    small = await platform.worker(memory_limit_bytes=size)
    other = await platform.stream()
    with pytest.raises(Overloaded) as caught:
        await platform.generate(small, other, text="so")
    assert caught.value.retry_after_seconds > 0


async def test_a_prompt_longer_than_the_budget_is_refused(platform: Any, worker: ModelWorker, make_text: Text) -> None:
    name = await platform.stream(kv_budget_tokens=48)
    with pytest.raises(PromptTooLong) as caught:
        await platform.generate(worker, name, text=make_text(400).decode())
    assert caught.value.limit_tokens == 48
    with pytest.raises(PromptTooLong):
        await platform.score(worker, name, text=make_text(400).decode())


async def test_original_positions_end_at_the_models_range(platform: Any, worker: ModelWorker, make_text: Text) -> None:
    name = await platform.stream(kv_budget_tokens=512, positions=api.POSITION_MODE_ORIGINAL)
    await platform.append(name, make_text(2500))
    with pytest.raises(FailedPrecondition, match="compact"):
        await platform.generate(worker, name, text="so")


async def test_original_positions_end_an_answer_at_the_models_range(platform: Any, worker: ModelWorker) -> None:
    name = await platform.stream(kv_budget_tokens=512, positions=api.POSITION_MODE_ORIGINAL)
    await platform.append(name, np.full(500, 100, dtype="<u4").tobytes(), api.RECORD_KIND_TOKEN_IDS)
    responses = await platform.generate(worker, name, max_tokens=100, sampling=api.Sampling(temperature=3.0, seed=5))
    assert summary_of(responses).num_answer_tokens <= 12


async def test_nothing_cannot_be_continued(platform: Any, worker: ModelWorker) -> None:
    name = await platform.stream()
    with pytest.raises(FailedPrecondition, match="empty"):
        await platform.generate(worker, name)
    with pytest.raises(FailedPrecondition, match="empty"):
        await platform.score(worker, name, text="so")


@pytest.mark.parametrize(
    "request_",
    [
        {"remember": True, "freshness": api.FRESHNESS_APPLIED},
        {"max_tokens": 4097},
        {"sampling": api.Sampling(temperature=11)},
        {"stop": [""]},
    ],
)
async def test_bad_requests_are_refused(platform: Any, worker: ModelWorker, request_: dict[str, Any]) -> None:
    name = await platform.stream()
    with pytest.raises(InvalidRequest):
        await platform.generate(worker, name, text="so", **request_)


async def test_an_answer_cannot_be_remembered_behind_a_cut_character(platform: Any, worker: ModelWorker) -> None:
    name = await platform.stream()
    await platform.append(name, "größe".encode()[:3])
    with pytest.raises(CarryOpen):
        await platform.generate(worker, name, text="so", remember=True)
    assert summary_of(await platform.generate(worker, name, text="so", max_tokens=1)).text


async def test_inspection_shows_the_committed_slots(platform: Any, worker: ModelWorker, make_text: Text) -> None:
    name = await platform.stream()
    await platform.append(name, make_text(900))
    record = await platform.flush(worker, name)
    await platform.append(name, make_text(900, 1))
    await platform.generate(worker, name, text="so", max_tokens=1)
    async with open_channel(worker.address) as channel:
        call = ModelWorkerClient(channel).inspect_memory(api.InspectMemoryRequest(name=name), await worker.place(name))
        first, *others = [response async for response in call]
    assert first.stream.state_digest == record.stream.state_digest
    heads = [response.head for response in others]
    assert [(head.layer, head.head) for head in heads] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for head in heads:
        num_tokens = record.stream.tokens
        assert list(head.positions) == [0, 1, 2, 3, *range(num_tokens - 44, num_tokens)]
        assert len(head.token_ids) == len(head.texts) == 48


@pytest.mark.parametrize("retain_log", [False, True])
async def test_inspection_shows_the_retained_log_up_to_the_newest_kept_token(
    platform: Any, worker: ModelWorker, make_text: Text, retain_log: bool
) -> None:
    name = await platform.stream(retain_log=retain_log)
    for seed in range(3):
        await platform.append(name, make_text(900, seed))
        record = await platform.flush(worker, name)
    await platform.append(name, make_text(900, 3))
    request = api.InspectMemoryRequest(name=name, with_log=True)
    async with open_channel(worker.address) as channel:
        call = ModelWorkerClient(channel).inspect_memory(request, await worker.place(name))
        responses = [response async for response in call]
    log = api.LogTokens()
    for response in responses:
        log.MergeFrom(response.log)
    data = b"".join(log.pieces)
    whole = b"".join(make_text(900, seed) for seed in range(4))
    start, end = record.stream.log_start_offset, record.stream.applied_offset
    assert whole[start:].startswith(data)
    # Tokens of a pre-token at the end may be folded before all of it is.
    assert 0 <= len(data) - (end - start) < 16
    head = next(response.head for response in responses if response.HasField("head"))
    first_position = record.stream.tokens - len(log.token_ids)
    assert (first_position == 0) == retain_log
    kept = [(p, id_) for p, id_ in zip(head.positions, head.token_ids, strict=True) if p >= first_position]
    assert kept == [(p, log.token_ids[p - first_position]) for p, _ in kept]
    assert len(kept) == 48 if retain_log else 44
