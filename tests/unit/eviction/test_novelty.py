"""Novelty: what the keys and values of a pass say of each of its tokens."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from eunoe.decoder.decoder import Decoder
from eunoe.decoder.memory_state import MemorySettings
from eunoe.decoder.tiny import tiny_config
from eunoe.eviction.backward_attention import BackwardAttention, num_parameters
from eunoe.eviction.namm import Namm, Normalization
from eunoe.eviction.novelty import NUM_NUMBERS, NovelSpectrogram, Novelty, numbers
from eunoe.eviction.spectrogram import AttentionSpectrogram

ONES = torch.ones(NUM_NUMBERS)


def a_pass(num_tokens: int, seed: int = 0, num_layers: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_layers, 2, num_tokens, 8)
    return torch.randn(shape, generator=generator) + 2, torch.randn(shape, generator=generator) - 1


def a_novelty(seed: int = 0) -> Novelty:
    generator = torch.Generator().manual_seed(seed)
    return Novelty(torch.randn(NUM_NUMBERS, generator=generator), torch.zeros(NUM_NUMBERS), ONES)


def a_namm(novelty: Novelty) -> Namm:
    parameters = 0.3 * torch.randn(num_parameters(26), generator=torch.Generator().manual_seed(0))
    normalization = Normalization(torch.full((17,), -5.0), torch.full((17,), 2.0), is_logarithmic=True)
    return Namm(BackwardAttention(parameters), normalization, NovelSpectrogram(novelty), num_recent_tokens=8)


def expected(part_LHTD: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[np.float64]]:
    """Shortness and oddness of each token, group by group, from the formulas of the module."""
    log_norm = np.log(np.linalg.norm(part_LHTD, axis=-1))
    mean = part_LHTD.mean(axis=2, keepdims=True)
    cosine = (part_LHTD * mean).sum(-1) / (np.linalg.norm(part_LHTD, axis=-1) * np.linalg.norm(mean, axis=-1))
    groups = np.array_split(np.arange(len(part_LHTD)), 6)
    short = log_norm.mean(axis=-1, keepdims=True) - log_norm
    return {
        "short": np.stack([short[group].mean(axis=(0, 1)) for group in groups]),
        "odd": np.stack([(1 - cosine)[group].mean(axis=(0, 1)) for group in groups]),
    }


@pytest.mark.parametrize("num_tokens", [1, 3, 50, 512])
def test_the_numbers_are_those_of_the_formulas(num_tokens: int) -> None:
    parts = a_pass(num_tokens)

    found = numbers(*parts).double().numpy().reshape(num_tokens, 2, 6, 2, 3)

    for index, part in enumerate(parts):
        measures = expected(part.double().numpy())
        for number, reach in enumerate((2, 8, 20)):
            for which, name in enumerate(("short", "odd")):
                for t in range(num_tokens):
                    around = measures[name][:, max(0, t - reach) : t + reach + 1].mean(axis=-1)
                    np.testing.assert_allclose(found[t, index, :, which, number], around, atol=2e-6)


def test_tokens_of_another_sort_are_novel() -> None:
    keys, values = a_pass(300)
    keys[:, :, 100:110] *= -0.5
    values[:, :, 100:110] *= 0.5

    novelty_T = Novelty(ONES, torch.zeros(NUM_NUMBERS), ONES)(keys, values)

    assert novelty_T.topk(10).indices.float().mean() == pytest.approx(104.5, abs=2)


def test_half_precision_keys_change_little() -> None:
    keys, values = a_pass(64)

    exact, rough = numbers(keys, values), numbers(keys.bfloat16(), values.bfloat16())

    torch.testing.assert_close(rough, exact, atol=0.01, rtol=0)


def test_a_slot_keeps_its_tokens_novelty_beside_its_spectrogram() -> None:
    policy = a_namm(a_novelty())
    decoder = Decoder.random(tiny_config(), seed=0)
    state = decoder.new_state(MemorySettings(kv_budget_tokens=100, segment_length=32), policy)
    decoder.prefill(state, np.random.default_rng(0).integers(0, 512, 64), policy)
    assert state.statistics_LHSB is not None
    assert isinstance(policy.statistics, NovelSpectrogram)

    spectrogram, novelty = policy.statistics.unpack(state.statistics_LHSB)

    passes = [slice(0, 32), slice(32, 64)]
    parts = [policy.statistics.novelty(state.keys_LHSD[:, :, p], state.values_LHSD[:, :, p]) for p in passes]
    torch.testing.assert_close(novelty[0, 0, :, 0], torch.cat(parts), atol=0.02, rtol=0.002)
    assert (novelty == novelty[:1, :1]).all()
    alone = replace(policy, network=BackwardAttention(torch.zeros(4172)), statistics=AttentionSpectrogram())
    same = decoder.new_state(state.settings, alone)
    decoder.prefill(same, np.random.default_rng(0).integers(0, 512, 64), alone)
    assert same.statistics_LHSB is not None
    assert torch.equal(same.statistics_LHSB, state.statistics_LHSB[..., :-2])
    assert spectrogram.shape[-1] == 17


def test_a_policy_with_novelty_reads_back_from_its_file(tmp_path: Path) -> None:
    policy = a_namm(a_novelty())
    policy.save(tmp_path / "namm.safetensors")

    loaded = Namm.load(tmp_path / "namm.safetensors")

    assert loaded.name == policy.name
    assert loaded.statistics.name == policy.statistics.name
    assert len(loaded.statistics.name) <= 48
    assert loaded.normalization.is_logarithmic
    assert a_namm(a_novelty(seed=1)).name != policy.name


def test_the_network_has_as_many_features_as_there_are() -> None:
    with pytest.raises(ValueError, match="26 features, of 25"):
        replace(a_namm(a_novelty()), statistics=AttentionSpectrogram())


def test_novelty_beside_an_unpacked_spectrogram_is_refused() -> None:
    with pytest.raises(ValueError, match="is_packed=False"):
        NovelSpectrogram(a_novelty(), AttentionSpectrogram(is_packed=False))


@pytest.mark.parametrize(
    "parts",
    [
        (ONES[:5], ONES, ONES),
        (ONES, ONES.double(), ONES),
        (ONES, ONES, torch.zeros(NUM_NUMBERS)),
        (ONES * torch.nan, ONES, ONES),
        (ONES, ONES * torch.inf, ONES),
        (ONES, ONES, ONES * torch.inf),
    ],
    ids=["too few", "double", "no scale", "nan weight", "infinite mean", "infinite scale"],
)
def test_weights_of_another_form_are_refused(parts: tuple[torch.Tensor, ...]) -> None:
    with pytest.raises(ValueError, match="novelty"):
        Novelty(*parts)
