"""What is this GPU, and how fast are the things that a step is made of?

    python benchmarks/card.py                # needs an H100 or H200; half a minute

Measures what the roofline of ``fp8.explain`` assumes: the rate of a large GEMM in BF16 and in FP8,
with fast and with full accumulation; the bandwidth of a large elementwise kernel, in bytes read and
written; and the time of a kernel too small to do anything. Notes the versions, the driver, what
``flax-fp8 doctor`` says and what ``fp8.capability`` answers for each recipe.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from rich.console import Console

import flax_fp8 as fp8
from flax_fp8 import doctor
from gemm import FORMATS, bare_program
from timed import script
from timed.clock import interleave, spread
from timed.compiling import prepare_all
from timed.measure import as_dict, measure, steps
from timed.options import Options
from timed.variants import BF16

SIDE, TINY_SIDE = 8192, 32
GIBIBYTE = 2**30
LAUNCHES = 200


def gemm_rates(options: Options) -> dict[str, Any]:
  """A square GEMM whose operands are ready, in each pair of formats that a layer multiplies."""
  side = TINY_SIDE if options.tiny else SIDE
  repeat = steps(2 * side**3, options)
  sizes = (side, side, side)
  kinds = {
    BF16: (None, False),
    "fprop, E4M3 x E4M3, fast": (FORMATS["fprop"], True),
    "dgrad, E5M2 x E4M3": (FORMATS["dgrad"], False),
    "wgrad, E4M3 x E5M2": (FORMATS["wgrad"], False),
  }
  programs = {name: bare_program(sizes, *kind, repeat) for name, kind in kinds.items()}
  return measure(prepare_all(programs, options), options)


def bandwidth(options: Options) -> dict[str, Any]:
  """Bytes read and written in a second by ``-x``, of an array far larger than the L2 cache."""
  size = 2**10 if options.tiny else 2 * GIBIBYTE
  x = jax.random.normal(jax.random.key(0), (size // 2,), jnp.bfloat16)
  negate = jax.jit(lambda x: lax.fori_loop(0, options.repeat, lambda _, x: -x, x), donate_argnums=0)
  holder = [x]

  def run() -> None:
    holder[0] = jax.block_until_ready(negate(holder[0]))

  seconds = interleave({"negate": run}, options.rounds)["negate"]
  rates = [options.repeat * 2 * size / each for each in seconds]
  return {"bytes_per_second": as_dict(spread(rates))}


def launch(options: Options) -> dict[str, Any]:
  """Seconds of one kernel of a chain in which each takes what the last one gave."""
  count = 10 if options.tiny else LAUNCHES

  def chain(x: jax.Array) -> jax.Array:
    for _ in range(count):
      x = lax.optimization_barrier(x * 1.001)
    return x

  chained, x = jax.jit(chain).lower(jnp.ones(1024)).compile(), jnp.ones(1024)
  run = lambda: jax.block_until_ready(chained(x))
  seconds = interleave({"chain": run}, options.rounds)["chain"]
  return {"kernels": count, "seconds": as_dict(spread([each / count for each in seconds]))}


def capabilities() -> dict[str, str]:
  """What ``fp8.capability`` answers for each recipe."""
  answers = {name: fp8.capability(recipe=fp8.get_recipe(name)) for name in fp8.RECIPES}
  return {name: f"{'yes' if able else 'no'}; {why}" for name, (able, why) in answers.items()}


def memory_limit() -> dict[str, Any]:
  """What JAX's allocator may take of the GPU's memory."""
  return jax.devices()[0].memory_stats() or {}


PARTS = {"gemms": gemm_rates, "bandwidth": bandwidth, "launch": launch}


def measure_all(options: Options, console: Console) -> dict[str, Any]:
  """Writes JSON after each part."""
  results: dict[str, Any] = {"capabilities": capabilities(), "allocator": memory_limit()}
  for name, part in PARTS.items():
    with console.status(name):
      results[name] = part(options)
    script.write_json(options.out, "card", script.document(options, **results))
  results["doctor"] = doctor.render(doctor.examine()).splitlines()
  return script.document(options, **results)


def show(content: Mapping[str, Any], console: Console) -> None:
  """Prints the rates, then what the doctor says."""
  script.print_note(content, console)
  console.print(script.table(f"GEMMs of {SIDE} x {SIDE} x {SIDE}", "", {"": content["gemms"]}))
  rate = content["bandwidth"]["bytes_per_second"]["median"] / 1e12
  each = content["launch"]["seconds"]["median"] * 1e6
  line = f"memory {rate:.2f} TB/s, read and written; a kernel that does nothing {each:.2f} µs"
  console.print(line, highlight=False)
  for line in content["doctor"]:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
  script.print_problems(content["failures"], {"": content["gemms"]}, console)


def main() -> None:
  """Runs the benchmark."""
  options, console = script.read_options(__doc__, "card"), script.console()
  content = measure_all(options, console)
  script.write_json(options.out, "card", content)
  show(content, console)


if __name__ == "__main__":
  main()
