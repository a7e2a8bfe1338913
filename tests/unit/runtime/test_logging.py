import json
import logging
import sys

import pytest

from eunoe.runtime.logging import LineFormatter, configure_logging


def a_record(*, with_exception: bool = False, **fields: object) -> logging.LogRecord:
    exc_info = None
    if with_exception:
        try:
            raise ValueError("the user's secret text")
        except ValueError:
            exc_info = sys.exc_info()
    record = logging.LogRecord("eunoe.test", logging.WARNING, __file__, 1, "commit was slow", None, exc_info)
    vars(record).update(fields)
    return record


def test_a_json_line_has_the_sentence_and_the_fields() -> None:
    line = json.loads(LineFormatter("json").format(a_record(stream="tenants/a/streams/b", commit_seconds=1.5)))

    assert line["message"] == "commit was slow"
    assert line["level"] == "WARNING"
    assert (line["stream"], line["commit_seconds"]) == ("tenants/a/streams/b", 1.5)


def test_a_plain_line_ends_with_the_fields() -> None:
    assert LineFormatter("plain").format(a_record(stream="s")).endswith("WARNING eunoe.test: commit was slow stream=s")


@pytest.mark.parametrize("log_format", ["json", "plain"])
def test_an_exception_is_logged_by_type_and_place_without_its_message(log_format: str) -> None:
    line = LineFormatter(log_format).format(a_record(with_exception=True))  # type: ignore[arg-type]

    assert "ValueError" in line
    assert "a_record" in line
    assert "secret" not in line
    assert "\n" not in line


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="xml"):
        configure_logging("xml")
