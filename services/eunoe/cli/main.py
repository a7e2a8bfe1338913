"""The `eunoe` command: options for all, the list of commands, errors to exit codes.

Exit codes: 0 ok, 1 an error of the platform, 2 wrong usage or input, 3 not found, 4 unavailable, 5 a stream is not what
was recorded of it, 6 what verifying it takes is missing, 130 interrupted.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from eunoe.cli import administration, answers, ingest, inspection, local, streams, training, verification
from eunoe.cli.connect import ConnectionOptions, NotReachable

EXIT_ERROR, EXIT_USAGE, EXIT_NOT_FOUND, EXIT_UNAVAILABLE, EXIT_INTERRUPTED = 1, 2, 3, 4, 130

# What typer raises for wrong usage; the class itself has no public name.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    help="Language models over documents and streams of any length, with a memory that does not grow.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _options(
    context: typer.Context,
    address: Annotated[
        str | None, typer.Option(envvar="EUNOE_ADDRESS", help="host:port of the gateway; default: that of `eunoe up`.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="EUNOE_API_KEY", help="Secret of an API key.")] = None,
    ca_file: Annotated[
        Path | None, typer.Option(envvar="EUNOE_CA_FILE", help="Speak TLS and trust this authority (PEM).")
    ] = None,
    certificate_file: Annotated[
        Path | None, typer.Option(envvar="EUNOE_CERTIFICATE_FILE", help="This client's certificate (PEM).")
    ] = None,
    key_file: Annotated[Path | None, typer.Option(envvar="EUNOE_KEY_FILE", help="The certificate's key (PEM).")] = None,
) -> None:
    context.obj = ConnectionOptions(
        address=address, api_key=api_key, ca_file=ca_file, certificate_file=certificate_file, key_file=key_file
    )


for command in (
    local.up,
    local.down,
    local.status,
    ingest.ingest,
    answers.ask,
    answers.score,
    streams.streams,
    streams.stream,
    streams.fork,
    streams.rebuild,
    streams.export,
    streams.import_,
    streams.rm,
    inspection.inspect,
    verification.verify,
    administration.models,
    administration.usage,
    local.demo,
):
    app.command(command.__name__.rstrip("_"))(command)
app.add_typer(administration.keys, name="keys")
app.add_typer(training.train, name="train")


def main() -> None:
    """Run the command line; every error becomes one line on standard error."""
    try:
        code = _run()
    except BrokenPipeError:
        # The reader of a pipe has seen enough; nothing more may be written to it, at exit neither.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = EXIT_ERROR
    except (typer.Abort, KeyboardInterrupt):
        code = EXIT_INTERRUPTED
    if code == EXIT_INTERRUPTED:
        print("interrupted", file=sys.stderr, flush=True)
        sys.stdout.flush()
        # A thread may still wait for standard input, which nothing but its end could end.
        os._exit(code)
    sys.exit(code)


def _run() -> int:
    try:
        return app(standalone_mode=False) or 0
    except _UsageError as error:
        return _fail_usage(error)
    except NotReachable as error:
        return _fail(str(error), EXIT_UNAVAILABLE)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), EXIT_USAGE)
    except ValueError as error:
        return _fail(str(error), EXIT_USAGE)
    except _platform_errors() as error:
        return _fail(*_described(error))


def _platform_errors() -> tuple[type[Exception], ...]:
    """Called only when something was raised: the classes are too heavy to import on the way in."""
    from eunoe.embedded.models import ModelUnavailable
    from eunoe.embedded.platform import StartFailed
    from eunoe.runtime.errors import EunoeError

    return EunoeError, ModelUnavailable, StartFailed


def _described(error: Exception) -> tuple[str, int]:
    from eunoe.embedded.models import ModelUnavailable
    from eunoe.runtime import errors

    if isinstance(error, ModelUnavailable):
        return str(error), EXIT_UNAVAILABLE
    if not isinstance(error, errors.EunoeError):
        return str(error), EXIT_ERROR
    codes: dict[type[errors.EunoeError], int] = {
        errors.NotFound: EXIT_NOT_FOUND,
        errors.Unavailable: EXIT_UNAVAILABLE,
        errors.InvalidRequest: EXIT_USAGE,
    }
    code = next((code for kind, code in codes.items() if isinstance(error, kind)), EXIT_ERROR)
    return f"{error.reason()}: {error.message}", code


def _fail_usage(error: Any) -> int:
    message = error.format_message()
    if message.startswith("Usage: "):
        # What typer raises without any arguments is the whole help.
        print(message, file=sys.stderr)
        return EXIT_USAGE
    return _fail(f"{message.rstrip('.')} (see `{error.ctx.command_path} --help`)" if error.ctx else message, EXIT_USAGE)


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
