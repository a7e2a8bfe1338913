"""`python -m eunoe.gateway`: a gateway configured by EUNOE_GATEWAY_* variables."""

import asyncio

from eunoe.gateway.config import GatewayConfig
from eunoe.gateway.gateway import Gateway
from eunoe.runtime.config import from_env
from eunoe.runtime.logging import configure_logging


async def _run(config: GatewayConfig) -> None:
    await Gateway(config).run()


def main() -> None:
    config = from_env(GatewayConfig, "EUNOE_GATEWAY")
    configure_logging(config.log_format, config.log_level)
    asyncio.run(_run(config))


if __name__ == "__main__":
    main()
