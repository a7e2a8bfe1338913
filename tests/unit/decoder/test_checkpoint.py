import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from eunoe.decoder.checkpoint import (
    convert_gguf,
    load_config,
    load_dtypes,
    load_stream_defaults,
    load_weights,
    save_weights,
)
from eunoe.decoder.config import DecoderConfig, Dtypes, RopeConfig
from eunoe.decoder.decoder import Decoder
from eunoe.decoder.memory_state import MemorySettings
from eunoe.decoder.tiny import tiny_config, write_tiny_model
from eunoe.decoder.weights import random_weights, weights_digest
from eunoe.eviction import DEFAULT_POLICY

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "multi-head": {"num_key_value_heads": 6},
    "tied": {"tie_word_embeddings": True},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


def logits_of(directory: Path, tokens: np.ndarray) -> torch.Tensor:
    decoder = Decoder.load(directory, Dtypes.float32())
    state = decoder.new_state(MemorySettings(kv_budget_tokens=256, segment_length=32))
    logits = decoder.prefill(state, tokens, DEFAULT_POLICY, logits="all")
    assert logits is not None
    return logits


def logits_of_transformers(model: Any, tokens: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.from_numpy(tokens)[None]).logits[0]
    return logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_transformers(variant: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | VARIANTS[variant])).eval()
    # Small shards, so that an index is written.
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    tokens = np.random.default_rng(0).integers(0, 300, 100)

    logits = logits_of(tmp_path, tokens)

    assert (tmp_path / "model.safetensors.index.json").exists()
    torch.testing.assert_close(logits, logits_of_transformers(model, tokens), atol=5e-4, rtol=0)


def test_transformers_reads_a_model_that_we_write(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 300, 50)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()

    torch.testing.assert_close(logits_of(tmp_path, tokens), logits_of_transformers(model, tokens), atol=5e-4, rtol=0)


def test_weights_survive_saving_and_loading(tmp_path: Path) -> None:
    config = tiny_config()
    weights = random_weights(config, seed=3)

    save_weights(tmp_path, config, weights)

    assert load_config(tmp_path) == config
    restored = load_weights(tmp_path, torch.float32)
    assert weights_digest(config, restored) == weights_digest(config, weights)
    assert restored.output is restored.embedding


def test_the_tiny_model_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_tiny_model(tmp_path / name, seed=seed)

    digests = {name: Decoder.load(tmp_path / name).model_digest for name in "abc"}

    assert digests["a"] == digests["b"] != digests["c"]


def test_a_model_from_gguf_equals_the_one_it_was_made_of(tmp_path: Path) -> None:
    config = tiny_config(vocab_size=256)
    weights = random_weights(config, seed=0)
    save_weights(tmp_path / "source", config, weights)
    write_gguf(tmp_path / "model.gguf", config, tmp_path / "source")

    convert_gguf(tmp_path / "model.gguf", tmp_path / "converted")

    assert load_config(tmp_path / "converted") == config
    converted = load_weights(tmp_path / "converted", torch.float32)
    assert weights_digest(config, converted) == weights_digest(config, weights)
    assert (tmp_path / "converted" / "tokenizer.json").is_file()


def test_a_gguf_of_another_family_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gpt2")
    writer.add_context_length(8)
    finish(writer)

    with pytest.raises(ValueError, match="Llama family"):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "converted")


def test_a_missing_or_misshapen_tensor_is_named(tmp_path: Path) -> None:
    save_weights(tmp_path, tiny_config(), random_weights(tiny_config(), seed=0))
    path = tmp_path / "config.json"
    original = json.loads(path.read_text())

    for change, message in (({"num_hidden_layers": 3}, "layers.2"), ({"intermediate_size": 64}, "gate_proj")):
        path.write_text(json.dumps(original | change))
        with pytest.raises(ValueError, match=message):
            load_weights(tmp_path, torch.float32)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        Decoder.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gpt2"},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"sliding_window": 4096},
        {"rope_parameters": {"rope_type": "yarn"}},
        {"num_key_value_heads": 3},
    ],
    ids=str,
)
def test_models_that_we_do_not_run_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"support|family|multiple"):
        DecoderConfig.from_hf(tiny_config().to_hf() | change)


@pytest.mark.parametrize(
    ("model_type", "torch_dtype", "expected"),
    [
        ("eunoe", "float32", torch.float32),
        ("eunoe", "bfloat16", torch.bfloat16),
        ("llama", "float32", torch.bfloat16),
        ("llama", "float16", torch.bfloat16),
    ],
)
def test_a_model_of_our_own_is_bound_to_what_its_file_says(
    tmp_path: Path, model_type: str, torch_dtype: str, expected: torch.dtype
) -> None:
    write_tiny_model(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | {"model_type": model_type, "torch_dtype": torch_dtype}))

    decoder = Decoder.load(tmp_path)

    assert decoder.dtypes.weights == decoder.dtypes.kv == expected
    assert expected == torch.bfloat16 or decoder.dtypes == Dtypes.float32()
    assert decoder.new_state(MemorySettings()).keys.dtype == expected


def test_a_dtype_that_we_do_not_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "eunoe", **SHAPE, "torch_dtype": "float16"}))

    with pytest.raises(ValueError, match="torch_dtype='float16'"):
        load_dtypes(tmp_path)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (256, 512, 4)),
        ({"segment_length": 128}, (256, 128, 4)),
        ({"kv_budget_tokens": 128, "segment_length": 64, "num_sink_tokens": 0}, (128, 64, 0)),
    ],
)
def test_a_model_may_say_what_its_streams_have(
    tmp_path: Path, given: dict[str, int], expected: tuple[int, int, int]
) -> None:
    config = {"model_type": "llama", **SHAPE} | ({"stream_defaults": given} if given else {})
    (tmp_path / "config.json").write_text(json.dumps(config))

    found = load_stream_defaults(tmp_path)

    assert (found.kv_budget_tokens, found.segment_length, found.num_sink_tokens) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"retain_log": 1}, "retain_log, which is no setting"),
        ({"segment_length": 16.0}, "other values than integers"),
        ({"num_sink_tokens": 256}, "num_sink_tokens=256"),
    ],
)
def test_stream_defaults_that_are_none_are_refused(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SHAPE, "stream_defaults": given}))

    with pytest.raises(ValueError, match=message):
        load_stream_defaults(tmp_path)


def test_configs_of_older_transformers_are_read() -> None:
    data = tiny_config().to_hf()
    del data["rope_parameters"]

    config = DecoderConfig.from_hf(data | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}})

    assert config.rope == RopeConfig(theta=5e5, scaling="linear", factor=2.0)


def test_layers_that_share_keys_are_refused_until_they_can_run() -> None:
    with pytest.raises(ValueError, match="kv_source"):
        DecoderConfig(**{**asdict_of(tiny_config()), "kv_source": (0, 0)})


def asdict_of(config: DecoderConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in DecoderConfig.__dataclass_fields__}


def write_gguf(path: Path, config: DecoderConfig, source: Path) -> None:
    """As llama.cpp's converter does it: names of its own, and the rotary pairs of q and k interleaved."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(config.name)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.num_query_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(sorted(pre_tokenizers.ByteLevel.alphabet()))
    writer.add_token_types([gguf.TokenType.NORMAL] * 256)
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        stored = tensor
        if "q_proj" in name or "k_proj" in name:
            num_heads = config.num_query_heads if "q_proj" in name else config.num_kv_heads
            stored = tensor.view(num_heads, 2, -1, config.dim).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), stored.contiguous().numpy())
    finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
