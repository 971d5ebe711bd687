"""What does it cost to split a batch into microbatches?

    python benchmarks/microbatches.py        # no GPU needed; about two minutes on one CPU core

One step over 16,384 tokens, in microbatches of several sizes: the gradients of a loss by float32
parameters, of four scanned and rematted blocks of ``traffic.py`` (an MLP 2048/8192 after an
RMSNorm) that compute in bfloat16. Compiled for a described GPU in BF16, with
``flax.linen.fp8_ops``, whose state goes from one microbatch to the next, and with
``fp8.accumulate_gradients``; never run. ``roofline`` is what bandwidth and matrix units allow at
best, ``MiB moved`` what kernels other than GEMMs read and write.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from rich.console import Console
from rich.table import Table

import flax_fp8 as fp8
from recipe_cost import figures
from traffic import OURS, VARIANTS, Stack, loss_of, run

TOKENS, WIDTH, LAYERS = 16384, 2048, 4
SIZES = (1024, 2048, 4096, 8192, 16384)
COMPARED = ("BF16", "flax.linen.fp8_ops", "flax_fp8")
OWG = fp8.OVERWRITE_WITH_GRADIENT


def accumulate(loss: Any, variables: Any, microbatches: jax.Array) -> Any:
  """Adds gradients up, as one does without this package; state is overwritten each time."""

  def step(carry: Any, x: jax.Array) -> Any:
    state, total = carry
    value, grads = jax.value_and_grad(loss)({**variables, **state}, x)
    state = {key: grads[key] for key in state}
    return (state, jax.tree.map(jnp.add, total, grads["params"])), value

  state = {key: variables[key] for key in variables if key == OWG}
  nothing = jax.tree.map(jnp.zeros_like, variables["params"])
  (state, total), values = lax.scan(step, (state, nothing), microbatches)
  return jnp.mean(values), {**state, "params": total}


def explain_step(tokens: int, variant: str, target: str) -> fp8.Report:
  """Reports on a step in microbatches of so many tokens."""
  cls = VARIANTS[variant]
  model: nn.Module = Stack(cls, scan=True, remat=True, length=LAYERS, param_dtype=jnp.float32)
  x = jax.ShapeDtypeStruct((TOKENS // tokens, tokens, WIDTH), jnp.bfloat16)
  variables = jax.eval_shape(model.init, jax.random.key(0), x.update(shape=x.shape[1:]))
  loss = loss_of(model)
  add: Any = fp8.accumulate_gradients if cls is OURS else accumulate
  step = lambda variables, x: add(loss, variables, x)
  return fp8.explain(step, variables, x, target=target, name=variant)


def measure(target: str, console: Console, sizes: tuple[int, ...] = SIZES) -> dict[str, Any]:
  """Compiles the step with every size of microbatch in every variant."""
  found: dict[str, Any] = {}
  for tokens in sizes:
    for variant in COMPARED:
      with console.status(f"{tokens} tokens, {variant}"):
        report = explain_step(tokens, variant, target)
      found.setdefault(str(tokens), {})[variant] = figures(report)
  return found


def table(found: dict[str, Any], target: str) -> Table:
  """One row a size of microbatch and variant."""
  grid = Table(title=f"{TOKENS:,} tokens in microbatches, as compiled for {target.upper()}")
  headings = ("tokens of one", "variant", "roofline ms", "of BF16", "MiB moved", "temp MiB")
  for heading in headings:
    grid.add_column(heading, justify="left" if heading == "variant" else "right")
  for tokens, variants in found.items():
    for variant, each in variants.items():
      grid.add_row(
        f"{int(tokens):,}" if variant == "BF16" else "",
        variant,
        f"{each['roofline_ms']:.2f}",
        f"{each['roofline_ms'] / variants['BF16']['roofline_ms']:.2f}",
        f"{each['mib_outside_gemms']:,.0f}",
        f"{each['temp_mib']:,.0f}",
        end_section=variant == COMPARED[-1],
      )
  return grid


if __name__ == "__main__":
  run(__doc__, "microbatches", measure, table)
