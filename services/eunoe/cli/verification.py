"""`eunoe verify`: is a stream's memory what its log makes of it?"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import typer

from eunoe.cli.connect import open_client
from eunoe.cli.output import JsonOption, print_json, to_json
from eunoe.cli.streams import StreamArgument

if TYPE_CHECKING:
    from eunoe.client import VerifyProgress, VerifySummary

EXIT_DIFFERENT, EXIT_UNVERIFIABLE = 5, 6


def verify(context: typer.Context, name: StreamArgument, json_output: JsonOption = False) -> None:
    """Check a stream against its own past, and fold its log anew. Changes nothing.

    Exit code 0: all is equal; 5: something differs; 6: what it takes is not here.
    """
    from eunoe.client import Verdict

    with open_client(context) as client, _progress_bar() as show:
        summary = client.verify_stream(name, on_progress=show)
    if json_output:
        print_json(summary)
    else:
        print(described(name, summary))
    codes: dict[int, int] = {
        Verdict.VERDICT_DIFFERENT: EXIT_DIFFERENT,
        Verdict.VERDICT_UNVERIFIABLE: EXIT_UNVERIFIABLE,
    }
    if code := codes.get(summary.verdict, 0):
        raise typer.Exit(code)


def described(name: str, summary: "VerifySummary") -> str:
    """The verdict for people."""
    values = to_json(summary)
    lines = [f"{name}: {values['verdict'].upper()}"]
    match values["verdict"]:
        case "verified":
            lines += _equal_parts(summary)
        case "different":
            difference = summary.difference
            lines.append(f"  {values['difference']['part']} at offset {difference.offset:,}: {difference.message}")
            if difference.recorded:
                lines.append(f"  recorded {difference.recorded}")
            if difference.found:
                lines.append(f"  found    {difference.found}")
        case _:
            lines += map(_lacking, values["missing"])
    return "\n".join(lines)


def _equal_parts(summary: "VerifySummary") -> list[str]:
    checkpoints = f"{summary.num_checkpoints} checkpoint{'' if summary.num_checkpoints == 1 else 's'}"
    lines = [f"  the log's chain over {summary.log_bytes_checked:,} bytes, and that of the commits"]
    if summary.tokens_folded:
        lines.append(
            f"  {checkpoints} as stored, and as folded anew: {summary.tokens_folded:,} tokens,"
            f" offset {summary.from_offset:,} to {summary.to_offset:,}"
        )
    elif summary.num_checkpoints:
        lines.append(f"  {checkpoints} as stored; nothing was folded, as nothing before it is kept")
    else:
        lines.append("  there is no checkpoint yet, so nothing was folded")
    return lines


def _lacking(missing: dict[str, Any]) -> str:
    since = f" (from segment {missing['first_segment']:,} on)" if missing["kind"] in ("numerics", "policy") else ""
    kind = missing["kind"].replace("_", " ")
    return f"  {kind}{since}: {missing['recorded'] or 'no longer recorded'}\n    here: {missing['available'] or 'none'}"


@contextlib.contextmanager
def _progress_bar() -> "Iterator[Callable[[VerifyProgress], None]]":
    """Shows how far a verification is, on standard error; invisible where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("checking the log, bytes", total=None)

        def show(progress: "VerifyProgress") -> None:
            again = f" (restart {progress.num_restarts})" if progress.num_restarts else ""
            if progress.tokens:
                what, done, total = "folding anew, tokens", progress.tokens_folded, progress.tokens
            else:
                what, done, total = "checking the log, bytes", progress.log_bytes_checked, progress.log_bytes
            bar.update(task, description=what + again, completed=done, total=total or None)

        yield show
