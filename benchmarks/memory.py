"""How much temporary memory does a step take, by policy of recomputation?

    python benchmarks/memory.py              # no GPU needed; about four minutes on one CPU core

The gradients of a loss by float32 parameters, of eight blocks of ``traffic.py`` (an MLP 2048/8192
after an RMSNorm, 8192 tokens) that compute in bfloat16, unrolled and under ``nn.scan`` with each
policy of ``nn.remat``, compiled for a described GPU in BF16, with ``flax.linen.fp8_ops`` and with
``flax_fp8``; never run.
``MiB`` is what the program allocates beside its arguments and results, ``of BF16`` its ratio to
BF16 with the same policy, ``of BF16, all kept`` to BF16 under ``nn.scan`` without a policy.
``again`` are the GEMMs of a layer that the backward pass computes once more.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import flax_fp8 as fp8
from recipe_cost import figures
from traffic import OURS, VARIANTS, Mlp, Stack, loss_of, run

LAYERS = 8
TOKENS, WIDTH = 8192, 2048
PARAMS = jnp.float32
GEMMS = 6  # of a layer's forward and backward pass
NONE = "all kept"

# For each policy what BF16 and Flax take, and what ours take in its place.
JAX = jax.checkpoint_policies
POLICIES: dict[str, tuple[Any, Any]] = {
  "nothing_saveable": (JAX.nothing_saveable, JAX.nothing_saveable),
  "dots_saveable": (JAX.dots_saveable, fp8.remat_policies.dots_saveable),
  "save_fp8_inputs": (None, fp8.remat_policies.save_fp8_inputs),
  "everything_saveable": (JAX.everything_saveable, JAX.everything_saveable),
}
COMPARED = ("BF16", "flax.linen.fp8_ops", "flax_fp8")


class Rematted(nn.Module):
  """The blocks under ``nn.scan``, each with a policy of what its backward pass keeps."""

  cls: Any
  policy: Callable[..., Any]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Takes and gives the residual stream."""
    block: Any = nn.remat(Mlp, prevent_cse=False, policy=self.policy)
    layers = fp8.scan(block, {"params": 0}, split_rngs={"params": True}, length=LAYERS)
    return layers(self.cls, PARAMS)(x, None)[0]


def cases(variant: str) -> dict[str, Callable[[Any], nn.Module]]:
  """The stacks of a variant, by policy."""
  made: dict[str, Callable[[Any], nn.Module]] = {
    "unrolled": lambda cls: Stack(cls, scan=False, param_dtype=PARAMS),
    NONE: lambda cls: Stack(cls, scan=True, param_dtype=PARAMS),
  }
  for name, policies in POLICIES.items():
    policy = policies[variant == "flax_fp8"]
    if policy is not None:
      made[name] = lambda cls, policy=policy: Rematted(cls, policy)
  return made


def explain_stack(make: Callable[[Any], nn.Module], variant: str, target: str) -> fp8.Report:
  """Reports on the gradients of a stack's loss."""
  cls = VARIANTS[variant]
  model, x = make(cls), jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.bfloat16)
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  differentiate: Any = fp8.value_and_grad if cls is OURS else jax.value_and_grad
  step = differentiate(loss_of(model))
  return fp8.explain(step, variables, x, target=target, name=variant)


def measure(target: str, console: Console) -> dict[str, Any]:
  """Compiles every stack of every variant."""
  found: dict[str, Any] = {}
  for variant in COMPARED:
    for name, make in cases(variant).items():
      with console.status(f"{variant}, {name}"):
        report = explain_stack(make, variant, target)
      found.setdefault(name, {})[variant] = figures(report)
  assert found[NONE]["BF16"]["operands"] == ["bf16"]
  return found


def table(found: dict[str, Any], target: str) -> Table:
  """One row a policy and variant."""
  grid = Table(title=f"Temporary memory of {LAYERS} MLPs as compiled for {target.upper()}")
  headings = ("policy", "variant", "MiB", "of BF16", f"of BF16, {NONE}", "again", "MiB moved")
  for heading in headings:
    grid.add_column(heading, justify="left" if heading in headings[:2] else "right")
  kept = found[NONE]["BF16"]["temp_mib"]
  for name, variants in found.items():
    own = variants.get("BF16", {}).get("temp_mib")
    for variant, each in variants.items():
      again = (each["gemms"] - GEMMS * LAYERS) / LAYERS
      grid.add_row(
        name if variant == next(iter(variants)) else "",
        variant,
        f"{each['temp_mib']:,.0f}",
        f"{each['temp_mib'] / own:.2f}" if own else "",
        f"{each['temp_mib'] / kept:.2f}",
        f"{again:.0f}",
        f"{each['mib_outside_gemms']:,.0f}",
        end_section=variant == list(variants)[-1],
      )
  return grid


if __name__ == "__main__":
  run(__doc__, "memory", measure, table)
