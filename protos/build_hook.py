"""Compiles protos/**/*.proto into services/, at every install and by `make protos`.

A proto package is its directory is its Python package (`eunoe.api.v1`), so that generated imports need no rewriting.
`python protos/build_hook.py --image FILE` writes all descriptors with their comments into one file instead: what buf
reads in `make lint`, because buf cannot find google/rpc/ in a Python wheel.
"""

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PROTO_ROOT = Path(__file__).resolve().parent
OUTPUT_ROOT = PROTO_ROOT.parent / "services"


def compile_protos() -> None:
    """Write `*_pb2.py`, `*_pb2.pyi` and `*_pb2_grpc.py` beside each other under services/eunoe/."""
    _protoc(f"--python_out={OUTPUT_ROOT}", f"--pyi_out={OUTPUT_ROOT}", f"--grpc_python_out={OUTPUT_ROOT}")
    for directory in {source.parent.relative_to(PROTO_ROOT) for source in _sources()}:
        (OUTPUT_ROOT / directory / "__init__.py").write_text('"""Generated from protos/; never edited."""\n')


def write_image(path: Path) -> None:
    """Write a FileDescriptorSet of all protos and their imports, comments included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _protoc("--include_imports", "--include_source_info", f"--descriptor_set_out={path}")


def _sources() -> list[Path]:
    return sorted(PROTO_ROOT.rglob("*.proto"))


def _protoc(*outputs: str) -> None:
    import importlib.resources

    from grpc_tools import protoc

    well_known = importlib.resources.files("grpc_tools") / "_proto"
    common = Path(next(iter(importlib.import_module("google.rpc").__path__))).parent.parent
    includes = [f"-I{PROTO_ROOT}", f"-I{well_known}", f"-I{common}"]
    if protoc.main(["protoc", *includes, *outputs, *map(str, _sources())]) != 0:
        raise SystemExit("protoc failed")


class CustomBuildHook(BuildHookInterface):
    """hatchling calls this for wheels and editable installs alike."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the protos before files are collected."""
        compile_protos()


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            compile_protos()
        case ["--image", path]:
            write_image(Path(path))
        case _:
            sys.exit("usage: build_hook.py [--image FILE]")
