"""How a benchmark measures and reports.

With --json the last line on stdout is one object {"benchmark", "machine", "commit", "results": {name: number}}.
Everything that people read goes to stderr.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


class Report:
    """Collects the results of one benchmark and prints them.

    Attributes:
        results: Name to number, as the last line will have them.
    """

    def __init__(self, benchmark: str, *, as_json: bool) -> None:
        self._benchmark = benchmark
        self._as_json = as_json
        self.results: dict[str, float] = {}
        # Now: what is measured may set torch's threads.
        self._machine = machine()
        self.say(f"{benchmark}: " + ", ".join(f"{name} {value}" for name, value in self._machine.items()))

    def say(self, text: str) -> None:
        """A line for people."""
        print(f"\r\033[K{text}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)

    def progress(self, text: str) -> None:
        """A line that the next one replaces; nothing where stderr is no terminal."""
        if sys.stderr.isatty():
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def add(self, name: str, value: float, goal: str = "") -> None:
        """A result that counts."""
        self.results[name] = round(value, 4)
        self.say(f"  {name:24} {value:8.3f}   {goal}")

    def finish(self) -> None:
        """Print the last line."""
        if self._as_json:
            whole = {
                "benchmark": self._benchmark,
                "machine": self._machine,
                "commit": commit(),
                "results": self.results,
            }
            print(json.dumps(whole), flush=True)


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="end with one JSON object on stdout")
    parser.add_argument("--quick", action="store_true", help="fewer repeats and sizes; noisy")
    parser.add_argument("--threads", type=int, default=2, help="of torch, on both sides (default: 2)")
    return parser


def existing_file(name: str) -> Path:
    """The type of an option that names a file.

    Raises:
        ArgumentTypeError: If there is none.
    """
    path = Path(name)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{name} is no file")
    return path


def machine() -> dict[str, Any]:
    """Processor, cores, instruction set and torch version."""
    capabilities = torch.cpu.get_capabilities()
    wanted = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "sve", "bf16")
    return {
        "processor": _processor(),
        "num_cores": torch.get_num_threads(),
        "isa": "+".join(name for name in wanted if capabilities.get(name)) or torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def has_amx() -> bool:
    """Whether the goals of bfloat16 prefill apply to this machine."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def commit() -> str:
    """The checkout's commit, with `-dirty` where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    here = Path(__file__).parent
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=here)
    return found.stdout.strip() or "unknown"


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleaved(
    report: Report, num_repeats: int, runs: Mapping[str, Callable[[], object]], *, num_warmups: int = 1
) -> dict[str, float]:
    """Median seconds of each run, taken in turns so that a slow minute of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(-num_warmups, num_repeats):
        for name, run in runs.items():
            report.progress(f"{name}: {'warm-up' if repeat < 0 else f'{repeat + 1} of {num_repeats}'}")
            elapsed = seconds(run)
            if repeat >= 0:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
