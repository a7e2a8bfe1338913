"""What `eunoe demo` does while its only worker is thought dead."""

import pytest

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.cli.demo import served_model
from eunoe.embedded.platform import StartFailed


class LapsingClient:
    """Lists no model the first `num_lapsed` times."""

    def __init__(self, num_lapsed: int) -> None:
        self.num_lapsed = num_lapsed

    def list_models(self) -> list[api.Model]:
        self.num_lapsed -= 1
        return [] if self.num_lapsed >= 0 else [api.Model(name="tiny")]


def test_a_model_that_is_away_for_a_moment_is_waited_for() -> None:
    model = served_model(LapsingClient(1))  # type: ignore[arg-type]

    assert model.name == "tiny"


def test_a_model_that_does_not_come_back_is_said_to_be_missing() -> None:
    with pytest.raises(StartFailed, match="no model is listed"):
        served_model(LapsingClient(1000), patience_seconds=0.0)  # type: ignore[arg-type]
