"""Commands on whole streams."""

import errno
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eunoe.cli.connect import open_client
from eunoe.cli.output import JsonOption, megabytes, note, print_json, print_table, to_json

if TYPE_CHECKING:
    from eunoe.client import Stream

StreamArgument = Annotated[str, typer.Argument(metavar="STREAM", help="A stream's id.")]


def streams(context: typer.Context, json_output: JsonOption = False) -> None:
    """List all streams."""
    with open_client(context) as client:
        found = list(client.list_streams())
    if json_output:
        for each in found:
            print_json(each)
        return
    rows = [
        [
            stream_id(each),
            each.model,
            f"{each.accepted_offset:,}",
            f"{each.applied_offset:,}",
            f"{each.tokens:,}",
            megabytes(each.state_bytes),
        ]
        for each in found
    ]
    print_table(["stream", "model", "accepted", "applied", "tokens", "memory"], rows)


def stream(context: typer.Context, name: StreamArgument, json_output: JsonOption = False) -> None:
    """Show a stream: settings, offsets, its memory's size and digest."""
    with open_client(context) as client:
        found = client.get_stream(name)
    show_stream(found, json_output)


def fork(
    context: typer.Context,
    name: StreamArgument,
    new: Annotated[str, typer.Argument(metavar="NEW", help="The new stream's id.")],
    at: Annotated[int | None, typer.Option(min=0, help="A record's end; default: all that was accepted.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Make a stream that shares the past of another."""
    with open_client(context) as client:
        child = client.fork_stream(name, new, at_offset=at)
    show_stream(child, json_output)


def rebuild(
    context: typer.Context,
    name: StreamArgument,
    new: Annotated[str, typer.Argument(metavar="NEW", help="The new stream's id.")],
    model: Annotated[str, typer.Option(help="Who reads the log anew; may be the stream's own model.")],
    at: Annotated[int | None, typer.Option(min=0, help="A record's end; default: all that was accepted.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Make a stream of another's log, for a model to read anew.

    The log must be whole: streams made with --retain-log keep it.
    """
    with open_client(context) as client:
        child = client.fork_stream(name, new, at_offset=at, model=model)
    show_stream(child, json_output)
    note(f"{model} reads {child.accepted_offset:,} bytes; `eunoe stream {new}` shows how far it is")


def export(
    context: typer.Context,
    name: StreamArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to; it appears whole or not at all.")],
    json_output: JsonOption = False,
) -> None:
    """Write a stream's memory, and the log after it, to a file."""
    if not file.parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "No such directory", str(file.parent))
    with open_client(context) as client:
        num_bytes = client.export_stream(name, file)
    if json_output:
        print_json({"file": str(file), "bytes": num_bytes})
    else:
        print(f"{file}: {megabytes(num_bytes)}")


def import_(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An export.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="The new stream's id.")],
    json_output: JsonOption = False,
) -> None:
    """Make a stream from an export: same offsets, same memory."""
    with file.open("rb") as source, open_client(context) as client:
        imported = client.import_stream(source, new)
    show_stream(imported, json_output)


def rm(
    context: typer.Context,
    name: StreamArgument,
    erase: Annotated[bool, typer.Option("--erase", help="Wait until the database's files hold nothing of it.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Remove a stream with everything that no fork shares."""
    with open_client(context) as client:
        receipt = client.delete_stream(name, erase=erase)
    if json_output:
        print_json({"removed": name} | ({} if receipt is None else {"receipt": to_json(receipt)}))
    elif receipt is None:
        print(f"{name} is removed")
    else:
        shared = "; forks or parents keep a part" if receipt.is_shared else ""
        print(f"{name} is erased: {receipt.num_values_removed} values{shared}")


def stream_id(found: "Stream") -> str:
    """The id in a stream's name."""
    return found.name.rpartition("/")[2]


def show_stream(found: "Stream", json_output: bool) -> None:
    """All of a stream, for people or as JSON."""
    values = to_json(found)
    if json_output:
        print_json(values)
        return
    settings = values.pop("settings", {})
    for key, value in {**values, **{f"settings.{key}": value for key, value in settings.items()}}.items():
        if isinstance(value, bool):
            value = "yes" if value else "no"
        print(f"{key:28} {value:,}" if isinstance(value, int) else f"{key:28} {value or '-'}")
