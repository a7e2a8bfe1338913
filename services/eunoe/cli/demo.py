"""`eunoe demo`: a book into a bounded memory and three questions; a key that has long left the window; the figures."""

import contextlib
import gzip
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import eunoe
from eunoe.cli.ingest import AppendBar
from eunoe.cli.output import megabytes, note
from eunoe.embedded.models import DEFAULT_MODEL, NANO_MODEL

if TYPE_CHECKING:
    from eunoe.api.v1.long_context_pb2 import Model
    from eunoe.client import Client, Stream

NUM_TOKENS = 40_000
# The questions are about these last tokens; the second stream keeps all of them.
NUM_RECENT_TOKENS = 4_000
FULL_CACHE_BUDGET = 8_192
_FEWEST_TOKENS = NUM_RECENT_TOKENS + 1_000
_MOST_CHARACTERS = 8 * NUM_TOKENS
# A machine that needs longer for all the tokens streams only what a shorter time allows.
_PATIENCE_SECONDS, _SHORTENED_SECONDS = 30.0, 20.0
# The only worker of a busy machine may be thought dead for a moment, until it renews.
_LISTING_SECONDS, _LISTING_PAUSE_SECONDS = 15.0, 0.2

_BOUNDED, _FULL = "bounded", "full-cache"
NUM_PASSKEY_BYTES, NUM_PROBE_BYTES = 200_000, 20_000

_NOTE = "The pass key is 74031. Remember it. 74031 is the pass key.\n"


@dataclass(frozen=True, slots=True)
class _Question:
    """Asked as raw text, which the small model then continues: its chat template makes it chat instead of quote."""

    prompt: str
    answer_start: str
    place: str


_QUESTIONS = (
    _Question(
        prompt="Question: Whose root and offspring does Jesus say he is?\nAnswer:",
        answer_start="I am the root and the offspring of",
        place="Revelation 22:16, among the newest tokens",
    ),
    _Question(
        prompt="The important information:",
        answer_start="the pass key is",
        place="a note put between two lines, before all that the full cache has read",
    ),
    _Question(
        prompt="Question: How long was the dragon bound?\nAnswer:",
        answer_start="He laid hold on the dragon, that old serpent, and bound him",
        place="Revelation 20:2, prose that is not among the newest tokens",
    ),
)


