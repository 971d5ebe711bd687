"""What does it cost to explain a train step, and how does that grow with the model?

    python benchmarks/explain_cost.py        # no GPU needed; about three minutes on two CPU cores

The step is that of ``train_lm.py`` in FP8 at the widths of Llama 3 8B (4096, 14336, 32 heads over
8) and 8192 tokens, compiled for a described H200: its layers under ``nn.scan``, which are compiled
once, and unrolled. Each case runs in a process of its own. ``seconds`` is the wall time from the
call of ``fp8.explain`` to the printed report, ``GiB`` the largest resident sizes of that process
and of the compiler that it starts, added up.
"""

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import flax_fp8 as fp8
from flax_fp8.doctor import allow_missing_cuda
from lm.config import PRESETS
from lm.model import Block, ModelShape, Transformer, norm
from lm.report import environment
from lm.step import jitted_step, optimizer

RESULTS = Path(__file__).resolve().parent / "results"
LAYERS = (1, 2, 4, 8, 12)
BATCH, LENGTH = 2, 4096


class Unrolled(nn.Module):
  """``lm.model.Transformer``, its blocks one after the other, each with parameters of its own.

  Attributes:
    shape: the sizes.
    dot_general_cls: what makes the projections' GEMMs.
  """

  shape: ModelShape
  dot_general_cls: Any

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Runs the decoder; the logits are float32."""
    vocabulary, width = self.shape.vocabulary, self.shape.d_model
    x = nn.Embed(vocabulary, width, dtype=jnp.bfloat16, name="embedding")(tokens)
    for index in range(self.shape.layers):
      x, _ = Block(self.shape, dot_general_cls=self.dot_general_cls, name=f"layer_{index}")(x, None)
    head = nn.Dense(vocabulary, use_bias=False, dtype=jnp.bfloat16, name="head")
    return head(norm("final_norm", jnp.bfloat16)(x)).astype(jnp.float32)


def step_arguments(layers: int, *, unrolled: bool) -> tuple[fp8.TrainState, jax.ShapeDtypeStruct]:
  """The train step's arguments, as shapes."""
  shape = ModelShape(d_model=4096, d_ff=14336, layers=layers, heads=32, kv_heads=8)
  model = (Unrolled if unrolled else Transformer)(shape, dot_general_cls=fp8.Fp8DotGeneral)
  config = dataclasses.replace(PRESETS["tiny"], shape=shape)

  def create(key: jax.Array) -> fp8.TrainState:
    variables = model.init(key, jnp.zeros((1, LENGTH), jnp.int32))
    return fp8.TrainState.create(apply_fn=model.apply, params=variables, tx=optimizer(config))

  state = jax.eval_shape(create, jax.random.key(0))
  return state, jax.ShapeDtypeStruct((BATCH, LENGTH + 1), jnp.uint8)


def measure(layers: int, *, unrolled: bool) -> dict[str, Any]:
  """Explains one step in this process, and says what that took."""
  arguments = step_arguments(layers, unrolled=unrolled)
  begun = time.perf_counter()
  report = fp8.explain(jitted_step, *arguments, target="h200")
  text = str(report)
  seconds = time.perf_counter() - begun
  assert report.fp8_gemms == 21 * layers, text  # seven projections, three GEMMs each
  who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
  gib = sum(resource.getrusage(each).ru_maxrss for each in who) / 2**20  # Linux counts KiB
  return {
    "layers": layers,
    "unrolled": unrolled,
    "seconds": seconds,
    "gib": gib,
    "gemms": report.total_gemms,
    "kernels": report.launches,
  }


def run_cases(layers: tuple[int, ...], console: Console) -> list[dict[str, Any]]:
  """Measures every case in a process of its own."""
  cases = []
  for unrolled in (False, True):
    for count in layers:
      case = [str(count), *(["unrolled"] if unrolled else [])]
      with console.status(f"explaining {' '.join(case)}"):
        command = [sys.executable, __file__, "--case", *case]
        environ = os.environ | {"JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
      cases.append(json.loads(done.stdout.splitlines()[-1]))
  return cases


def table(cases: list[dict[str, Any]]) -> Table:
  """One row a case."""
  grid = Table(title="fp8.explain of a train step at Llama 3 8B's widths, for an H200")
  for heading in ("layers", "", "GEMMs", "kernels", "seconds", "GiB"):
    grid.add_column(heading, justify="right")
  for case in cases:
    how = "unrolled" if case["unrolled"] else "nn.scan"
    sizes = [f"{case[key]:,}" for key in ("gemms", "kernels")]
    grid.add_row(str(case["layers"]), how, *sizes, f"{case['seconds']:.1f}", f"{case['gib']:.2f}")
  return grid


def draw(cases: list[dict[str, Any]]) -> Figure:
  """Draws seconds and GiB against the number of layers."""
  figure = Figure(figsize=(8, 3), layout="constrained")
  for axes, key, label in zip(
    figure.subplots(1, 2), ("seconds", "gib"), ("seconds", "GiB"), strict=True
  ):
    for unrolled, name in ((False, "nn.scan"), (True, "unrolled")):
      points = [(case["layers"], case[key]) for case in cases if case["unrolled"] is unrolled]
      axes.plot(*zip(*points, strict=True), "o-", label=name)
    axes.set(xlabel="layers", ylabel=label, ylim=(0, None))
    axes.legend()
  return figure


def main() -> None:
  """Runs the benchmark, or the one case that it is asked for."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--layers", type=int, nargs="+", default=LAYERS)
  parser.add_argument("--out", type=Path, default=RESULTS, help="folder of JSON and picture")
  parser.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  allow_missing_cuda()
  if arguments.case:
    count, *how = arguments.case
    print(json.dumps(measure(int(count), unrolled=bool(how))))
    return
  console = Console()
  cases = run_cases(tuple(arguments.layers), console)
  console.print(table(cases))
  arguments.out.mkdir(parents=True, exist_ok=True)
  document = {"environment": environment() | {"cpus": os.cpu_count()}, "cases": cases}
  (arguments.out / "explain_cost.json").write_text(json.dumps(document, indent=1) + "\n")
  draw(cases).savefig(arguments.out / "explain_cost.png", dpi=120)


if __name__ == "__main__":
  main()
