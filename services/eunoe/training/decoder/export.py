"""Writes trained weights as the checkpoint directory that the decoder loads, and reads them back."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from eunoe.decoder.checkpoint import load_config
from eunoe.decoder.config import DecoderConfig, RopeConfig
from eunoe.training.decoder.differentiable import NanoConfig, NanoDecoder


def export(model: NanoDecoder, directory: Path, segment_length: int, trained_length: int) -> None:
    """Write `model.safetensors` (float32, Hugging Face's names) and `config.json`.

    Args:
        segment_length: Bytes of a segment, and of the window carried between segments.
        trained_length: The longest sequence trained on, in bytes.
    """
    config = model.config
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    shape = DecoderConfig(
        name=directory.name,
        vocab_size=config.vocab_size,
        dim=config.hidden_size,
        num_layers=config.num_layers,
        num_query_heads=config.num_query_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        ffn_dim=config.intermediate_size,
        norm_eps=config.rms_norm_eps,
        rope=RopeConfig(theta=config.rope_theta),
        ties_embeddings=True,
        max_positions=trained_length,
    )
    described = shape.to_hf() | {
        "model_type": "eunoe",
        "architectures": ["EunoeForCausalLM"],
        "tokenizer": "bytes",
        "torch_dtype": "float32",
        "compressive_memory": {
            "update_rule": config.update_rule,
            "has_write_gate": config.has_write_gate,
            "uses_gamma": config.uses_gamma,
        },
        "stream_defaults": {
            "kv_budget_tokens": segment_length,
            "segment_length": segment_length,
            "num_sink_tokens": 0,
        },
    }
    (directory / "config.json").write_text(json.dumps(described, indent=2) + "\n")


def load(directory: Path) -> NanoDecoder:
    """What `export` wrote, for many sequences side by side.

    Raises:
        ValueError: If the directory holds no model with a compressive memory.
    """
    shape = load_config(directory)
    if shape.compressive_memory is None:
        raise ValueError(f"the model in {directory} has no compressive memory")
    model = NanoDecoder(
        NanoConfig(
            num_layers=shape.num_layers,
            hidden_size=shape.dim,
            num_query_heads=shape.num_query_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            intermediate_size=shape.ffn_dim,
            vocab_size=shape.vocab_size,
            rope_theta=shape.rope.theta,
            rms_norm_eps=shape.norm_eps,
            update_rule=shape.compressive_memory.update_rule,
            has_write_gate=shape.compressive_memory.has_write_gate,
            uses_gamma=shape.compressive_memory.uses_gamma,
        )
    )
    tensors = load_file(directory / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    return model
