"""The eviction sidecar process: `python -m eunoe.eviction_sidecar`, configured by EUNOE_EVICTION_SIDECAR_<FIELD>."""

import asyncio
import logging
import sys

from eunoe.eviction_sidecar.config import EvictionSidecarConfig
from eunoe.eviction_sidecar.sidecar import running_sidecar
from eunoe.runtime.config import from_env
from eunoe.runtime.grpc_server import run_process
from eunoe.runtime.logging import configure_logging
from eunoe.runtime.telemetry import serve_metrics

logger = logging.getLogger("eunoe.eviction_sidecar")


async def serve(config: EvictionSidecarConfig) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ValueError: If the policies or rules are broken.
    """
    with serve_metrics(config.metrics_port):
        async with running_sidecar(config) as server:
            await run_process(server, ready_file=config.ready_file, grace_seconds=1.0)


def main() -> int:
    """Run the process; its exit status."""
    configure_logging()
    try:
        asyncio.run(serve(from_env(EvictionSidecarConfig, "EUNOE_EVICTION_SIDECAR")))
    except ValueError as error:
        logger.error("the eviction sidecar does not serve", extra={"problem": str(error)})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