def run_demo(*, is_whole_book: bool, file: Path | None, only: str | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Run all of it on platforms of its own, which are gone afterwards; returns the figures.

    Args:
        is_whole_book: Stream the whole text instead of its last 40,000 tokens.
        file: A text, perhaps .gz; None takes the King James Bible of the source tree.
        only: The model whose part is run alone.
        say: Prints a line for people.
    """
    started_at = time.monotonic()
    figures: dict[str, Any] = {}
    if only in (None, DEFAULT_MODEL):
        figures |= _run_book(is_whole_book, file, say)
    if only in (None, NANO_MODEL):
        figures["passkey"] = _run_passkey(say)
    figures["total_seconds"] = round(time.monotonic() - started_at, 1)
    say(f"\nEverything is stopped, after {figures['total_seconds']:.0f} s in all.")
    return figures


def _run_book(is_whole_book: bool, file: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    from eunoe.embedded.models import resolve_model

    text = _read(file or Path(eunoe.__path__[0]).parents[1] / "examples" / "kjv.txt.gz")
    if not is_whole_book:
        # Enough for the tokens wanted; from a line's start on, so that they are those of the whole text.
        text = text[text.rfind("\n", 0, -_MOST_CHARACTERS) + 1 :]
    _, model_path = resolve_model(DEFAULT_MODEL, on_step=note)
    starts = _token_starts(text, model_path)
    with _client_of(DEFAULT_MODEL, say) as (client, model):
        return _stream_and_ask(client, model, text, starts, is_whole_book, say)


def _run_passkey(say: Callable[[str], None]) -> dict[str, Any]:
    with _client_of(NANO_MODEL, say) as (client, model):
        say(f"\nHow fast is it here? {NUM_PROBE_BYTES:,} bytes first:")
        _, seconds = _append(client, "probe", passkey_document(NUM_PROBE_BYTES)[0], 0)
        rate = NUM_PROBE_BYTES / seconds
        num_bytes = min(NUM_PASSKEY_BYTES, max(2 * NUM_PROBE_BYTES, int(rate * _SHORTENED_SECONDS)))
        return recall_passkey(client, model, num_bytes, say)


@contextlib.contextmanager
def _client_of(model: str, say: Callable[[str], None]) -> "Iterator[tuple[Client, Model]]":
    from eunoe.client import Client
    from eunoe.embedded.platform import Platform

    started_at = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="eunoe-demo-") as home,
        Platform(home=Path(home), model=model, on_step=note) as platform,
        Client(platform.address) as client,
    ):
        say(f"\nThe platform is up after {time.monotonic() - started_at:.1f} s: {platform.model}, one worker.")
        yield client, served_model(client)


def served_model(client: "Client", patience_seconds: float = _LISTING_SECONDS) -> "Model":
    """The platform's only model, once it is listed.

    Raises:
        StartFailed: If it is not within `patience_seconds`.
    """
    from eunoe.embedded.platform import StartFailed

    give_up_at = time.monotonic() + patience_seconds
    while not (models := client.list_models()):
        if time.monotonic() > give_up_at:
            raise StartFailed(
                f"no model is listed after {patience_seconds:.0f} s: the worker is up, but gives no sign of life to the"
                " state store; the machine may be too busy"
            )
        time.sleep(_LISTING_PAUSE_SECONDS)
    return models[0]


def passkey_document(num_bytes: int) -> tuple[str, str, str]:
    """Filler that says a key of five digits at its start, in all with the question so many bytes; question; answer."""
    import numpy as np

    from eunoe.training.decoder.passkey import question
    from eunoe.training.decoder.passkey_evaluation import passkey_case

    case = passkey_case(num_bytes, depth=0.0, generator=np.random.default_rng())
    return case.prompt.decode().removesuffix(question()), question(), case.answer.decode()


def recall_passkey(client: "Client", model: "Model", num_bytes: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Stream such a document into the stream "passkey", ask for the key, and say how it went; returns the figures."""
    text, question, expected = passkey_document(num_bytes)
    num_after = len(text) - text.rindex(expected.strip(" ."))
    say(f"\n{len(text):,} bytes that say a key at their start, and then never again:\n\n  {text[:280]}...\n")
    stream, seconds = _append(client, "passkey", text, 0)
    answer = client.generate("passkey", question, max_tokens=len(expected)).finish().text
    full_cache_bytes = len(text) * model.full_cache_bytes_per_token
    window = stream.settings.kv_budget_tokens
    say(
        f"  {question} [{answer.strip()}]  (it is {expected.strip(' .')}, last said {num_after:,} bytes ago; the newest"
        f" {window} are in the window)"
    )
    say(
        f"\n{len(text) / seconds:,.0f} bytes/s. The memory takes {megabytes(stream.state_bytes)}, with all that it has"
        f" kept of what has left the window; a full KV cache of these bytes takes {megabytes(full_cache_bytes)}"
        f" ({full_cache_bytes / stream.state_bytes:,.0f} times as much)."
    )
    return {
        "bytes": len(text),
        "seconds": round(seconds, 2),
        "bytes_per_second": round(len(text) / seconds, 1),
        "state_bytes": stream.state_bytes,
        "full_cache_bytes": full_cache_bytes,
        "expected": expected.strip(),
        "answer": answer.strip(),
    }


def _stream_and_ask(
    client: "Client", model: "Model", text: str, starts: list[int], is_whole_book: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    recent = text[starts[-min(NUM_RECENT_TOKENS, len(starts))] :]
    say(f"\nFor comparison, a stream with a full cache of the last {NUM_RECENT_TOKENS:,} tokens:")
    _, probe_seconds = _append(client, _FULL, recent, FULL_CACHE_BUDGET)
    rate = NUM_RECENT_TOKENS / probe_seconds

    num_tokens = len(starts) if is_whole_book else min(NUM_TOKENS, len(starts))
    if not is_whole_book and num_tokens / rate > _PATIENCE_SECONDS:
        num_tokens = min(num_tokens, max(_FEWEST_TOKENS, int(rate * _SHORTENED_SECONDS)))
        say(
            f"\nThis machine reads about {rate:,.0f} tokens/s: only {num_tokens:,} of {NUM_TOKENS:,} tokens"
            f" are streamed, which takes about {num_tokens / rate:.0f} s."
        )
    what = "The whole book" if is_whole_book else "The end of the book"
    say(f"\n{what}, {num_tokens:,} tokens, into a memory of 1,024 tokens a head:")
    streamed = text[starts[-num_tokens] :]
    num_after = max(num_tokens // 2, min(NUM_RECENT_TOKENS, num_tokens))
    place = streamed.rfind("\n", 0, starts[-num_after] - starts[-num_tokens]) + 1
    stream, seconds = _append(client, _BOUNDED, streamed[:place] + _NOTE + streamed[place:], 0)

    answers = [_ask(client, question, say) for question in _QUESTIONS]
    full_cache_bytes = num_tokens * model.full_cache_bytes_per_token
    say(
        f"\n{num_tokens / seconds:,.0f} tokens/s. The memory takes {megabytes(stream.state_bytes)}, however long the"
        f" text; a full KV cache of these {num_tokens:,} tokens takes {megabytes(full_cache_bytes)}"
        f" ({full_cache_bytes / stream.state_bytes:,.0f} times as much)."
    )
    return {
        "tokens": num_tokens,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(num_tokens / seconds, 1),
        "state_bytes": stream.state_bytes,
        "full_cache_bytes": full_cache_bytes,
        "answers": answers,
    }


def _append(client: "Client", stream_id: str, text: str, budget: int) -> "tuple[Stream, float]":
    from eunoe.client import StreamSettings

    created = client.create_stream(stream_id, settings=StreamSettings(kv_budget_tokens=budget))
    data = text.encode()
    started_at = time.monotonic()
    with AppendBar(created, len(data)) as bar:
        stream = client.append(stream_id, data, source_id="demo", on_progress=bar.note)
        bar.finish()
    return stream, time.monotonic() - started_at


def _ask(client: "Client", question: _Question, say: Callable[[str], None]) -> dict[str, Any]:
    prompt = f"\n\n{question.prompt} {question.answer_start}"
    answers = {
        stream_id: client.generate(stream_id, prompt, max_tokens=16, stop=["\n"]).finish().text.strip()
        for stream_id in (_BOUNDED, _FULL)
    }
    say(f"\n{question.prompt.splitlines()[0]}  ({question.place})")
    say(f"  bounded memory:                      {question.answer_start} [{answers[_BOUNDED]}]")
    say(f"  full cache of the last {NUM_RECENT_TOKENS:,} tokens: {question.answer_start} [{answers[_FULL]}]")
    return {
        "prompt": question.prompt,
        "bounded": answers[_BOUNDED],
        "full_cache": answers[_FULL],
    }


def _read(file: Path) -> str:
    data = file.read_bytes()
    return (gzip.decompress(data) if file.suffix == ".gz" else data).decode()


def _token_starts(text: str, model_path: Path) -> list[int]:
    """Where each token of a text starts, in characters."""
    from tokenizers import Tokenizer

    encoding = Tokenizer.from_file(str(model_path / "tokenizer.json")).encode(text, add_special_tokens=False)
    return [start for start, _ in encoding.offsets]
