"""The `eunoe` command on a running platform."""

import gzip
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eunoe.client import Client
from eunoe.embedded.platform import Platform

Run = Callable[..., Any]

TEXT = ("In the beginning was a tiny model, and it knew next to nothing. " * 300).encode()


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file."""
    path = tmp_path_factory.mktemp("books") / "book.txt"
    path.write_bytes(TEXT)
    return path


@pytest.fixture(scope="module")
def read_book(client: Client) -> str:
    """The id of a stream that has read the text."""
    client.create_stream("read")
    client.append("read", TEXT)
    return "read"


def test_ingest_makes_the_stream_and_reads_the_file(eunoe: Run, book: Path) -> None:
    done = eunoe("ingest", str(book), "--stream", "ingested", "--json")
    assert done.code == 0, done.error
    assert done.json["sent_bytes"] == done.json["stream"]["accepted_offset"] == len(TEXT)
    stream = eunoe("stream", "ingested", "--json").json
    expected = {"accepted_offset", "applied_offset", "tokens", "state_bytes", "state_digest", "model", "policy"}
    assert expected <= stream.keys()
    assert stream == done.json["stream"]


def test_ingest_goes_on_where_a_broken_one_stopped_whatever_came_between(
    eunoe: Run, client: Client, book: Path, tmp_path: Path
) -> None:
    source_id = f"sha256:{hashlib.sha256(TEXT).hexdigest()}"
    client.create_stream("broken")
    client.append("broken", TEXT[:5000], source_id=source_id, finish=False)
    client.append("broken", "Somebody else was here. ", finish=False)
    packed = tmp_path / "book.txt.gz"
    packed.write_bytes(gzip.compress(TEXT))
    done = eunoe("ingest", str(packed), "--stream", "broken", "--json")
    assert done.code == 0, done.error
    assert done.json["sent_bytes"] == len(TEXT) - 5000
    again = eunoe("ingest", str(book), "--stream", "broken")
    assert "had 19,200 bytes of this file already" in again.output


def test_ingest_reads_standard_input(eunoe: Run) -> None:
    done = eunoe("ingest", "-", "--stream", "piped", "--json", text="Überfluß")
    assert done.json["stream"]["accepted_offset"] == len("Überfluß".encode())
    assert "each question reads them first" in eunoe("ingest", "-", "--stream", "piped", text=" und mehr").output


def test_ask_prints_the_answer_alone_on_standard_output(eunoe: Run, read_book: str) -> None:
    arguments = ["ask", read_book, "What was in the beginning?", "--max-tokens", "6"]
    summary = eunoe(*arguments, "--json").json
    assert summary["finish_reason"] in ("length", "end_of_turn")
    plain = subprocess.run(
        [sys.executable, "-m", "eunoe.cli.main", *arguments], capture_output=True, text=True, check=True
    )
    assert plain.stdout == f"{summary['text']}\n"
    assert "tokens/s" in plain.stderr


def test_ask_raw_continues_the_text(eunoe: Run, read_book: str) -> None:
    chat = eunoe("ask", read_book, "In the", "--max-tokens", "2", "--json").json
    raw = eunoe("ask", read_book, "In the", "--max-tokens", "2", "--raw", "--json").json
    assert raw["num_prompt_tokens"] < chat["num_prompt_tokens"]


def test_streams_prints_one_json_object_a_line(eunoe: Run, read_book: str) -> None:
    names = [each["name"] for each in eunoe("streams", "--json").json_lines]
    assert f"tenants/default/streams/{read_book}" in names
    assert names == sorted(names)
    assert read_book in eunoe("streams").output


def test_fork_export_import_and_rm(eunoe: Run, read_book: str, tmp_path: Path) -> None:
    digest = eunoe("stream", read_book, "--json").json["state_digest"]
    assert eunoe("fork", read_book, "forked", "--json").json["state_digest"] == digest
    exported = eunoe("export", "forked", str(tmp_path / "file"), "--json").json
    assert exported["bytes"] == (tmp_path / "file").stat().st_size
    assert eunoe("import", str(tmp_path / "file"), "back", "--json").json["state_digest"] == digest
    assert eunoe("rm", "forked").code == 0
    assert eunoe("stream", "forked").code == 3
    assert eunoe("rm", "back", "--erase", "--json").json["receipt"]["num_values_removed"] > 0


def test_rebuild_reads_the_log_anew(eunoe: Run, client: Client, read_book: str, tmp_path: Path) -> None:
    rebuilt = eunoe("rebuild", read_book, "rebuilt", "--model", "tiny", "--json")
    assert (rebuilt.json["accepted_offset"], rebuilt.json["tokens"]) == (len(TEXT), 0)
    assert "reads 19,200 bytes" in rebuilt.error
    digest = client.append("rebuilt", b"").state_digest
    assert digest == client.get_stream(read_book).state_digest

    client.export_stream(read_book, tmp_path / "file")
    client.import_stream((tmp_path / "file").read_bytes(), "without-its-beginning")
    refused = eunoe("rebuild", "without-its-beginning", "x", "--model", "tiny")
    assert (refused.code, refused.output, refused.error.count("\n")) == (1, "", 1)
    assert "OFFSET_UNAVAILABLE" in refused.error
    assert "retain_log=true" in refused.error
    assert eunoe("rebuild", read_book, "x", "--model", "nobody").code == 3


def test_inspect_shows_the_text_and_what_of_it_is_kept(eunoe: Run, read_book: str) -> None:
    shown = eunoe("inspect", read_book, "--width", "60")
    assert shown.output.startswith("text all heads keep it, {most: text}")
    _, _, text = shown.output.partition("\n\n")
    assert text.startswith(("[0-3] ", "[0-99] "))
    assert "tokens are gone" in text or "[-" in text
    assert max(map(len, shown.output.splitlines())) <= 60
    lines = eunoe("inspect", read_book, "--layer", "0", "--head", "1", "--json").json_lines
    assert lines[0]["stream"]["name"].endswith(read_book)
    (head,) = (line["head"] for line in lines if "head" in line)
    assert (head["layer"], head["head"]) == (0, 1)
    tokens = [line["token"] for line in lines if "token" in line]
    assert [token["position"] for token in tokens if token["num_keeping"]] == head["positions"]
    assert tokens[-1]["position"] == lines[0]["stream"]["tokens"] - 1
    assert eunoe("inspect", read_book, "--layer", "9").error.startswith("error: Invalid value: layers are 0 to 1")


def test_score_models_and_usage(eunoe: Run, read_book: str) -> None:
    score = eunoe("score", read_book, "a tiny model", "--json").json
    assert score["log_prob"] == pytest.approx(sum(score["log_probs"]))
    (model,) = eunoe("models", "--json").json_lines
    assert (model["name"], model["num_workers"]) == ("tiny", 2)
    assert eunoe("usage", "--json").json["tenant"] == "default"


def test_a_key_is_made_listed_used_and_revoked(eunoe: Run) -> None:
    created = eunoe("keys", "create", "other-tenant", "--label", "test", "--json").json
    (listed,) = eunoe("keys", "list", "--tenant", "other-tenant", "--json").json_lines
    assert listed["key_id"] == created["key"]["key_id"]
    usage = eunoe("--api-key", created["secret"], "usage", "--json")
    assert usage.json["tenant"] == "other-tenant"
    assert eunoe("keys", "revoke", listed["key_id"]).code == 0
    assert eunoe("keys", "list", "--tenant", "other-tenant", "--json").json_lines == []
    assert eunoe("keys", "revoke", "nobody").code == 3


def test_up_on_a_running_platform_says_so(eunoe: Run, platform: Platform) -> None:
    assert eunoe("up", "--json").json == {"address": platform.address, "was_running": True}
    status = eunoe("status", "--json")
    assert status.code == 0
    assert status.json["is_running"]
    names = [process["name"] for process in status.json["processes"]]
    assert names == ["redis", "state_store", "eviction_sidecar", "ray_host", "gateway"]


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["stream", "nothing"], 3, "STREAM_NOT_FOUND"),
        (["ask", "nothing", "Who?"], 3, "STREAM_NOT_FOUND"),
        (["ask", "read", "Who?", "--top-p", "2"], 2, "--top-p"),
        (["ask", "read", "long " * 3000], 2, "PROMPT_TOO_LONG"),
        (["ingest", "/nowhere/book.txt", "--stream", "x"], 2, "No such file"),
        (["import", __file__, "x"], 2, "BAD_EXPORT"),
        (["fork", "read", "y", "--at", "7"], 1, "OFFSET_UNAVAILABLE"),
        (["fork", "read", "read"], 1, "ALREADY_EXISTS"),
        (["ingest", __file__, "--stream", "bad name"], 2, "INVALID_REQUEST"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else str(value),
)
def test_an_error_is_one_line_with_its_reason(
    eunoe: Run, read_book: str, arguments: list[str], code: int, reason: str
) -> None:
    done = eunoe(*arguments)
    assert (done.code, done.output) == (code, "")
    assert done.error.count("\n") == 1
    assert reason in done.error


def test_bytes_that_are_no_text_are_refused_and_lose_nothing(eunoe: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"good \xff\xfe")
    done = eunoe("ingest", str(tmp_path / "file"), "--stream", "no-text", "--json")
    assert done.code == 2
    assert "INVALID_UTF8" in done.error
    assert json.loads(eunoe("stream", "no-text", "--json").output)["accepted_offset"] == 0


def test_verify_folds_a_stream_anew(eunoe: Run, read_book: str) -> None:
    done = eunoe("verify", read_book, "--json")
    stream = eunoe("stream", read_book, "--json").json
    assert done.code == 0, done.error
    assert done.json["verdict"] == "verified"
    assert done.json["to_offset"] == stream["applied_offset"]
    assert eunoe("verify", read_book).output.startswith(f"{read_book}: VERIFIED\n")
    assert eunoe("verify", "nobody").code == 3
