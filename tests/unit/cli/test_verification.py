"""What `eunoe verify` tells people."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from eunoe.cli import verification
from eunoe.cli.verification import EXIT_DIFFERENT, EXIT_UNVERIFIABLE, described
from eunoe.client import Difference, Missing, VerifySummary

VERIFIED = VerifySummary(
    verdict="VERDICT_VERIFIED",
    from_offset=10,
    to_offset=9010,
    tokens_folded=2048,
    num_checkpoints=3,
    log_bytes_checked=9100,
)
DIFFERENT = VerifySummary(
    verdict="VERDICT_DIFFERENT",
    difference=Difference(part="VERIFIED_PART_MEMORY", offset=4000, recorded="aa", found="bb", message="another"),
)
UNVERIFIABLE = VerifySummary(
    verdict="VERDICT_UNVERIFIABLE",
    missing=[
        Missing(kind="MISSING_KIND_NUMERICS", recorded="torch-1", available="torch-2", first_segment=1200),
        Missing(kind="MISSING_KIND_RECORD_FORMAT", recorded="3", available="2"),
        Missing(kind="MISSING_KIND_POLICY"),
    ],
)


def test_a_verified_stream_is_told_with_what_was_compared() -> None:
    assert described("book", VERIFIED).splitlines() == [
        "book: VERIFIED",
        "  the log's chain over 9,100 bytes, and that of the commits",
        "  3 checkpoints as stored, and as folded anew: 2,048 tokens, offset 10 to 9,010",
    ]


def test_where_nothing_was_folded_it_says_so() -> None:
    summary = VerifySummary(verdict="VERDICT_VERIFIED", num_checkpoints=1)

    assert described("book", summary).splitlines()[2].startswith("  1 checkpoint as stored; nothing was folded")


def test_a_stream_without_a_checkpoint_is_told_as_such() -> None:
    summary = VerifySummary(verdict="VERDICT_VERIFIED", log_bytes_checked=9)

    assert described("book", summary).splitlines()[2] == "  there is no checkpoint yet, so nothing was folded"


def test_a_difference_is_told_with_its_place_and_both_digests() -> None:
    assert described("book", DIFFERENT).splitlines() == [
        "book: DIFFERENT",
        "  memory at offset 4,000: another",
        "  recorded aa",
        "  found    bb",
    ]


def test_what_is_missing_is_told_with_what_is_here() -> None:
    assert described("book", UNVERIFIABLE).splitlines() == [
        "book: UNVERIFIABLE",
        "  numerics (from segment 1,200 on): torch-1",
        "    here: torch-2",
        "  record format: 3",
        "    here: 2",
        "  policy (from segment 0 on): no longer recorded",
        "    here: none",
    ]


@pytest.mark.parametrize("json_output", [False, True])
@pytest.mark.parametrize(
    ("summary", "code"), [(VERIFIED, 0), (DIFFERENT, EXIT_DIFFERENT), (UNVERIFIABLE, EXIT_UNVERIFIABLE)]
)
def test_each_verdict_has_an_exit_code_of_its_own(
    monkeypatch: pytest.MonkeyPatch, summary: VerifySummary, code: int, json_output: bool
) -> None:
    class Client:
        def verify_stream(self, name: str, on_progress: Any) -> VerifySummary:
            return summary

    @contextlib.contextmanager
    def open_client(_: Any) -> Iterator[Client]:
        yield Client()

    monkeypatch.setattr(verification, "open_client", open_client)
    context: Any = None
    try:
        verification.verify(context, "book", json_output)
        exit_code = 0
    except typer.Exit as end:
        exit_code = end.exit_code

    assert exit_code == code
