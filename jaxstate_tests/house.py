"""Prints how large the package is, how its files depend on each other, and on JAX:

python -m jaxstate_tests.house
"""

import collections

from jaxstate._src import _jax
from jaxstate._src._jax import versions
from jaxstate_tests.test_layering import FILES, FLOORS, PACKAGE, imported_modules, module_name


def folder_of(name):
    return name.partition(".")[0] if name.partition(".")[0] in FLOORS else ""


def main():
    lines, files, longest = collections.Counter(), collections.Counter(), (0, "")
    arrows, inner = set(), 0
    for path in FILES:
        name = module_name(path)
        n = len(path.read_text().splitlines())
        lines[folder_of(name)] += n
        files[folder_of(name)] += 1
        longest = max(longest, (n, str(path.relative_to(PACKAGE))))
        for other in set(imported_modules(path)):
            if folder_of(other) == folder_of(name):
                inner += 1
            else:
                arrows.add((folder_of(name), folder_of(other), name, other))
    print("lines by folder")
    for floor in FLOORS:
        print(f"  {floor or '__init__':10} {lines[floor]:6} in {files[floor]} files")
    print(f"  {'all':10} {sum(lines.values()):6} in {len(FILES)} files")
    print(f"  the longest file: {longest[1]}, {longest[0]} lines")
    folders = {(a, b) for a, b, *_ in arrows}
    depth = {}
    for floor in FLOORS:
        depth[floor] = 1 + max((depth[b] for a, b in folders if a == floor), default=0)
    print(f"floors: {max(depth.values())}")
    print(f"arrows: {len(folders)} between folders, {len(arrows) + inner} between files")
    here = [row for row in _jax.TABLE if row.since <= _jax.VERSION < row.until]
    by_group = collections.Counter(row.group.name for row in here)
    print(f"changes to JAX: {len(here)} ({', '.join(f'{n} {g}' for g, n in by_group.items())})")
    print(f"internals of JAX used: {sum(map(len, versions.USED.values()))}")


if __name__ == "__main__":
    main()
