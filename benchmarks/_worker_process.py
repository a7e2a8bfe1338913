"""The process of a platform's worker, as the system sees it."""

import psutil

from eunoe.embedded.platform import Platform


def worker_process(platform: Platform) -> psutil.Process:
    """The process of the model worker: the largest below Ray's host."""
    record = next(process for process in platform.record.processes if process.name == "ray_host")
    children = psutil.Process(record.pid).children(recursive=True)
    return max(children, key=lambda process: process.memory_info().rss)
