"""Is a damaged checkpoint ever restored wrong?

    python benchmarks/damaged_checkpoints.py        # no GPU needed; about two minutes on a CPU core

Two steps of a training state in FP8 are saved from four devices. Copies of the second are damaged
in one file each: 1 to 8 bits are flipped, its end is cut off, it is removed, it changes places with
another file, or it is replaced by a file of the first step. Each copy must be restored with all its
bits, or refused with an error that names the directory. A process of its own restores them, so that
a crash or a hang counts as such.
"""

import argparse
import contextlib
import json
import os
import queue
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

import flax_fp8 as fp8
from lm.files import write_text
from lm.options import not_negative, positive
from lm.report import environment

RESULTS = Path(__file__).resolve().parent / "results"
COUNT = 500
SECONDS = 60.0
LAYER, TX = nn.Dense(64, dot_general_cls=fp8.Fp8DotGeneral), optax.adamw(1e-2)
OUTCOMES = ("right", "refused", "wrong", "other error", "crashed", "hung")


def flip(path: Path, draw: random.Random, others: list[Path], older: list[Path]) -> None:
  """Flips 1 to 8 bits."""
  del others, older
  data = bytearray(path.read_bytes())
  for _ in range(draw.randint(1, 8)):
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
  path.write_bytes(data)


def cut(path: Path, draw: random.Random, others: list[Path], older: list[Path]) -> None:
  """Cuts the end off."""
  del others, older
  os.truncate(path, draw.randrange(path.stat().st_size))


def remove(path: Path, draw: random.Random, others: list[Path], older: list[Path]) -> None:
  """Removes the file."""
  del draw, others, older
  path.unlink()


def exchange(path: Path, draw: random.Random, others: list[Path], older: list[Path]) -> None:
  """Lets it change places with another file of the checkpoint."""
  del older
  other = draw.choice([each for each in others if each != path])
  mine, its = path.read_bytes(), other.read_bytes()
  path.write_bytes(its)
  other.write_bytes(mine)


def replace(path: Path, draw: random.Random, others: list[Path], older: list[Path]) -> None:
  """Replaces it by the first step's file of that name; data files by any of them, in any place."""
  del others
  named = [each for each in older if each.name == path.name]
  shutil.copy(draw.choice(named or [each for each in older if each.parent.name == "d"]), path)


DAMAGES: dict[str, Callable[[Path, random.Random, list[Path], list[Path]], None]] = {
  "bits flipped": flip,
  "cut": cut,
  "removed": remove,
  "exchanged": exchange,
  "of another step": replace,
}


def files(directory: Path) -> list[Path]:
  """The files with something in them, in an order that is always the same for their sizes."""
  found = [path for path in directory.rglob("*") if path.is_file() and path.stat().st_size]
  return sorted(found, key=lambda path: (path.stat().st_size, path))


def make_state(step: int) -> dict[str, Any]:
  """A training state over all devices: FP8 state, moments, BF16, a PRNG key and a number."""
  variables = LAYER.init(jax.random.key(step), jnp.ones((2, 64)))
  state = fp8.TrainState.create(apply_fn=LAYER.apply, params=variables, tx=TX)
  spec = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))
  place = lambda leaf: jax.device_put(leaf, spec) if getattr(leaf, "ndim", 0) == 2 else leaf
  noise = jax.random.normal(jax.random.key(step), (64, 64))
  grads = jax.tree.map(lambda leaf: noise[: leaf.shape[0], 0] if leaf.ndim == 1 else noise,
                       variables["params"])  # fmt: skip
  state = state.apply_gradients(grads={**variables, "params": grads})
  state = jax.tree.map(place, state)
  half = noise.astype(jnp.bfloat16)
  return {"state": state, "ema": half, "key": jax.random.key(step, impl="rbg"), "epoch": step}


def bits(leaf: Any) -> bytes:
  """All that a leaf is."""
  is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  data = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
  return f"{getattr(leaf, 'dtype', type(leaf))}{data.shape}".encode() + data.tobytes()


def restore(directory: str) -> tuple[str, str]:
  """Restores one copy; gives the outcome and the error."""
  try:
    got = fp8.restore_checkpoint(directory, make_state(0)).tree
  except Exception as error:  # whatever it is, it is counted
    words = str(error)
    ours = words.startswith("restore_checkpoint: ") and directory in words and len(words) <= 600
    return "refused" if ours and type(error) is ValueError else "other error", repr(error)
  same = jax.tree.map(lambda a, b: bits(a) == bits(b), got, make_state(2))
  return "right" if all(jax.tree.leaves(same)) else "wrong", ""


def serve() -> None:
  """Answers requests, one a line, until the input ends."""
  for line in sys.stdin:
    directory = json.loads(line)
    if Path(directory).exists():
      answer = restore(directory)
    else:
      fp8.save_checkpoint(directory, make_state(int(directory.rsplit("_", 1)[1])))
      answer = ("right", "")
    print(json.dumps(answer), flush=True)


