"""What commands print: for people, or as JSON."""

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

if TYPE_CHECKING:
    pass

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line, and nothing else.")]


def print_json(value: Message | dict[str, Any]) -> None:
    """One JSON object on one line of standard output."""
    print(json.dumps(to_json(value) if isinstance(value, Message) else value, ensure_ascii=False), flush=True)


def to_json(message: Message) -> dict[str, Any]:
    """A message with every field, whole numbers as numbers, times as RFC 3339, durations in seconds."""
    return {
        field.name: _field_to_json(message, field)
        for field in message.DESCRIPTOR.fields
        if not field.has_presence or message.HasField(field.name)
    }


def _field_to_json(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    return [_value_to_json(item, field) for item in value] if field.is_repeated else _value_to_json(value, field)


def _value_to_json(value: Any, field: Any) -> Any:
    if isinstance(value, Timestamp):
        return value.ToJsonString()
    if isinstance(value, Duration):
        return value.ToNanoseconds() / 1e9
    if isinstance(value, Message):
        return to_json(value)
    if field.enum_type is not None:
        # POSITION_MODE_COMPACT of PositionMode is "compact".
        name: str = field.enum_type.values_by_number[value].name
        prefix = field.enum_type.values_by_number[0].name.removesuffix("UNSPECIFIED")
        return name.removeprefix(prefix).lower()
    return value.hex() if isinstance(value, bytes) else value


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    """A plain table; numbers, which are right-aligned, are known by their first character."""
    from rich.console import Console
    from rich.table import Table

    table: Table = Table(box=None, header_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        is_number = bool(rows) and all(row[index][:1].isdigit() for row in rows)
        table.add_column(column, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    # A pipe has no width; nothing is to be wrapped there.
    Console(width=None if sys.stdout.isatty() else 1000).print(table, markup=False)


def megabytes(num_bytes: float) -> str:
    """23.6 MB."""
    return f"{num_bytes / 1e6:,.1f} MB"


def note(text: str) -> None:
    """A line for people, on standard error."""
    print(text, file=sys.stderr, flush=True)
