"""Neural attention memory model (NAMM): an evolved network scores each slot by the attention that it received.

After "An Evolved Universal Transformer Memory" (Cetin et al. 2024, arXiv:2410.13166). A slot's 25 features are its age

    sin(age w_k), cos(age w_k),   w_k = 50000^(-k / 4), k = 0..3,   age = position of the newest slot - its own

and the mean of its attention spectrogram, normalised with constants that are frozen before the evolution begins. One
network scores them for all layers and heads. Published, a slot stays while its score is 0 or more, nothing is protected
and nothing bounds the cache; here the budget does, and sinks and the newest slots stay. With `NovelSpectrogram` a slot
has one more feature, the novelty of its token.

Shape suffixes: L KV source layer, H KV head, S slot, F frequency bin, I feature.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from eunoe.eviction.backward_attention import NUM_FEATURES, NUM_PARAMETERS, BackwardAttention, num_parameters
from eunoe.eviction.novelty import NUM_NUMBERS, NovelSpectrogram, Novelty
from eunoe.eviction.policy import Window, WindowShape, keep_by_scores
from eunoe.eviction.selection import keep_best, protect
from eunoe.eviction.spectrogram import AttentionSpectrogram
from eunoe.runtime.errors import UnknownVersion
from eunoe_kernels.attention_spectrogram import NUM_BINS

# The published table of ages ends here. A stream does not: what is older looks as old as this.
_MAX_AGE = 32768
NUM_AGE_FEATURES = NUM_FEATURES - NUM_BINS
_NUM_WAVES = NUM_AGE_FEATURES // 2
_LEAST_BIN = 1e-6
# A trained network's largest are near 10. Up to this no score overflows: features are at most 1e11 (a mean of 1e4 over
# the least deviation, 1e-7), queries, keys and values 3e16, their products 2e34, and scores 2e38.
_MAX_PARAMETER = 1e4
# No score is near it, and torch compares with no integer that is much above it.
_MAX_THRESHOLD = 1e18

# The one entry of the file's metadata, {"version", settings} as JSON: of several, safetensors shuffles the order.
_FILE_METADATA = "eunoe-namm"
_FILE_VERSION = 1
# A model's weights, put into the wrong directory, would be read whole.
_MAX_FILE_BYTES = 1 << 20
_FILE_SHAPES: dict[str, tuple[int, ...]] = {
    "parameters": (NUM_PARAMETERS,),
    "normalization_mean": (NUM_BINS,),
    "normalization_variance": (NUM_BINS,),
}
_NOVELTY_SHAPES: dict[str, tuple[int, ...]] = {
    "novelty_weight": (NUM_NUMBERS,),
    "novelty_mean": (NUM_NUMBERS,),
    "novelty_scale": (NUM_NUMBERS,),
}
# Of settings whose owners take their type for granted.
_FILE_TYPES: dict[str, tuple[type, ...]] = {
    "num_observed_queries": (int, type(None)),
    "is_packed": (bool,),
    "is_logarithmic": (bool,),
}


class BadNammFile(ValueError):
    """A file holds no NAMM that could run; the message says why."""


@dataclass(frozen=True, eq=False)
class Normalization:
    """Mean and variance of each bin of the spectrogram, float32 [F] each, collected once over a full cache."""

    mean: torch.Tensor
    variance: torch.Tensor
    is_logarithmic: bool = False
    """Of the bins' logarithms: a few slots receive a thousand times the attention of the others."""

    def __post_init__(self) -> None:
        if self.mean.shape != (NUM_BINS,) or self.variance.shape != (NUM_BINS,):
            raise ValueError(
                f"mean {tuple(self.mean.shape)} and variance {tuple(self.variance.shape)} of {NUM_BINS} bins"
            )

    def __call__(self, spectrogram_F: torch.Tensor) -> torch.Tensor:
        """Normalised bins [..., F]."""
        if self.is_logarithmic:
            spectrogram_F = log_bins(spectrogram_F)
        return (spectrogram_F - self.mean) / self.variance.sqrt().clamp_min(1e-7)


