"""The shape of a decoder, and the dtypes it is bound to.

Plain Llama (pre-norm RMSNorm, SwiGLU, rotary positions, grouped-query attention), or the same with a compressive memory
beside each layer's attention.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_args

import torch

from eunoe_kernels.compressive_memory import UpdateRule


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864) and how their frequencies are stretched for long contexts.

    `linear` divides every frequency by `factor`. `llama3` divides those with a wavelength above
    `original_max_positions / low_freq_factor`, keeps those below `original_max_positions / high_freq_factor`, and
    blends between.
    """

    theta: float = 10_000.0
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        if self.scaling not in ("none", "linear", "llama3"):
            raise ValueError(f"rope scaling {self.scaling!r} is not supported; there are none, linear, llama3")
        if self.scaling == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(f"low_freq_factor={self.low_freq_factor} is not below {self.high_freq_factor=}")

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> Self:
        """Read `rope_parameters`, or the older `rope_theta` and `rope_scaling`, of a Hugging Face config."""
        given = {**(data.get("rope_scaling") or {}), **(data.get("rope_parameters") or {})}
        kind: Any = given.get("rope_type", given.get("type", "default"))
        return cls(
            theta=float(given.get("rope_theta", data.get("rope_theta", 10_000.0))),
            scaling="none" if kind == "default" else kind,
            factor=float(given.get("factor", 1.0)),
            low_freq_factor=float(given.get("low_freq_factor", 1.0)),
            high_freq_factor=float(given.get("high_freq_factor", 4.0)),
            original_max_positions=int(given.get("original_max_position_embeddings", 8192)),
        )

    def to_hf(self) -> dict[str, Any]:
        """What `from_hf` reads under `rope_parameters`."""
        values: dict[str, Any] = {"rope_theta": self.theta, "rope_type": "default"}
        if self.scaling != "none":
            values |= {"rope_type": self.scaling, "factor": self.factor}
        if self.scaling == "llama3":
            values |= {
                "low_freq_factor": self.low_freq_factor,
                "high_freq_factor": self.high_freq_factor,
                "original_max_position_embeddings": self.original_max_positions,
            }
        return values


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressiveMemoryConfig:
    """How tokens that leave the window are kept (Infini-attention, Munkhdalai et al. 2024, arXiv:2404.07143)."""

    update_rule: UpdateRule = "linear"
    has_write_gate: bool = False
    """Whether a token's key says how much of the token is written; else all of it is."""
    uses_gamma: bool = False
    """Whether the normalizer leaves out what it has counted already."""

    def __post_init__(self) -> None:
        if self.update_rule not in get_args(UpdateRule):
            raise ValueError(f"update_rule={self.update_rule!r} is none of {get_args(UpdateRule)}")
        if self.uses_gamma and self.update_rule != "delta":
            raise ValueError("uses_gamma belongs to the delta rule")

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> Self:
        """Read what stands under `compressive_memory` in a config.json.

        Raises:
            ValueError: If there is something that we do not know, or not all of it.
        """
        names = {f.name for f in fields(cls)}
        if set(data) != names:
            raise ValueError(f"compressive_memory has {sorted(data)}, not {sorted(names)}")
        return cls(**data)


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """The shape of one decoder."""

    name: str
    vocab_size: int
    dim: int
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    norm_eps: float = 1e-5
    rope: RopeConfig = RopeConfig()
    ties_embeddings: bool = False
    max_positions: int = 8192
    """Longest context the weights were trained on, in tokens."""
    kv_source: tuple[int, ...] = ()
    """For each layer, the layer whose keys and values it attends to. Empty means: each its own."""
    compressive_memory: CompressiveMemoryConfig | None = None
    """None in a plain Llama: there, what leaves the window is forgotten."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "num_layers", "num_query_heads", "num_kv_heads", "head_dim", "ffn_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1")
        if self.num_query_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_query_heads=} is no multiple of {self.num_kv_heads=}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd, rotary positions need pairs")
        own = tuple(range(self.num_layers))
        if self.kv_source not in ((), own):
            raise ValueError(f"kv_source={self.kv_source}: layers that share keys and values are not supported")
        object.__setattr__(self, "kv_source", own)

    @property
    def group_size(self) -> int:
        """Query heads that share a KV head."""
        return self.num_query_heads // self.num_kv_heads

    @property
    def num_kv_layers(self) -> int:
        return len(set(self.kv_source))

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> Self:
        """Read a Hugging Face `config.json`.

        Raises:
            ValueError: If it is not of the Llama family, or uses biases or an activation that we do not run.
        """
        if data.get("model_type") not in ("llama", "mistral", "eunoe"):
            raise ValueError(f"model_type={data.get('model_type')!r} is not of the Llama family")
        if data.get("hidden_act", "silu") != "silu" or data.get("attention_bias") or data.get("mlp_bias"):
            raise ValueError("only SiLU without biases is supported")
        if data.get("sliding_window"):
            raise ValueError(f"sliding_window={data['sliding_window']} is not supported")
        num_query_heads = int(data["num_attention_heads"])
        memory = data.get("compressive_memory")
        return cls(
            name=str(data.get("_name_or_path") or data["model_type"]),
            vocab_size=int(data["vocab_size"]),
            dim=int(data["hidden_size"]),
            num_layers=int(data["num_hidden_layers"]),
            num_query_heads=num_query_heads,
            num_kv_heads=int(data.get("num_key_value_heads") or num_query_heads),
            head_dim=int(data.get("head_dim") or int(data["hidden_size"]) // num_query_heads),
            ffn_dim=int(data["intermediate_size"]),
            norm_eps=float(data.get("rms_norm_eps", 1e-6)),
            rope=RopeConfig.from_hf(data),
            ties_embeddings=bool(data.get("tie_word_embeddings", False)),
            max_positions=int(data.get("max_position_embeddings", 2048)),
            compressive_memory=CompressiveMemoryConfig.from_hf(memory) if memory is not None else None,
        )

    def to_hf(self) -> dict[str, Any]:
        """A Hugging Face `config.json` from which `from_hf` makes an equal config."""
        memory = self.compressive_memory
        family: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        if memory is not None:
            # Not a Llama to anybody else: without its memory it is another model.
            family = {
                "architectures": ["EunoeForCausalLM"],
                "model_type": "eunoe",
                "compressive_memory": asdict(memory),
            }
        return {
            "_name_or_path": self.name,
            **family,
            "hidden_act": "silu",
            "vocab_size": self.vocab_size,
            "hidden_size": self.dim,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_query_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.ffn_dim,
            "rms_norm_eps": self.norm_eps,
            "rope_parameters": self.rope.to_hf(),
            "tie_word_embeddings": self.ties_embeddings,
            "max_position_embeddings": self.max_positions,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Dtypes:
    """A model's binding: what its numbers are stored in, and what this machine computes in.

    `weights` and `kv` belong to the model wherever it runs. `compute` is the machine's: activations and matmuls.
    """

    weights: torch.dtype
    kv: torch.dtype
    compute: torch.dtype

    @classmethod
    def for_this_machine(cls) -> Self:
        """Weights and KV in bfloat16; arithmetic too where the CPU multiplies bfloat16 natively, else in float32.

        Without AMX or AVX512-BF16 a bfloat16 matmul runs at a ninth of the speed of a float32 one (20 against 180
        GFLOP/s on 2 cores with AVX2).
        """
        capabilities = torch.cpu.get_capabilities()
        has_bfloat16 = bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
        compute = torch.bfloat16 if has_bfloat16 else torch.float32
        return cls(weights=torch.bfloat16, kv=torch.bfloat16, compute=compute)

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> Self:
        """The binding of the model of a Hugging Face `config.json`.

        A model of type "eunoe" has it from `torch_dtype`: float32 for all, or bfloat16 as on this machine. In other
        files that key says what the weights lie on disk in, converted ones have float32 there; all are bound to
        bfloat16.

        Raises:
            ValueError: If the `torch_dtype` of a model of type "eunoe" is another one.
        """
        name = data.get("torch_dtype", "bfloat16") if data.get("model_type") == "eunoe" else "bfloat16"
        if name not in ("bfloat16", "float32"):
            raise ValueError(f"torch_dtype={name!r} is not supported, only bfloat16 and float32")
        return cls.float32() if name == "float32" else cls.for_this_machine()

    @classmethod
    def float32(cls) -> Self:
        """Everything in float32."""
        return cls(weights=torch.float32, kv=torch.float32, compute=torch.float32)
