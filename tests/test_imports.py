"""Import rules that import-linter cannot express, checked on the package's syntax trees.

import-linter sees only the root of other packages, so it treats ``jax._src`` as ``jax``. It ignores
the place of an import, and it treats every name imported from the façade as the façade.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "flax_fp8"
FILES = sorted(PACKAGE.rglob("*.py"))
COMPAT = PACKAGE / "_compat.py"
FACADE = PACKAGE / "__init__.py"


def imported(tree: ast.AST) -> Iterator[tuple[ast.stmt, str, str]]:
  """Yields ``(statement, module, name)`` for each import; ``name`` is empty for modules."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from ((node, alias.name, "") for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      module = "." * node.level + (node.module or "")
      yield from ((node, module, alias.name) for alias in node.names)


def names_private_jax(tree: ast.AST) -> Iterator[tuple[int, str]]:
  """Finds ``jax._src``, as an import or as an attribute."""
  advice = "names jax._src: reach it through flax_fp8._compat"
  for statement, module, name in imported(tree):
    if f"{module}.{name}.".startswith("jax._src."):
      yield statement.lineno, advice
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute) and ast.unparse(node) == "jax._src":
      yield node.lineno, advice


def imports_by_string(tree: ast.AST) -> Iterator[tuple[int, str]]:
  """Finds imports by a string, which no tool can follow."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
      ("import_module", "__import__")
    ):
      yield node.lineno, "imports by a string: write an import statement"


def imports_in_function(tree: ast.AST) -> Iterator[tuple[int, str]]:
  """Finds imports inside of functions, where they could hide a cycle."""
  for function in ast.walk(tree):
    if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
      for statement, module, _ in imported(function):
        yield statement.lineno, f"imports {module} inside {function.name}(): move it to the top"


def imports_facade(tree: ast.AST, submodules: set[str]) -> Iterator[tuple[int, str]]:
  """Finds imports of ``flax_fp8`` itself instead of one of its modules."""
  for statement, module, name in imported(tree):
    if module.startswith("."):
      yield statement.lineno, "imports relatively: write the module's full name"
    elif module == "flax_fp8" and name not in submodules:
      what = f"takes {name} from the façade" if name else "imports the façade"
      yield statement.lineno, f"{what}: import the module that defines what you need"


def unambiguous_submodules() -> set[str]:
  """Returns the names that mean a module in ``from flax_fp8 import ...`` at any time.

  If the façade exports a function under the name of its module, the name is ambiguous.
  """
  modules = {path.stem for path in PACKAGE.glob("*.py")} | {
    p.parent.name for p in PACKAGE.glob("*/*.py")
  }
  if not FACADE.exists():
    return modules
  facade = imported(ast.parse(FACADE.read_text(encoding="utf-8")))
  return modules - {name for _, module, name in facade if module != "flax_fp8"}


def findings(path: Path, source: str, submodules: set[str]) -> list[tuple[int, str]]:
  """Returns ``(line, complaint)`` for every rule that a file of the package breaks."""
  tree = ast.parse(source, filename=str(path))
  found = set(imports_in_function(tree))
  if path != COMPAT:
    found |= {*names_private_jax(tree), *imports_by_string(tree)}
  if path != FACADE:
    found |= set(imports_facade(tree, submodules))
  return sorted(found)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_follow_the_rules(path: Path):
  found = findings(path, path.read_text(encoding="utf-8"), unambiguous_submodules())
  assert not found, "\n" + "\n".join(
    f"{path.relative_to(ROOT).as_posix()}:{line}: {complaint}" for line, complaint in found
  )


@pytest.mark.parametrize(
  ("source", "complaint"),
  [
    ("import jax._src", "names jax._src"),
    ("import jax._src.core as core", "names jax._src"),
    ("from jax import _src", "names jax._src"),
    ("from jax._src.core import Tracer", "names jax._src"),
    ("import jax\njax._src.core.Tracer", "names jax._src"),
    ("importlib.import_module('jax.numpy')", "imports by a string"),
    ("__import__('jax')", "imports by a string"),
    ("def f():\n  import jax", "imports jax inside f()"),
    ("class C:\n  async def f(self):\n    from jax import lax", "imports jax inside f()"),
    ("import flax_fp8", "imports the façade"),
    ("import flax_fp8 as fp8", "imports the façade"),
    ("from flax_fp8 import DelayedScaling", "takes DelayedScaling from the façade"),
    ("from . import formats", "imports relatively"),
  ],
)
def test_a_broken_rule_is_found(source: str, complaint: str):
  lines = source.splitlines()
  found = findings(PACKAGE / "ops" / "example.py", source, submodules={"formats"})
  assert [line for line, _ in found] == [len(lines)]
  assert complaint in found[0][1]


@pytest.mark.parametrize(
  "source",
  [
    "import jax\nfrom jax import lax",
    "import jax_srcs",
    "from flax_fp8 import formats",
    "from flax_fp8.formats import Format",
    "import importlib.metadata",
  ],
)
def test_a_proper_import_passes(source: str):
  assert not findings(PACKAGE / "ops" / "example.py", source, submodules={"formats"})


def test_only_the_shim_may_name_private_jax():
  assert not findings(COMPAT, "from jax._src import core", submodules=set())
