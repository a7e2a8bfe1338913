"""The eviction sidecar: wires its parts."""

import asyncio
import logging
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from eunoe.eviction.catalogue import PolicyCatalogue
from eunoe.eviction.policy_files import PolicyFiles
from eunoe.eviction_sidecar import metrics
from eunoe.eviction_sidecar.audit import AuditLog
from eunoe.eviction_sidecar.config import EvictionSidecarConfig
from eunoe.eviction_sidecar.scoring import Scoring
from eunoe.eviction_sidecar.servicer import SERVICE_NAME, EvictionSidecarServicer
from eunoe.internal.v1 import eviction_sidecar_pb2_grpc
from eunoe.runtime.grpc_server import GrpcServer
from eunoe.runtime.payload_files import remove_stale

logger = logging.getLogger(__name__)

_STALE_SECONDS = 600.0


@asynccontextmanager
async def running_sidecar(config: EvictionSidecarConfig) -> AsyncIterator[GrpcServer]:
    """The server of a sidecar, not yet started; policies are loaded and watched inside of the block.

    Should the watch ever fail, the process gets a SIGTERM, and the block's end raises what failed.

    Raises:
        ValueError: If the policies or rules are broken.
    """
    catalogue = PolicyCatalogue(await asyncio.to_thread(PolicyFiles, config.policies_dir), config.policy)
    scoring = Scoring(catalogue.files, config.payload_dir)
    audit = None
    if config.audit_file is not None:
        audit = AuditLog(config.audit_file, config.audit_file_bytes, config.num_audit_files)

    def add_servicers(server: grpc.aio.Server) -> None:
        eviction_sidecar_pb2_grpc.add_EvictionSidecarServiceServicer_to_server(
            EvictionSidecarServicer(catalogue, scoring, audit), server
        )

    watching = asyncio.create_task(_watch_forever(catalogue, config), name="watch")
    watching.add_done_callback(_end_unwatched)
    try:
        yield GrpcServer(address=config.listen_address, add_servicers=add_servicers, service_names=[SERVICE_NAME])
    finally:
        watching.cancel()
        await asyncio.wait([watching])
        await asyncio.to_thread(scoring.close)
        if audit is not None:
            audit.close()
    if not watching.cancelled():
        watching.result()


def _end_unwatched(watching: asyncio.Task[None]) -> None:
    # Without it the process would serve, and follow the rules of this moment for ever.
    if not watching.cancelled():
        logger.critical("the policies are not watched any more, so the process ends")
        signal.raise_signal(signal.SIGTERM)


async def _watch_forever(catalogue: PolicyCatalogue, config: EvictionSidecarConfig) -> None:
    problem = None
    while True:
        await asyncio.sleep(config.reload_seconds)
        try:
            if await asyncio.to_thread(catalogue.refresh):
                metrics.RELOADS.inc()
            if config.payload_dir is not None:
                await asyncio.to_thread(remove_stale, config.payload_dir, _STALE_SECONDS)
        except OSError as error:
            # What cannot be read or removed now must not end the watch for good; once a look would fill the log.
            if str(error) != problem:
                logger.error("a directory cannot be looked after", extra={"problem": str(error)})
            problem = str(error)
        else:
            problem = None
