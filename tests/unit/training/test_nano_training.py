"""Passkey samples, the curriculum, the loop, and what is exported."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from eunoe.training.decoder.corpus import FillerName
from eunoe.training.decoder.curriculum import Stage
from eunoe.training.decoder.differentiable import NanoConfig, NanoDecoder, SegmentPlan
from eunoe.training.decoder.export import export, load
from eunoe.training.decoder.growth import grown
from eunoe.training.decoder.margin import SHUT, head_margins, recalling_head, shut_idle_gates
from eunoe.training.decoder.passkey import ANSWER, COPY, MASKED, PLAIN, PasskeyTask, draw, needle, question
from eunoe.training.decoder.passkey_evaluation import PasskeyCase, answered, answers, passkey_case, scores
from eunoe.training.decoder.training import TrainingConfig, train
from eunoe.training.run_directory import BadRunDirectory

SMALL = NanoConfig(
    num_layers=2, hidden_size=16, num_query_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=24
)  # fmt: skip
TASK = PasskeyTask(length=512, least_gap=64, gap=(0, 60), questions_bytes=150)


def _model(seed: int = 0) -> NanoDecoder:
    model = NanoDecoder(SMALL)
    model.initialize(torch.Generator().manual_seed(seed))
    return model


@pytest.mark.parametrize("filler_name", ["paper", "shuffled", "book"])
def test_every_answer_repeats_the_hidden_key(filler_name: str) -> None:
    task = replace(TASK, fillers=((filler_name, 1.0),), introduction_share=0.5)
    generator = np.random.default_rng(1)
    for _ in range(30):
        sample = draw(task, generator)
        assert sample.tokens.shape == (512,)
        key = bytes(sample.tokens[sample.kinds == MASKED])
        assert bytes(sample.tokens[sample.kinds == COPY]) == key
        asked = bytes(sample.tokens[sample.kinds == ANSWER])
        assert (key + b".").startswith(asked[:6])
        assert len(asked) >= 6
        assert sample.distances[sample.kinds == ANSWER].min() > 0
        assert not sample.distances[sample.kinds != ANSWER].any()


def test_a_second_key_has_another_name_and_its_own_answer() -> None:
    generator = np.random.default_rng(2)
    texts = [bytes(draw(replace(TASK, two_keys_share=1.0), generator).tokens).decode() for _ in range(20)]
    assert all(text.count("Remember it.") == 2 for text in texts)
    for text in texts:
        asked, _, answer = text.partition("What is the ")[2].partition(" key is ")
        name = asked.split(" ")[0]
        assert f"{answer[:5]} is the {name} key." in text


def test_a_plain_sample_hides_and_asks_for_nothing() -> None:
    task = replace(TASK, plain_share=0.5, fillers=(("book", 1.0),))
    samples = [draw(task, np.random.default_rng(seed)) for seed in range(40)]
    plain = [sample for sample in samples if not sample.kinds.any()]
    assert 10 < len(plain) < 30
    assert all(sample.tokens.shape == (512,) and b"key" not in bytes(sample.tokens) for sample in plain)


def test_dilution_spares_the_segments_around_a_key() -> None:
    stage = Stage(task=TASK, segment_length=32, bytes_per_step=512, max_steps=1, max_dilution=100.0)
    kinds = torch.full((1, 8 * 32), PLAIN, dtype=torch.uint8)
    kinds[0, 3 * 32 + 5] = MASKED
    scale = stage.write_scale(kinds, np.random.default_rng(0))
    assert isinstance(scale, torch.Tensor)
    factors = scale[0, :, 0, 0, 0]
    assert factors[2:5].tolist() == [1.0, 1.0, 1.0]
    others = torch.cat([factors[:2], factors[5:]])
    assert others.unique().numel() == 1
    assert 1.0 < others[0] <= 100.0


def test_a_resumed_run_equals_an_undisturbed_one(tmp_path: Path) -> None:
    stage = Stage(task=replace(TASK, length=256), segment_length=32, bytes_per_step=512, max_steps=6, shortest=0.5)
    config = TrainingConfig(model=SMALL, stages=(stage,), steps_per_report=1, steps_per_checkpoint=2)
    undisturbed = train(config, tmp_path / "undisturbed")

    class Cut(Exception):
        pass

    def cut(report: dict[str, object]) -> None:
        if report["step"] == 5:
            raise Cut

    with pytest.raises(Cut):
        train(config, tmp_path / "cut", cut)
    resumed = train(config, tmp_path / "cut")
    for name, parameter in undisturbed.state_dict().items():
        assert torch.equal(parameter, resumed.state_dict()[name]), name
    assert not torch.equal(undisturbed.embed_tokens.weight, _model().embed_tokens.weight)
    curve = [json.loads(line) for line in (tmp_path / "cut" / "curve.jsonl").read_text().splitlines()]
    assert [report["step"] for report in curve] == [1, 2, 3, 4, 5, 5, 6]


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    stage = Stage(task=replace(TASK, length=128), segment_length=32, bytes_per_step=128, max_steps=1)
    config = TrainingConfig(model=SMALL, stages=(stage,))
    train(config, tmp_path)
    with pytest.raises(BadRunDirectory, match="another run"):
        train(replace(config, seed=1), tmp_path)


def test_activations_that_are_computed_again_change_no_weight(tmp_path: Path) -> None:
    stage = Stage(task=replace(TASK, length=256), segment_length=32, bytes_per_step=512, max_steps=3, carried_bytes=256)
    config = TrainingConfig(model=SMALL, stages=(stage,))
    kept = train(config, tmp_path / "kept").state_dict()
    again = train(replace(config, recomputes_layers=True), tmp_path / "again").state_dict()
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_state_passing_reads_up_to_so_many_bytes_of_filler_before_the_samples() -> None:
    stage = Stage(task=TASK, segment_length=32, bytes_per_step=512, max_steps=1, carried_bytes=128)
    drawn = [stage.draw_carried(TASK, 3, np.random.default_rng(seed)) for seed in range(30)]
    assert {len(samples) for samples in drawn} == {0, 3}
    assert {len(sample.tokens) for samples in drawn for sample in samples} == {32, 64, 96, 128}
    assert not any(sample.kinds.any() for samples in drawn for sample in samples)


@pytest.mark.parametrize(("share", "is_diluted"), [(0.0, False), (1.0, True)])
def test_only_a_share_of_samples_is_diluted(share: float, is_diluted: bool) -> None:
    task = PasskeyTask(length=512, least_gap=200, gap=(0, 20), questions_bytes=60)
    stage = Stage(task=task, segment_length=32, bytes_per_step=512, max_steps=1, max_dilution=50.0, diluted_share=share)
    scale = stage.write_scale(torch.zeros(3, 512, dtype=torch.uint8), np.random.default_rng(0))
    assert isinstance(scale, torch.Tensor)
    assert bool((scale > 1).all()) == is_diluted
    assert bool((scale == 1).all()) != is_diluted


def test_a_stage_that_is_learned_ends_early(tmp_path: Path) -> None:
    first = Stage(task=replace(TASK, length=128), segment_length=32, bytes_per_step=128, max_steps=500, min_steps=1,
                  far_accuracy=0.0)  # fmt: skip
    steps: list[int] = []
    config = TrainingConfig(model=SMALL, stages=(first, replace(first, max_steps=2)), steps_per_report=1)
    train(config, tmp_path, lambda report: steps.append(report["stage"]))
    assert steps == [0] * 50 + [1] * 2


@torch.no_grad()
def test_added_layers_change_nothing_until_they_are_trained() -> None:
    model = _model()
    deeper = grown(model, 4, torch.Generator().manual_seed(1))
    assert deeper.config.num_layers == 4
    tokens = torch.randint(0, 256, (1, 96), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        deeper(tokens, SegmentPlan(deeper.config, 16))[0], model(tokens, SegmentPlan(SMALL, 16))[0]
    )


def test_before_it_recalls_all_gates_are_shut_but_the_recalling_heads() -> None:
    model = _model()
    kept = recalling_head(model, 32)
    shut_idle_gates(model, 32)
    gates = model.memory_gates()
    assert gates[kept.layer][kept.query_head] == pytest.approx(kept.gate)
    others = [gate for layer, row in enumerate(gates) for head, gate in enumerate(row)
              if (layer, head) != (kept.layer, kept.query_head)]  # fmt: skip
    assert others == pytest.approx([1 / (1 + math.exp(-SHUT))] * 3)


def test_a_prompt_is_the_papers_and_as_long_as_asked() -> None:
    case = passkey_case(5000, 0.5, np.random.default_rng(0))
    text = case.prompt.decode()
    assert 5000 - 25 < len(text) <= 5000
    assert text.startswith("There is an important info hidden inside a lot of irrelevant text. ")
    assert text.endswith("What is the pass key? The pass key is")
    key = case.answer.decode()[1:-1]
    assert 0.4 < text.index(f"The pass key is {key}. Remember it. {key} is the pass key. ") / 5000 < 0.6


@pytest.mark.parametrize("filler_name", ["paper", "shuffled", "book"])
def test_cases_of_one_filler_seed_differ_by_their_needles_alone(filler_name: FillerName) -> None:
    short, long, other_key = (
        passkey_case(num_bytes, 0.0, np.random.default_rng(key), filler_name, filler_seed=5)
        for num_bytes, key in ((3000, 1), (9000, 1), (9000, 2))
    )

    assert long.prompt.startswith(short.prompt.removesuffix(question().encode()))
    assert other_key.answer != long.answer
    needles = [needle(case.answer.decode()[1:-1]).encode() for case in (long, other_key)]
    assert other_key.prompt == long.prompt.replace(*needles)


@pytest.mark.parametrize("num_bytes", [640, 641, 700, 703])
def test_streamed_answers_equal_those_of_one_pass(num_bytes: int) -> None:
    model, generator = _model(), np.random.default_rng(num_bytes)
    prompts = [bytes(generator.integers(0, 256, num_bytes, np.uint8)) for _ in range(2)]
    cases = [PasskeyCase(prompt, b" 12345.", 0.0) for prompt in prompts]
    streamed = answers(model, cases, 64)
    plan = SegmentPlan(SMALL, 64)
    for case, answer in zip(cases, streamed, strict=True):
        text = list(case.prompt)
        for byte in answer:
            padded = torch.tensor([text + [0] * (-len(text) % 64)])
            with torch.no_grad():
                assert int(model.logits(model(padded, plan)[0][0, len(text) - 1]).argmax()) == byte
            text.append(byte)


def test_prompts_that_share_a_beginning_are_answered_as_if_alone() -> None:
    model = _model()
    cases = [passkey_case(1200, depth, np.random.default_rng(7)) for depth in (0.0, 0.9, 0.5, 0.9, 0.5)]
    assert answers(model, cases, 64) == [answers(model, [case], 64)[0] for case in cases]


def test_a_prompt_that_begins_a_longer_one_is_answered_on_the_way() -> None:
    model, lengths = _model(), (1500, 700, 1100)
    cases = [passkey_case(length, 0.0, np.random.default_rng(7), filler_seed=0) for length in lengths]
    assert cases[0].prompt.startswith(cases[1].prompt.removesuffix(question().encode()))
    found = list(answered(model, cases, 64))
    assert [index for index, _ in found] == [1, 2, 0]
    assert all(answer == answers(model, [cases[index]], 64)[0] for index, answer in found)


def test_prompts_of_any_lengths_are_answered_in_their_order() -> None:
    model, generator = _model(), np.random.default_rng(8)
    cases = [passkey_case(length, 0.5, generator, "book") for length in (1500, 700, 1480, 720)]
    assert len({len(case.prompt) // 64 for case in cases}) > 1
    assert answers(model, cases, 64) == [answers(model, [case], 64)[0] for case in cases]


def test_window_only_does_not_read_what_left_the_window() -> None:
    model = _model()
    # Random weights say nothing of a needle; large values make every read of the memory show.
    for layer in model.layers:
        layer.self_attn.memory_gate.data.fill_(4.0)
    case = passkey_case(1200, 0.0, np.random.default_rng(4))
    prompt = bytearray(case.prompt)
    prompt[100:400] = bytes(300)
    other = PasskeyCase(bytes(prompt), case.answer, 0.0)
    assert answers(model, [case], 64, "window_only") == answers(model, [other], 64, "window_only")


def test_a_margin_is_what_a_write_weight_adds() -> None:
    model = _model()
    case = passkey_case(900, 0.5, np.random.default_rng(4))
    plain = head_margins(model, case, 64)
    assert len(plain) == 4
    assert {margin.layer for margin in plain} == {0, 1}
    assert plain[0].worst_margin < plain[0].margin
    assert plain[0].share_after(10) > plain[0].share_after(1000)
    closed = _model()
    closed.layers[0].self_attn.write_gate.bias.data.fill_(-10.0)
    # A bias shuts the gate on needle and filler alike.
    assert head_margins(closed, case, 64)[0].margin == pytest.approx(plain[0].margin, abs=1e-3)


def test_scores_count_digits_and_whole_answers() -> None:
    cases = [PasskeyCase(b"", b" 12345.", depth) for depth in (0.0, 0.0, 1.0)]
    result = scores(cases, [b" 12345.", b" 12045.", b" 12345,"])
    assert (result[0.0].digit_accuracy, result[0.0].num_exact) == (0.9, 1)
    assert (result[1.0].digit_accuracy, result[1.0].num_exact) == (1.0, 0)


def test_an_exported_checkpoint_has_the_names_that_the_decoder_loads(tmp_path: Path) -> None:
    export(_model(), tmp_path, segment_length=128, trained_length=5120)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["model.layers.1.self_attn.memory_gate"].shape == (2,)
    assert tensors["model.layers.0.self_attn.write_gate.weight"].shape == (1, 8)
    assert tensors["model.layers.0.self_attn.write_gate.bias"].shape == (1,)
    assert tensors["model.embed_tokens.weight"].shape == (256, 16)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["compressive_memory"] == {"update_rule": "linear", "has_write_gate": True, "uses_gamma": False}
    assert config["stream_defaults"] == {"kv_budget_tokens": 128, "segment_length": 128, "num_sink_tokens": 0}
    for name, tensor in load(tmp_path).state_dict().items():
        assert torch.equal(tensor, tensors[f"model.{name}"]), name
