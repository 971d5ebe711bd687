"""What moves through a GPU's memory besides GEMMs, and in how many kernels?

    python benchmarks/traffic.py             # no GPU needed; some minutes on one CPU core

Layers, a block and a stack of blocks, forward and backward, all in bfloat16, compiled for a
described GPU in BF16, with ``flax.linen.fp8_ops`` and with ``flax_fp8``; never run. ``MiB`` are
read and written by kernels other than GEMMs, ``temp`` is what the program allocates beside its
arguments and results. ``floor`` reads each tensor once in bfloat16 and writes it once in each of
the two layouts that FP8 GEMMs take.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import fp8_ops as flax_fp8_ops
from rich.console import Console
from rich.table import Table

import flax_fp8 as fp8
from flax_fp8.doctor import allow_missing_cuda
from flax_fp8.meta_dtype import to_float32
from lm.files import write_text
from lm.report import environment
from recipe_cost import figures

RESULTS = Path(__file__).resolve().parent / "results"
MIB = 2**20

OURS = fp8.DelayedScaling().dot_general_cls


# The class of a layer's GEMMs, by name of the variant; None for BF16.
VARIANTS: dict[str, Callable[..., Any] | None] = {
  "BF16": None,
  "flax.linen.fp8_ops": flax_fp8_ops.Fp8DotGeneral,
  "flax_fp8": OURS,
}


def dense(
  features: int, cls: Any, name: str | None = None, param_dtype: Any = jnp.bfloat16
) -> nn.Dense:
  """A layer that computes in bfloat16."""
  kinds = {"dtype": jnp.bfloat16, "param_dtype": param_dtype}
  return nn.Dense(features, use_bias=False, dot_general_cls=cls, name=name, **kinds)


def norm(param_dtype: Any = jnp.bfloat16) -> nn.RMSNorm:
  """RMSNorm in bfloat16, its statistics in float32."""
  return nn.RMSNorm(dtype=jnp.bfloat16, param_dtype=param_dtype)


class LlamaBlock(nn.Module):
  """The projections of a block of Llama 3 8B.

  Between them, what is elementwise; attention itself is as simple as can be, since it is the same
  in all variants.
  """

  cls: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """``x + out(mix(q, k, v))``, then ``x + down(silu(gate) * up)``, both of the norm of x."""
    y = norm()(x)
    query, key, value = (
      dense(width, self.cls, name)(y) for name, width in (("q", 4096), ("k", 1024), ("v", 1024))
    )
    heads = lambda z: jnp.tile(z, (1, 4))
    x = x + dense(4096, self.cls, "out")(jnp.tanh(query * heads(key)) * heads(value))
    y = norm()(x)
    gate, up = (dense(14336, self.cls, name)(y) for name in ("gate", "up"))
    return x + dense(4096, self.cls, "down")(nn.silu(gate) * up)


class Mlp(nn.Module):
  """``x + down(relu(up(norm(x))))``, as a step of a scan."""

  cls: Any
  param_dtype: Any = jnp.bfloat16

  @nn.compact
  def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
    """Takes and gives the residual stream."""
    layer = functools.partial(dense, cls=self.cls, param_dtype=self.param_dtype)
    y = nn.relu(layer(8192, name="up")(norm(self.param_dtype)(x)))
    return x + layer(2048, name="down")(y), None


class Stack(nn.Module):
  """Blocks.

  Attributes:
    cls: of their GEMMs.
    scan: under ``nn.scan``, or one after the other.
    remat: recompute each block in the backward pass.
    length: how many blocks.
    param_dtype: of their parameters.
  """

  cls: Any
  scan: bool
  remat: bool = False
  length: int = 8
  param_dtype: Any = jnp.bfloat16

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Takes and gives the residual stream."""
    block: Any = nn.remat(Mlp, prevent_cse=not self.scan) if self.remat else Mlp
    if self.scan:
      layers = fp8.scan(block, {"params": 0}, split_rngs={"params": True}, length=self.length)
      return layers(self.cls, self.param_dtype)(x, None)[0]
    for _ in range(self.length):
      x, _ = block(self.cls, self.param_dtype)(x, None)
    return x


@dataclasses.dataclass(frozen=True)
class Case:
  """A program to compile.

  Attributes:
    make: makes the model, of the class of its GEMMs.
    tokens: rows of its input.
    width: columns of its input.
    floor: MiB that FP8 must move beyond BF16; None where that is not known.
  """

  make: Callable[[Any], nn.Module]
  tokens: int
  width: int
  floor: float | None = None


