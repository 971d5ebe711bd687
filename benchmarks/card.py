"""What is this GPU, and how fast are the operations that make up a step?

    python benchmarks/card.py                # needs an H100 or H200; half a minute

Measures what the roofline of ``fp8.explain`` assumes: the rate of a large GEMM in BF16 and in FP8,
with fast and with full accumulation; the bandwidth of a large elementwise kernel, in bytes read and
written; and the time of a kernel that is too small to do anything. It notes the versions, the
driver, what ``flax-fp8 doctor`` says, and what ``fp8.capability`` answers for each recipe.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from rich.console import Console

import flax_fp8 as fp8
from flax_fp8 import doctor
from gemm import FORMATS, bare_program
from harness import clock, output, timed
from harness.names import BF16
from harness.options import Options
from harness.programs import Program
from harness.table import rows_of

GIBIBYTE = 2**30


def gemm_rates(options: Options) -> dict[str, dict[str, Program]]:
  """A square GEMM of operands that are ready, in each pair of formats that a layer multiplies."""
  side = 32 if options.tiny else 8192
  repeat = timed.steps(2 * side**3, options)
  kinds = {
    BF16: (None, False),
    "fprop, E4M3 x E4M3, fast": (FORMATS["fprop"], True),
    "dgrad, E5M2 x E4M3": (FORMATS["dgrad"], False),
    "wgrad, E4M3 x E5M2": (FORMATS["wgrad"], False),
  }
  programs = {name: bare_program((side, side, side), *kind, repeat) for name, kind in kinds.items()}
  return {f"GEMM {side} x {side} x {side}": programs}


def bandwidth(options: Options) -> dict[str, float]:
  """Bytes read and written in a second by ``-x``, of an array far larger than the L2 cache."""
  size = 2**10 if options.tiny else 2 * GIBIBYTE
  x = jax.random.normal(jax.random.key(0), (size // 2,), jnp.bfloat16)
  negate = jax.jit(lambda x: lax.fori_loop(0, options.repeat, lambda _, x: -x, x), donate_argnums=0)
  holder = [x]

  def run() -> None:
    holder[0] = jax.block_until_ready(negate(holder[0]))

  seconds = clock.interleave({"negate": run}, options.rounds)["negate"]
  rates = [options.repeat * 2 * size / each for each in seconds]
  return clock.spread(rates)


def launch(options: Options) -> dict[str, float]:
  """Seconds of one kernel of a chain in which each takes the result of the one before."""
  count = 10 if options.tiny else 200
  link = lambda x, _: lax.optimization_barrier(x * 1.001)
  chain, x = jax.jit(lambda x: functools.reduce(link, range(count), x)), jnp.ones(1024)
  run = lambda: jax.block_until_ready(chain(x))
  seconds = clock.interleave({"chain": run}, options.rounds)["chain"]
  return clock.spread([each / count for each in seconds])


def others(options: Options) -> dict[str, Any]:
  """What needs no GEMM, and what JAX says about the device."""
  answers = {name: fp8.capability(recipe=fp8.get_recipe(name)) for name in fp8.RECIPES}
  rates, seconds = bandwidth(options), launch(options)
  return {
    "summary": {
      "memory, read and written: TB/s": rates["median"] / 1e12,
      "a kernel that does nothing: µs": 1e6 * seconds["median"],
    },
    "bandwidth": {"bytes_per_second": rates},
    "launch": {"seconds": seconds},
    "capabilities": {n: f"{'yes' if able else 'no'}; {why}" for n, (able, why) in answers.items()},
    "allocator": jax.devices()[0].memory_stats() or {},
    "doctor": doctor.render(doctor.examine()).splitlines(),
  }


def summarize(found: timed.Found) -> dict[str, float]:
  return {f"{row['variant']}: TFLOP/s": row["tflops"]["median"] for row in rows_of(found)}


def show(content: dict[str, Any], console: Console) -> None:
  """Prints the rates, then what the doctor says."""
  timed.show_found(content, console)
  output.say(console, *content["doctor"])


def main() -> None:
  groups = lambda options: {"gemms": lambda: gemm_rates(options)}
  timed.run(__doc__, "card", groups, summarize, others=others, show=show)


if __name__ == "__main__":
  main()