@dataclass(frozen=True, eq=False)
class Namm:
    """Keeps what the network scores highest."""

    network: BackwardAttention
    normalization: Normalization
    statistics: AttentionSpectrogram | NovelSpectrogram = field(default_factory=AttentionSpectrogram)
    num_recent_tokens: int = 64
    """Newest slots that are never evicted, but at most half of the budget."""
    threshold: float | None = None
    """Slots below it leave too when an eviction is due, down to the number that the greediest head of all layers has at
    or above it. With 0, one recent token and no sinks that is the published rule, there at every boundary and for each
    layer alone."""
    num_spare_slots: int = 0
    """Slots evicted beyond the budget: with a segment's length here only every second segment is scored."""

    def __post_init__(self) -> None:
        expected = NUM_FEATURES + isinstance(self.statistics, NovelSpectrogram)
        if self.network.num_features != expected:
            raise ValueError(f"a network of {self.network.num_features} features, of {expected} that there are")
        # Types too: a file's settings come as they are, and a wrong one would fail in a stream.
        for name in ("num_recent_tokens", "num_spare_slots"):
            count = getattr(self, name)
            if type(count) is not int or count < 0:
                raise ValueError(f"{name}={count!r} is no integer from 0")
        threshold = self.threshold
        if threshold is not None and not (type(threshold) in (int, float) and abs(threshold) <= _MAX_THRESHOLD):
            raise ValueError(f"threshold={threshold!r} is no number up to {_MAX_THRESHOLD}")

    @property
    def spectrogram(self) -> AttentionSpectrogram:
        """How attention is observed."""
        return self.statistics.spectrogram if isinstance(self.statistics, NovelSpectrogram) else self.statistics

    @classmethod
    def untrained(cls) -> "Namm":
        """All weights zero: every score is 0, so that the newest slots stay."""
        network = BackwardAttention(torch.zeros(NUM_PARAMETERS))
        return cls(network, Normalization(torch.zeros(NUM_BINS), torch.ones(NUM_BINS)))

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """The policy in a file that `save` wrote.

        Raises:
            BadNammFile: If it is another file, or a part of it is missing, no number or a setting that cannot be used.
            UnknownVersion: If a later release wrote it.
            OSError: If it cannot be read.
        """
        if (num_bytes := os.stat(path).st_size) > _MAX_FILE_BYTES:
            raise BadNammFile(f"{path} has {num_bytes:,} bytes, a NAMM has tens of thousands")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise BadNammFile(f"{path} is no safetensors file: {error}") from None
        try:
            settings = json.loads(metadata[_FILE_METADATA])
            version = int(settings.pop("version"))
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError):
            raise BadNammFile(f"{path} holds no NAMM: its metadata does not say so") from None
        if version != _FILE_VERSION:
            raise UnknownVersion(f"{path} is a NAMM of version {version}", found=version, known=_FILE_VERSION)
        has_novelty = _NOVELTY_SHAPES.keys() <= tensors.keys()
        shapes = _FILE_SHAPES | (_NOVELTY_SHAPES if has_novelty else {})
        shapes["parameters"] = (num_parameters(NUM_FEATURES + has_novelty),)
        for name, shape in shapes.items():
            if name not in tensors or tensors[name].shape != shape or tensors[name].dtype != torch.float32:
                raise BadNammFile(f"{path}: {name} is not float32 {shape}")
            if not (tensors[name].abs() <= _MAX_PARAMETER).all():
                raise BadNammFile(f"{path}: {name} has values that are no numbers up to {_MAX_PARAMETER:,.0f}")
        if (tensors["normalization_variance"] < 0).any():
            raise BadNammFile(f"{path}: normalization_variance is negative")
        for name, types in _FILE_TYPES.items():
            if name in settings and type(settings[name]) not in types:
                raise BadNammFile(f"{path}: {name}={settings[name]!r} is of another type")
        try:
            network = BackwardAttention(tensors["parameters"], settings.pop("attention"))
            spectrogram = AttentionSpectrogram(settings.pop("num_observed_queries"), settings.pop("is_packed"))
            mean, variance = tensors["normalization_mean"], tensors["normalization_variance"]
            novelty = Novelty(*(tensors[name] for name in _NOVELTY_SHAPES)) if has_novelty else None
            return cls(
                network,
                Normalization(mean, variance, settings.pop("is_logarithmic", False)),
                spectrogram if novelty is None else NovelSpectrogram(novelty, spectrogram),
                **settings,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BadNammFile(f"{path}: its settings cannot be used: {error}") from None

    def save(self, path: Path | str) -> None:
        """Write parameters, constants and settings as safetensors, all or nothing."""
        constants = (self.network.parameters, self.normalization.mean, self.normalization.variance)
        tensors = dict(zip(_FILE_SHAPES, constants, strict=True))
        if isinstance(self.statistics, NovelSpectrogram):
            novelty = self.statistics.novelty
            tensors |= zip(_NOVELTY_SHAPES, (novelty.weight, novelty.mean, novelty.scale), strict=True)
        settings = {
            "version": _FILE_VERSION,
            "attention": self.network.attention,
            "num_observed_queries": self.spectrogram.num_observed_queries,
            "is_packed": self.spectrogram.is_packed,
            "is_logarithmic": self.normalization.is_logarithmic,
            "num_recent_tokens": self.num_recent_tokens,
            "threshold": self.threshold,
            "num_spare_slots": self.num_spare_slots,
        }
        metadata = {_FILE_METADATA: json.dumps(settings)}
        beside = Path(f"{path}.new")
        beside.write_bytes(save(tensors, metadata=metadata))
        os.replace(beside, path)

    @cached_property
    def name(self) -> str:
        """See `EvictionPolicy`: parameters, constants and every setting are in it."""
        digest = hashlib.sha256(self.network.parameters.numpy().tobytes())
        for constant in (self.normalization.mean, self.normalization.variance):
            digest.update(constant.numpy().tobytes())
        settings = (self.network.attention, self.statistics.name, self.normalization.is_logarithmic)
        digest.update(repr((*settings, self.num_recent_tokens, self.threshold, self.num_spare_slots)).encode())
        return f"namm/1/{digest.hexdigest()[:16]}"

    def features(self, window: Window) -> torch.Tensor:
        """See `ScoringPolicy`: age first, then the spectrogram, then novelty if there is any."""
        assert window.statistics_LHSB is not None
        spectrogram_LHSF, other = self.statistics.unpack(window.statistics_LHSB)
        parts = [age_embedding(window.positions_LHS), self.normalization(spectrogram_LHSF)]
        if isinstance(self.statistics, NovelSpectrogram):
            assert other is not None
            parts.append(other)
        return torch.cat(parts, dim=-1)

    def scores(self, feature_LHSI: torch.Tensor) -> torch.Tensor:
        """See `ScoringPolicy`."""
        return self.network(feature_LHSI.flatten(0, 1)).view(feature_LHSI.shape[:3])

    def keep(self, window: Window, budget: int) -> torch.Tensor:
        """See `EvictionPolicy.keep`."""
        return keep_by_scores(self, window, budget)

    def keep_scored(self, scores_LHS: torch.Tensor, window: WindowShape, budget: int) -> torch.Tensor:
        """See `ScoringPolicy`."""
        budget = max(budget - self.num_spare_slots, window.num_sink_tokens + 1)
        protected_LHS = protect(scores_LHS, window, budget, self.num_recent_tokens)
        num_kept = min(budget, window.num_slots)
        if self.threshold is not None:
            num_kept = min(num_kept, int((protected_LHS >= self.threshold).sum(dim=-1).max()))
        return keep_best(protected_LHS, num_kept)


def log_bins(spectrogram_F: torch.Tensor) -> torch.Tensor:
    """Logarithms of bins, of which none is below that of 1e-6."""
    return (spectrogram_F + _LEAST_BIN).log()


def age_embedding(positions_LHS: torch.Tensor) -> torch.Tensor:
    """Sines and cosines of each slot's distance in tokens from the newest slot, float32 [L, H, S, 8]."""
    age_LHS = (positions_LHS[..., -1:].long() - positions_LHS).clamp_(max=_MAX_AGE)
    frequency = 50000.0 ** (-torch.arange(_NUM_WAVES, dtype=torch.float64, device=age_LHS.device) / _NUM_WAVES)
    angle = age_LHS[..., None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float()
