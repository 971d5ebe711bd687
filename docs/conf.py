"""Configures Sphinx. Build with ``python -m sphinx -W --keep-going -j auto docs docs/_build/html``.

Pages are MyST Markdown. MyST-NB executes every code cell, so an example that fails fails the build.
The tutorials are the notebooks of ``notebooks/``, shown with their committed outputs.
"""

import dataclasses
import inspect
import os
import re
import shutil
from pathlib import Path
from typing import Any

import flax_fp8

HERE = Path(__file__).resolve().parent

# Pages run on a CPU. `explain` needs the CUDA plugin, but not the CUDA libraries.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ.setdefault("COLUMNS", "100")  # tables are as wide as the terminal

project = "flax_fp8"
author = "The flax_fp8 authors"
copyright = "2026, The flax_fp8 authors"
release = version = flax_fp8.__version__

extensions = [
  "myst_nb",
  "sphinx.ext.autodoc",
  "sphinx.ext.napoleon",
  "sphinx.ext.viewcode",
  "sphinx_copybutton",
  "sphinx_design",
]
exclude_patterns = ["_build"]

# Pages
myst_enable_extensions = ["colon_fence", "dollarmath", "deflist", "fieldlist"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE / "_build" / ".jupyter_cache")
nb_execution_excludepatterns = ["tutorials/*"]
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
suppress_warnings = ["mystnb.unknown_mime_type"]

# API reference
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [
  *("Numerics", "Units", "Variables", "PRNG keys", "State"),
  ("Attributes", "params_style"),
]

# HTML
html_theme = "sphinx_book_theme"
html_title = "flax_fp8"
html_static_path = ["_static"]
html_theme_options = {
  "show_navbar_depth": 2,
  "show_toc_level": 2,
  "use_fullscreen_button": False,
  "use_download_button": False,
  "navbar_persistent": [],
}


def without_linen_fields(
  app: Any, what: str, name: str, value: Any, options: Any, signature: str, returns: str
) -> tuple[str, str] | None:
  """Writes a class's signature from its own fields, each default as its source would."""
  del app, what, name, options, returns
  if not isinstance(value, type) or not dataclasses.is_dataclass(value) or not signature:
    return None
  parameters = []
  for parameter in inspect.signature(value).parameters.values():
    if parameter.name in ("parent", "name") and hasattr(value, "parent"):
      continue  # of every Linen module
    default = parameter.default
    if default is not parameter.empty:
      parameter = parameter.replace(default=Source(short(default)))
    parameters.append(parameter.replace(annotation=parameter.empty))
  return str(inspect.Signature(parameters)), ""


class Source(str):
  """Text that a signature shows without quotes."""

  __slots__ = ()
  __repr__ = str.__str__


def short(default: Any) -> str:
  """Returns a default as a user would write it."""
  if isinstance(default, flax_fp8.Recipe):
    return f"{type(default).__name__}()"
  if isinstance(default, flax_fp8.Format):
    return next(f"Format.{name}" for name, it in vars(flax_fp8.Format).items() if it == default)
  if isinstance(default, type) or inspect.isfunction(default):
    return default.__qualname__.removesuffix(".<locals>.init")
  text = re.sub(r"^np\.\w+\((.+)\)$", r"\1", repr(default))
  return text if len(text) < 80 else "..."


def with_types_and_links(
  app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
  """Prepares a docstring for napoleon: types of attributes, links."""
  del app, name, options
  fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
  types = {field.name: field.type for field in fields} if what == "class" else {}
  found: list[str] = []
  section = ""
  for line in lines:
    line = re.sub(r"``(flax_fp8(?:\.\w+)+)``", r":py:obj:`\1`", line)
    if heading := re.match(r"(\w[\w ]*):$", line):
      section = heading[1]
    attribute = re.match(r"  (\w+): ", line)
    if section == "Attributes" and attribute and isinstance(types.get(attribute[1]), str):
      line = line.replace(":", f" ({types[attribute[1]]}):", 1)
    opens_property = what == "property" and not found
    if opens_property or (found and found[-1] == "Returns:"):
      # Otherwise napoleon takes the words before a colon for a type.
      line = re.sub(r"^( *)(\w+ .*:)", r"\1: \2", line)
    found.append(line)
  lines[:] = found


def setup(app: Any) -> None:
  """Connects what is above to Sphinx."""
  app.connect("autodoc-process-signature", without_linen_fields)
  app.connect("autodoc-process-docstring", with_types_and_links, priority=400)  # before napoleon


def copy_tutorials() -> None:
  """Copies the notebooks below ``docs``, since Sphinx reads no page outside its source folder."""
  target = HERE / "tutorials"
  target.mkdir(exist_ok=True)
  for notebook in (HERE.parent / "notebooks").glob("*.ipynb"):
    shutil.copy(notebook, target / notebook.name)


copy_tutorials()
