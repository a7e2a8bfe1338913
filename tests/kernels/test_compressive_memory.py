import math

import pytest
import torch

from eunoe_kernels.compressive_memory import UpdateRule, retrieve, update


def a_memory(num_heads: int, key_dim: int, value_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(num_heads, key_dim, value_dim), torch.zeros(num_heads, key_dim)


def some_tokens(num_heads: int, num_tokens: int, key_dim: int, value_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(num_heads, num_tokens, key_dim, generator=generator)
    return key, torch.randn(num_heads, num_tokens, value_dim, generator=generator)


@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_retrieval_is_the_mean_of_the_written_values_by_the_products_of_features(rule: UpdateRule) -> None:
    key, value = some_tokens(2, 5, 16, 8)
    query = torch.randn(2, 3, 4, 16, generator=torch.Generator().manual_seed(1))
    memory, normalizer = a_memory(2, 16, 8)

    update(memory, normalizer, key, value, None, rule=rule)

    def elu_plus_one(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.elu(x) + 1

    product = torch.einsum("hgtd,hsd->hgts", elu_plus_one(query), elu_plus_one(key))
    expected = torch.einsum("hgts,hse->hgte", product / product.sum(dim=-1, keepdim=True), value)
    torch.testing.assert_close(retrieve(query, memory, normalizer), expected, atol=1e-5, rtol=1e-5)


def test_an_unwritten_memory_answers_zero() -> None:
    query = torch.randn(2, 3, 4, 16, generator=torch.Generator().manual_seed(1))

    assert torch.equal(retrieve(query, *a_memory(2, 16, 8)), torch.zeros(2, 3, 4, 8))


@pytest.mark.parametrize(("rule", "uses_gamma"), [("linear", False), ("delta", False), ("delta", True)])
def test_tokens_of_weight_zero_change_nothing(rule: UpdateRule, uses_gamma: bool) -> None:
    memory, normalizer = a_memory(2, 16, 8)
    update(memory, normalizer, *some_tokens(2, 5, 16, 8), None, rule=rule, uses_gamma=uses_gamma)
    expected = memory.clone(), normalizer.clone()
    padding = torch.full((2, 3, 16), math.nan), torch.full((2, 3, 8), math.inf)

    update(memory, normalizer, *padding, torch.zeros(2, 3), rule=rule, uses_gamma=uses_gamma)

    assert torch.equal(memory, expected[0])
    assert torch.equal(normalizer, expected[1])
