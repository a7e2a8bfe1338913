from typing import Any

import pytest

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.gateway.generate import generate, score
from eunoe.runtime.errors import InvalidRequest

NAME = "tenants/acme/streams/book"


class RecordingPlacement:
    """Runs a call on a worker that only keeps the request it got."""

    def __init__(self) -> None:
        self.request: Any = None

    def stream_from_owner(self, name: str, call: Any, is_progress: Any = None) -> Any:
        return call(self, None)

    def generate(self, request: api.GenerateRequest, lease: Any, timeout_seconds: float | None) -> None:
        self.request = request

    def score(self, request: api.ScoreRequest, lease: Any, timeout_seconds: float | None) -> None:
        self.request = request


def passed_on(**values: Any) -> api.GenerateRequest:
    placement = RecordingPlacement()
    generate(placement, NAME, api.GenerateRequest(stream="tenants/-/streams/book", **values), None)  # type: ignore[arg-type]
    assert isinstance(placement.request, api.GenerateRequest)
    return placement.request


def test_the_worker_gets_the_full_name_and_the_defaults() -> None:
    request = passed_on(text="Hello")

    assert request.stream == NAME
    assert (request.max_tokens, request.sampling.top_p) == (128, 1.0)
    assert request.freshness == api.FRESHNESS_ACCEPTED
    assert request.request_id == ""


def test_a_remembering_call_always_has_a_request_id() -> None:
    assert passed_on(remember=True).request_id
    assert passed_on(remember=True, request_id="mine").request_id == "mine"


@pytest.mark.parametrize(
    "values",
    [
        {"max_tokens": 4097},
        {"sampling": api.Sampling(temperature=-0.1)},
        {"sampling": api.Sampling(temperature=10.5)},
        {"sampling": api.Sampling(temperature=float("nan"))},
        {"sampling": api.Sampling(temperature=float("inf"))},
        {"sampling": api.Sampling(top_p=1.5)},
        {"sampling": api.Sampling(top_p=-0.5)},
        {"sampling": api.Sampling(top_p=float("nan"))},
        {"stop": ["x"] * 9},
        {"stop": [""]},
        {"stop": ["ä" * 33]},
        {"chat": api.ChatPrompt()},
        {"chat": api.ChatPrompt(turns=[api.ChatTurn(role="robot", content="hi")])},
        {"freshness": 7},
        {"remember": True, "freshness": api.FRESHNESS_APPLIED},
        {"request_id": "x" * 65},
    ],
)
def test_a_value_out_of_range_is_invalid(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        passed_on(**values)


def test_an_empty_text_cannot_be_scored() -> None:
    with pytest.raises(InvalidRequest):
        score(RecordingPlacement(), NAME, api.ScoreRequest(), None)  # type: ignore[arg-type]
