"""Coverage-guided fuzzing of everything that reads bytes from outside: no input may do more than be refused.

    python tests/faults/fuzzing.py --target state --runs 250000 --seed 1

A target is a function of bytes that returns, or raises, which is a finding: refusals of the documented kind end in it.
Needs atheris.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MAX_INPUT_BYTES = 4096
RSS_LIMIT_MIB = 2048

Target = Callable[[bytes], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class FuzzFigures:
    """Executions and findings; `output` of the targets that found something."""

    executions_by_target: dict[str, int]
    num_crashes: int
    output: str
    seconds: float

    @property
    def num_executions(self) -> int:
        """Of all targets."""
        return sum(self.executions_by_target.values())


def fuzz(runs_by_target: dict[str, int], seed: int) -> FuzzFigures:
    """Fuzz each target in a process of its own, whose memory is capped."""
    start = time.monotonic()
    executions, num_crashes, output = {}, 0, ""
    for target, num_runs in runs_by_target.items():
        command = [sys.executable, __file__, "--target", target, "--runs", str(num_runs), "--seed", str(seed)]
        with tempfile.TemporaryDirectory() as directory:
            ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=directory)
        found = re.search(r"stat::number_of_executed_units:\s+(\d+)", ended.stderr)
        executions[target] = int(found[1]) if found else 0
        if ended.returncode != 0:
            num_crashes += 1
            output += f"{target}:\n{ended.stderr[-4000:]}\n"
    return FuzzFigures(
        executions_by_target=executions, num_crashes=num_crashes, output=output, seconds=time.monotonic() - start
    )


def state_target() -> tuple[Target, list[bytes]]:
    """Chunks of a memory state; every other input gets right digests, so that what lies behind them is reached."""
    import torch
    import xxhash

    from eunoe.decoder import state_codec
    from eunoe.decoder.config import Dtypes
    from eunoe.decoder.memory_state import MemorySettings, MemoryState
    from eunoe.decoder.tiny import tiny_config
    from eunoe.runtime.errors import CorruptState, UnknownVersion

    torch.set_num_threads(1)
    config, dtypes = tiny_config(), Dtypes.float32()
    settings = MemorySettings(kv_budget_tokens=2, segment_length=2, num_sink_tokens=1)
    state = MemoryState(config, settings, dtypes.kv)
    empty = state_codec.encode(state)[0]
    state.num_tokens = state.num_slots = 2
    full = state_codec.encode(state)[0]
    header_bytes = state_codec._HEADER.size

    def target(data: bytes) -> None:
        if data[:1] == b"E" and len(data) >= header_bytes:
            payload = data[header_bytes:]
            header = data[: header_bytes - 16] + xxhash.xxh3_128_digest(payload)
            data = header + xxhash.xxh3_128_digest(header) + payload
        cut = len(data) // 2
        with suppress(CorruptState, UnknownVersion):
            decoded = state_codec.decode([data[:cut], data[cut:]], config, settings, dtypes)
            assert b"".join(state_codec.encode(decoded)) == data, "another state was read than was written"

    return target, [empty, full, full[:header_bytes] + full[header_bytes + 16 :]]


def record_target() -> tuple[Target, list[bytes]]:
    """Records of any bytes, cut anywhere: tokens depend on the bytes alone, and what is refused changes nothing."""
    from eunoe.decoder.log_tokenizer import LogTokenizer
    from eunoe.decoder.tokenizer import load_tokenizer, write_tiny_tokenizer
    from eunoe.gateway.append import check_token_ids
    from eunoe.runtime.errors import EunoeError
    from eunoe.state_store import log_rules
    from eunoe.state_store.metadata import Settings, StreamMetadata

    with tempfile.TemporaryDirectory() as directory:
        write_tiny_tokenizer(Path(directory))
        tokenizer = load_tokenizer(directory)
    stream = StreamMetadata(
        name="tenants/t/streams/a", uid="u", model="m", settings=Settings(64, 16, 4, 2, False), create_time_ns=0
    )

    def target(data: bytes) -> None:
        num_cuts, rest = (data[0] % 8, data[1:]) if data else (0, b"")
        cuts, text = sorted(rest[:num_cuts]), rest[num_cuts:]
        metadata, taken, offset = stream, [], 0
        ends = [*(min(cut, len(text)) for cut in cuts), len(text)]
        for begin, end in zip([0, *ends], ends, strict=False):
            event = log_rules.Append(offset=offset, data=text[begin:end], kind=1 + (begin == 3 and num_cuts == 7))
            with suppress(EunoeError):
                log_rules.check_append(event)
                if event.kind == log_rules.KIND_TOKEN_IDS:
                    check_token_ids(event.data, tokenizer.vocab_size)
                appended = log_rules.append(metadata, event, max_backlog_bytes=1 << 20)
                (metadata,) = appended.change.records
                taken.append(event)
                offset = metadata.accepted_offset
        whole, parts = LogTokenizer(tokenizer), LogTokenizer(tokenizer)
        for event in taken:
            parts.feed(event.data, "text" if event.kind == 1 else "token_ids")
        if all(event.kind == 1 for event in taken):
            whole.feed(b"".join(event.data for event in taken), "text")
            assert whole.close_copy().tolist() == parts.close_copy().tolist(), "tokens depend on the cuts"

    return target, [b"\x03\x02\x05\x09some text, \xc3\xa4 and more", b"\x07" + bytes(range(7)) + b"\0\1\0\0" * 9]


def metadata_target() -> tuple[Target, list[bytes]]:
    """A stream's record, members of a log's index, sealed values; records get a right digest."""
    import xxhash

    from eunoe.runtime.errors import CorruptState, KeyUnavailable, UnknownVersion
    from eunoe.state_store.metadata import Settings, StreamMetadata
    from eunoe.state_store.metadata_codec import decode, encode
    from eunoe.state_store.sealing import CipherSeal, DigestSeal, Keyring
    from eunoe.state_store.transactions import member_as_entry

    settings = Settings(64, 16, 4, 2, False)
    record = StreamMetadata(name="tenants/t/streams/a", uid="u", model="m", settings=settings, create_time_ns=0)
    seals, keyring = (DigestSeal(), CipherSeal(bytes(32))), Keyring(bytes(32))

    def target(data: bytes) -> None:
        with suppress(CorruptState, UnknownVersion):
            encode(decode(xxhash.xxh3_128_hexdigest(data).encode() + data))
        with suppress(CorruptState):
            member_as_entry(data.decode(errors="replace"), 4)
        for seal in seals:
            with suppress(CorruptState):
                seal.open("a", data)
        with suppress(KeyUnavailable):
            keyring.seal("t", data.hex() or "00")

    return target, [encode(record)[32:], b"0:1:0:" + b"ab" * 16, DigestSeal().close("a", b"value")]


def export_target() -> tuple[Target, list[bytes]]:
    """An export's bytes in two pieces; frames get right checksums, their payloads are read as messages."""
    import google_crc32c
    from google.protobuf.message import DecodeError

    from eunoe.gateway.export_format import MAGIC, FrameKind, FrameReader, frame
    from eunoe.internal.v1 import state_store_pb2 as pb
    from eunoe.runtime.errors import BadExport

    messages = {
        FrameKind.HEADER: pb.StreamRecord,
        FrameKind.CHUNK: pb.ReadChunksResponse,
        FrameKind.RECORD: pb.ReadLogResponse,
    }

    def target(data: bytes) -> None:
        body, cut = data[1:], data[0] if data else 0
        if cut % 2 and len(body) > 4:
            body = MAGIC + body[:-4] + google_crc32c.value(body[:-4]).to_bytes(4, "little")
        reader = FrameReader()
        with suppress(BadExport, DecodeError):
            for piece in (body[:cut], body[cut:]):
                for kind, payload in reader.feed(piece):
                    if kind in messages:
                        messages[kind].FromString(payload)

    whole = MAGIC + frame(FrameKind.HEADER, pb.StreamRecord().SerializeToString()) + frame(FrameKind.END)
    return target, [b"\x08" + whole, b"\x09" + frame(FrameKind.HEADER, b"\x0a\x00")]


TARGETS: dict[str, Callable[[], tuple[Target, list[bytes]]]] = {
    "state": state_target,
    "record": record_target,
    "metadata": metadata_target,
    "export": export_target,
}


def main() -> None:
    """Fuzz one target until its runs are done; a finding ends the process with another status than 0."""
    import atheris

    parser = argparse.ArgumentParser(description="fuzz one target")
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with atheris.instrument_imports(include=["eunoe"]):
        target, seeds = TARGETS[options.target]()
    with tempfile.TemporaryDirectory() as corpus:
        for index, seed in enumerate(seeds):
            (Path(corpus) / str(index)).write_bytes(seed)
        limits = [f"-runs={options.runs}", f"-seed={options.seed}", f"-max_len={MAX_INPUT_BYTES}"]
        limits += [f"-rss_limit_mb={RSS_LIMIT_MIB}", "-timeout=20", "-print_final_stats=1", "-verbosity=0"]
        atheris.Setup([sys.argv[0], *limits, corpus], target)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
