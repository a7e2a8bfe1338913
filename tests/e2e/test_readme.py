"""The README's Python examples, run in their order against a running platform."""

import re
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"


def test_examples_of_the_readme_run(platform, tmp_path, monkeypatch):
    examples = re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.DOTALL | re.MULTILINE)
    monkeypatch.setenv("EUNOE_ADDRESS", platform.address)
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("And God remembered Noah, and every living thing that was with him in the ark.\n" * 100)

    for example in examples:
        exec(compile(example, str(README), "exec"), {"__name__": "__main__"})

    assert examples
