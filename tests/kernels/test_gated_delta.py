import math

import torch

from eunoe_kernels.gated_delta import gated_delta_retrieve, gated_delta_update


def test_a_token_written_with_full_strength_is_retrieved_as_it_was() -> None:
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 7, 16, generator=generator), torch.randn(2, 7, 8, generator=generator)
    memory = torch.zeros(2, 16, 8)

    gated_delta_update(memory, key, value, torch.full((2, 7), 0.9), torch.ones(2, 7))

    retrieved = gated_delta_retrieve(5 * key[:, None, -1:], memory)
    torch.testing.assert_close(retrieved[:, 0, 0], value[:, -1], atol=1e-5, rtol=1e-5)


def test_padding_changes_nothing() -> None:
    memory = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))
    expected = memory.clone()
    key, value = torch.full((2, 3, 16), math.nan), torch.full((2, 3, 8), math.inf)

    gated_delta_update(memory, key, value, torch.ones(2, 3), torch.zeros(2, 3))

    assert torch.equal(memory, expected)
