"""Finds what `jaxstate._src._jax` uses of JAX's internals, and writes its `internals.py`.

python -m jaxstate_tests.internals dump > 0.12.0.1.json      with every supported JAX
python -m jaxstate_tests.internals write *.json              once
"""

from __future__ import annotations

import ast
import importlib
import json
import pathlib
import sys

FOLDER = pathlib.Path(__file__).parents[1] / "jaxstate" / "_src" / "_jax"


def used_names() -> dict[str, set[str]]:
    """The names that the files of the folder take from each module of ``jax._src``."""
    found: dict[str, set[str]] = {}
    for path in sorted(FOLDER.glob("*.py")):
        if path.name != "internals.py":
            _collect(ast.parse(path.read_text()), found)
    return found


def _collect(tree: ast.Module, found: dict[str, set[str]]) -> None:
    modules = {"flattree": "jax._src.flattree"}  # `names` hands it to the other files
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jax._src"):
            for alias in node.names:
                if _is_module(f"{node.module}.{alias.name}"):
                    modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                    found.setdefault(f"{node.module}.{alias.name}", set())
                else:
                    found.setdefault(node.module, set()).add(alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            chain = [node.attr]
            base = node.value
            while isinstance(base, ast.Attribute):
                chain.append(base.attr)
                base = base.value
            if isinstance(base, ast.Name) and base.id in modules:
                names = [name for name in reversed(chain) if not name.startswith("__")]
                if names:
                    found.setdefault(modules[base.id], set()).add(names[0])
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
            base, name = node.args[0], node.args[1]
            if isinstance(base, ast.Name) and base.id in modules and isinstance(name, ast.Constant):
                found[modules[base.id]].add(name.value)


def _is_module(name: str) -> bool:
    if name == "jax._src.flattree":  # which JAX 0.10 does not have
        return True
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def dump() -> dict[str, dict[str, str]]:
    """What of that this version of JAX has, with the parameters of functions."""
    from jaxstate._src._jax.versions import parameters_of

    found: dict[str, dict[str, str]] = {}
    for module, names in used_names().items():
        try:
            there = importlib.import_module(module)
        except ImportError:
            continue
        has = [name for name in sorted(names) if hasattr(there, name)]
        found[module] = {name: parameters_of(getattr(there, name)) or "" for name in has}
    return found


def merged(dumps: dict[str, dict[str, dict[str, str]]]) -> dict[str, dict[str, str]]:
    """Which versions have each name: all, those before 0.11, those since; and its parameters."""
    versions = sorted(dumps, key=lambda v: [*map(int, v.split("."))])
    result: dict[str, dict[str, str]] = {}
    for module, names in used_names().items():
        for name in sorted(names) or [""]:
            there = [
                v for v in versions
                if module in dumps[v] and (not name or name in dumps[v][module])
            ]  # fmt: skip
            known = {dumps[v][module].get(name, "") for v in there}
            when = next(
                text
                for text, those in {
                    "": versions,
                    "<0.11": [v for v in versions if v < "0.11"],
                    ">=0.11": [v for v in versions if v >= "0.11"],
                    ">=0.11 <0.12": [v for v in versions if "0.11" <= v < "0.12"],
                    "<0.12": [v for v in versions if v < "0.12"],
                    ">=0.12": [v for v in versions if v >= "0.12"],
                    "no": [],
                }.items()
                if those == there
            )
            result.setdefault(module, {})[name] = f"{when}: {' | '.join(sorted(known))}"
    return result


def _broken(text: str) -> list[str]:
    """A text as literals that fit into lines."""
    words, lines = text.split(" "), [""]
    for word in words:
        if len(lines[-1]) + len(word) > 80:
            lines.append("")
        lines[-1] += f"{word} "
    lines[-1] = lines[-1][:-1]
    return [f'            "{line}"' for line in lines]


def main() -> None:
    import jax

    if sys.argv[1] == "dump":
        print(json.dumps({jax.__version__: dump()}))
        return
    dumps = {}
    for path in sys.argv[2:]:
        dumps.update(json.loads(pathlib.Path(path).read_text()))
    file = FOLDER / "internals.py"
    head = file.read_text().partition("USED: ")[0]
    lines = ["USED: dict[str, dict[str, str]] = {"]
    for module, names in sorted(merged(dumps).items()):
        lines.append(f'    "{module}": {{')
        for name, text in names.items():
            line = f'        "{name}": "{text}",'
            lines += (
                [line]
                if len(line) <= 100
                else [f'        "{name}": (', *_broken(text), "        ),"]
            )
        lines.append("    },")
    file.write_text(head + "\n".join([*lines, "}", ""]))


if __name__ == "__main__":
    main()
