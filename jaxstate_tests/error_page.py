"""Writes the page of errors: ``python -m jaxstate_tests.error_page``.

The catalogue (`error_catalogue.md`) has programs that are wrong, ``shows(error, program, *lines)``
with lines that the message has to have, and the mended programs. All of it is run, and on the page
are, in the place of each ``shows``, the call and the message as users see it.
"""

import ast
import pathlib
import re
import warnings

ROOT = pathlib.Path(__file__).parents[1]
CATALOGUE = ROOT / "jaxstate_tests/error_catalogue.md"
PAGE = ROOT / "docs/errors.md"
MADE_BY = (
    "<!-- Made from jaxstate_tests/error_catalogue.md by python -m jaxstate_tests.error_page. -->"
)


def shown(error):
    """What the end of a traceback says of an error; without what JAX says of its own frames."""
    notes = [n for n in getattr(error, "__notes__", ()) if "JAX_TRACEBACK_FILTERING" not in n]
    text = "\n".join([str(error), *notes])
    text = re.sub(r" at 0x[0-9a-f]+", "", text).replace(" (<lambda>)\n", " (<module>)\n")
    text = re.sub(rf"{re.escape(str(ROOT))}/(jaxstate/\S+\.py):\d+", r"\1", text)
    name = type(error).__name__
    module = type(error).__module__
    return f"{'jaxstate.' if module.startswith('jaxstate') else ''}{name}: {text}"


class Recorder:
    """``shows`` of the catalogue."""

    def __init__(self):
        self.messages = []

    def __call__(self, error, program, *lines):
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                program()
            assert issubclass(error, Warning) and warned, f"no {error.__name__}"
            raised = warned[0].message
        except error as found:
            raised = found.with_traceback(None)
        text = shown(raised)
        for line in lines:
            assert line in text, text
        # A message names a line of the program, which is a function that calls what is wrong.
        assert str(ROOT) not in text, text
        self.messages.append(text)


def calls_of_shows(statement):
    for node in ast.walk(statement):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "shows":
            yield node


def call_of(program, source):
    """The wrong program as one calls it."""
    if isinstance(program, ast.Lambda):
        first, *more = ast.get_source_segment(source, program.body).splitlines()
        return "\n".join([first, *(line[program.col_offset :] for line in more)])
    return f"{ast.unparse(program)}()"


def as_on_the_page(source, statement):
    """The lines of a statement, with calls in the place of ``shows``."""
    lines = source.splitlines()
    for node in sorted(calls_of_shows(statement), key=lambda n: -n.lineno):
        call = " " * node.col_offset + call_of(node.args[1], source)
        lines[node.lineno - 1 : node.end_lineno] = [call, *[None] * (node.end_lineno - node.lineno)]
    first = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", ()))])
    return [line for line in lines[first - 1 : statement.end_lineno] if line is not None]


def pieces(source, namespace):
    """The code of one block and the messages in it: pairs of language and text."""
    code, end = [], 0
    for statement in ast.parse(source).body:
        recorder = namespace["shows"] = Recorder()
        exec(compile(ast.Module([statement], []), "program.py", "exec"), namespace)
        first = min(
            [statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", ()))]
        )
        code += source.splitlines()[end : first - 1]  # comments and empty lines
        code += as_on_the_page(source, statement)
        end = statement.end_lineno
        if recorder.messages:
            yield "python", "\n".join(code).strip("\n")
            yield from (("text", message) for message in recorder.messages)
            code = []
    code += source.splitlines()[end:]
    if any(line.strip() for line in code):
        yield "python", "\n".join(code).strip("\n")


def page():
    """The text of the page."""
    namespace = {"__name__": "__main__"}

    def block(match):
        made = [f"```{language}\n{text}\n```" for language, text in pieces(match[1], namespace)]
        return "\n\n".join(made) + "\n"

    text = re.sub(r"^```python\n(.*?)^```\n", block, CATALOGUE.read_text(), flags=re.M | re.S)
    title, _, rest = text.partition("\n")
    return f"{title}\n\n{MADE_BY}\n{rest}"


if __name__ == "__main__":
    PAGE.write_text(page())
