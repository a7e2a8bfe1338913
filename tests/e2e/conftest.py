"""The whole platform with two workers and a tiny model, once for all tests of this folder."""

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from eunoe.cli.main import main
from eunoe.client import Client
from eunoe.decoder.tiny import write_tiny_model
from eunoe.embedded.platform import Platform


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test of the folder also waits for the platform; those that break it come last."""
    for item in items:
        if item.path.parent == Path(__file__).parent and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(180))
    items.sort(key=lambda item: item.path == Path(__file__).parent / "test_restart.py")


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    code: int
    output: str
    error: str

    @property
    def json(self) -> dict[str, Any]:
        """Its only JSON object."""
        (value,) = self.json_lines
        return value

    @property
    def json_lines(self) -> list[dict[str, Any]]:
        """Its JSON objects, one a line."""
        return [json.loads(line) for line in self.output.splitlines()]


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model "tiny"."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    write_tiny_model(directory)
    return directory


@pytest.fixture(scope="session")
def platform(tmp_path_factory: pytest.TempPathFactory, model_directory: Path) -> Iterator[Platform]:
    """Two workers that serve the model "tiny"."""
    with Platform(home=tmp_path_factory.mktemp("home"), model=model_directory, workers=2, threads=1) as platform:
        yield platform


@pytest.fixture(scope="session")
def client(platform: Platform) -> Iterator[Client]:
    """A client of the platform."""
    with Client(platform.address) as client:
        yield client


@pytest.fixture
def eunoe(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Finished]:
    """Runs the `eunoe` command on the platform, in this process: starting another takes longer than most commands."""
    monkeypatch.setenv("EUNOE_HOME", str(platform.home))
    monkeypatch.delenv("EUNOE_ADDRESS", raising=False)

    def run(*arguments: str, text: str = "") -> Finished:
        monkeypatch.setattr(sys, "argv", ["eunoe", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        output, error = io.StringIO(), io.StringIO()
        with (
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(error),
            pytest.raises(SystemExit) as ended,
        ):
            main()
        assert isinstance(ended.value.code, int)
        return Finished(ended.value.code, output.getvalue(), error.getvalue())

    return run
