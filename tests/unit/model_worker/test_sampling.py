import math

import pytest
import torch

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.model_worker.sampling import Sampler

LOGITS = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))


def chosen(num_draws: int = 400, **settings: float) -> set[int]:
    sampler = Sampler(api.Sampling(**settings))  # type: ignore[arg-type]
    return {sampler.choose(LOGITS)[0] for _ in range(num_draws)}


def test_temperature_zero_takes_the_likeliest_token() -> None:
    assert chosen() == {0}


def test_every_token_can_be_drawn() -> None:
    assert chosen(temperature=1.0) == {0, 1, 2, 3}


def test_top_k_draws_only_the_k_likeliest() -> None:
    assert chosen(temperature=1.0, top_k=2) == {0, 1}


def test_top_p_keeps_the_token_that_reaches_the_sum() -> None:
    assert chosen(temperature=1.0, top_p=0.6) == {0, 1}


def test_draws_follow_the_probabilities() -> None:
    sampler = Sampler(api.Sampling(temperature=1.0, seed=7))
    draws = [sampler.choose(LOGITS)[0] for _ in range(2000)]
    assert draws.count(0) / 2000 == pytest.approx(0.5, abs=0.04)
    assert draws.count(3) / 2000 == pytest.approx(0.05, abs=0.02)


def test_equal_seeds_draw_equal_tokens() -> None:
    one, other = (Sampler(api.Sampling(temperature=2.0, seed=3)) for _ in range(2))
    assert [one.choose(LOGITS) for _ in range(50)] == [other.choose(LOGITS) for _ in range(50)]


def test_the_log_probability_is_the_models_own_whatever_the_temperature() -> None:
    token_id, log_prob = Sampler(api.Sampling(temperature=0.5, top_k=1)).choose(LOGITS)
    assert token_id == 0
    assert log_prob == pytest.approx(math.log(0.5), abs=1e-6)


@pytest.mark.parametrize("settings", [{"temperature": -0.1}, {"temperature": 11.0}, {"top_p": 1.5}, {"top_p": -1.0}])
def test_values_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="is not within"):
        Sampler(api.Sampling(**settings))  # type: ignore[arg-type]


def test_values_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="is not within"):
        Sampler(api.Sampling(temperature=float("nan")))
