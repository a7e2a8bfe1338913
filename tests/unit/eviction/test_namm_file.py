import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eunoe.eviction import Namm
from eunoe.eviction.backward_attention import NUM_PARAMETERS, BackwardAttention, num_parameters
from eunoe.eviction.namm import BadNammFile, Normalization
from eunoe.eviction.novelty import NUM_NUMBERS
from eunoe.eviction.spectrogram import AttentionSpectrogram
from eunoe.runtime.errors import UnknownVersion

SETTINGS: dict[str, Any] = {
    "version": 1,
    "attention": "blocks",
    "num_observed_queries": 128,
    "is_packed": False,
    "num_recent_tokens": 32,
    "threshold": 0.5,
    "num_spare_slots": 16,
}
WITH_NOVELTY = {
    "parameters": torch.zeros(num_parameters(26)),
    "novelty_weight": torch.zeros(NUM_NUMBERS),
    "novelty_mean": torch.zeros(NUM_NUMBERS),
    "novelty_scale": torch.ones(NUM_NUMBERS),
}


def a_namm() -> Namm:
    generator = torch.Generator().manual_seed(0)
    return Namm(
        BackwardAttention(torch.randn(NUM_PARAMETERS, generator=generator), "blocks"),
        Normalization(torch.rand(17, generator=generator), torch.rand(17, generator=generator)),
        AttentionSpectrogram(128, is_packed=False),
        num_recent_tokens=32,
        threshold=0.5,
        num_spare_slots=16,
    )


def a_file(path: Path, tensors: dict[str, Any] | None = None, metadata: str | None = None, **settings: Any) -> None:
    """A good file, with some of it replaced."""
    good = {
        "parameters": torch.zeros(NUM_PARAMETERS),
        "normalization_mean": torch.zeros(17),
        "normalization_variance": torch.ones(17),
    }
    replaced = {name: tensor for name, tensor in (good | (tensors or {})).items() if tensor is not None}
    described = json.dumps(SETTINGS | settings) if metadata is None else metadata
    save_file(replaced, path, metadata={"eunoe-namm": described})


@pytest.mark.parametrize("make", [a_namm, Namm.untrained], ids=["every setting", "untrained"])
def test_what_was_saved_is_the_same_policy(tmp_path: Path, make: Callable[[], Namm]) -> None:
    policy = make()
    policy.save(tmp_path / "namm.safetensors")

    loaded = Namm.load(tmp_path / "namm.safetensors")

    assert loaded.name == policy.name
    assert torch.equal(loaded.network.parameters, policy.network.parameters)
    assert loaded.statistics == policy.statistics
    assert [path.name for path in tmp_path.iterdir()] == ["namm.safetensors"]


