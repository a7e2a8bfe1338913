"""From the command line's options to a client."""

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from eunoe.client import AsyncClient, Client, TlsConfig

_PROBE_SECONDS = 3.0


class NotReachable(Exception):
    """Nothing listens where the platform should be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectionOptions:
    """The options that every command shares."""

    address: str | None
    api_key: str | None
    ca_file: Path | None
    certificate_file: Path | None
    key_file: Path | None

    def tls(self) -> "TlsConfig | None":
        """Certificates, or None for plain text."""
        from eunoe.runtime.auth import tls_from_files

        return tls_from_files(self.certificate_file, self.key_file, self.ca_file)

    def reachable_address(self) -> str:
        """The gateway's address: as given, else of the platform that runs on this machine.

        Raises:
            NotReachable: At once if nobody listens there; the client itself would wait for a platform that restarts.
            ValueError: If it is no host:port.
        """
        address = self.address or _local_address()
        host, separator, port = address.rpartition(":")
        if not separator or not port.isdigit():
            raise ValueError(f"{address!r} is not host:port")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_SECONDS).close()
        except OSError as error:
            hint = "" if self.address else "; `eunoe up` starts a platform"
            raise NotReachable(f"nobody answers at {address} ({error}){hint}") from None
        return address


@contextlib.contextmanager
def open_client(context: typer.Context) -> "Iterator[Client]":
    """A client for one command."""
    from eunoe.client import Client

    options: ConnectionOptions = context.obj
    with Client(options.reachable_address(), api_key=options.api_key, tls=options.tls()) as client:
        yield client


def open_async_client(context: typer.Context) -> "AsyncClient":
    """A client for a command that does two things at once."""
    from eunoe.client import AsyncClient

    options: ConnectionOptions = context.obj
    return AsyncClient(options.reachable_address(), api_key=options.api_key, tls=options.tls())


def _local_address() -> str:
    from eunoe.embedded.home import default_home, read_record

    record = read_record(default_home())
    if record is None or not record.address:
        raise NotReachable("no platform runs here (`eunoe up` starts one), and no --address is given")
    return record.address
