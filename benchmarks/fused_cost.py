"""What do fused projections save on a GPU?

    python benchmarks/fused_cost.py          # no GPU needed; about a minute on one CPU core

Llama 3 8B's widths, 8192 tokens, parameters in float32, the rest in bfloat16: query, key and value
(32 and 8 heads of 128), and the SwiGLU (14336), each as separate ``nn.Dense`` and fused: forward,
backward from output gradients that are arguments, and a step of gradient descent. Each variant is
compiled for a described H100, and never run: counts, bytes and memory are those of the compiled
program. ``ms`` is a roofline, a lower bound by data-sheet rates without launches and caches: it
compares programs, it predicts no time. ``MiB`` are read and written by kernels other than GEMMs.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import flax_fp8 as fp8
from flax_fp8.doctor import allow_missing_cuda
from lm.report import environment
from recipe_cost import RESULTS, figures

TARGET = "h100"
Kind: TypeAlias = Literal["separate", "joint"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """Of one Transformer block."""

  tokens: int = 8192
  width: int = 4096
  heads: int = 32
  kv_heads: int = 8
  head_dim: int = 128
  hidden: int = 14336


class SeparateQKV(nn.Module):
  """Three layers; BF16 without ``dot_general_cls``."""

  sizes: Sizes
  dot_general_cls: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
    heads = {"query": self.sizes.heads, "key": self.sizes.kv_heads, "value": self.sizes.kv_heads}
    return tuple(
      dense(count * self.sizes.head_dim, self.dot_general_cls, name)(x).reshape(
        *x.shape[:-1], count, self.sizes.head_dim
      )
      for name, count in heads.items()
    )


class SeparateSwiGLU(nn.Module):
  """Three layers; BF16 without ``dot_general_cls``."""

  sizes: Sizes
  dot_general_cls: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    gate = dense(self.sizes.hidden, self.dot_general_cls, "gate")(x)
    up = dense(self.sizes.hidden, self.dot_general_cls, "up")(x)
    return dense(self.sizes.width, self.dot_general_cls, "down")(nn.silu(gate) * up)


def dense(features: int, dot_general_cls: Any, name: str) -> nn.Dense:
  """A projection without bias."""
  return nn.Dense(
    features, use_bias=False, dtype=jnp.bfloat16, dot_general_cls=dot_general_cls, name=name
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
  """How the projections are made.

  Attributes:
    recipe: None for BF16.
    kernel_scales: of the fused modules; None for separate layers.
  """

  recipe: fp8.Recipe | None = None
  kernel_scales: Kind = None

  def qkv(self, sizes: Sizes) -> nn.Module:
    """Query, key and value."""
    if self.kernel_scales is None:
      return SeparateQKV(sizes, self.recipe and self.recipe.dot_general_cls)
    heads = {"num_heads": sizes.heads, "num_kv_heads": sizes.kv_heads, "head_dim": sizes.head_dim}
    return fp8.Fp8FusedQKV(**heads, use_bias=False, **self._options())

  def swiglu(self, sizes: Sizes) -> nn.Module:
    """The gated MLP."""
    if self.kernel_scales is None:
      return SeparateSwiGLU(sizes, self.recipe and self.recipe.dot_general_cls)
    return fp8.Fp8SwiGLU(hidden_features=sizes.hidden, **self._options())

  def _options(self) -> dict[str, Any]:
    options = {"recipe": self.recipe, "kernel_scales": self.kernel_scales}
    return {"dtype": jnp.bfloat16, **options}


DELAYED, CURRENT = fp8.DelayedScaling(), fp8.Float8CurrentScaling()
VARIANTS = {
  "BF16": Variant(),
  "delayed, three layers": Variant(recipe=DELAYED),
  "delayed, fused": Variant(recipe=DELAYED, kernel_scales="joint"),
  "delayed, fused, separate scales": Variant(recipe=DELAYED, kernel_scales="separate"),
  "current, three layers": Variant(recipe=CURRENT),
  "current, fused": Variant(recipe=CURRENT, kernel_scales="joint"),
  "current, fused, separate scales": Variant(recipe=CURRENT, kernel_scales="separate"),
}
PROJECTIONS: dict[str, Callable[[Variant, Sizes], nn.Module]] = {
  "query, key, value": Variant.qkv,
  "SwiGLU": Variant.swiglu,
}


def explain_step(projections: str, name: str, sizes: Sizes) -> fp8.Report:
  """Reports on forward and backward of one variant, named as in ``PROJECTIONS``, ``VARIANTS``."""
  module = PROJECTIONS[projections](VARIANTS[name], sizes)
  x = jax.ShapeDtypeStruct((sizes.tokens, sizes.width), jnp.bfloat16)
  variables = jax.eval_shape(module.init, jax.random.key(0), x)
  grad = jax.eval_shape(module.apply, variables, x)

  def step(variables: Any, x: jax.Array, grad: Any) -> Any:
    out, pull_back = jax.vjp(module.apply, variables, x)
    grads, x_grad = pull_back(grad)
    overwrite, grads = fp8.partition_for_grad_overwrite(grads)
    updates = jax.tree.map(lambda grad: -1e-3 * grad, grads)
    return out, x_grad, fp8.apply_updates(variables, updates, overwrite)

  return fp8.explain(step, variables, x, grad, target=TARGET, name=name)


def measure(sizes: Sizes, names: Sequence[str], console: Console) -> dict[str, dict[str, Any]]:
  """Compiles the named variants of both."""
  found: dict[str, dict[str, Any]] = {}
  for projections in PROJECTIONS:
    found[projections] = {}
    for name in names:
      with console.status(f"{projections}: {name}"):
        found[projections][name] = figures(explain_step(projections, name, sizes))
    baseline = found[projections]["BF16"]
    assert baseline["operands"] == ["bf16"], baseline  # no speed over another dtype than BF16
  return found


def table(projections: str, found: Mapping[str, Any]) -> Table:
  """One row a variant."""
  grid = Table(title=f"{projections}: forward and backward, compiled for {TARGET.upper()}")
  grid.add_column("")
  for heading in ("FP8 GEMMs", "kernels", "MiB", "temp MiB", "ms"):
    grid.add_column(heading, justify="right")
  for name, each in found.items():
    mib = (f"{each[key]:,.0f}" for key in ("mib_outside_gemms", "temp_mib"))
    gemms, ms = f"{each['fp8_gemms']}/{each['gemms']}", f"{each['roofline_ms']:.2f}"
    grid.add_row(name, gemms, str(each["kernels"]), *mib, ms)
  return grid


def main() -> None:
  """Runs the benchmark."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
  arguments = parser.parse_args()
  allow_missing_cuda()
  console, sizes = Console(), Sizes()
  found = measure(sizes, tuple(VARIANTS), console)
  for projections, variants in found.items():
    console.print(table(projections, variants))
  arguments.out.mkdir(parents=True, exist_ok=True)
  document = {
    "environment": environment(),
    "target": TARGET,
    "sizes": dataclasses.asdict(sizes),
    "found": found,
  }
  (arguments.out / "fused_cost.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
  main()
