"""Is every feature right in every mode of JAX and of Python? ``python -m tests.modes`` prints it.

Rows are the programs of ``tests/features.py``. Columns are settings of JAX, flags of Python,
threads, processes. A cell is right when its results are those of a plain run, and "JAX's" when the
same program without FP8 fails in the same way.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import multiprocessing
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tests import conftest as _devices  # noqa: F401 - for ``python -m``
from tests import features
from tests.features import BASELINES, FEATURES

ROOT = Path(__file__).parents[1]
Results = list[Any]
Run = Callable[[Sequence[str]], dict[str, Results | str]]

SETTINGS: dict[str, tuple[str, Any]] = {
  "debug_nans": ("jax_debug_nans", True),
  "debug_infs": ("jax_debug_infs", True),
  "checking_leaks": ("jax_check_tracer_leaks", True),
  "strict promotion": ("jax_numpy_dtype_promotion", "strict"),
  "rank promotion raise": ("jax_numpy_rank_promotion", "raise"),
  "threefry_partitionable off": ("jax_threefry_partitionable", False),
  "disable_jit": ("jax_disable_jit", True),
  "x64": ("jax_enable_x64", True),
}
BASELINES_BY_NAME = {f"{name} without FP8": baseline for name, baseline in BASELINES.items()}
FLAGS = {"-O": ["-O"], "-OO": ["-OO"], "-W error": ["-W", "error"]}


def run(names: Sequence[str]) -> dict[str, Results | str]:
  """Results of features by name; what they raised instead, as text."""
  found: dict[str, Results | str] = {}
  for name in names:
    try:
      leaves = jax.tree.leaves({**FEATURES, **BASELINES_BY_NAME}[name]())
      found[name] = [x if isinstance(x, str) else np.asarray(jax.device_get(x)) for x in leaves]
    except Exception as error:  # whatever it is, it is the cell's content
      found[name] = f"{type(error).__name__}: {error}"
  return found


@contextlib.contextmanager
def setting(name: str, value: Any) -> Iterator[None]:
  """Sets a flag of JAX for all threads."""
  before = getattr(jax.config, name)
  jax.config.update(name, value)
  try:
    yield
  finally:
    jax.config.update(name, before)


def with_settings(*modes: str) -> Run:
  """Makes a run under several settings of JAX at once."""

  def run_so(names: Sequence[str]) -> dict[str, Results | str]:
    with contextlib.ExitStack() as stack:
      for mode in modes:
        stack.enter_context(setting(*SETTINGS[mode]))
      return run(names)

  return run_so


def guarded(names: Sequence[str], inner: Run = run) -> dict[str, Results | str]:
  """Runs while compiled functions may transfer nothing but their arguments."""
  token = features.GUARD.set("disallow")
  try:
    return inner(names)
  finally:
    features.GUARD.reset(token)


def in_threads(names: Sequence[str], inner: Run = run) -> dict[str, Results | str]:
  """Runs each feature in three threads at once; what one of them raised or got differently."""
  found: dict[str, Results | str] = {}
  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    for name in names:
      all_of = [one[name] for one in pool.map(inner, [[name]] * 3)]
      differing = [one for one in all_of if compare(one, all_of[0], name, exact=True) != "right"]
      found[name] = differing[0] if differing else all_of[0]
  return found


def spawned(names: Sequence[str]) -> dict[str, Results | str]:
  """Runs in a process that Python spawns."""
  with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
    return pool.submit(run, list(names)).result()


def with_flags(*flags: str, how: str = "run") -> Run:
  """Makes a run in a process of Python with flags."""

  def run_so(names: Sequence[str]) -> dict[str, Results | str]:
    with tempfile.TemporaryDirectory() as folder:
      out = Path(folder, "results")
      command = [sys.executable, *flags, "-m", "tests.modes", "--into", str(out), "--how", how]
      done = subprocess.run([*command, *names], cwd=ROOT, capture_output=True, text=True)
      if done.returncode:
        return dict.fromkeys(names, done.stderr[-2000:])
      return pickle.loads(out.read_bytes())

  return run_so


MODES: dict[str, Run] = {
  **{name: with_settings(name) for name in SETTINGS},
  "transfer guard": guarded,
  "threads": in_threads,
  "spawn": spawned,
  **{name: with_flags(*flags) for name, flags in FLAGS.items()},
}
# What tests run: many modes at once, each of which would be seen. To look for leaks takes minutes.
# JAX 0.8 looks for infinities in results of an extended dtype too, and there is no way around it.
APART = ["disable_jit", "x64", "checking_leaks"]
APART += ["debug_infs"] if jax.__version_info__ < (0, 10) else []
DEBUG = tuple(name for name in SETTINGS if name not in APART)
COMBINED: dict[str, Run] = {
  "settings": functools.partial(guarded, inner=with_settings(*DEBUG)),
}
# FP8 turns a difference in the last bit of a quotient into one of a step.
LOOSE = ("disable_jit", "x64")


def compare(got: Results | str, want: Results | str, name: str, *, exact: bool) -> str:
  """Says "right", or what differs."""
  if isinstance(got, str):
    return got
  assert not isinstance(want, str), want
  if len(got) != len(want):
    return f"{len(got)} results, not {len(want)}"
  for a, b in zip(got, want, strict=True):
    if isinstance(b, str):
      if a != b:
        return f"{a!r}, not {b!r}"
    elif a.shape != b.shape or a.dtype.kind != b.dtype.kind:
      return f"{a.dtype}{a.shape}, not {b.dtype}{b.shape}"
    elif not _equal(a, b, 0.0 if exact else 0.5 if name == "stochastic_rounding" else 0.02):
      return f"differs by {_difference(a, b):.1e}"
  return "right"


def _difference(a: np.ndarray, b: np.ndarray) -> float:
  a, b = a.astype(np.float64), b.astype(np.float64)
  return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


def _equal(a: np.ndarray, b: np.ndarray, bound: float) -> bool:
  return np.array_equal(a, b) if not bound else _difference(a, b) <= bound


def _is_of_jax(name: str, mode: str, error: str) -> bool:
  """Tells whether a feature's baseline without FP8 raises in a mode as the feature does."""
  baseline = f"{name} without FP8"
  raised = MODES[mode]([baseline])[baseline] if baseline in BASELINES_BY_NAME else ""
  return isinstance(raised, str) and bool(raised) and raised[:40] == error[:40]


