"""Lint, and the tests at both ends of the supported versions. ``nox`` alone runs all of it.

Words after ``--`` go to pytest: ``nox -s oldest -- tests/ops``.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import nox

PROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PROJECT)  # as the classifiers name them, oldest first
FLOORS = [d.replace(">=", "==") for d in PROJECT["project"]["dependencies"]]
LINTERS = (
  ("ruff", "check"),
  ("ruff", "format", "--check"),
  ("pyright",),
  ("lint-imports", "--no-logo"),
)
VERSIONS = """
import platform
from importlib.metadata import version
names = ["jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "ml_dtypes"]
print("python", platform.python_version(), *(f"| {name} {version(name)}" for name in names))
"""

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["lint", "docs", "oldest", "default", "newest"]
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = True


def candidates(version: str) -> Iterator[Path]:
  """Yields where a Python may be: on the PATH, and where pyenv keeps those not activated."""
  if on_path := shutil.which(f"python{version}"):
    yield Path(on_path)
  pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
  yield from sorted(pyenv.glob(f"versions/{version}.*/bin/python{version}"))


def interpreter(version: str) -> str | None:
  """Returns the path of a Python that really is ``version``, or ``None``.

  A candidate is asked, since pyenv's shims stand on the PATH for inactive versions too.
  """
  ask = "import sys; print(sys.executable, *sys.version_info[:2])"
  for candidate in candidates(version):
    reply = subprocess.run([candidate, "-c", ask], capture_output=True, text=True, check=False)
    if found := re.fullmatch(r"(.+) (\d+) (\d+)\n", reply.stdout):
      path, *numbers = found.groups()
      if ".".join(numbers) == version:
        return path
  return None


OLDEST = interpreter(PYTHONS[0]) or PYTHONS[0]
NEWEST = next(filter(None, map(interpreter, reversed(PYTHONS))), PYTHONS[-1])


def test(session: nox.Session, *requirements: str) -> None:
  """Installs the requirements, says what was installed, and runs all tests, slow ones too."""
  session.install("--upgrade", "--upgrade-strategy=eager", *requirements)
  session.run("python", "-c", VERSIONS, log=False)
  session.run("python", "-m", "pytest", "-m", "slow or not slow", *session.posargs)


@nox.session(python=OLDEST)
def oldest(session: nox.Session) -> None:
  """Tests the oldest Python with every dependency at its lower bound."""
  test(session, ".[test]", *FLOORS)


@nox.session(python=OLDEST)
def default(session: nox.Session) -> None:
  """Tests the oldest Python with the newest dependencies that it takes."""
  test(session, ".[test]")


@nox.session(python=NEWEST)
def newest(session: nox.Session) -> None:
  """Tests the newest supported Python found on this machine with the newest dependencies."""
  test(session, ".[test]")


@nox.session(python=OLDEST)
def lint(session: nox.Session) -> None:
  """Runs the linters, the formatter, the type checker and the import contracts."""
  if session.virtualenv.is_sandboxed:  # not under --no-venv, where the caller has installed them
    session.install(".[dev]")
  for command in LINTERS:
    session.run(*command)


@nox.session(python=OLDEST)
def docs(session: nox.Session) -> None:
  """Builds the documentation, executes its code, and takes every warning for an error."""
  if session.virtualenv.is_sandboxed:
    session.install(".[docs]")
  session.run(
    *("python", "-m", "sphinx", "-W", "--keep-going", "-q", "-j", "auto"),
    *("docs", "docs/_build/html", *session.posargs),
  )
