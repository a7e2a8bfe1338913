"""The tokenizer against the `tokenizers` library and, for SmolLM2, against transformers."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from eunoe.decoder.byte_tokenizer import ByteTokenizer
from eunoe.decoder.pre_tokenizer import bytes_of_pre_token, pre_tokenizer_definition, pre_tokenizer_name
from eunoe.decoder.tokenizer import (
    BytePairTokenizer,
    TextDecoder,
    Tokenizer,
    load_tokenizer,
    tokenizer_files_from_gguf,
    write_tiny_tokenizer,
)

NASTY_TEXTS = [
    "",
    "  12 1\u00b2 \u0663\u0664 3",
    "don't we'll I'VE 'tis 's's '' \u2019s",
    "a \n\n\t b\r\n  c   ",
    "e\u0301\u0323 \u0928\u0940 \u200d\ufeff \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "\u6f22\u5b57\u304b\u306a \ud55c\uad6d\uc5b4 \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \U00020000",
    "\x00\x04\x1c\x7f\x85\xa0\u2028\u3000",
    "<|im_start|>user\n<|im_end|><|endoftext|>",
]


@pytest.fixture(scope="module")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    write_tiny_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def tiny(tiny_directory: Path) -> Tokenizer:
    return load_tokenizer(tiny_directory)


@pytest.fixture(scope="module", params=["byte-pairs", "bytes"])
def each(request: pytest.FixtureRequest, tiny: Tokenizer) -> Tokenizer:
    return tiny if request.param == "byte-pairs" else ByteTokenizer()


@pytest.fixture(scope="module")
def tiny_json(tiny_directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((tiny_directory / "tokenizer.json").read_bytes())
    return content


@pytest.fixture(scope="module", params=["smollm", "llama-bpe"])
def with_split(request: pytest.FixtureRequest, tiny_json: dict[str, Any]) -> dict[str, Any]:
    return tiny_json | {"pre_tokenizer": pre_tokenizer_definition(request.param)}


@pytest.fixture(scope="module")
def encoders(with_split: dict[str, Any]) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """Ours and the library's own, which knows no special tokens."""
    return BytePairTokenizer(with_split, {}), tokenizers.Tokenizer.from_str(
        json.dumps(with_split | {"added_tokens": []})
    )


def a_gguf_reader(path: Path, tokenizer_json: dict[str, Any], split: str, model: str = "gpt2") -> gguf.GGUFReader:
    tokens = sorted(tokenizer_json["model"]["vocab"], key=tokenizer_json["model"]["vocab"].get)
    special = {token["content"] for token in tokenizer_json["added_tokens"]}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer_json["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf.GGUFReader(path)


@settings(deadline=None, derandomize=True)
@given(text=st.text(st.one_of(st.sampled_from("'srvelLRVS \n\r\t190!"), st.characters(codec="utf-8")), max_size=60))
def test_encode_gives_the_ids_of_the_tokenizers_library(
    encoders: tuple[Tokenizer, tokenizers.Tokenizer], text: str
) -> None:
    ours, oracle = encoders

    assert ours.encode(text) == oracle.encode(text, add_special_tokens=False).ids


def test_text_never_becomes_a_special_token(tiny: Tokenizer) -> None:
    token_ids = tiny.encode("<|im_start|>system<|im_end|>")

    assert not {0, 1} & set(token_ids)
    assert tiny.decode(token_ids) == "<|im_start|>system<|im_end|>"


@pytest.mark.parametrize("text", NASTY_TEXTS)
def test_decode_undoes_encode(each: Tokenizer, text: str) -> None:
    assert each.decode(each.encode(text)) == text


@pytest.mark.parametrize("text", NASTY_TEXTS)
def test_pre_tokens_are_the_text_cut_between_characters(each: Tokenizer, text: str) -> None:
    pre_tokens = each.pre_tokens(text)

    assert "".join(bytes_of_pre_token(pre_token).decode() for pre_token in pre_tokens) == text
    assert [token_id for each_one in pre_tokens for token_id in each.ids_of_pre_token(each_one)] == each.encode(text)


def test_text_decoder_holds_back_cut_characters(each: Tokenizer) -> None:
    decoder = TextDecoder(each)

    pieces = [decoder.push(token_id) for token_id in each.encode("a\U0001f600b")]

    assert [piece for piece in pieces if piece] == ["a", "\U0001f600", "b"]
    assert decoder.finish() == ""


def test_text_decoder_replaces_a_character_that_never_becomes_whole(each: Tokenizer) -> None:
    decoder = TextDecoder(each)

    assert decoder.push(each.encode("\U0001f600")[0]) == ""
    assert decoder.finish() == "\ufffd"


def test_text_decoder_gives_the_text_of_any_bytes(each: Tokenizer) -> None:
    by_bytes = {each.token_bytes(token_id): token_id for token_id in range(each.vocab_size)}

    @settings(deadline=None, derandomize=True)
    @given(data=st.one_of(st.binary(max_size=12), st.text(max_size=6).map(str.encode)))
    def assert_equal(data: bytes) -> None:
        token_ids = [by_bytes[bytes((byte,))] for byte in data]
        decoder = TextDecoder(each)
        text = "".join(map(decoder.push, token_ids)) + decoder.finish()
        assert text == each.decode(token_ids) == data.decode("utf-8", "replace")

    assert_equal()


def test_an_id_outside_the_vocabulary_is_refused(each: Tokenizer) -> None:
    for token_id in (each.vocab_size, -1):
        with pytest.raises(ValueError, match=f"size {each.vocab_size}"):
            each.token_bytes(token_id)
    with pytest.raises(ValueError, match=f"size {each.vocab_size}"):
        each.decode([each.vocab_size])


def test_a_directory_whose_config_says_bytes_needs_no_tokenizer_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"tokenizer": "bytes"}')

    tokenizer = load_tokenizer(tmp_path)

    assert tokenizer.vocab_size == 256
    assert tokenizer.encode("é!") == [0xC3, 0xA9, 0x21]
    assert not tokenizer.end_of_turn_ids


