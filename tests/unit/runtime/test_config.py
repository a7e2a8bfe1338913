from dataclasses import dataclass
from pathlib import Path

import pytest

from eunoe.runtime.config import from_env, to_env


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    address: str
    num_threads: int = 2
    ratio: float = 0.5
    is_on: bool = False
    ready_file: Path | None = None
    names: tuple[str, ...] = ()


def test_values_come_from_the_environment_and_the_rest_from_the_defaults() -> None:
    found = from_env(Config, "X", {"X_ADDRESS": "a:1", "X_NUM_THREADS": "7", "X_IS_ON": "true", "PATH": "/bin"})

    assert found == Config(address="a:1", num_threads=7, is_on=True)


def test_a_config_comes_back_from_the_environment_it_makes() -> None:
    config = Config(address="a:1", ratio=0.25, is_on=True, ready_file=Path("/tmp/x"), names=("b", "c"))

    assert from_env(Config, "X", to_env(config, "X")) == config


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "X_ADDRESS is not set"),
        ({"X_ADDRESS": "a:1", "X_NUM_THREADS": "4k"}, "X_NUM_THREADS='4k' is not an int"),
        ({"X_ADDRESS": "a:1", "X_IS_ON": "maybe"}, "X_IS_ON='maybe' is not a bool"),
        ({"X_ADDRESS": "a:1", "X_ADRESS": "b:1"}, "X_ADRESS is no setting of Config"),
    ],
)
def test_a_bad_environment_is_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_env(Config, "X", environment)
