"""Executes the tutorials: each source ``<name>.md`` becomes ``<name>.ipynb`` with its outputs.

Run ``python notebooks/build.py``. Equal sources and packages give equal files: cell ids come from
the cells' text, and no times or interpreter versions are stored.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import jupytext
import nbformat
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from matplotlib import font_manager
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
SOURCES = sorted(path for path in HERE.glob("*.md") if path.name != "README.md")


class ThisInterpreter(AsyncKernelManager):
  """Starts the kernel in the running interpreter, independent of registered kernels."""

  @property
  def kernel_spec(self) -> KernelSpec:
    return KernelSpec(**get_kernel_dict())


def execute(source: Path) -> nbformat.NotebookNode:
  """Runs a source from top to bottom in its checkout.

  Args:
    source: a notebook as MyST Markdown.

  Returns:
    The notebook with outputs.

  Raises:
    nbclient.exceptions.CellExecutionError: a cell failed.
    RuntimeError: a cell wrote to stderr, a warning for example.
  """
  font_manager.findfont("sans")  # a first import builds a font cache and prints to stderr
  notebook = read(source)
  client = NotebookClient(
    notebook,
    kernel_manager_class=ThisInterpreter,
    startup_timeout=300,
    record_timing=False,
    coalesce_streams=True,
    extra_arguments=["--log-level=ERROR"],
    resources={"metadata": {"path": str(source.parent)}},
  )
  client.execute(env=kernel_environment())
  for cell in notebook.cells:
    for output in cell.get("outputs", []):
      if output.get("name") == "stderr":
        raise RuntimeError(f"{source.name}: a cell wrote to stderr:\n{cell.source}\n{output.text}")
  return notebook


def read(source: Path) -> nbformat.NotebookNode:
  """Reads a source without outputs, with stable ids and metadata."""
  notebook = jupytext.read(source)
  for cell in notebook.cells:
    cell.id = hashlib.sha256(cell.source.encode()).hexdigest()[:8]
  notebook.metadata.jupytext = {"formats": notebook.metadata.jupytext.formats}
  return notebook


def kernel_environment() -> dict[str, str]:
  """Returns an environment in which the kernel imports the checkout and JAX starts silently.

  ``XLA_FLAGS`` is removed, so that a notebook runs as it does for its reader.
  """
  search = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
  kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  return kept | {
    "PYTHONPATH": os.pathsep.join(search),
    # A CUDA plugin without the CUDA libraries can compile for a described GPU. Without this
    # variable, JAX would print a traceback when it starts.
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
  }


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
  """Writes a notebook without the interpreter's version."""
  notebook.metadata.language_info = {"name": "python"}
  nbformat.validate(notebook)
  path.write_text(nbformat.writes(notebook), encoding="utf-8")


def main() -> None:
  """Builds every tutorial."""
  for source in SOURCES:
    target = source.with_suffix(".ipynb")
    write(execute(source), target)
    print(target.relative_to(HERE.parent))


if __name__ == "__main__":
  main()
