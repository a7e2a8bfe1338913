"""The rules of the tree that no reviewer should have to remember."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = [ROOT / "services" / "eunoe", ROOT / "kernels" / "eunoe_kernels"]
GENERATED = [ROOT / "services" / "eunoe" / "api" / "v1", ROOT / "services" / "eunoe" / "internal" / "v1"]
MAX_LINES = 500
MEANINGLESS_NAMES = re.compile(r"util|helper|manager|common|misc")
# llvmlite is numba's code generator: its @intrinsic functions are written in it.
KERNEL_IMPORTS = {"torch", "triton", "numba", "llvmlite", "numpy", "eunoe_kernels"}
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
DOCUMENTS = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "examples/README.md"]


def hand_written(*roots: Path) -> Iterator[Path]:
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            if not any(path.is_relative_to(generated) for generated in GENERATED):
                yield path


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def heading_anchors(document: str) -> set[str]:
    """The anchors that GitHub gives to a document's headings."""
    titles = re.findall(r"^#+ (.+)$", document, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_packages_import_only_what_they_may():
    result = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )

    assert result.returncode == 0, result.stdout


def test_kernels_import_nothing_but_array_libraries():
    imported = set()
    for path in hand_written(ROOT / "kernels"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add("eunoe_kernels" if node.level else (node.module or "").split(".")[0])

    assert imported - KERNEL_IMPORTS - sys.stdlib_module_names == set()


def test_generated_code_is_compiled_and_not_in_git():
    protos = [path.relative_to(ROOT / "protos") for path in (ROOT / "protos").rglob("*.proto")]
    modules = [ROOT / "services" / path.with_name(f"{path.stem}_pb2.py") for path in protos]
    ignored = subprocess.run(["git", "check-ignore", *modules], cwd=ROOT, capture_output=True, text=True)
    if ignored.returncode == 128:
        pytest.skip("not a git checkout")

    assert [module for module in modules if not module.exists()] == []
    assert len(ignored.stdout.splitlines()) == len(modules) > 0


def test_files_are_named_after_what_they_hold():
    paths = [path for root in CODE for path in root.rglob("*") if path.is_dir() or path.suffix == ".py"]

    assert [relative(path) for path in paths if MEANINGLESS_NAMES.search(path.stem)] == []


def test_no_file_is_too_long_to_read():
    paths = hand_written(*CODE, *(ROOT / name for name in ("protos", "tests", "benchmarks")))

    assert {relative(path) for path in paths if len(path.read_text().splitlines()) > MAX_LINES} == set()


def test_every_package_says_what_it_is():
    packages = {path.parent for path in hand_written(*CODE)}
    undocumented = {
        relative(package)
        for package in packages
        if not (package / "__init__.py").exists()
        or not ast.get_docstring(ast.parse((package / "__init__.py").read_text()))
    }

    assert undocumented == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    path = ROOT / document
    text = path.read_text()
    dead = []
    for target in LINK.findall(text):
        file, _, anchor = target.partition("#")
        if "://" in target:
            continue
        linked = path.parent / file if file else path
        if not linked.exists() or (
            anchor and linked.suffix == ".md" and anchor not in heading_anchors(linked.read_text())
        ):
            dead.append(target)

    assert dead == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_functions_stand_in_the_files_they_link_to(document):
    path = ROOT / document
    missing = []
    for names, target in re.findall(r"\[`([\w.]+)(?:\(\))?`\]\(([^)\s#]+\.py)\)", path.read_text()):
        *_, name = names.split(".")
        if (
            name != "py"
            and (path.parent / target).exists()
            and not re.search(rf"\b{name}\b", (path.parent / target).read_text())
        ):
            missing.append(f"{names} in {target}")

    assert missing == []
