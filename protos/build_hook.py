"""Compiles protos/**/*.proto into services/, at every install and by `make protos`.

A proto package is its directory is its Python package (`eunoe.api.v1`), so that generated imports need no rewriting.
"""

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PROTO_ROOT = Path(__file__).resolve().parent
OUTPUT_ROOT = PROTO_ROOT.parent / "services"


def compile_protos() -> None:
    """Write `*_pb2.py`, `*_pb2.pyi` and `*_pb2_grpc.py` beside each other under services/eunoe/."""
    import importlib.resources

    from grpc_tools import protoc

    well_known = importlib.resources.files("grpc_tools") / "_proto"
    common = Path(next(iter(importlib.import_module("google.rpc").__path__))).parent.parent
    sources = sorted(str(path) for path in PROTO_ROOT.rglob("*.proto"))
    arguments = [
        "protoc",
        f"-I{PROTO_ROOT}",
        f"-I{well_known}",
        f"-I{common}",
        f"--python_out={OUTPUT_ROOT}",
        f"--pyi_out={OUTPUT_ROOT}",
        f"--grpc_python_out={OUTPUT_ROOT}",
        *sources,
    ]
    if protoc.main(arguments) != 0:
        raise SystemExit("protoc failed")
    for directory in {Path(source).parent.relative_to(PROTO_ROOT) for source in sources}:
        (OUTPUT_ROOT / directory / "__init__.py").write_text('"""Generated from protos/; never edited."""\n')


class CustomBuildHook(BuildHookInterface):
    """hatchling calls this for wheels and editable installs alike."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the protos before files are collected."""
        compile_protos()


if __name__ == "__main__":
    sys.exit(compile_protos())
