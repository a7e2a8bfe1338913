"""The eviction sidecar process: `python -m eunoe.eviction_sidecar`, configured by EUNOE_EVICTION_SIDECAR_<FIELD>."""

import asyncio
import logging
import signal
import sys
from pathlib import Path

from eunoe.eviction_sidecar.config import EvictionSidecarConfig
from eunoe.eviction_sidecar.sidecar import running_sidecar
from eunoe.runtime.config import from_env
from eunoe.runtime.grpc_server import run_process
from eunoe.runtime.logging import configure_logging
from eunoe.runtime.telemetry import serve_metrics

logger = logging.getLogger("eunoe.eviction_sidecar")

_START_POLL_SECONDS = 0.01


class SocketLost(Exception):
    """The socket's file is gone or another's: nobody can connect any more, so somebody must start the process anew."""


async def serve(config: EvictionSidecarConfig) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ValueError: If the policies or rules are broken.
        SocketLost: If it ended for that.
    """
    with serve_metrics(config.metrics_port):
        async with running_sidecar(config) as server:
            watching = asyncio.create_task(_end_without_socket(config.socket_path, config.reload_seconds))

            async def stop_watching() -> None:
                # What drains removes its socket's file itself.
                watching.cancel()
                await asyncio.wait([watching])

            await run_process(server, ready_file=config.ready_file, on_drain=stop_watching, grace_seconds=1.0)
            if not watching.cancelled():
                raise SocketLost(f"the file of the socket {config.socket_path} is gone")


def main() -> int:
    """Run the process; its exit status."""
    configure_logging()
    try:
        asyncio.run(serve(from_env(EvictionSidecarConfig, "EUNOE_EVICTION_SIDECAR")))
    except ValueError as error:
        logger.error("the eviction sidecar does not serve", extra={"problem": str(error)})
        return 1
    except SocketLost as error:
        logger.critical("nobody can connect any more", extra={"problem": str(error)})
        return 1
    return 0


async def _end_without_socket(path: Path, seconds: float) -> None:
    """Wait until the file of the server that starts is there no longer, then have the process drain."""
    first = None
    while True:
        found = _inode(path)
        if first is not None and found != first:
            break
        first = found
        await asyncio.sleep(_START_POLL_SECONDS if first is None else seconds)
    signal.raise_signal(signal.SIGTERM)


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
