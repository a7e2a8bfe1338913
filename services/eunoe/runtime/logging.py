"""Logs of a process: one line an event, a constant sentence plus fields, as JSON or plain text.

Never log what users sent: no bytes of records, prompts, answers or tokens. An exception is logged by type and frames;
its message stays out, because messages of foreign libraries quote their input.
"""

import json
import logging
import sys
import time
import traceback
from typing import Literal

LogFormat = Literal["plain", "json"]

_STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class LineFormatter(logging.Formatter):
    """Formats a record as one line: JSON, or `time LEVEL logger: sentence key=value ...`."""

    def __init__(self, log_format: LogFormat) -> None:
        super().__init__()
        self._is_json = log_format == "json"

    def format(self, record: logging.LogRecord) -> str:
        values = {name: value for name, value in vars(record).items() if name not in _STANDARD_FIELDS}
        if record.exc_info and record.exc_info[1] is not None:
            values |= _described(record.exc_info[1])
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        if self._is_json:
            head = {"time": moment, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
            return json.dumps(head | values, default=str)
        tail = "".join(f" {name}={value}" for name, value in values.items())
        return f"{moment} {record.levelname} {record.name}: {record.getMessage()}{tail}"


def configure_logging(log_format: str = "plain", level: str = "INFO") -> None:
    """Send every logger's records to stderr in one format. Called once, at the start of a process.

    Raises:
        ValueError: If the format is neither "plain" nor "json".
    """
    if log_format not in ("plain", "json"):
        raise ValueError(f"log format {log_format!r} is neither 'plain' nor 'json'")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter("json" if log_format == "json" else "plain"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())


def _described(error: BaseException) -> dict[str, str]:
    frames = traceback.extract_tb(error.__traceback__)
    return {
        "exception": type(error).__name__,
        "frames": " < ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames)),
    }
