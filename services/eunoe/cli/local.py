"""The platform on this machine: up, down, status, demo."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eunoe.cli.output import JsonOption, note, print_json, print_table

if TYPE_CHECKING:
    from eunoe.embedded.home import PlatformRecord

# Those of eunoe.embedded.models and of eunoe.embedded.platform, which are too heavy to import for --help; a test
# compares them.
DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_PORT = 8400

_MEBIBYTE = 1024 * 1024


def up(
    model: Annotated[
        str,
        typer.Option(
            help="smollm2-135m-instruct; eunoe-nano, whose tokens are bytes; a local directory; or a hub repository"
            " (owner/name)."
        ),
    ] = DEFAULT_MODEL,
    workers: Annotated[int, typer.Option(min=1, help="Model workers.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each worker.")] = 2,
    port: Annotated[int, typer.Option(min=0, max=65535, help="The gateway's port; 0 picks a free one.")] = DEFAULT_PORT,
    memory_limit: Annotated[
        int | None, typer.Option(min=1, help="MiB of resident memory states, most of each worker.")
    ] = None,
    require_key: Annotated[bool, typer.Option("--require-key", help="Refuse calls without an API key.")] = False,
    policy: Annotated[
        str | None,
        typer.Option(
            help="Which cached tokens stay: a policy's name, or that of a file in ~/.eunoe/policies. Default:"
            " smollm2-namm for the default model, else sinks-recent/1."
        ),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Start the whole platform on this machine, on loopback."""
    from eunoe.embedded.platform import AlreadyRunning, Platform

    platform = Platform(
        model=model,
        workers=workers,
        threads=threads,
        port=port,
        memory_limit_bytes=None if memory_limit is None else memory_limit * _MEBIBYTE,
        requires_key=require_key,
        policy=policy,
        on_step=_show_step,
    )
    was_running = False
    try:
        platform.start()
        address = platform.address
    except AlreadyRunning as error:
        was_running, address = True, error.address
    if json_output:
        print_json({"address": address, "was_running": was_running})
    elif was_running:
        print(f"eunoe is already running at {address}, with the options of its start (`eunoe down` ends it)")
    else:
        print(f"eunoe is up at {address}, serving {platform.model}")


def down(json_output: JsonOption = False) -> None:
    """Stop what `eunoe up` started; data stays."""
    from eunoe.embedded.home import default_home, read_record
    from eunoe.embedded.platform import Platform

    was_running = read_record(default_home()) is not None
    Platform(on_step=_show_step).stop()
    if json_output:
        print_json({"was_running": was_running})
    else:
        print("eunoe is down" if was_running else "eunoe was not running")


def status(json_output: JsonOption = False) -> None:
    """Say whether the platform runs on this machine. Exit code 4 if it does not."""
    from eunoe.embedded.home import default_home, read_record
    from eunoe.embedded.processes import is_alive

    record = read_record(default_home())
    is_running = record is not None and record.is_running
    alive = {process.name: is_alive(process) for process in record.processes} if record is not None else {}
    if json_output:
        print_json(_status_to_json(record, is_running, alive))
    elif record is None:
        print("eunoe is not running")
    else:
        up_at = f"eunoe is up at {record.address}, serving {record.model}"
        print(up_at if is_running else "eunoe is not all up: `eunoe up` starts it anew, `eunoe down` ends what is left")
        rows = [
            [process.name, "running" if alive[process.name] else "ended", str(process.pid), process.log_file]
            for process in record.processes
        ]
        print_table(["process", "state", "pid", "log"], rows)
    if not is_running:
        raise typer.Exit(4)


def demo(
    book: Annotated[bool, typer.Option("--book", help="Stream the whole book, not only its end.")] = False,
    file: Annotated[Path | None, typer.Option(help="Another text; default: the King James Bible in examples/.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Read a book into a bounded memory, ask about it, stop all again."""
    from eunoe.cli.demo import run_demo

    figures = run_demo(is_whole_book=book, file=file, say=note if json_output else print)
    if json_output:
        print_json(figures)


def _status_to_json(record: "PlatformRecord | None", is_running: bool, alive: dict[str, bool]) -> dict[str, Any]:
    if record is None:
        return {"is_running": False, "processes": []}
    return {
        "is_running": is_running,
        "address": record.address,
        "state_store_address": record.state_store_address,
        "model": record.model,
        "processes": [
            {"name": process.name, "pid": process.pid, "is_alive": alive[process.name], "log_file": process.log_file}
            for process in record.processes
        ],
    }


def _show_step(step: str) -> None:
    note(f"{step} ..." if sys.stderr.isatty() else step)
