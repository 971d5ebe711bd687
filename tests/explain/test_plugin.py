"""A missing or mismatched compiler gives an error with the install command."""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jax
import pytest

from flax_fp8.explain import plugin

ROOT = Path(__file__).parents[2]
SCRIPT = """
import jax, jax.numpy as jnp
import flax_fp8 as fp8
fp8.explain(lambda x: x, jnp.ones(4), target="h100")
"""


def explain_with(folder):
  """Runs ``explain`` in a child process that finds the packages of a folder first."""
  path = os.pathsep.join([str(folder), str(ROOT)])
  return subprocess.run(
    [sys.executable, "-c", SCRIPT],
    env=os.environ | {"PYTHONPATH": path},
    capture_output=True,
    text=True,
    check=False,
  )


def test_of_another_version(tmp_path):
  info = tmp_path / "jax_cuda13_plugin-0.0.1.dist-info"
  info.mkdir()
  (info / "METADATA").write_text("Metadata-Version: 2.1\nName: jax-cuda13-plugin\nVersion: 0.0.1\n")
  found = explain_with(tmp_path)
  assert found.returncode == 1
  last = found.stderr.strip().splitlines()[-1]
  assert last.startswith("ImportError: explain: JAX's CUDA plugin must have jaxlib's version; got ")
  assert f"jax-cuda13-plugin 0.0.1 with jaxlib {metadata.version('jaxlib')}" in last
  assert last.endswith(f"Run: pip install 'jax[cuda13-local]=={jax.__version__}' flatbuffers")


def test_missing(monkeypatch):
  monkeypatch.setattr(plugin, "_PLUGINS", ("jax-cuda99-plugin",))
  line = re.escape(plugin.install_line())
  with pytest.raises(ImportError, match=f"got none installed. Run: {line}"):
    plugin.require_compiler()


def test_flatbuffers_missing(monkeypatch):
  real = metadata.version

  def version(name):
    if name == "flatbuffers":
      raise metadata.PackageNotFoundError(name)
    return real(name)

  monkeypatch.setattr(metadata, "version", version)
  with pytest.raises(
    ImportError, match=r"needs the package flatbuffers; .* Run: pip install flatbuffers"
  ):
    plugin.require_compiler()


def test_present():
  plugin.require_compiler()
  name, version = plugin.find_compiler()
  assert name.startswith("jax-cuda")
  assert version.startswith(jax.__version__.rsplit(".", 1)[0])