class Worker:
  """A process that saves and restores, and is started again when it has died."""

  def __init__(self) -> None:
    """Starts nothing yet."""
    self.process: subprocess.Popen[str] | None = None
    self.answers: queue.Queue[str] = queue.Queue()

  def start(self) -> subprocess.Popen[str]:
    """Starts the process, and a thread that reads from it."""
    devices = "--xla_force_host_platform_device_count=4"
    self.process = subprocess.Popen(
      [sys.executable, __file__, "--serve"],
      env={**os.environ, "XLA_FLAGS": devices, "JAX_PLATFORMS": "cpu"},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
    )
    self.answers = queue.Queue()
    threading.Thread(target=self.read, args=(self.process, self.answers), daemon=True).start()
    return self.process

  @staticmethod
  def read(process: subprocess.Popen[str], answers: "queue.Queue[str]") -> None:
    """Queues what the process says; an empty answer where it has ended."""
    assert process.stdout is not None
    with process.stdout as lines:
      for line in lines:
        answers.put(line)
    answers.put("")

  def ask(self, directory: Path) -> tuple[str, str]:
    """Lets it restore a directory, or save to one that is not there."""
    process = self.process or self.start()
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended: then its answer is empty
      print(json.dumps(str(directory)), file=process.stdin, flush=True)
    try:
      answer = self.answers.get(timeout=SECONDS)
    except queue.Empty:
      self.end()
      return "hung", f"no answer in {SECONDS} s"
    if not answer:
      code = process.wait()
      self.end()
      return "crashed", f"exit code {code}"
    outcome, error = json.loads(answer)
    return outcome, error

  def end(self) -> None:
    """Ends the process."""
    if self.process is not None:
      self.process.kill()
      self.process.wait()
      with contextlib.suppress(BrokenPipeError):
        self.process.stdin.close()  # pyright: ignore[reportOptionalMemberAccess]
      self.process = None


def measure(count: int, seed: int, folder: Path) -> list[dict[str, str]]:
  """Damages and restores ``count`` copies; one entry each, in JSON's types."""
  draw, worker, found = random.Random(seed), Worker(), list[dict[str, str]]()
  older, whole, copy = folder / "step_1", folder / "step_2", folder / "copy"
  try:
    for directory in (older, whole):
      worker.ask(directory)
    if worker.ask(whole)[0] != "right":
      raise RuntimeError("damaged_checkpoints: the whole checkpoint must be restored right.")
    for index in range(count):
      kind = list(DAMAGES)[index % len(DAMAGES)]
      shutil.copytree(whole, copy)
      path = draw.choice(files(copy))
      DAMAGES[kind](path, draw, files(copy), files(older))
      outcome, error = worker.ask(copy)
      found.append({"damage": kind, "file": path.relative_to(copy).as_posix(),
                    "outcome": outcome, "error": error.replace(str(folder), "")})  # fmt: skip
      shutil.rmtree(copy)
  finally:
    worker.end()
  return found


def count_outcomes(found: list[dict[str, str]]) -> dict[str, Counter[str]]:
  """Counts the outcomes of each kind of damage, and of all."""
  kinds = {kind: [each for each in found if each["damage"] == kind] for kind in DAMAGES}
  return {kind: Counter(each["outcome"] for each in some)
          for kind, some in {**kinds, "all": found}.items()}  # fmt: skip


def table(counts: dict[str, Counter[str]]) -> Table:
  """One row a kind of damage."""
  grid = Table(title="Damaged checkpoints")
  for heading in ("", *OUTCOMES):
    grid.add_column(heading, justify="right" if heading else "left")
  for kind, counted in counts.items():
    grid.add_row(kind, *(str(counted[outcome]) for outcome in OUTCOMES))
  return grid


def main(argv: list[str] | None = None) -> int:
  """Runs the benchmark; ``argv`` is the command line, None the process's own.

  Returns:
    0, or 1 where a copy was neither restored right nor refused.
  """
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--count", type=positive, default=COUNT, help="of copies")
  parser.add_argument("--seed", type=not_negative, default=0, help="of the damage")
  parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
  parser.add_argument("--serve", action="store_true", help="restores for another process")
  arguments = parser.parse_args(argv)
  if arguments.serve:
    serve()
    return 0
  with tempfile.TemporaryDirectory() as folder:
    found = measure(arguments.count, arguments.seed, Path(folder))
  counts = count_outcomes(found)
  bad = [each for each in found if each["outcome"] not in ("right", "refused")]
  Console().print(table(counts))
  document = {"environment": environment(), "seed": arguments.seed, "counts": counts, "bad": bad}
  write_text(arguments.out / "damaged_checkpoints.json", json.dumps(document, indent=1) + "\n")
  return int(bool(bad))


if __name__ == "__main__":
  sys.exit(main())