def test_equal_policies_are_equal_files(tmp_path: Path) -> None:
    a_namm().save(tmp_path / "one")
    a_namm().save(tmp_path / "two")

    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert set(load_file(tmp_path / "one")) == {"parameters", "normalization_mean", "normalization_variance"}


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"metadata": "nonsense"}, "holds no NAMM"),
        ({"metadata": "[]"}, "holds no NAMM"),
        ({"metadata": "{}"}, "holds no NAMM"),
        ({"version": "one"}, "holds no NAMM"),
        ({"version": math.inf}, "holds no NAMM"),
        ({"metadata": "[" * 100_000}, "holds no NAMM"),
        ({"tensors": {"parameters": None}}, "parameters is not float32"),
        ({"tensors": {"parameters": torch.zeros(2026)}}, "parameters is not float32"),
        ({"tensors": {"normalization_mean": torch.zeros(17).double()}}, "normalization_mean is not float32"),
        ({"tensors": {"parameters": torch.full((NUM_PARAMETERS,), torch.nan)}}, "no numbers"),
        ({"tensors": {"parameters": torch.full((NUM_PARAMETERS,), -1.1e4)}}, "no numbers up to 10,000"),
        ({"tensors": {"normalization_variance": -torch.ones(17)}}, "negative"),
        ({"metadata": '{"version": 1}'}, "attention"),
        ({"attention": "?"}, "neither dense nor blocks"),
        ({"attention": []}, "neither dense nor blocks"),
        ({"num_observed_queries": 7}, "num_observed_queries"),
        ({"num_observed_queries": 64.0}, "num_observed_queries=64.0 is of another type"),
        ({"num_observed_queries": "64"}, "num_observed_queries='64' is of another type"),
        ({"is_packed": "no"}, "is_packed='no' is of another type"),
        ({"is_logarithmic": 1}, "is_logarithmic=1 is of another type"),
        ({"num_recent_tokens": -1}, "num_recent_tokens=-1"),
        ({"num_recent_tokens": 32.0}, "num_recent_tokens=32.0"),
        ({"num_recent_tokens": "32"}, "num_recent_tokens='32'"),
        ({"num_recent_tokens": None}, "num_recent_tokens=None"),
        ({"num_spare_slots": -20}, "num_spare_slots=-20"),
        ({"num_spare_slots": True}, "num_spare_slots=True"),
        ({"threshold": math.nan}, "threshold=nan"),
        ({"threshold": -math.inf}, "threshold=-inf"),
        ({"threshold": 10**400}, "threshold=1000"),
        ({"threshold": "0.5"}, "threshold='0.5'"),
        ({"threshold": True}, "threshold=True"),
        ({"tensors": WITH_NOVELTY}, "is_packed=False"),
        ({"tensors": WITH_NOVELTY | {"novelty_scale": torch.zeros(NUM_NUMBERS)}, "is_packed": True}, "below 1e-07"),
        ({"more": 1}, "more"),
    ],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value),
)
def test_a_file_that_could_not_run_is_refused_with_its_reason(
    tmp_path: Path, wrong: dict[str, Any], reason: str
) -> None:
    a_file(tmp_path / "namm", **wrong)

    with pytest.raises(BadNammFile, match=reason):
        Namm.load(tmp_path / "namm")


def test_a_file_of_a_later_version_is_refused_as_such(tmp_path: Path) -> None:
    a_file(tmp_path / "namm", version=2)

    with pytest.raises(UnknownVersion) as refused:
        Namm.load(tmp_path / "namm")

    assert (refused.value.found, refused.value.known) == (2, 1)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff" * 64])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "namm").write_bytes(content)

    with pytest.raises(BadNammFile, match="no safetensors file"):
        Namm.load(tmp_path / "namm")


def test_a_file_of_a_models_size_is_refused_unread(tmp_path: Path) -> None:
    header = json.dumps({"weight": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}).encode()
    with (tmp_path / "model").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 40))

    with pytest.raises(BadNammFile, match="bytes, a NAMM has tens of thousands"):
        Namm.load(tmp_path / "model")


@pytest.mark.parametrize("attention", ["dense", "blocks"])
def test_the_largest_values_that_a_file_may_have_give_finite_scores(tmp_path: Path, attention: str) -> None:
    largest = {
        "parameters": torch.full((num_parameters(26),), 1e4),
        "normalization_mean": torch.full((17,), -1e4),
        "normalization_variance": torch.zeros(17),
    }
    a_file(tmp_path / "namm", WITH_NOVELTY | largest, is_packed=True, attention=attention)
    policy = Namm.load(tmp_path / "namm")
    # Age, a mean above which 16 is nothing, and the most that novelty can be.
    features = torch.cat([torch.ones(300, 8), policy.normalization(torch.full((300, 17), 16.0))], dim=1)
    features = torch.cat([features, torch.full((300, 1), 1000.0)], dim=1)[None, None]

    scores = policy.scores(features)

    assert scores.max() > 1e36
    assert scores.isfinite().all()


def test_somebody_elses_safetensors_are_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "namm", metadata={"format": "pt"})

    with pytest.raises(BadNammFile, match="holds no NAMM"):
        Namm.load(tmp_path / "namm")


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    a_namm().save(tmp_path / "namm")
    whole = (tmp_path / "namm").read_bytes()

    for length in range(0, len(whole), 97):
        (tmp_path / "namm").write_bytes(whole[:length])
        with pytest.raises(BadNammFile):
            Namm.load(tmp_path / "namm")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nothing"):
        Namm.load(tmp_path / "nothing")
