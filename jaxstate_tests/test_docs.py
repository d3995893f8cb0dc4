"""The examples of the README and of the documentation run, each file from top to bottom."""

import ast
import os
import pathlib
import re
import subprocess
import sys
import tomllib
import venv

import pytest

import jaxstate

ROOT = pathlib.Path(__file__).parents[1]
# The page of errors is made of programs that the tests of errors run: most of them fail.
PAGES = [
    ROOT / "README.md",
    *sorted(p for p in (ROOT / "docs").glob("*.md") if p.name != "errors.md"),
    ROOT / "jaxstate/README.md",
]


def python_source(path):
    """The code of a page, each line where it is in the page."""
    lines, inside = [], False
    for line in path.read_text().splitlines():
        inside = inside and line != "```"
        lines.append(line if inside else "")
        inside = inside or line == "```python"
    return "\n".join(lines)


def statements(path):
    source = python_source(path)
    return source.splitlines(), ast.parse(source, str(path)).body


FILES = [path for path in PAGES if python_source(path).strip()]
FIRST_STEPS = [
    ROOT / "docs" / f"{name}.md"
    for name in ("index", "quickstart", "recipes", "gallery", "coming_from", "faq")
]
# A comment below what prints is what it prints.
SHOW_OUTPUT = [path for path in FILES if path.parent == ROOT / "docs"]


def comment_after(lines, number):
    """The lines of the comment that follows line ``number``."""
    found = []
    for line in lines[number:]:
        if not line.startswith("#"):
            break
        found.append(line[2:].rstrip())
    return found


@pytest.mark.leaks_allowed("examples show errors, whose tracebacks hold tracers")
@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_examples_run(path, capsys, monkeypatch, tmp_path):
    """And print what they show. They find the folder of examples, and may write files."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    lines, body = statements(path)
    for statement in body:
        exec(compile(ast.Module([statement], []), str(path), "exec"), namespace)
        printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        if printed and path in SHOW_OUTPUT:
            shown = comment_after(lines, statement.end_lineno)
            assert shown == printed, f"{path.name}, line {statement.lineno}"


@pytest.mark.leaks_allowed("NetKet keeps what it has traced")
def test_the_recipe_for_netket():
    pytest.importorskip("netket", reason="NetKet is large, and no other test needs it")
    page = (ROOT / "docs" / "recipes.md").read_text()
    imports = page.partition("```python\n")[2].partition("```")[0]
    [program] = re.findall("^```py\n(.*?)^```", page, flags=re.M | re.S)
    exec(imports + program, {})


@pytest.mark.parametrize("path", FIRST_STEPS, ids=lambda p: p.name)
def test_a_page_says_how_to_install_what_it_imports(path):
    installed = {"jax", "jaxstate", "numpy", *sys.stdlib_module_names}
    for line in re.findall(r"^pip install (.*)$", path.read_text(), flags=re.M):
        installed |= {name.replace("-", "_").partition("_checkpoint")[0] for name in line.split()}
    imported = set()
    for statement in ast.walk(ast.parse(python_source(path))):
        if isinstance(statement, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            imported.add(statement.module.partition(".")[0])
    assert imported <= installed


@pytest.mark.parametrize("module", [jaxstate, jaxstate.random, jaxstate.extend])
def test_every_public_name_is_on_the_page_of_the_api(module):
    page = (ROOT / "docs" / "api.md").read_text()
    if f".. automodule:: {module.__name__}\n   :members:" in page:
        return  # all of them
    shown = set(re.findall(r"^\.\. auto\w+:: ([\w.]+)", page, flags=re.M))
    names = {f"{module.__name__}.{name}" for name in module.__all__}
    modules = {"jaxstate.random", "jaxstate.extend"}
    assert names - modules - shown == set()


@pytest.mark.slow
@pytest.mark.leaks_allowed("runs in processes of its own")
def test_by_copying_from_the_front_page_to_a_model_that_is_trained_saved_and_loaded(tmp_path):
    """In a new virtual environment: the commands of both pages, and each page as one program."""
    venv.create(tmp_path / "venv", with_pip=True)
    path = f"{tmp_path / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PATH": path}

    def run(command, folder):
        done = subprocess.run(
            command, shell=True, cwd=folder, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    for name in ("index", "quickstart"):
        page = ROOT / "docs" / f"{name}.md"
        commands = re.findall("^```sh\n(.*?)^```$", page.read_text(), flags=re.M | re.S)
        assert commands
        for command in commands:
            run(command, ROOT)
        lines, body = statements(page)
        program = tmp_path / f"{name}.py"
        program.write_text("\n".join(lines))
        shown = [line for statement in body for line in comment_after(lines, statement.end_lineno)]
        printed = run(f"python -W error {program.name}", tmp_path).splitlines()
        assert [line.rstrip() for line in printed] == shown
    assert (tmp_path / "net.safetensors").is_file()


def test_the_source_distribution_has_what_the_tests_read():
    with (ROOT / "pyproject.toml").open("rb") as file:
        targets = tomllib.load(file)["tool"]["hatch"]["build"]["targets"]
    included = {name.strip("/") for name in targets["sdist"]["include"]} | {"pyproject.toml"}
    tests = "".join(path.read_text() for path in (ROOT / "jaxstate_tests").rglob("*.py"))
    read = set(re.findall(r"(?:ROOT|parents\[[12]\]) / [\"']([\w.]+)", tests))
    assert {"README.md", "docs"} <= read
    assert read <= included


def test_the_readme_of_the_package_index_has_no_links_to_files():
    """There it stands without the files beside it: links become their text, images go."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        readme = tomllib.load(file)["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    assert readme["fragments"] == [{"path": "README.md"}]
    text = before = (ROOT / "README.md").read_text() + "![a](b.png) [c](https://d.e) [f](#g)"
    for substitution in readme["substitutions"]:
        text = re.sub(substitution["pattern"], substitution["replacement"], text)
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links == [x for x in re.findall(r"\]\(([^)]*)\)", before) if x[0] == "#" or ":" in x]
    assert "- Quickstart, Recipes, Coming from Haiku" in text and "[Quickstart](" in before


def test_the_readme_has_an_example():
    assert python_source(ROOT / "README.md").strip()
