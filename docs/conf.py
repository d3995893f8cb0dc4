"""How Sphinx builds this documentation: `make docs`."""

import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

here = Path(__file__).parent
root = here.parent
sys.path.insert(0, str(root))

# Sphinx reads files below this folder only; the notebooks are kept at the top of the repository.
shutil.rmtree(here / "notebooks", ignore_errors=True)
shutil.copytree(root / "notebooks", here / "notebooks", ignore=shutil.ignore_patterns("*.ipynb"))

from docutils import nodes  # noqa: E402
from sphinx import addnodes  # noqa: E402

import jaxstate  # noqa: E402
from jaxstate._src.public import written_in  # noqa: E402

# Sphinx finds overloads, and the order of members, in the source.
for value, module in written_in.items():
    value.__module__ = module

project = "jaxstate"
author = copyright = "the jaxstate authors"
version = release = jaxstate.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

html_theme = "furo" if find_spec("furo") else "alabaster"
html_title = "jaxstate"
html_static_path = ["_static"]
html_css_files = ["pages.css"]

myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "separated"
autodoc_default_options = {"exclude-members": "__init__, __new__"}  # nobody calls them
autodoc_type_aliases = {name: name for name in ("ArrayLike", "DTypeLike", "KeyLike", "Keys")}
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
default_role = "code"


def _docstring_to_rst(app, what, name, obj, options, lines):
    """Docstrings are written to be read in the source; reStructuredText wants two things else."""
    if what == "module":
        lines.clear()  # the page says what the module has
        return
    text = "\n".join(lines)
    text = text.replace("*args, **kwargs:", "args, kwargs:")
    text = re.sub(r"(?<!`)`([^`\n]+)`(?=\w)", r"`\1`\\ ", text)  # `Name`s
    lines[:] = text.split("\n")


def _as_written(app, what, name, obj, options, signature, annotation):
    """Aliases have their names, and an argument that is there to be refused is not shown."""
    if signature:
        signature = re.sub(r"(, )?\*+(nothing|unknown)[^,)]*", "", signature)
    return _plain(signature), _plain(annotation)


def _plain(text):
    if text:
        text = re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text)
        text = re.sub(r"\S*\._Scope\b", "ContextDecorator", text)
        text = re.sub(r"<class '\S*\.(\w+)'>", r"\1", text)
    return text


def _plain_overloads(app, doctree):
    """Types of overloads do not come to the function above."""
    for signature in doctree.findall(addnodes.desc_signature):
        for text in list(signature.findall(nodes.Text)):
            plain = re.sub(r"~(?:\w+\.)*~?", "", text.astext())
            if plain != text.astext():
                text.parent.replace(text, nodes.Text(plain))


def _long_names_may_break(app, doctree, docname):
    """In tables: ``UnsupportedPrimitiveError`` may go on in the next line."""
    for cell in doctree.findall(nodes.entry):
        for text in list(cell.findall(nodes.Text)):
            parts = re.split(r"(?<=[a-z]{8})(?=[A-Z])|(?=Error$)", text.astext())
            if len(text.astext()) > 12 and len(parts) > 1:
                new = [nodes.Text(parts[0])]
                for part in parts[1:]:
                    new += [nodes.raw("", "<wbr>", format="html"), nodes.Text(part)]
                text.parent.replace(text, new)


def setup(app):
    app.connect("autodoc-process-signature", _as_written)
    app.connect("doctree-read", _plain_overloads)
    app.connect("doctree-resolved", _long_names_may_break)
    app.connect("autodoc-process-docstring", _docstring_to_rst, priority=400)  # before napoleon
