"""The whole platform with the model of our own: what has left the window is recalled."""

from collections.abc import Iterator

import pytest

from eunoe.cli.demo import recall_passkey
from eunoe.client import Client, InvalidRequest
from eunoe.embedded.models import ModelUnavailable, resolve_model
from eunoe.embedded.platform import Platform


@pytest.fixture(scope="module")
def nano_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    try:
        resolve_model("eunoe-nano")
    except ModelUnavailable as error:
        pytest.skip(str(error))
    with (
        Platform(home=tmp_path_factory.mktemp("nano"), model="eunoe-nano") as platform,
        Client(platform.address) as client,
    ):
        yield client


def test_the_demo_recalls_a_key_that_has_long_left_the_window(nano_client: Client) -> None:
    said: list[str] = []

    figures = recall_passkey(nano_client, nano_client.list_models()[0], 10_000, said.append)

    assert figures["answer"] == figures["expected"]
    assert any(f"[{figures['answer']}]" in line for line in said)
    assert figures["bytes"] > 50 * nano_client.get_stream("passkey").settings.kv_budget_tokens


def test_its_memory_stays_below_a_megabyte_and_has_no_sinks(nano_client: Client) -> None:
    stream = nano_client.create_stream("small")

    (model,) = nano_client.list_models()

    assert 0 < model.default_state_bytes < 1_000_000
    assert stream.settings == model.default_settings
    assert stream.settings.num_sink_tokens == 0


def test_a_chat_is_refused_with_the_reason(nano_client: Client) -> None:
    nano_client.append("small", "The grass is green. " * 10)

    with pytest.raises(InvalidRequest, match="no chat template"):
        nano_client.ask("small", "What is green?")


def test_a_text_in_another_script_goes_in_and_what_is_no_utf_8_comes_out_marked(nano_client: Client) -> None:
    nano_client.create_stream("bytes")
    nano_client.append("bytes", "Die Gräser sind grün. 草は緑です。" * 10)

    # So hot that about every byte is as likely as any other.
    answer = nano_client.generate("bytes", "草", max_tokens=100, temperature=10.0, seed=1).finish()

    assert (answer.num_prompt_tokens, answer.num_answer_tokens) == (3, 100)
    assert "\ufffd" in answer.text


def test_inspection_shows_the_newest_bytes(nano_client: Client) -> None:
    nano_client.append("small", "The sky is blue. " * 20)

    memory = nano_client.inspect_memory("small", with_log=True)

    newest = b"".join(memory.log.pieces)[-memory.stream.settings.kv_budget_tokens :]
    assert all("".join(head.texts).encode() == newest for head in memory.heads)
    assert len(memory.heads) == 16
