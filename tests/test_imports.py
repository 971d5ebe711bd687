"""Import rules that neither ruff nor import-linter can express, checked on the syntax trees.

ruff rejects ``jax._src`` outside of ``_compat.py``, imports inside functions and relative imports.
import-linter checks the layers, but treats every name imported from the façade as the façade.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "flax_fp8"
FACADE = PACKAGE / "__init__.py"


def imported(tree: ast.AST) -> Iterator[tuple[ast.stmt, str, str]]:
  """Yields ``(statement, module, name)`` for each import; ``name`` is empty for modules."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from ((node, alias.name, "") for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from ((node, node.module or "", alias.name) for alias in node.names)


def unambiguous_submodules() -> set[str]:
  """Returns the modules that ``from flax_fp8 import ...`` always imports as modules.

  Where the façade exports a function with its module's name, the name can mean either.
  """
  modules = {path.stem for path in PACKAGE.glob("*.py")}
  modules |= {path.parent.name for path in PACKAGE.glob("*/*.py")}
  facade = imported(ast.parse(FACADE.read_text(encoding="utf-8")))
  return modules - {name for _, module, name in facade if module != "flax_fp8"}


def findings(source: str, submodules: set[str]) -> Iterator[tuple[int, str]]:
  """Yields ``(line, complaint)`` for each import by a string or of the façade."""
  for node in ast.walk(tree := ast.parse(source)):
    called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
    if called.endswith(("import_module", "__import__")):
      yield node.lineno, "imports by a string: write an import statement"
  for statement, module, name in imported(tree):
    if module == "flax_fp8" and name not in submodules:
      what = f"takes {name} from the façade" if name else "imports the façade"
      yield statement.lineno, f"{what}: import the module that defines it"


def test_imports_follow_the_rules():
  submodules = unambiguous_submodules()
  found = [
    f"{path.relative_to(ROOT).as_posix()}:{line}: {complaint}"
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != FACADE
    for line, complaint in findings(path.read_text(encoding="utf-8"), submodules)
    if not (path.name == "_compat.py" and "by a string" in complaint)
  ]
  assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
  ("source", "complaint"),
  [
    ("importlib.import_module('jax.numpy')", "imports by a string"),
    ("__import__('jax')", "imports by a string"),
    ("import flax_fp8 as fp8", "imports the façade"),
    ("from flax_fp8 import DelayedScaling", "takes DelayedScaling from the façade"),
  ],
)
def test_a_broken_rule_is_found(source: str, complaint: str):
  ((line, found),) = findings("\n" + source, submodules={"formats"})
  assert line == 2
  assert complaint in found


def test_a_correct_import_passes():
  source = """
from flax_fp8 import formats
from flax_fp8.formats import Format
import importlib.metadata
"""
  assert not list(findings(source, submodules={"formats"}))
