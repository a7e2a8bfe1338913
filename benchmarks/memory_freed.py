"""What does a worker save where its streams keep a quarter of their tokens? RSS with many streams, and bytes of states.

A platform of its own takes in the same text as many streams, once with budgets for all of it and once for a quarter.
What a worker holds beyond an empty one counts rotated copies, and the room for a segment that a bounded memory needs
as well: so less than three quarters are saved. `state_bytes_saved_*` is of what is stored and moved.
"""

import signal
import sys
import tempfile
from pathlib import Path

from _book import its_beginning
from _report import Report, arguments
from _worker_process import worker_process

from eunoe.client import Client, StreamSettings
from eunoe.decoder.checkpoint import load_config
from eunoe.decoder.config import Dtypes
from eunoe.decoder.memory_state import MemorySettings, MemoryState
from eunoe.decoder.tokenizer import load_tokenizer
from eunoe.embedded.models import DEFAULT_MODEL, resolve_model
from eunoe.embedded.platform import Platform
from eunoe.eviction import POLICIES, EvictionPolicy, Namm
from eunoe.eviction.policy_files import SHIPPED

SHARE = 0.25
MEMORY_LIMIT_BYTES = 16 * 1024**3
# Of two segments, about.
WARM_UP_CHARACTERS = 4096


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, help="of each stream, at most 8192, which is the default")
    options = parser.parse_args()
    # A benchmark that is told to end must still stop the platform that it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    num_tokens = options.tokens or (1024 if options.quick else 8192)
    bounded = MemorySettings(kv_budget_tokens=int(SHARE * num_tokens))
    full = MemorySettings(kv_budget_tokens=num_tokens)
    report = Report("memory_freed", as_json=options.json)
    _, directory = resolve_model(DEFAULT_MODEL, on_step=report.say)

    text = its_beginning(load_tokenizer(directory), num_tokens)
    full_rss, bounded_rss = (
        resident_bytes(report, directory, options.threads, settings, options.streams, text)
        for settings in (full, bounded)
    )
    report.add("rss_mb_full", full_rss / 1e6, f"{options.streams} streams of {num_tokens} tokens, nothing evicted")
    report.add("rss_mb_25", bounded_rss / 1e6, "the same with a quarter of the slots")
    report.add("memory_freed_25", 1 - bounded_rss / full_rss, "of the worker's RSS beyond an empty one's")

    policies: dict[str, EvictionPolicy] = {
        **POLICIES,
        "namm": Namm.untrained(),
        "smollm2_namm": Namm.load(SHIPPED / "smollm2-namm.safetensors"),
    }
    all_state = a_state(directory, full, None)
    for name, policy in policies.items():
        state, label = a_state(directory, bounded, policy), name.partition("/")[0]
        saved = 1 - state.state_bytes / all_state.state_bytes
        report.add(f"state_bytes_saved_25_{label}", saved, f"{state.state_bytes:,} of {all_state.state_bytes:,} bytes")
        freed = 1 - state.resident_bytes / all_state.resident_bytes
        report.add(f"slab_bytes_saved_25_{label}", freed, f"{state.resident_bytes:,} of {all_state.resident_bytes:,}")
    report.finish()


def resident_bytes(
    report: Report, directory: Path, num_threads: int, settings: MemorySettings, num_streams: int, text: str
) -> int:
    """What the streams add to the RSS of a worker that has run before."""
    stream_settings = StreamSettings(kv_budget_tokens=settings.kv_budget_tokens)
    with (
        tempfile.TemporaryDirectory(prefix="eunoe-bench-") as home,
        Platform(
            home=Path(home),
            model=directory,
            threads=num_threads,
            memory_limit_bytes=MEMORY_LIMIT_BYTES,
            on_step=report.progress,
        ) as platform,
        Client(platform.address) as client,
    ):
        worker = worker_process(platform)
        # The smallest memory there is, so that what the first pass allocates for good is there before.
        client.create_stream("warm-up", settings=StreamSettings(kv_budget_tokens=5))
        client.append("warm-up", text[:WARM_UP_CHARACTERS])
        empty = worker.memory_info().rss
        for index in range(num_streams):
            report.progress(f"budget {settings.kv_budget_tokens}: stream {index + 1} of {num_streams}")
            client.create_stream(f"stream-{index}", settings=stream_settings)
            client.append(f"stream-{index}", text)
        return int(worker.memory_info().rss) - int(empty)


def a_state(directory: Path, settings: MemorySettings, policy: EvictionPolicy | None) -> MemoryState:
    """Of the model's shape."""
    statistics = policy.statistics if policy is not None else None
    return MemoryState(load_config(directory), settings, Dtypes.for_this_machine().kv, statistics)


if __name__ == "__main__":
    main()
