"""`python -m eunoe.model_worker`: one model worker as a plain process, configured by EUNOE_WORKER_<FIELD>.

SIGTERM or SIGINT drains it: every stream is committed and given back. Where Ray runs the workers, the Serve application
does the same for its replicas.
"""

import asyncio
import logging
import os
import signal
import sys

from eunoe.model_worker.config import WorkerConfig
from eunoe.model_worker.worker import ModelWorker
from eunoe.runtime.config import from_env
from eunoe.runtime.errors import Unavailable
from eunoe.runtime.grpc_server import write_ready_file
from eunoe.runtime.logging import configure_logging

logger = logging.getLogger("eunoe.model_worker")

UNHEALTHY_STATUS = 70
"""Exit status of a worker that cannot work any more; also of one whose engine thread has died."""

_HEALTH_SECONDS = 1.0
# As Serve does: one bad check may be a very slow pass.
_MAX_BAD_CHECKS = 3


async def serve(config: WorkerConfig) -> None:
    """Serve until SIGTERM or SIGINT; a worker that stays unhealthy ends the process with `UNHEALTHY_STATUS`.

    Raises:
        ValueError: If there is no model of that name to load.
        Unavailable: If the state store cannot be reached.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, stop.set)
    worker = ModelWorker(config)
    await worker.start()
    if config.ready_file is not None:
        write_ready_file(config.ready_file, worker.address)
    await _until_stopped(worker, stop)
    logger.info("draining")
    await worker.drain()
    if config.ready_file is not None:
        await asyncio.to_thread(config.ready_file.unlink, missing_ok=True)
    logger.info("drained")


async def _until_stopped(worker: ModelWorker, stop: asyncio.Event) -> None:
    num_bad_checks = 0
    while True:
        try:
            async with asyncio.timeout(_HEALTH_SECONDS):
                await stop.wait()
            return
        except TimeoutError:
            pass
        try:
            worker.check_health()
            num_bad_checks = 0
        except Unavailable as error:
            num_bad_checks += 1
            logger.error("the worker is not healthy", extra={"problem": str(error)})
        if num_bad_checks >= _MAX_BAD_CHECKS:
            # Not by way of a drain: it would wait for the very engine that does not answer.
            os._exit(UNHEALTHY_STATUS)


def main() -> int:
    """Run the process; its exit status."""
    configure_logging()
    try:
        asyncio.run(serve(from_env(WorkerConfig, "EUNOE_WORKER")))
    except (Unavailable, ValueError) as error:
        logger.error("the model worker does not serve", extra={"problem": str(error)})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
