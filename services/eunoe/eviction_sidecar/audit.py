"""The audit log: one JSON line an eviction, what left a stream's window for good, when and by which policy.

    {"time": "2026-11-26T01:02:03.456Z", "stream": "tenants/t/streams/s", "segment": 17, "policy": "namm/1/0f...",
     "slots_before": 1536, "slots_after": 1024, "dropped": [[812, 815], [901, 901], ...]}

`dropped` are runs [first, last] of positions that no layer and head keeps any more: from then on the model cannot see
the token at all. What single heads drop is a hundred times as much, and can be had by folding the log again. A segment
that was folded again after a crash is there twice; a fallback names its reason in `policy`.
"""

import json
import logging
import os
import time
from contextlib import suppress
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path

from eunoe.internal.v1 import eviction_sidecar_pb2 as pb
from eunoe.runtime.errors import Unavailable

logger = logging.getLogger(__name__)


class AuditLog:
    """Writes evictions to a file that is rotated by its size. Safe to use from any thread.

    Args:
        path: Of the newest lines.
        max_bytes: Of a file.
        num_files: With the newest.
    """

    def __init__(self, path: Path, max_bytes: int, num_files: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handler = _Lines(path, maxBytes=max_bytes, backupCount=num_files - 1, delay=True)
        self._is_failing = False

    def write(self, eviction: pb.RecordEvictionRequest) -> None:
        """Write one line.

        Raises:
            Unavailable: If it cannot be written, as on a full disk.
        """
        seconds, nanoseconds = divmod(eviction.time_ns, 10**9)
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{nanoseconds // 10**6:03d}Z"
        line = json.dumps(
            {
                "time": moment,
                "stream": eviction.stream,
                "segment": eviction.segment,
                "policy": eviction.policy,
                "slots_before": eviction.num_slots_before,
                "slots_after": eviction.num_slots_after,
                "dropped": [*zip(eviction.dropped_first, eviction.dropped_last, strict=True)],
            },
            separators=(",", ":"),
        )
        try:
            self._handler.handle(logging.makeLogRecord({"msg": line}))
        except OSError as error:
            if not self._is_failing:
                logger.error("evictions are not recorded", extra={"problem": str(error)})
            self._is_failing = True
            raise Unavailable(f"the audit log cannot be written: {error}") from error
        self._is_failing = False

    def close(self) -> None:
        """Close the file."""
        self._handler.close()


class _Lines(RotatingFileHandler):
    """Raises what its base prints and forgets."""

    def handleError(self, record: logging.LogRecord) -> None:
        # A file that failed holds back what it could not write, or is closed: the next line gets it opened anew.
        stream, self.stream = self.stream, None
        if stream is not None:
            with suppress(OSError):
                stream.close()
        raise

    def _open(self) -> TextIOWrapper:
        """The file; what a full disk or the end of a process has cut off there stays a line of its own."""
        stream = super()._open()
        if stream.seekable() and stream.tell():
            with open(self.baseFilename, "rb") as file:
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    stream.write("\n")
        return stream