def layer_floor(tokens: int, width: int, features: int) -> float:
  """MiB that quantising the three tensors of a layer must move."""
  return 4 * (tokens * width + width * features + tokens * features) / MIB


CASES = {
  "Dense 4096 x 4096": Case(
    lambda cls: dense(4096, cls), 8192, 4096, layer_floor(8192, 4096, 4096)
  ),
  "Dense 4096 x 16384": Case(
    lambda cls: dense(16384, cls), 15872, 4096, layer_floor(15872, 4096, 16384)
  ),
  "Llama 3 8B block": Case(LlamaBlock, 8192, 4096),
  "8 MLPs, unrolled": Case(functools.partial(Stack, scan=False), 8192, 2048),
  "8 MLPs, nn.scan": Case(functools.partial(Stack, scan=True), 8192, 2048),
  "8 MLPs, nn.scan, remat": Case(functools.partial(Stack, scan=True, remat=True), 8192, 2048),
}


def explain_case(case: Case, variant: str, target: str) -> fp8.Report:
  """Reports on forward and backward of a model."""
  cls = VARIANTS[variant]
  model = case.make(cls)
  x = jax.ShapeDtypeStruct((case.tokens, case.width), jnp.bfloat16)
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  grad = jax.eval_shape(model.apply, variables, x)

  def step(variables: Any, x: jax.Array, grad: jax.Array) -> Any:
    state = fp8.as_max_grad(variables) if cls is OURS else variables
    out, pull_back = jax.vjp(model.apply, state, x)
    return out, jax.tree.map(to_float32, pull_back(grad))

  return fp8.explain(step, variables, x, grad, target=target, name=variant)


def loss_of(model: nn.Module) -> Callable[[Any, jax.Array], jax.Array]:
  """Makes a loss of a model, of its variables and input: the mean of squares."""

  def loss(variables: Any, x: jax.Array) -> jax.Array:
    out: Any = model.apply(variables, x)
    return jnp.mean(jnp.square(out.astype(jnp.float32)))

  return loss


def run(
  doc: str | None,
  name: str,
  measure: Callable[[str, Console], dict[str, Any]],
  table: Callable[[dict[str, Any], str], Table],
) -> None:
  """Is all of a script that compiles for a target, prints a table and writes ``name``.json."""
  parser = argparse.ArgumentParser(
    description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--target", default="h100")
  parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
  arguments = parser.parse_args()
  allow_missing_cuda()
  console = Console()
  found = measure(arguments.target, console)
  console.print(table(found, arguments.target))
  write(arguments.out, name, arguments.target, found)


def write(folder: Path, name: str, target: str, found: dict[str, Any]) -> None:
  """Writes what was found for a target, with the versions that found it."""
  folder.mkdir(parents=True, exist_ok=True)
  result = {"environment": environment(), "target": target, "found": found}
  write_text(folder / f"{name}.json", json.dumps(result, indent=2) + "\n")


def measure(case: Case, target: str) -> dict[str, Any]:
  """Compiles a case in all variants."""
  return {name: figures(explain_case(case, name, target)) for name in VARIANTS}


def table(found: dict[str, Any], target: str) -> Table:
  """One row a case and variant."""
  grid = Table(title=f"Forward and backward as compiled for {target.upper()}")
  for heading in ("case", "variant", "FP8 GEMMs", "kernels", "MiB", "over BF16", "floor", "temp"):
    grid.add_column(heading, justify="left" if heading in ("case", "variant") else "right")
  for name, variants in found.items():
    bf16, floor = variants["BF16"]["mib_outside_gemms"], CASES[name].floor
    for variant, each in variants.items():
      mib = each["mib_outside_gemms"]
      grid.add_row(
        name if variant == "BF16" else "",
        variant,
        f"{each['fp8_gemms']}/{each['gemms']}",
        str(each["kernels"]),
        f"{mib:,.0f}",
        f"{mib - bf16:+,.0f}",
        "" if floor is None or variant == "BF16" else f"{floor:,.0f}",
        f"{each['temp_mib']:,.0f} ({each['temp_mib'] / variants['BF16']['temp_mib']:.2f})",
        end_section=variant == list(variants)[-1],
      )
  return grid


def main() -> None:
  """Runs the benchmark."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--target", default="h100")
  parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
  parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
  arguments = parser.parse_args()
  allow_missing_cuda()
  console = Console()
  found: dict[str, Any] = {}
  for name in arguments.cases:
    with console.status(name):
      found[name] = measure(CASES[name], arguments.target)
  console.print(table(found, arguments.target))
  write(arguments.out, "traffic", arguments.target, found)


if __name__ == "__main__":
  main()
