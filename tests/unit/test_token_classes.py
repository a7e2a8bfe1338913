"""The classes of tokens that `benchmarks/eviction_token_classes.py` counts by."""

import importlib.util
from itertools import groupby
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def classes() -> ModuleType:
    """The module, which lies beside the benchmarks and in no package."""
    path = Path(__file__).parents[2] / "benchmarks" / "_token_classes.py"
    spec = importlib.util.spec_from_file_location("_token_classes", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parts(text: str, class_of_character: list[str]) -> list[tuple[str, str]]:
    """Each run of one class without its white space."""
    assert len(text) == len(class_of_character)
    runs = [
        "".join(c for c, _ in run) for _, run in groupby(zip(text, class_of_character, strict=True), lambda x: x[1])
    ]
    kinds = [kind for kind, _ in groupby(class_of_character)]
    return [(run, kind) for run, kind in zip(runs, kinds, strict=True) if kind != "white space"]


def test_code_is_told_apart_by_its_tokens(classes: ModuleType) -> None:
    source = 'def f(x):  # größer\n    """Doc\n    string."""\n    return x + 1\n'

    assert parts(source, classes.code_classes(source)) == [
        ("def", "keywords"),
        ("f", "identifiers"),
        ("(", "operators"),
        ("x", "identifiers"),
        ("):", "operators"),
        ("# größer", "comments"),
        ('"""Doc\n    string."""', "strings"),
        ("return", "keywords"),
        ("x", "identifiers"),
        ("+", "operators"),
        ("1", "numbers"),
    ]


def test_a_name_is_capitalised_inside_of_a_sentence_and_never_small(classes: ModuleType) -> None:
    text = "Ge1:1 And Noah said, Let them go. Rain fell 40 days, and they let Noah be."

    assert parts(text, classes.prose_classes(text)) == [
        ("Ge1:1", "verse marks"),
        ("And", "function words"),
        ("Noah", "names"),
        ("said", "content words"),
        (",", "punctuation"),
        ("Let", "function words"),
        ("them", "function words"),
        ("go", "content words"),
        (".", "punctuation"),
        ("Rain", "content words"),
        ("fell", "content words"),
        ("40", "numbers"),
        ("days", "content words"),
        (",", "punctuation"),
        ("and", "function words"),
        ("they", "function words"),
        ("let", "function words"),
        ("Noah", "names"),
        ("be", "function words"),
        (".", "punctuation"),
    ]


def test_a_token_has_the_class_of_most_of_its_bytes_that_are_no_white_space(classes: ModuleType) -> None:
    text = "größe = 1\n"
    pieces = [b"gr\xc3", b"\xb6\xc3\x9fe", b" =", b" 1", b"\n"]

    found = classes.token_classes(pieces, classes.code_classes(text), text)

    assert found == ["identifiers", "identifiers", "operators", "numbers", "white space"]
