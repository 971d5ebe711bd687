"""Is a damaged checkpoint ever restored wrong?

    python -m tests.reliability.damaged_checkpoints    # no GPU needed; two minutes on a CPU core

Two steps of a training state in FP8 are saved from several devices. Copies of the second are
damaged in one file each: 1 to 8 bits are flipped, its end is cut off, it is removed, it changes
places with another file, or a file of the first step replaces it. Each copy must be restored with
all its bits, or refused with an error that names the directory. A separate process restores them,
so that a crash or a hang is an outcome too.
"""

import multiprocessing
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import flax_fp8 as fp8
from harness.environment import environment
from harness.output import make_console, make_parser, positive, write_json
from harness.table import Column, print_table

SECONDS = 60.0
LAYER, TX = nn.Dense(64, dot_general_cls=fp8.Fp8DotGeneral), optax.adamw(1e-2)
OUTCOMES = ("right", "refused", "wrong", "other error", "crashed", "hung")


def flip(path, draw, others, older):
  data = bytearray(path.read_bytes())
  for _ in range(draw.randint(1, 8)):
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
  path.write_bytes(data)


def cut(path, draw, others, older):
  os.truncate(path, draw.randrange(path.stat().st_size))


def remove(path, draw, others, older):
  path.unlink()


def exchange(path, draw, others, older):
  other = draw.choice([each for each in others if each != path])
  mine, its = path.read_bytes(), other.read_bytes()
  path.write_bytes(its)
  other.write_bytes(mine)


def replace(path, draw, others, older):
  """Takes the first step's file of that name; for a data file, any data file."""
  named = [each for each in older if each.name == path.name]
  shutil.copy(draw.choice(named or [each for each in older if each.parent.name == "d"]), path)


DAMAGES = {
  "bits flipped": flip,
  "cut": cut,
  "removed": remove,
  "exchanged": exchange,
  "of another step": replace,
}


def files(directory):
  """The files that are not empty, in an order that depends on their sizes first."""
  found = [path for path in directory.rglob("*") if path.is_file() and path.stat().st_size]
  return sorted(found, key=lambda path: (path.stat().st_size, path))


def make_state(step):
  """A training state over all devices: FP8 state, moments, BF16, a PRNG key and a number."""
  variables = LAYER.init(jax.random.key(step), jnp.ones((2, 64)))
  state = fp8.TrainState.create(apply_fn=LAYER.apply, params=variables, tx=TX)
  spec = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))
  place = lambda leaf: jax.device_put(leaf, spec) if getattr(leaf, "ndim", 0) == 2 else leaf
  noise = jax.random.normal(jax.random.key(step), (64, 64))
  grads = jax.tree.map(lambda p: noise[: len(p), 0] if p.ndim == 1 else noise, variables["params"])
  state = jax.tree.map(place, state.apply_gradients(grads={**variables, "params": grads}))
  half, key = noise.astype(jnp.bfloat16), jax.random.key(step, impl="rbg")
  return {"state": state, "ema": half, "key": key, "epoch": step}


def bits(leaf):
  is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  data = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
  return f"{getattr(leaf, 'dtype', type(leaf))}{data.shape}".encode() + data.tobytes()


def save(directory, step):
  fp8.save_checkpoint(directory, make_state(step))
  return "right", ""


def restore(directory):
  """Restores one copy; returns the outcome and the error."""
  try:
    got = fp8.restore_checkpoint(directory, make_state(0)).tree
  except Exception as error:
    words = str(error)
    ours = words.startswith("restore_checkpoint: ") and directory in words and len(words) <= 600
    return "refused" if ours and type(error) is ValueError else "other error", repr(error)
  same = jax.tree.map(lambda a, b: bits(a) == bits(b), got, make_state(2))
  return "right" if all(jax.tree.leaves(same)) else "wrong", ""


class Worker:
  """A process that saves and restores; the next request after its death starts a new one."""

  def __init__(self):
    self.pool = None

  def ask(self, function, *args):
    """Calls a function there; returns its outcome and error, or those of the process."""
    self.pool = self.pool or ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    try:
      return self.pool.submit(function, *args).result(SECONDS)
    except TimeoutError:
      self.end()
      return "hung", f"no answer in {SECONDS} s"
    except BrokenProcessPool as error:
      self.end()
      return "crashed", repr(error)

  def end(self):
    for process in multiprocessing.active_children():
      process.kill()
    if self.pool:
      self.pool.shutdown()
    self.pool = None


def measure(count, seed, folder):
  """Damages and restores ``count`` copies; returns one entry for each, in JSON's types."""
  draw, worker, found = random.Random(seed), Worker(), []
  older, whole, copy = folder / "step_1", folder / "step_2", folder / "copy"
  try:
    for step, directory in enumerate((older, whole), 1):
      worker.ask(save, str(directory), step)
    if (outcome := worker.ask(restore, str(whole)))[0] != "right":
      raise RuntimeError(f"damaged_checkpoints: the whole one must be restored; got {outcome}.")
    for index in range(count):
      kind = list(DAMAGES)[index % len(DAMAGES)]
      shutil.copytree(whole, copy)
      path = draw.choice(files(copy))
      DAMAGES[kind](path, draw, files(copy), files(older))
      outcome, error = worker.ask(restore, str(copy))
      entry = {"damage": kind, "file": path.relative_to(copy).as_posix()}
      found.append(entry | {"outcome": outcome, "error": error.replace(str(folder), "")})
      shutil.rmtree(copy)
  finally:
    worker.end()
  return found


def main(argv=None):
  """Runs the experiment; returns 1 if a copy was neither restored right nor refused."""
  parser = make_parser(__doc__)
  parser.add_argument("--count", type=positive, default=500, help="of copies")
  parser.add_argument("--seed", type=int, default=0, help="of the damage")
  arguments = parser.parse_args(argv)
  os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
  with tempfile.TemporaryDirectory() as folder:
    found = measure(arguments.count, arguments.seed, Path(folder))
  outcomes = lambda kinds: Counter(each["outcome"] for each in found if each["damage"] in kinds)
  counts = {kind: outcomes([kind]) for kind in DAMAGES} | {"all": outcomes(DAMAGES)}
  rows = [{"damage": kind} | dict.fromkeys(OUTCOMES, 0) | count for kind, count in counts.items()]
  columns = [Column(key, f"{{{key}}}", left=key == "damage") for key in rows[0]]
  print_table(make_console(), "Damaged checkpoints", columns, rows)
  bad = [each for each in found if each["outcome"] not in ("right", "refused")]
  document = {"environment": environment(), "seed": arguments.seed, "counts": counts, "bad": bad}
  write_json(arguments.out, "damaged_checkpoints", document)
  return int(bool(bad))


if __name__ == "__main__":
  sys.exit(main())
