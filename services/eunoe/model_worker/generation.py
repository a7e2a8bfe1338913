"""Answers and scores, computed on copies of a stream's memory that are never committed."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
from google.protobuf.duration_pb2 import Duration

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.eviction.policy import EvictionPolicy
from eunoe.model_worker import metrics
from eunoe.model_worker.answer import Answer
from eunoe.model_worker.copies import BorrowedCopy, Outbox
from eunoe.model_worker.engine import Decode, Job
from eunoe.model_worker.fold import EphemeralCopy
from eunoe.model_worker.reading import check_room, read_tokens, score_tokens
from eunoe.model_worker.remembering import Remembering
from eunoe.model_worker.sampling import Sampler
from eunoe.model_worker.stream import OwnedStream, WorkerParts
from eunoe.runtime.errors import InvalidRequest, PromptTooLong

DEFAULT_MAX_TOKENS = 128
LARGEST_MAX_TOKENS = 4096


@dataclass(slots=True, eq=False)
class _Call:
    """One answer on its way."""

    prompt_ids: list[int]
    max_tokens: int
    sampler: Sampler
    answer: Answer
    arrived: float = field(default_factory=time.monotonic)
    caught_up: float = 0.0
    started: float = 0.0
    first_logits: float = 0.0
    sent: api.GeneratedTokens = field(default_factory=api.GeneratedTokens)
    summary: api.GenerateSummary = field(default_factory=api.GenerateSummary)


class Generation:
    """Generate and Score of one worker's streams.

    Args:
        parts: Of the worker.
    """

    def __init__(self, parts: WorkerParts) -> None:
        self._parts = parts

    async def generate(self, stream: OwnedStream, request: api.GenerateRequest) -> AsyncIterator[api.GenerateResponse]:
        """Answer from the stream's memory; closing the iterator frees the copy at the next token.

        Raises:
            InvalidRequest, PromptTooLong: If the request can never work.
            FailedPrecondition: If there is nothing to go on from, or no position left that the model knows.
            CarryOpen: If the call wants to remember while a character is cut.
            Overloaded: If the copy does not fit in memory.
        """
        call = await self._checked(stream, request)
        remembering = Remembering(self._parts.store, stream.name, request.request_id) if request.remember else None
        if remembering is not None and (told := await remembering.told_before()) is not None:
            for response in told:
                yield response
            return
        borrowed = BorrowedCopy(self._parts, stream)
        with stream.in_use(), closing(borrowed):
            async for catching_up in borrowed.take(request.freshness, needs_whole_text=request.remember):
                yield api.GenerateResponse(catching_up=catching_up)
            call.caught_up = time.monotonic()
            outbox = Outbox[api.GeneratedTokens]()
            running = borrowed.run(self._decode(call, borrowed.taken(), stream.copy_policy, outbox.put))
            async for tokens in outbox.until_done(running):
                call.sent.MergeFrom(tokens)
                yield api.GenerateResponse(tokens=tokens)
            answer_ids = running.result()
        summary = call.summary
        summary.text = call.sent.text = call.answer.text
        if remembering is not None:
            summary = await remembering.remember(call.prompt_ids + answer_ids, call.sent, summary)
            stream.advance()
        yield api.GenerateResponse(summary=summary)

    async def score(self, stream: OwnedStream, request: api.ScoreRequest) -> AsyncIterator[api.ScoreResponse]:
        """Log-probabilities of a text's tokens given the stream's memory; errors as `generate`."""
        text_ids = await self._encoded(request.text)
        if not text_ids:
            raise InvalidRequest("there is no text to score")
        _check_length(stream, len(text_ids))
        decoder = self._parts.decoder
        borrowed = BorrowedCopy(self._parts, stream)
        with stream.in_use(), closing(borrowed):
            async for catching_up in borrowed.take(request.freshness):
                yield api.ScoreResponse(catching_up=catching_up)
            outbox = Outbox[api.ScoredTokens]()
            running = borrowed.run(score_tokens(decoder, stream.copy_policy, borrowed.taken(), text_ids, outbox.put))
            async for tokens in outbox.until_done(running):
                yield api.ScoreResponse(tokens=tokens)
            running.result()

    async def _checked(self, stream: OwnedStream, request: api.GenerateRequest) -> _Call:
        if request.remember and request.freshness == api.FRESHNESS_APPLIED:
            raise InvalidRequest("remember needs freshness ACCEPTED")
        if request.max_tokens > LARGEST_MAX_TOKENS:
            raise InvalidRequest(f"max_tokens={request.max_tokens} is more than {LARGEST_MAX_TOKENS}")
        sampler, answer = Sampler(request.sampling), Answer(self._parts.tokenizer, list(request.stop))
        if request.WhichOneof("prompt") == "chat":
            turns = [(turn.role, turn.content) for turn in request.chat.turns]
            prompt_ids = await asyncio.to_thread(self._parts.tokenizer.render_chat, turns)
        else:
            prompt_ids = await self._encoded(request.text)
        _check_length(stream, len(prompt_ids))
        call = _Call(prompt_ids, request.max_tokens or DEFAULT_MAX_TOKENS, sampler, answer)
        call.summary.num_prompt_tokens = len(prompt_ids)
        return call

    async def _encoded(self, text: str) -> list[int]:
        # Off the loop: a prompt may be megabytes, and only then turns out to be too long.
        return await asyncio.to_thread(self._parts.tokenizer.encode, text)

    def _decode(
        self, call: _Call, copy: EphemeralCopy, policy: EvictionPolicy, send: Callable[[api.GeneratedTokens], None]
    ) -> Job[list[int]]:
        """Read tail and prompt, then answer; returns the answer's token ids as they are to be remembered."""
        call.started = time.monotonic()
        call.summary.offset, call.summary.state_bytes = copy.offset, copy.state_bytes
        decoder, tokenizer, state = self._parts.decoder, self._parts.tokenizer, copy.state
        token_ids = np.concatenate([copy.tail, np.asarray(call.prompt_ids, dtype=np.int64)])
        num_left = check_room(decoder, state, len(token_ids), num_needed=1)
        logits = yield from read_tokens(decoder, policy, state, token_ids)
        call.first_logits = time.monotonic()
        finish_reason, last_ids = api.FINISH_REASON_LENGTH, []
        num_most = min(call.max_tokens, num_left)
        for num_answered in range(1, num_most + 1):
            token_id, log_prob = call.sampler.choose(logits)
            if token_id in tokenizer.end_of_turn_ids:
                finish_reason, last_ids = api.FINISH_REASON_END_OF_TURN, [token_id]
                break
            metrics.GENERATED_TOKENS.inc()
            if (tokens := call.answer.push(token_id, log_prob)) is not None:
                send(tokens)
            if call.answer.is_stopped:
                finish_reason = api.FINISH_REASON_STOP
                break
            if num_answered < num_most:
                logits = yield Decode(state, token_id, policy)
        if not call.answer.is_stopped and (tokens := call.answer.finish()) is not None:
            send(tokens)
        self._summarize(call, finish_reason, state.num_slots)
        return call.answer.remembered_ids() + last_ids

    def _summarize(self, call: _Call, finish_reason: "api.FinishReason", num_slots: int) -> None:
        summary = call.summary
        summary.finish_reason = finish_reason
        summary.num_answer_tokens = len(call.answer.token_ids)
        summary.num_slots = num_slots
        catching_up = call.caught_up - call.arrived
        _set_seconds(summary.queue_time, call.started - call.caught_up)
        _set_seconds(summary.prefill_time, catching_up + call.first_logits - call.started)
        _set_seconds(summary.decode_time, time.monotonic() - call.first_logits)


def _check_length(stream: OwnedStream, num_tokens: int) -> None:
    limit = stream.settings.kv_budget_tokens
    if num_tokens > limit:
        raise PromptTooLong(
            f"{num_tokens} tokens do not fit a KV budget of {limit}", num_tokens=num_tokens, limit_tokens=limit
        )


def _set_seconds(duration: Duration, seconds: float) -> None:
    duration.FromNanoseconds(int(seconds * 1e9))
