"""Weights from and to files: Hugging Face directories and GGUF. The only file that knows foreign tensor names."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from eunoe.decoder.config import DecoderConfig, Dtypes, RopeConfig
from eunoe.decoder.memory_state import MemorySettings
from eunoe.decoder.tokenizer import tokenizer_files_from_gguf
from eunoe.decoder.weights import LayerWeights, MemoryGates, Weights

_EMBEDDING = "model.embed_tokens.weight"
_OUTPUT_NORM = "model.norm.weight"
_OUTPUT = "lm_head.weight"
_ATTENTION_NORM = "input_layernorm.weight"
_QUERY_KEY_VALUE = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
_ATTENTION_OUTPUT = "self_attn.o_proj.weight"
_FFN_NORM = "post_attention_layernorm.weight"
_GATE_UP = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
_FFN_DOWN = "mlp.down_proj.weight"
_MEMORY_GATE = "self_attn.memory_gate"
_WRITE_GATE = ("self_attn.write_gate.weight", "self_attn.write_gate.bias")

_GGUF_NAMES = {
    "token_embd.weight": _EMBEDDING,
    "output_norm.weight": _OUTPUT_NORM,
    "output.weight": _OUTPUT,
}
_GGUF_LAYER_NAMES = {
    "attn_norm.weight": _ATTENTION_NORM,
    "attn_q.weight": _QUERY_KEY_VALUE[0],
    "attn_k.weight": _QUERY_KEY_VALUE[1],
    "attn_v.weight": _QUERY_KEY_VALUE[2],
    "attn_output.weight": _ATTENTION_OUTPUT,
    "ffn_norm.weight": _FFN_NORM,
    "ffn_gate.weight": _GATE_UP[0],
    "ffn_up.weight": _GATE_UP[1],
    "ffn_down.weight": _FFN_DOWN,
}


def load_config(directory: Path | str) -> DecoderConfig:
    """The config of a Hugging Face directory.

    Raises:
        ValueError: If there is no config.json, or it describes a model that we do not run.
    """
    return DecoderConfig.from_hf(_config_json(directory))


def load_dtypes(directory: Path | str) -> Dtypes:
    """What the model of a Hugging Face directory is bound to on this machine.

    Raises:
        ValueError: If there is no config.json, or it names a dtype that we do not run.
    """
    return Dtypes.from_hf(_config_json(directory))


def load_stream_defaults(directory: Path | str) -> MemorySettings:
    """What the streams of a Hugging Face directory's model have where nobody says otherwise.

    That is `stream_defaults` of config.json, an object of `kv_budget_tokens`, `segment_length` and `num_sink_tokens`,
    and for what is missing there, or where there is none, the defaults of `MemorySettings` within the trained range.

    Raises:
        ValueError: As `load_config`; or if `stream_defaults` has something else or no valid numbers.
    """
    config, given = load_config(directory), _config_json(directory).get("stream_defaults", {})
    if unknown := sorted(set(given) - {"kv_budget_tokens", "segment_length", "num_sink_tokens"}):
        raise ValueError(f"stream_defaults of {directory} has {', '.join(unknown)}, which is no setting")
    if not all(isinstance(value, int) for value in given.values()):
        raise ValueError(f"stream_defaults of {directory} has other values than integers: {given}")
    return MemorySettings(**{"kv_budget_tokens": min(MemorySettings().kv_budget_tokens, config.max_positions)} | given)


def _config_json(directory: Path | str) -> dict[str, Any]:
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} is no model directory: it has no config.json")
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def load_weights(directory: Path | str, dtype: torch.dtype) -> Weights:
    """The weights of a Hugging Face directory of safetensors, one file or sharded, rounded to `dtype`.

    Raises:
        ValueError: If a tensor is missing or has another shape than the config says.
    """
    config = load_config(directory)
    tensors = _SafetensorsDirectory(Path(directory))
    query_dim, kv_dim = config.num_query_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def tensor(name: str, *shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        found = tensors.read(name)
        if found.shape != shape:
            raise ValueError(f"{name} is {tuple(found.shape)}, not {shape}")
        return found.to(dtype)

    def layer(index: int) -> LayerWeights:
        prefix = f"model.layers.{index}."
        query, key, value = (prefix + name for name in _QUERY_KEY_VALUE)
        return LayerWeights(
            attention_norm=tensor(prefix + _ATTENTION_NORM, config.dim),
            query_key_value=torch.cat(
                [
                    tensor(query, query_dim, config.dim),
                    tensor(key, kv_dim, config.dim),
                    tensor(value, kv_dim, config.dim),
                ]
            ),
            attention_output=tensor(prefix + _ATTENTION_OUTPUT, config.dim, query_dim),
            ffn_norm=tensor(prefix + _FFN_NORM, config.dim),
            gate_up=torch.cat([tensor(prefix + name, config.ffn_dim, config.dim) for name in _GATE_UP]),
            ffn_down=tensor(prefix + _FFN_DOWN, config.dim, config.ffn_dim),
        )

    def gates(index: int) -> MemoryGates:
        prefix = f"model.layers.{index}."
        mixing = tensor(prefix + _MEMORY_GATE, config.num_query_heads, dtype=torch.float32)
        if not (config.compressive_memory and config.compressive_memory.has_write_gate):
            return MemoryGates(
                mixing=mixing, write_weight=torch.empty(config.num_kv_heads, 0), write_bias=torch.empty(0)
            )
        weight, bias = (prefix + name for name in _WRITE_GATE)
        return MemoryGates(
            mixing=mixing,
            write_weight=tensor(weight, config.num_kv_heads, config.head_dim, dtype=torch.float32),
            write_bias=tensor(bias, config.num_kv_heads, dtype=torch.float32),
        )

    embedding = tensor(_EMBEDDING, config.vocab_size, config.dim)
    return Weights(
        embedding=embedding,
        layers=tuple(layer(index) for index in range(config.num_layers)),
        output_norm=tensor(_OUTPUT_NORM, config.dim),
        output=embedding if config.ties_embeddings else tensor(_OUTPUT, config.vocab_size, config.dim),
        memory_gates=tuple(map(gates, range(config.num_layers))) if config.compressive_memory is not None else (),
    )


def save_weights(directory: Path | str, config: DecoderConfig, weights: Weights) -> None:
    """Write config.json and model.safetensors, so that `load_config` and `load_weights` read them back."""
    query_dim, kv_dim = config.num_query_heads * config.head_dim, config.num_kv_heads * config.head_dim
    tensors = {_EMBEDDING: weights.embedding, _OUTPUT_NORM: weights.output_norm}
    if not config.ties_embeddings:
        tensors[_OUTPUT] = weights.output
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}."
        parts = dict(zip(_QUERY_KEY_VALUE, layer.query_key_value.split([query_dim, kv_dim, kv_dim]), strict=True))
        parts |= zip(_GATE_UP, layer.gate_up.split(config.ffn_dim), strict=True)
        parts |= {
            _ATTENTION_NORM: layer.attention_norm,
            _ATTENTION_OUTPUT: layer.attention_output,
            _FFN_NORM: layer.ffn_norm,
            _FFN_DOWN: layer.ffn_down,
        }
        tensors |= {prefix + name: part for name, part in parts.items()}
    for index, gates in enumerate(weights.memory_gates):
        parts = {_MEMORY_GATE: gates.mixing}
        if len(gates.write_bias):
            parts |= zip(_WRITE_GATE, (gates.write_weight, gates.write_bias), strict=True)
        tensors |= {f"model.layers.{index}.{name}": part for name, part in parts.items()}
    _write(Path(directory), config, tensors)


def convert_gguf(gguf_path: Path | str, directory: Path | str) -> None:
    """Turn a GGUF file of the Llama family into a Hugging Face directory: float32 weights, config, tokenizer.

    Raises:
        ValueError: If the file is of another family, or scales its rotary frequencies by a table.
    """
    reader = gguf.GGUFReader(str(gguf_path))
    config = _gguf_config(reader)
    tensors = {}
    for stored in reader.tensors:
        tensor = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy()).float()
        block, _, rest = stored.name.removeprefix("blk.").partition(".")
        if stored.name in _GGUF_NAMES:
            tensors[_GGUF_NAMES[stored.name]] = tensor
        elif block.isdecimal() and rest in _GGUF_LAYER_NAMES:
            num_heads = {"attn_q.weight": config.num_query_heads, "attn_k.weight": config.num_kv_heads}.get(rest)
            tensors[f"model.layers.{block}.{_GGUF_LAYER_NAMES[rest]}"] = (
                tensor if num_heads is None else _unpermuted(tensor, num_heads)
            )
        else:
            raise ValueError(f"{gguf_path}: tensor {stored.name} has no place in a plain Llama")
    _write(Path(directory), config, tensors)
    for name, content in zip(
        ("tokenizer.json", "tokenizer_config.json"), tokenizer_files_from_gguf(reader), strict=True
    ):
        (Path(directory) / name).write_text(json.dumps(content, ensure_ascii=False))


def _gguf_config(reader: gguf.GGUFReader) -> DecoderConfig:
    values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    if values["general.architecture"] != "llama":
        raise ValueError(f"architecture {values['general.architecture']!r} is not of the Llama family")
    llama = {name.removeprefix("llama."): value for name, value in values.items() if name.startswith("llama.")}
    shapes = {stored.name: stored.shape.tolist() for stored in reader.tensors}
    num_query_heads = int(llama["attention.head_count"])
    scaling = llama.get("rope.scaling.type", "none")
    return DecoderConfig(
        name=str(values.get("general.name", "llama")),
        vocab_size=int(shapes["token_embd.weight"][1]),
        dim=int(llama["embedding_length"]),
        num_layers=int(llama["block_count"]),
        num_query_heads=num_query_heads,
        num_kv_heads=int(llama.get("attention.head_count_kv", num_query_heads)),
        head_dim=int(llama.get("attention.key_length", llama["embedding_length"] // num_query_heads)),
        ffn_dim=int(llama["feed_forward_length"]),
        # GGUF holds a float32: 9.999999747378752e-06 was 1e-5.
        norm_eps=float(f"{llama['attention.layer_norm_rms_epsilon']:.6g}"),
        rope=RopeConfig(
            theta=float(llama.get("rope.freq_base", 10_000.0)),
            scaling=scaling,
            factor=float(llama.get("rope.scaling.factor", 1.0)),
        ),
        ties_embeddings="output.weight" not in shapes,
        max_positions=int(llama["context_length"]),
    )


def _unpermuted(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows in Hugging Face's order: GGUF interleaves the two halves of each head's rotary pairs."""
    num_rows, num_columns = weight.shape
    pairs = weight.view(num_heads, num_rows // num_heads // 2, 2, num_columns)
    return pairs.transpose(1, 2).reshape(num_rows, num_columns)


def _write(directory: Path, config: DecoderConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config.to_hf() | {"torch_dtype": "float32"}, indent=2))


class _SafetensorsDirectory:
    """Tensors by name, out of one file or of shards with an index."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            self._file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
        elif (directory / "model.safetensors").is_file():
            with safe_open(directory / "model.safetensors", framework="pt") as file:
                self._file_of = dict.fromkeys(file.keys(), "model.safetensors")
        else:
            raise ValueError(f"{directory} has neither model.safetensors nor model.safetensors.index.json")

    def read(self, name: str) -> torch.Tensor:
        if name not in self._file_of:
            raise ValueError(f"{self._directory} has no tensor {name}")
        with safe_open(self._directory / self._file_of[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor
