"""The peer of eviction_quality: kvpress, in an environment of its own, because it needs an older `transformers`.

It runs as a script there and imports nothing of ours. It reads one JSON object {"model", "dtype", "threads", "jobs":
[{"case", "context", "question", "answer", "presses": [[press, share]], "is_checked"}]} from stdin, and for each press
of each job prints one line {"press", "share", "case", "is_exact", "log_likelihood", "num_slots"}.

A press changes a layer's cache only after the attention of that layer, and nothing of the context comes later: whatever
the press, the prefill is that of the full cache. So a case is read once, and each press compresses a copy. Question and
answer have the positions behind the context, as in kvpress' pipeline. `is_checked` has every press compress and answer
once more in kvpress' own way, and ends the run if anything differs.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import kvpress
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()

# Some presses draw random numbers: each has its own, the same for every case. "CompactorPress@1" draws others.
_SEED = 0


class FullCache(kvpress.BasePress):
    """Evicts nothing."""

    def compress(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attentions: torch.Tensor,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return keys, values


@dataclass
class Memory:
    """What a press leaves of a context.

    Attributes:
        name: Of the press, as in `built`.
        share: Of the slots.
        press: It, used for one context only.
        cache: As after its own prefill.
        masked: Of each layer: evicted slots (batch, head, slot) that a head-wise press leaves in the cache, where
            kvpress' attention passes over them; None of other presses.
        random_state: Of the generator, for the press' next layer.
    """

    name: str
    share: float
    press: kvpress.BasePress
    cache: DynamicCache = field(default_factory=DynamicCache)
    masked: list[tuple[torch.Tensor, ...] | None] = field(default_factory=list)
    random_state: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.random_state = torch.Generator().manual_seed(self.seed).get_state()

    @property
    def seed(self) -> int:
        """What it draws its random numbers from."""
        return int(self.name.partition("@")[2] or _SEED)

    @property
    def num_slots(self) -> int:
        """That a head has on average."""
        num_slots = num_heads = 0
        for layer, masked in zip(self.cache.layers, self.masked, strict=True):
            num_slots += layer.keys.shape[1] * layer.keys.shape[2] - (len(masked[1]) if masked is not None else 0)
            num_heads += layer.keys.shape[1]
        return num_slots // num_heads


@torch.inference_mode()
def main() -> None:
    """Answer all jobs, one after the other."""
    given = json.load(sys.stdin)
    torch.set_num_threads(given["threads"])
    model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=getattr(torch, given["dtype"])).eval()
    tokenizer = AutoTokenizer.from_pretrained(given["model"])
    pipeline = kvpress.KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer)
    for job in given["jobs"]:
        for attention, presses in by_attention(job["presses"]).items():
            model.set_attn_implementation(attention)
            memories = [Memory(name, share, built(name, share)) for name, share in presses]
            prefill(model, job["context"], memories)
            for memory in memories:
                if job["is_checked"]:
                    check(pipeline, memory, job)
                print(json.dumps(answered(model, memory, job)), flush=True)


def built(name: str, share: float) -> kvpress.BasePress:
    """A press with its default parameters: "SnapKVPress", or around another one "AdaKVPress(SnapKVPress)"; its seed
    behind an @ does not count here.
    """
    name = name.partition("@")[0]
    if name == "full-cache":
        return FullCache()
    outer, _, inner = name.removesuffix(")").partition("(")
    made = getattr(kvpress, outer)
    return made(press=built(inner, share)) if inner else made(compression_ratio=1 - share)


def by_attention(presses: list[tuple[str, float]]) -> dict[str, list[tuple[str, float]]]:
    """Presses by the attention that their prefill needs: "eager" gives them its weights."""
    found: dict[str, list[tuple[str, float]]] = {}
    for name, share in presses:
        found.setdefault("eager" if "ObservedAttentionPress" in name else "sdpa", []).append((name, share))
    return found


def prefill(model: PreTrainedModel, context: list[int], memories: list[Memory]) -> None:
    """Read a context once, and have each memory's press compress its copy of every layer's cache."""

    def compress(module: nn.Module, _: tuple[()], kwargs: dict[str, Any], output: tuple[torch.Tensor, ...]) -> None:
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        for memory in memories:
            module.masked_key_indices = None
            torch.set_rng_state(memory.random_state)
            hidden_states, weights = kwargs["hidden_states"], output[1]
            kept = memory.press.compress(module, hidden_states, layer.keys, layer.values, weights, kwargs)
            memory.random_state = torch.get_rng_state()
            memory.cache.update(*kept, module.layer_idx)
            memory.masked.append(module.masked_key_indices)

    hooks = []
    try:
        for memory in memories:
            memory.press.post_init_from_model(model)
        for layer in model.model.layers:
            # Presses look for it there.
            layer.self_attn.rotary_emb = model.model.rotary_emb
            hooks.append(layer.self_attn.register_forward_hook(compress, with_kwargs=True))
        model.model(input_ids=torch.tensor([context]), past_key_values=DynamicCache())
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def masking(model: PreTrainedModel, masked: list[tuple[torch.Tensor, ...] | None]) -> Iterator[None]:
    """Attention passes over these slots of each layer."""
    for layer, indices in zip(model.model.layers, masked, strict=True):
        layer.self_attn.masked_key_indices = indices
    try:
        yield
    finally:
        for layer in model.model.layers:
            layer.self_attn.masked_key_indices = None


def answered(model: PreTrainedModel, memory: Memory, job: dict[str, Any]) -> dict[str, Any]:
    """The line of one press, whose cache then has question and answer too. One pass instead of decoding: greedy
    decoding says the answer if each of its tokens is the likeliest after those before it.
    """
    num_slots, start = memory.num_slots, len(job["context"])
    question, answer = job["question"], torch.tensor(job["answer"])
    asked = torch.tensor([[*question, *job["answer"][:-1]]])
    positions = torch.arange(start, start + asked.shape[1])[None]
    with masking(model, memory.masked):
        logits = model(input_ids=asked, past_key_values=memory.cache, position_ids=positions).logits[0]
    log_probs = logits[len(question) - 1 :].float().log_softmax(dim=-1)
    return {
        "press": memory.name,
        "share": memory.share,
        "case": job["case"],
        "is_exact": bool((log_probs.argmax(dim=-1) == answer).all()),
        "log_likelihood": float(log_probs.gather(1, answer[:, None]).sum()),
        "num_slots": num_slots,
    }


def check(pipeline: kvpress.KVPressTextGenerationPipeline, memory: Memory, job: dict[str, Any]) -> None:
    """Compare a memory with that of a prefill of its own under the press, and what it answers with what kvpress'
    pipeline does.

    Raises:
        SystemExit: If they differ.
    """
    model = pipeline.model
    context, question = torch.tensor([job["context"]]), torch.tensor([job["question"]])
    own = Memory(memory.name, memory.share, built(memory.name, memory.share))
    torch.manual_seed(memory.seed)
    with own.press(model):
        model.model(input_ids=context, past_key_values=own.cache)
    own.masked = [getattr(layer.self_attn, "masked_key_indices", None) for layer in model.model.layers]
    for index in range(model.config.num_hidden_layers):
        pairs = zip(slots(memory, index), slots(own, index), strict=True)
        if not all(torch.equal(*pair) for pair in pairs):
            raise SystemExit(f"{memory.name}: another cache than kvpress' own in layer {index}")
    with masking(model, memory.masked):
        ours = pipeline.generate_answer(question, deepcopy(memory.cache), context.shape[1], len(job["answer"]))
    torch.manual_seed(memory.seed)
    inputs = {"context_ids": context, "questions_ids": [question]}
    (theirs,) = pipeline._forward(inputs, len(job["answer"]), built(memory.name, memory.share))
    if ours != theirs:
        raise SystemExit(f"{memory.name}: {ours!r}, where kvpress' own pipeline says {theirs!r}")
    expected = pipeline.tokenizer.decode(job["answer"], skip_special_tokens=True)
    is_exact = answered(model, deepcopy(memory), job)["is_exact"]
    print(
        f"{memory.name}: {own.num_slots} slots a head and the answer {ours!r} equal kvpress' own; one pass finds it "
        f"{'right' if is_exact else 'wrong'}, and {expected!r} is right",
        file=sys.stderr,
        flush=True,
    )


def slots(memory: Memory, index: int) -> list[torch.Tensor]:
    """A layer's keys and values, and what is masked."""
    layer = memory.cache.layers[index]
    return [layer.keys, layer.values, *(memory.masked[index] or ())]


if __name__ == "__main__":
    main()
