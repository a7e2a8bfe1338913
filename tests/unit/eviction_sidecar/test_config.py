import pytest

from eunoe.eviction_sidecar.config import EvictionSidecarConfig


@pytest.mark.parametrize(
    "wrong",
    [
        {"listen_address": "127.0.0.1:0"},
        {"reload_seconds": 0.0},
        {"num_audit_files": 1},
        {"audit_file_bytes": 0},
        {"audit_file_bytes": -1},
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_with_their_name(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EvictionSidecarConfig(**{"listen_address": "unix:/tmp/socket"} | wrong)  # type: ignore[arg-type]