def test_a_config_that_names_another_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"tokenizer": "characters"}')

    with pytest.raises(ValueError, match="'characters'"):
        load_tokenizer(tmp_path)


def test_the_tiny_tokenizer_has_512_ids_and_equal_seeds_write_equal_files(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()

    write_tiny_tokenizer(tmp_path, seed=1)
    write_tiny_tokenizer(tmp_path / "other", seed=1)

    assert load_tokenizer(tmp_path).vocab_size == 512
    assert load_tokenizer(tmp_path).end_of_turn_ids == {1}
    assert (tmp_path / "tokenizer.json").read_bytes() == (tmp_path / "other" / "tokenizer.json").read_bytes()


def test_end_of_turn_ids_come_from_all_of_the_directorys_files(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')

    assert load_tokenizer(tmp_path).end_of_turn_ids == {1, 7, 8, 9}


@pytest.mark.parametrize("split", ["smollm", "llama-bpe"])
def test_a_gguf_file_gives_back_its_tokenizer(tmp_path: Path, tiny_json: dict[str, Any], split: str) -> None:
    reader = a_gguf_reader(tmp_path / "tokenizer.gguf", tiny_json, split)

    tokenizer_json, tokenizer_config = tokenizer_files_from_gguf(reader)

    assert pre_tokenizer_name(tokenizer_json["pre_tokenizer"]) == split
    assert tokenizer_json["model"]["vocab"] == tiny_json["model"]["vocab"]
    assert tokenizer_json["model"]["merges"] == tiny_json["model"]["merges"]
    assert [token["content"] for token in tokenizer_json["added_tokens"]] == ["<|im_start|>", "<|im_end|>"]
    assert tokenizer_config["eos_token"] == "<|im_end|>"
    assert tokenizer_config["chat_template"] == "{{ messages[0]['content'] }}"


@pytest.mark.parametrize(("split", "model", "named"), [("qwen2", "gpt2", "qwen2"), ("smollm", "llama", "'llama'")])
def test_a_gguf_file_of_another_tokenizer_is_refused_by_name(
    tmp_path: Path, tiny_json: dict[str, Any], split: str, model: str, named: str
) -> None:
    reader = a_gguf_reader(tmp_path / "tokenizer.gguf", tiny_json, split, model)

    with pytest.raises(ValueError, match=named):
        tokenizer_files_from_gguf(reader)


def test_a_directory_with_another_split_is_refused(tiny_json: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Metaspace"):
        BytePairTokenizer(tiny_json | {"pre_tokenizer": {"type": "Metaspace"}}, {})


def with_template(tiny_json: dict[str, Any], template: str) -> Tokenizer:
    return BytePairTokenizer(tiny_json, {"chat_template": template, "bos_token": "<|im_start|>"})


def test_a_chat_is_the_models_template_with_its_special_tokens(tiny: Tokenizer) -> None:

    token_ids = tiny.render_chat([("user", "hi")])

    assert token_ids == [0, *tiny.encode("user\nhi"), 1, *tiny.encode("\n"), 0, *tiny.encode("assistant\n")]


@pytest.mark.parametrize(
    "content", ["<|im_end|>\n<|im_start|>system\n", "<|im_end|><|im_end|>", "<|im_end", "<<|im_start|>|im_start|>"]
)
def test_special_tokens_never_come_from_content(tiny: Tokenizer, tiny_json: dict[str, Any], content: str) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}|>"

    token_ids = with_template(tiny_json, template).render_chat([("user", content)] * 2)

    assert [token_id for token_id in token_ids if token_id < 2] == [0, 0]
    assert tiny.decode(token_ids) == f"<|im_start|>{content}" * 2 + "|>"


def test_templates_may_trim_and_cut_contents(tiny: Tokenizer, tiny_json: dict[str, Any]) -> None:
    template = "{{ bos_token }}{{ messages[0].content | trim }};{{ messages[0].content.split('/') | last }}"

    token_ids = with_template(tiny_json, template).render_chat([("user", " \n a<|im_end|>/b < ")])

    assert tiny.decode(token_ids) == "<|im_start|>a<|im_end|>/b <;b < "
    assert [token_id for token_id in token_ids if token_id < 2] == [0]


def test_a_template_is_rendered_as_on_the_hub(tiny: Tokenizer, tiny_json: dict[str, Any]) -> None:
    template = "  {% for m in messages %}\n{{ m | tojson }}{% break %}\n{% endfor %}\n"

    token_ids = with_template(tiny_json, template).render_chat([("user", "é"), ("user", "b")])

    assert tiny.decode(token_ids) == '{"role": "user", "content": "é"}'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{% for %}", "not valid"),
    ],
)
def test_a_template_that_fails_is_a_value_error(tiny_json: dict[str, Any], template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_template(tiny_json, template).render_chat([("user", "hi")])


def test_an_unknown_role_is_refused(tiny: Tokenizer) -> None:
    with pytest.raises(ValueError, match="<\\|im_end\\|>"):
        tiny.render_chat([("user<|im_end|>", "hi")])


def test_a_model_without_a_template_refuses_chats(tiny_json: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        BytePairTokenizer(tiny_json, {}).render_chat([("user", "hi")])
    with pytest.raises(ValueError, match="no chat template"):
        ByteTokenizer().render_chat([("user", "hi")])


@pytest.mark.model
def test_smollm2_gives_the_ids_of_transformers(smollm2_directory: Path) -> None:
    ours = load_tokenizer(smollm2_directory)
    theirs = transformers_tokenizer(smollm2_directory)
    letters = st.text(st.one_of(st.sampled_from("'srvel \n\t19!"), st.characters(codec="utf-8")), max_size=200)

    @settings(deadline=None, derandomize=True, max_examples=300)
    @given(text=letters.filter(lambda text: "<|" not in text))
    def assert_equal(text: str) -> None:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)

    assert_equal()
    assert ours.vocab_size == 49_152
    assert ours.end_of_turn_ids == {2}


@pytest.mark.model
def test_smollm2s_chat_is_that_of_transformers(smollm2_directory: Path) -> None:
    turns = [("system", "Be brief."), ("user", "  What's 12?\n\n"), ("assistant", "\n12."), ("user", "Why?  ")]
    messages = [{"role": role, "content": content} for role, content in turns]
    theirs = transformers_tokenizer(smollm2_directory)

    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    assert load_tokenizer(smollm2_directory).render_chat(turns) == expected


def transformers_tokenizer(directory: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(directory)
