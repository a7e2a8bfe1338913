"""The state store process: `python -m eunoe.state_store`, configured by EUNOE_STATE_STORE_<FIELD>.

`python -m eunoe.state_store print-function` prints what `FUNCTION LOAD` takes, where its user may not load it.
"""

import asyncio
import logging
import sys
from pathlib import Path

import grpc

from eunoe.internal.v1 import state_store_pb2_grpc
from eunoe.runtime.auth import tls_from_files
from eunoe.runtime.config import from_env
from eunoe.runtime.errors import Unavailable
from eunoe.runtime.grpc_server import GrpcServer, run_process
from eunoe.runtime.logging import configure_logging
from eunoe.runtime.telemetry import serve_metrics
from eunoe.state_store.config import StateStoreConfig
from eunoe.state_store.redis_client import RedisTls
from eunoe.state_store.redis_storage import FUNCTION_SOURCE, RedisStorage
from eunoe.state_store.sealing import KEY_BYTES, Keyring
from eunoe.state_store.server_check import UnsafeRedisError, check_server
from eunoe.state_store.servicer import SERVICE_NAME, StateStoreServicer
from eunoe.state_store.store import StateStore
from eunoe.state_store.transactions import Environment

logger = logging.getLogger("eunoe.state_store")


async def serve(config: StateStoreConfig) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        UnsafeRedisError, Unavailable: If Redis cannot be served from.
    """
    tls = RedisTls(
        ca_file=config.redis_tls_ca_file,
        certificate_file=config.redis_tls_certificate_file,
        key_file=config.redis_tls_key_file,
    )
    storage = RedisStorage(config.redis_url, num_replicas=config.num_replicas, tls=tls)
    try:
        await check_server(storage, allow_unsafe=config.allow_unsafe_redis, marker_file=config.data_marker_file)
        pepper = config.api_key_pepper_file.read_bytes().strip() if config.api_key_pepper_file else b""
        keyring = Keyring(_master_key(config.encryption_key_file))
        store = StateStore(Environment(storage=storage, config=config, keyring=keyring), pepper=pepper)
        server = build_server(store, config)
        with serve_metrics(config.metrics_port):
            async with store.running():
                await run_process(server, ready_file=config.ready_file)
    finally:
        await storage.close()


def _master_key(path: Path | None) -> bytes | None:
    """The key in a file; the error of a bad one does not show it."""
    if path is None:
        return None
    try:
        return bytes.fromhex(path.read_text().strip())
    except ValueError:
        raise ValueError(f"{path} does not hold {2 * KEY_BYTES} hex digits") from None


def build_server(store: StateStore, config: StateStoreConfig) -> GrpcServer:
    """The gRPC server of a state store, not yet started."""

    def add_servicers(server: grpc.aio.Server) -> None:
        state_store_pb2_grpc.add_StateStoreServiceServicer_to_server(StateStoreServicer(store), server)

    return GrpcServer(
        address=config.listen_address,
        add_servicers=add_servicers,
        service_names=[SERVICE_NAME],
        tls=tls_from_files(config.tls_certificate_file, config.tls_key_file, config.tls_ca_file),
    )


def main() -> int:
    """Run the process; its exit status."""
    if sys.argv[1:] == ["print-function"]:
        print(FUNCTION_SOURCE)
        return 0
    configure_logging()
    try:
        asyncio.run(serve(from_env(StateStoreConfig, "EUNOE_STATE_STORE")))
    except (UnsafeRedisError, Unavailable, ValueError) as error:
        logger.error("the state store does not serve", extra={"problem": str(error)})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
