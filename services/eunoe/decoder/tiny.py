"""Seeded random models, small enough that every test can have one."""

import json
from pathlib import Path

from eunoe.decoder.checkpoint import save_weights
from eunoe.decoder.config import CompressiveMemoryConfig, DecoderConfig
from eunoe.decoder.tokenizer import load_tokenizer, write_tiny_tokenizer
from eunoe.decoder.weights import random_weights


def tiny_config(
    *, vocab_size: int = 512, num_layers: int = 2, compressive_memory: CompressiveMemoryConfig | None = None
) -> DecoderConfig:
    """A Llama of some 100,000 weights, or one with a compressive memory."""
    return DecoderConfig(
        name="tiny",
        vocab_size=vocab_size,
        dim=64,
        num_layers=num_layers,
        num_query_heads=4,
        num_kv_heads=2,
        head_dim=16,
        ffn_dim=128,
        ties_embeddings=True,
        max_positions=512,
        compressive_memory=compressive_memory,
    )


def write_tiny_model(
    directory: Path | str,
    *,
    seed: int = 0,
    num_layers: int = 2,
    compressive_memory: CompressiveMemoryConfig | None = None,
) -> None:
    """Write a model directory with seeded random weights and a small byte-level tokenizer."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_tiny_tokenizer(directory)
    config = tiny_config(
        vocab_size=load_tokenizer(directory).vocab_size, num_layers=num_layers, compressive_memory=compressive_memory
    )
    save_weights(directory, config, random_weights(config, seed))


def write_tiny_byte_model(directory: Path | str, *, seed: int = 0) -> None:
    """Write a model directory whose tokens are bytes, with seeded random weights and a compressive memory.

    Its streams have a budget and segments of 16 tokens and no sinks, where nobody says otherwise.
    """
    directory = Path(directory)
    config = tiny_config(
        vocab_size=256, compressive_memory=CompressiveMemoryConfig(update_rule="linear", has_write_gate=True)
    )
    save_weights(directory, config, random_weights(config, seed))
    written = json.loads((directory / "config.json").read_text()) | {
        "tokenizer": "bytes",
        "stream_defaults": {"kv_budget_tokens": 16, "segment_length": 16, "num_sink_tokens": 0},
    }
    (directory / "config.json").write_text(json.dumps(written, indent=2))
