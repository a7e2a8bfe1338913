import pytest

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.decoder.tokenizer import Tokenizer
from eunoe.model_worker.answer import Answer


def byte_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token a byte, so that tests decide where tokens end."""
    by_bytes = {tokenizer.token_bytes(token_id): token_id for token_id in range(tokenizer.vocab_size)}
    return [by_bytes[bytes([byte])] for byte in text.encode()]


def pushed(answer: Answer, token_ids: list[int]) -> list[api.GeneratedTokens]:
    sent = []
    for token_id in token_ids:
        if not answer.is_stopped and (tokens := answer.push(token_id, -1.0)) is not None:
            sent.append(tokens)
    if not answer.is_stopped and (tokens := answer.finish()) is not None:
        sent.append(tokens)
    return sent


def text_of(sent: list[api.GeneratedTokens]) -> str:
    return "".join(tokens.text for tokens in sent)


def test_without_stop_texts_every_token_is_sent_at_once(tokenizer: Tokenizer) -> None:
    sent = pushed(Answer(tokenizer, []), byte_ids(tokenizer, "abc"))
    assert [tokens.text for tokens in sent] == ["a", "b", "c"]


def test_text_is_sent_in_whole_characters(tokenizer: Tokenizer) -> None:
    sent = pushed(Answer(tokenizer, []), byte_ids(tokenizer, "aé€"))
    assert text_of(sent) == "aé€"
    assert all("\ufffd" not in tokens.text for tokens in sent)


def test_the_answer_ends_before_the_stop_text(tokenizer: Tokenizer) -> None:
    answer = Answer(tokenizer, ["END"])
    sent = pushed(answer, byte_ids(tokenizer, "one ENtwo END three"))
    assert answer.is_stopped
    assert text_of(sent) == answer.text == "one ENtwo "
    assert [token_id for tokens in sent for token_id in tokens.token_ids] == byte_ids(tokenizer, "one ENtwo ")


def test_what_may_begin_a_stop_text_is_held_back_until_it_does_not(tokenizer: Tokenizer) -> None:
    answer = Answer(tokenizer, ["xyz"])
    for token_id in byte_ids(tokenizer, "xy"):
        assert answer.push(token_id, -1.0) is None
    tokens = answer.push(*byte_ids(tokenizer, "a"), -1.0)
    assert tokens is not None
    assert tokens.text == "xya"


def test_held_back_text_is_sent_at_the_end(tokenizer: Tokenizer) -> None:
    answer = Answer(tokenizer, ["xyz"])
    assert text_of(pushed(answer, byte_ids(tokenizer, "axy"))) == "axy"


def test_the_first_of_several_stop_texts_counts(tokenizer: Tokenizer) -> None:
    answer = Answer(tokenizer, ["cd", "b"])
    pushed(answer, byte_ids(tokenizer, "abcd"))
    assert answer.text == "a"


def test_a_token_cut_by_a_stop_text_is_remembered_as_its_part(tokenizer: Tokenizer) -> None:
    token_id = next(i for i in range(2, tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) >= 3)
    whole = tokenizer.token_bytes(token_id).decode()
    answer = Answer(tokenizer, [whole[2:]])
    sent = pushed(answer, [token_id])
    assert text_of(sent) == answer.text == whole[:2]
    assert answer.token_ids == []
    assert tokenizer.decode(answer.remembered_ids()) == whole[:2]


@pytest.mark.parametrize("stop_texts", [["a"] * 9, [""], ["x" * 65]])
def test_bad_stop_texts_are_refused(tokenizer: Tokenizer, stop_texts: list[str]) -> None:
    with pytest.raises(ValueError, match="stop text"):
        Answer(tokenizer, stop_texts)
