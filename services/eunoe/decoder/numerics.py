"""What decides the last bits of a result. Within one `numerics_id`, equal logs fold to equal states, byte for byte."""

import platform
from pathlib import Path

import torch

from eunoe.decoder.config import Dtypes

ENGINE_VERSION = 2
"""Raised by every change of the decoder or its kernels that changes results in the last bit."""


def numerics_id(dtypes: Dtypes, num_threads: int) -> str:
    """Processor, dtypes, threads and versions, in one string without spaces."""
    names = (str(dtype).removeprefix("torch.") for dtype in (dtypes.weights, dtypes.kv, dtypes.compute))
    return "/".join(
        (
            f"engine-{ENGINE_VERSION}",
            f"torch-{torch.__version__}",
            platform.machine(),
            torch.backends.cpu.get_cpu_capability().replace(" ", "-"),
            _processor(),
            "-".join(names),
            f"threads-{num_threads}",
        )
    )


def _processor() -> str:
    """Vendor, family and model: matmul libraries choose their kernels by them, not by the instruction set alone."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return platform.processor().replace(" ", "-") or "unknown"
    first = path.read_text().split("\n\n")[0]
    values = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in first.splitlines()}
    return ".".join(values[name] for name in ("vendor_id", "cpu family", "model") if name in values) or "unknown"
