"""The command line without a platform: usage, exit codes, start."""

import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from eunoe import eviction
from eunoe.api.v1 import long_context_pb2 as api
from eunoe.cli import local
from eunoe.cli.main import main
from eunoe.cli.output import to_json
from eunoe.embedded import models, platform
from eunoe.eviction.policy_files import PolicyFiles


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of `eunoe` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["eunoe", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    code = ended.value.code
    assert isinstance(code, int)
    return code


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["ask", "book"], 2, "Missing argument"),
        (["ask", "book", "Who?", "--max-tokens", "0"], 2, "--max-tokens"),
        (["rebuild", "book", "again"], 2, "--model"),
        (["nonsense"], 2, "nonsense"),
        (["--address", "nowhere", "streams"], 2, "host:port"),
        (["--address", "127.0.0.1:1", "streams"], 4, "nobody answers"),
        (["streams"], 4, "no platform runs here"),
        (["keys", "list"], 4, "no platform runs here"),
        (["up", "--model", "nonsense"], 4, "no model"),
        (["up", "--workers", "0"], 2, "--workers"),
        (["demo", "--model", "nonsense"], 2, "--model"),
        (["demo", "--model", "eunoe-nano", "--book"], 2, "--book"),
        (["train", "namm"], 2, "--out"),
        (["train", "namm", "--out", "run", "--covariance", "?"], 2, "--covariance"),
        (["train", "namm", "--out", "run", "--model", "nonsense"], 4, "no model"),
        # Before the model is looked for, and long before Ray starts.
        (["train", "namm", "--out", "run", "--model", "nonsense", "--cases", "20"], 2, "--cases 20 is too few"),
        (["train", "namm", "--out", "run", "--model", "nonsense", "--share", "25"], 2, "--share"),
        (["train", "namm", "--out", "run", "--model", "nonsense", "--share", "0"], 2, "--share"),
        (["train", "namm", "--out", "run", "--model", "nonsense", "--sigma", "0"], 2, "--sigma"),
        (["train", "namm", "--out", "run", "--model", "nonsense", "--sigma", "nan"], 2, "--sigma"),
        (["train", "namm", "--out", "run", "--model", "nonsense", "--reading-weight", "inf"], 2, "--reading-weight"),
        (["train", "namm", "--out", "run", "--model", "nonsense", "--start", "missing"], 2, "missing"),
        (["train", "novelty", "--out", "namm", "--model", "nonsense", "--attention", "nan"], 2, "--attention"),
        (["train", "novelty", "--out", "missing/namm", "--model", "nonsense"], 2, "--out missing/namm"),
        (["train", "novelty", "--out", ".", "--model", "nonsense"], 2, "--out ."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_an_error_is_one_line_with_its_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    code: int,
    reason: str,
) -> None:
    monkeypatch.setenv("EUNOE_HOME", str(tmp_path))
    monkeypatch.delenv("EUNOE_ADDRESS", raising=False)
    assert run(monkeypatch, *arguments) == code
    output, error = capsys.readouterr()
    assert output == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert reason in error


@pytest.mark.parametrize("arguments", [[], ["keys"]], ids=str)
def test_without_arguments_there_is_help_and_no_error_but_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert run(monkeypatch, *arguments) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert error.startswith("Usage: eunoe")


def test_wrong_usage_names_the_help_to_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "ask", "book")
    assert capsys.readouterr().err == "error: Missing argument 'QUESTION' (see `eunoe ask --help`)\n"


def test_a_file_that_cannot_be_read_is_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "import", "/nowhere/file", "new")
    run(monkeypatch, "export", "book", "/nowhere/file")
    assert (
        capsys.readouterr().err
        == "error: /nowhere/file: No such file or directory\nerror: /nowhere: No such directory\n"
    )


def test_status_and_down_work_where_nothing_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("EUNOE_HOME", str(tmp_path / "new"))
    assert run(monkeypatch, "status", "--json") == 4
    assert run(monkeypatch, "down", "--json") == 0
    assert capsys.readouterr().out == '{"is_running": false, "processes": []}\n{"was_running": false}\n'


def test_ask_starts_without_anything_heavy() -> None:
    heavy = ("torch", "ray", "numpy", "rich", "redis", "tokenizers")
    program = (
        "import sys, eunoe.cli.main, eunoe.cli.answers, eunoe.client, eunoe.embedded.home;"
        f"print(*(name for name in {heavy} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


def test_the_defaults_that_help_shows_are_the_platforms() -> None:
    assert (local.DEFAULT_MODEL, local.NANO_MODEL) == (models.DEFAULT_MODEL, models.NANO_MODEL)
    assert local.DEFAULT_PORT == platform.DEFAULT_PORT
    (option,) = get_type_hints(local.up, include_extras=True)["policy"].__metadata__
    trained, other = models.default_policy(models.DEFAULT_MODEL), models.default_policy("tiny")
    assert other == eviction.DEFAULT_POLICY.name
    assert option.help.endswith(f"Default: {trained} for the default model, else {other}.")
    assert PolicyFiles(None).named(trained).statistics is not None


def test_messages_become_json_with_numbers_and_plain_words() -> None:
    stream = api.Stream(name="n", tokens=2**40, settings=api.StreamSettings(positions=api.POSITION_MODE_COMPACT))
    stream.create_time.FromJsonString("2026-01-02T03:04:05Z")
    values = to_json(stream)
    assert values["tokens"] == 2**40
    assert values["settings"]["positions"] == "compact"
    assert values["create_time"] == "2026-01-02T03:04:05Z"
    assert values["state_digest"] == ""
    assert "expire_time" not in values
