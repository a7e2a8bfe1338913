"""Remembered answers: prompt and answer as one record, appended where the answer was computed, or not at all."""

import io
import uuid

import numpy as np
from google.protobuf import proto

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.clients.state_store import StateStoreClient
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.runtime.errors import ContentMismatch, OutcomeNotFound
from eunoe.runtime.failpoints import failpoint


class Remembering:
    """The remembering side of one Generate call.

    Args:
        store: The state store.
        name: The stream.
        request_id: Of the call; an empty one is not found again.
    """

    def __init__(self, store: StateStoreClient, name: str, request_id: str) -> None:
        self._store = store
        self._name = name
        self._is_repeatable = bool(request_id)
        # Also tells our own record from an equal one of somebody else.
        self._request_id = request_id or f"unnamed-{uuid.uuid4().hex}"

    async def told_before(self) -> list[api.GenerateResponse] | None:
        """What the first call of this request id was answered, if it remembered."""
        return await self._outcome() if self._is_repeatable else None

    async def remember(
        self, token_ids: list[int], tokens: api.GeneratedTokens, summary: api.GenerateSummary
    ) -> api.GenerateSummary:
        """Append the record at `summary.offset`; returns the summary with what became of it.

        Args:
            token_ids: Prompt and answer.
            tokens: The whole answer, for whoever repeats the call.
            summary: Changed in place.

        Raises:
            CarryOpen, QuotaExceeded, Overloaded: If the log does not take the record.
        """
        summary.remember_result = api.REMEMBER_RESULT_REMEMBERED
        if not token_ids:
            return summary
        request = pb.AppendRecordRequest(
            name=self._name,
            offset=summary.offset,
            data=np.asarray(token_ids, dtype="<u4").tobytes(),
            kind=api.RECORD_KIND_TOKEN_IDS,
            request_id=self._request_id,
            outcome=_to_bytes([api.GenerateResponse(tokens=tokens), api.GenerateResponse(summary=summary)]),
        )
        failpoint("worker.before-remember")
        try:
            is_new = not (await self._store.append_record(request)).already_exists
        except ContentMismatch:
            is_new = False
        failpoint("worker.remembered")
        if is_new:
            return summary
        # Somebody was first: this call itself, repeated by the client library or by its caller, or another append.
        told = await self._outcome()
        if told is not None:
            return told[-1].summary
        summary.remember_result = api.REMEMBER_RESULT_CONFLICT
        return summary

    async def _outcome(self) -> list[api.GenerateResponse] | None:
        try:
            request = pb.GetOutcomeRequest(name=self._name, request_id=self._request_id)
            return _from_bytes((await self._store.get_outcome(request)).outcome)
        except OutcomeNotFound:
            return None


def _to_bytes(responses: list[api.GenerateResponse]) -> bytes:
    output = io.BytesIO()
    for response in responses:
        proto.serialize_length_prefixed(response, output)
    return output.getvalue()


def _from_bytes(data: bytes) -> list[api.GenerateResponse]:
    source = io.BytesIO(data)
    responses = []
    while (response := proto.parse_length_prefixed(api.GenerateResponse, source)) is not None:
        responses.append(response)
    return responses
