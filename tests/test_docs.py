"""The API reference has each public name in exactly one page. Tables of pages match the code."""

import pkgutil
import re
from collections import Counter
from pathlib import Path

import pytest

import flax_fp8 as fp8
from tests import test_defects

DOCS = Path(__file__).parents[1] / "docs"
PAGES = DOCS / "api"
NAMESPACES = (fp8, fp8.ops, fp8.fp8_ops, fp8.remat_policies)
DIRECTIVE = re.compile(r"^\.\. (?P<kind>\w+):: (?P<name>[\w.]+)$", re.MULTILINE)
OBJECTS = ("autoclass", "autofunction", "autodata", "class", "function", "data")


def documented(page):
  """Returns the full names of what a page documents."""
  module, names = "", []
  for kind, name in DIRECTIVE.findall(page):
    if kind == "currentmodule":
      module = name
    elif kind in OBJECTS:
      names.append(f"{module}.{name}")
  return names


def test_each_public_name_is_in_one_page():
  public = {f"{module.__name__}.{name}" for module in NAMESPACES for name in module.__all__}
  public -= {module.__name__ for module in NAMESPACES}  # a namespace is a page
  pages = [name for page in PAGES.glob("*.md") for name in documented(page.read_text())]
  times = Counter(pages)
  assert not public - times.keys(), "not documented"
  assert not times.keys() - public, "documented, but not public"
  assert not [name for name, count in times.items() if count > 1], "documented twice"


@pytest.mark.parametrize("module", NAMESPACES[1:], ids=lambda module: module.__name__)
def test_a_namespace_is_a_page(module):
  page = PAGES / f"{module.__name__.rpartition('.')[2]}.md"
  assert f"currentmodule:: {module.__name__}\n" in page.read_text()


def test_reading_a_page():
  page = """
.. currentmodule:: flax_fp8.ops

.. autofunction:: einsum

   :members: x
"""
  assert documented(page) == ["flax_fp8.ops.einsum"]


def test_the_design_page_names_functions_that_exist():
  page = (PAGES.parent / "design.md").read_text()
  steps = re.findall(r"^\| \d+ \| `([\w.]+)` \| `([\w.]+)` \|$", page, re.MULTILINE)
  assert len(steps) > 10
  for function, module in steps:
    assert callable(pkgutil.resolve_name(f"{module}:{function}"))
  drawing = (PAGES.parent / "_static" / "data_flow.svg").read_text()
  assert not [function for function, _ in steps if function not in drawing]
  paths = re.findall(r"([\w/]+\.py)", drawing)
  assert not [path for path in paths if not (PAGES.parents[1] / "flax_fp8" / path).exists()]


def test_the_table_of_defects_lists_the_checks():
  page = (DOCS / "coming_from" / "flax_fp8_ops.md").read_text()
  rows = re.findall(r"^\| `([a-z0-9_]+)` \|", page[page.index("| check |") :], re.MULTILINE)
  assert rows == [check.__name__ for check in test_defects.CHECKS]
