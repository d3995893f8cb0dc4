"""The examples of the README and of the documentation run, each file from top to bottom."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def python_blocks(path):
    return re.findall(r"^```python\n(.*?)^```$", path.read_text(), flags=re.M | re.S)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "jaxstate/README.md"]
FILES = [path for path in PAGES if python_blocks(path)]


@pytest.mark.leaks_allowed("examples show errors, whose tracebacks hold tracers")
@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_examples_run(path, capsys):
    source = "\n".join(python_blocks(path))
    namespace = {"__name__": "__main__"}
    exec(compile(source, str(path), "exec"), namespace)


def test_the_readme_has_an_example():
    assert python_blocks(ROOT / "README.md")