def main() -> int:
  """Prints the table, or writes results into a file; returns 1 if a cell is wrong."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
  parser.add_argument("--into", type=Path, help="write results there, and no table")
  parser.add_argument("--how", choices=("run", "spawned"), default="run")
  parser.add_argument("--modes", nargs="*", default=list(MODES), help="columns")
  parser.add_argument("features", nargs="*", default=list(FEATURES), help="rows")
  args = parser.parse_args()
  if args.into:
    args.into.write_bytes(pickle.dumps({"run": run, "spawned": spawned}[args.how](args.features)))
    return 0
  want, wrong = run(args.features), dict[tuple[str, str], str]()
  columns: dict[str, dict[str, Results | str]] = {}
  for mode in args.modes:
    start = time.perf_counter()
    columns[mode] = MODES[mode](args.features)
    print(f"{mode}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
  print(f"| feature | {' | '.join(args.modes)} |\n|---{'|---' * len(args.modes)}|")
  for name in args.features:
    cells: list[str] = []
    for mode, found in columns.items():
      exact = mode not in LOOSE and name != "stochastic_rounding"
      cell = compare(found[name], want[name], name, exact=exact)
      if cell != "right" and _is_of_jax(name, mode, cell):
        cell = "JAX's"
      elif cell != "right":
        wrong[name, mode], cell = cell, "WRONG"
      cells.append(cell)
    print(f"| {name} | {' | '.join(cells)} |")
  for (name, mode), text in wrong.items():
    print(f"\n{name}, {mode}: {text[:1000]}")
  print(f"\n{len(args.features) * len(columns)} cells, {len(wrong)} wrong.")
  return int(bool(wrong))


if __name__ == "__main__":
  sys.exit(main())
