"""`eunoe ingest`: a file into a stream, resuming where a broken one stopped."""

import asyncio
import contextlib
import gzip
import hashlib
import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, cast

import typer

from eunoe.cli.connect import open_async_client
from eunoe.cli.output import JsonOption, megabytes, note, print_json, to_json

if TYPE_CHECKING:
    from eunoe.client import AppendProgress, AsyncClient, Stream

_DIGEST_PIECE_BYTES = 1 << 20
_TOKENS_POLL_SECONDS = 1.0


def ingest(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="UTF-8 text; .gz is unpacked; - is standard input.")],
    stream: Annotated[str, typer.Option("--stream", "-s", help="Where to; made if it is not there.")],
    model: Annotated[str, typer.Option(help="Model of a stream that is made; default: the only one served.")] = "",
    budget: Annotated[int | None, typer.Option(min=1, help="KV budget in tokens of a stream that is made.")] = None,
    retain_log: Annotated[
        bool, typer.Option("--retain-log", help="Of a stream that is made: keep its whole log.")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Append a file to a stream and wait until it is read.

    A file goes in once: the same one again goes on where it stopped, whatever was appended in between.
    """
    with contextlib.ExitStack() as stack:
        if file == "-":
            source: IO[bytes] = sys.stdin.buffer
            source_id, num_bytes = "", None
        else:
            source = stack.enter_context(_open(Path(file)))
            source_id, num_bytes = _digest(source)
        try:
            result = asyncio.run(_ingest(context, stream, source, source_id, num_bytes, model, budget, retain_log))
        except KeyboardInterrupt:
            if source_id:
                note("what was sent is stored; the same command goes on where this one stopped")
            raise
    if json_output:
        print_json(result)
    else:
        _print_result(stream, result)


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _digest(source: IO[bytes]) -> tuple[str, int]:
    """A name for the unpacked contents, and their length."""
    digest, num_bytes = hashlib.sha256(), 0
    try:
        while piece := source.read(_DIGEST_PIECE_BYTES):
            digest.update(piece)
            num_bytes += len(piece)
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"the file is no whole gzip file: {error}") from None
    source.seek(0)
    return f"sha256:{digest.hexdigest()}", num_bytes


async def _ingest(
    context: typer.Context,
    stream_id: str,
    source: IO[bytes],
    source_id: str,
    num_bytes: int | None,
    model: str,
    budget: int | None,
    retain_log: bool,
) -> dict[str, Any]:
    async with open_async_client(context) as client:
        before = await _get_or_create(client, stream_id, model, budget, retain_log)
        started_at = time.monotonic()
        with AppendBar(before, num_bytes) as bar:
            polling = asyncio.create_task(_poll_tokens(client, stream_id, bar))
            try:
                after = await client.append(stream_id, source, source_id=source_id, on_progress=bar.note)
                bar.finish()
            finally:
                polling.cancel()
        seconds = time.monotonic() - started_at
    sent_bytes = bar.source_bytes_sent
    return {
        "stream": to_json(after),
        "source_id": source_id,
        "source_bytes": bar.source_bytes_accepted,
        "sent_bytes": sent_bytes,
        "num_reconnects": bar.num_reconnects,
        "seconds": round(seconds, 3),
        "bytes_per_second": round(sent_bytes / seconds, 1),
        "tokens_per_second": round((after.tokens - before.tokens) / seconds, 1),
    }


async def _get_or_create(
    client: "AsyncClient", stream_id: str, model: str, budget: int | None, retain_log: bool
) -> "Stream":
    from eunoe.client import AlreadyExists, StreamNotFound, StreamSettings

    try:
        found = await client.get_stream(stream_id)
    except StreamNotFound:
        settings = StreamSettings(kv_budget_tokens=budget or 0, retain_log=retain_log)
        try:
            return await client.create_stream(stream_id, model=model, settings=settings)
        except AlreadyExists:
            found = await client.get_stream(stream_id)
    asked = {
        "--model": model not in ("", found.model),
        "--budget": budget not in (None, found.settings.kv_budget_tokens),
        "--retain-log": retain_log and not found.settings.retain_log,
    }
    for option in (option for option, differs in asked.items() if differs):
        note(f"warning: {stream_id} was made with another setting, so {option} is ignored")
    return found


async def _poll_tokens(client: "AsyncClient", stream_id: str, bar: "AppendBar") -> None:
    from eunoe.client import EunoeError

    while True:
        await asyncio.sleep(_TOKENS_POLL_SECONDS)
        with contextlib.suppress(EunoeError):
            bar.note_tokens(await client.get_stream(stream_id))


class AppendBar:
    """A progress bar of what the memory has taken in, on standard error; invisible where that is no terminal.

    Attributes:
        source_bytes_accepted: Bytes of the source that are durable.
        source_bytes_sent: Those of them that this append sent.
        num_reconnects: As last seen.
    """

    def __init__(self, before: "Stream", num_bytes: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        self.source_bytes_accepted = self.source_bytes_sent = self.num_reconnects = 0
        self._first_source_bytes: int | None = None
        self._num_bytes = num_bytes
        self._tokens_before, self._started_at = before.tokens, time.monotonic()
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            DownloadColumn(),
            TransferSpeedColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[applied]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("reading", total=num_bytes, rate="", applied="")

    def __enter__(self) -> "AppendBar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def note(self, progress: "AppendProgress") -> None:
        """Show how far an append is."""
        if self._first_source_bytes is None:
            self._first_source_bytes = progress.source_bytes_accepted
        self.source_bytes_accepted = progress.source_bytes_accepted
        self.source_bytes_sent = progress.source_bytes_accepted - self._first_source_bytes
        self.num_reconnects = progress.num_reconnects
        # The source's end is the log's end while nobody else appends.
        lag = progress.accepted_offset - progress.folded_offset
        self._progress.update(
            self._task,
            completed=max(0, progress.source_bytes_accepted - lag),
            applied=f"applied {progress.applied_offset:,}",
        )

    def note_tokens(self, stream: "Stream") -> None:
        """Show how many tokens were committed."""
        seconds = time.monotonic() - self._started_at
        if stream.tokens > self._tokens_before:
            self._progress.update(self._task, rate=f"{(stream.tokens - self._tokens_before) / seconds:,.0f} tokens/s")

    def finish(self) -> None:
        """Fill the bar: all that is a full segment is in."""
        self._progress.update(self._task, completed=self._num_bytes)


def _print_result(stream_id: str, result: dict[str, Any]) -> None:
    stream = result["stream"]
    if result["source_id"] and result["sent_bytes"] < result["source_bytes"]:
        kept = result["source_bytes"] - result["sent_bytes"]
        print(f"{stream_id} had {kept:,} bytes of this file already")
    rates = f" ({result['tokens_per_second']:,.0f} tokens/s, {result['bytes_per_second'] / 1e3:,.1f} kB/s)"
    print(
        f"{stream_id}: {result['sent_bytes']:,} bytes in {result['seconds']:.1f} s{rates if stream['tokens'] else ''};"
        f" {stream['tokens']:,} tokens read so far, memory {megabytes(stream['state_bytes'])}"
    )
    if not stream["tokens"]:
        segment = stream["settings"]["segment_length"]
        print(f"All are stored. As they fill no segment of {segment} tokens yet, each question reads them first.")
