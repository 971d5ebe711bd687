"""Configures Sphinx. Build with ``python -m sphinx -W --keep-going -j auto docs docs/_build/html``.

Pages are MyST Markdown. MyST-NB executes every code cell, so an example that fails fails the build.
The tutorials are the notebooks of ``notebooks/``, shown with their committed outputs.
"""

import os
import shutil
from pathlib import Path

import flax_fp8

HERE = Path(__file__).resolve().parent

# Pages run on a CPU. `explain` needs the CUDA plugin, but not the CUDA libraries.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

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
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Numerics", "notes"), ("Units", "notes")]

# HTML
html_theme = "sphinx_book_theme"
html_title = "flax_fp8"
html_static_path = ["_static"]
html_theme_options = {
  "show_navbar_depth": 2,
  "show_toc_level": 2,
  "use_fullscreen_button": False,
  "use_download_button": False,
}


def copy_tutorials() -> None:
  """Copies the notebooks below ``docs``, since Sphinx reads no page outside its source folder."""
  target = HERE / "tutorials"
  target.mkdir(exist_ok=True)
  for notebook in (HERE.parent / "notebooks").glob("*.ipynb"):
    shutil.copy(notebook, target / notebook.name)


copy_tutorials()
