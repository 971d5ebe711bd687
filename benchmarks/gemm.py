"""How much faster than BF16 are a layer's three GEMMs in FP8, quantisation included?

    python benchmarks/gemm.py                # needs an H100 or H200; a few minutes

Layers without bias, all in bfloat16, forward and backward:

    out = x @ kernel;  x_grad = grad @ kernel.T;  kernel_grad = x.T @ grad

Their shapes are those of Transformer Engine's published figures (hidden 4096, four times that in
the MLP, 15872 tokens; query, key and value in one: twelve GEMMs), and of Llama 3 8B's and 70B's
projections with 8192 tokens. ``speedup`` is BF16's time over a variant's, the median over rounds in
which all variants ran in turn (``timed/``). Beside the layers, the bare GEMMs: operands already
quantised, in the layout that FP8 takes, and the same in BF16. On the compiled programs every GEMM
is checked to be of the dtype that its row says.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from flax_fp8.contraction import forward_gemm
from flax_fp8.products import dot_per_tensor
from flax_fp8.quantize import QTensor
from timed import script
from timed.clock import geometric_mean, speedups, spread
from timed.compiling import Ready, prepare_all
from timed.measure import Deadline, as_dict, measure, steps
from timed.options import Options
from timed.programs import Program, repeated
from timed.variants import BF16, VARIANTS

FP8 = "FP8"
# What Transformer Engine publishes is 1.69 and 1.58; rowwise is this package's own goal.
BARS = {"delayed": 1.69, "current": 1.58, "rowwise": 1.45}
E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
ROWS_BY_ROWS = (((1,), (1,)), ((), ()))  # both contracted along their rows, as FP8 kernels want


@dataclasses.dataclass(frozen=True)
class Shape:
  """Of a layer."""

  tokens: int
  width: int
  features: int

  @property
  def flops(self) -> int:
    """Of the three GEMMs."""
    return 6 * self.tokens * self.width * self.features

  @property
  def gemms(self) -> dict[str, tuple[int, int, int]]:
    """Rows, columns and contracted size of each."""
    m, k, n = self.tokens, self.width, self.features
    return {"fprop": (m, n, k), "dgrad": (m, k, n), "wgrad": (k, n, m)}


GROUPS: dict[str, dict[str, Shape]] = {
  "Transformer Engine": {
    "query, key, value": Shape(15872, 4096, 12288),
    "attention out": Shape(15872, 4096, 4096),
    "MLP up": Shape(15872, 4096, 16384),
    "MLP down": Shape(15872, 16384, 4096),
  },
  "Llama 3 8B": {
    "query, out": Shape(8192, 4096, 4096),
    "key, value": Shape(8192, 4096, 1024),
    "gate, up": Shape(8192, 4096, 14336),
    "down": Shape(8192, 14336, 4096),
  },
  "Llama 3 70B": {
    "query, out": Shape(8192, 8192, 8192),
    "key, value": Shape(8192, 8192, 1024),
    "gate, up": Shape(8192, 8192, 28672),
    "down": Shape(8192, 28672, 8192),
  },
}
TINY = {"Transformer Engine": {"small": Shape(32, 16, 48), "smaller": Shape(16, 16, 16)}}
PUBLISHED = "Transformer Engine"
FORMATS = {"fprop": (E4M3, E4M3), "dgrad": (E5M2, E4M3), "wgrad": (E4M3, E5M2)}


def layer_programs(shape: Shape, options: Options) -> dict[str, Program]:
  """A layer in each variant."""
  repeat = steps(shape.flops, options)
  x = jax.ShapeDtypeStruct((shape.tokens, shape.width), jnp.bfloat16)
  return {
    name: variant.program(variant.dense(shape.features), x, repeat=repeat, flops=shape.flops)
    for name, variant in VARIANTS.items()
    if name in options.choose(VARIANTS)
  }


def bare_program(
  sizes: tuple[int, int, int], formats: tuple[Any, Any] | None, fast: bool, repeat: int
) -> Program:
  """One GEMM whose operands are ready.

  Args:
    sizes: rows, columns, contracted.
    formats: of both operands; None for BF16.
    fast: accumulation, as recipes have it in the forward pass.
    repeat: steps.

  Returns:
    The program; its result is bfloat16.
  """
  m, n, k = sizes
  gemm = forward_gemm(ROWS_BY_ROWS, (m, k), (n, k))

  def multiply(state: Any, operands: Any, scales: Any) -> tuple[Any, Any]:
    if formats is None:
      lhs, rhs = operands
      out = jax.lax.dot_general(lhs, rhs, ROWS_BY_ROWS, preferred_element_type=jnp.bfloat16)
      return state, out
    lhs, rhs = QTensor(operands[0], scales[0]), QTensor(operands[1], scales[1])
    return state, dot_per_tensor(lhs, rhs, gemm, jnp.bfloat16, fast_accumulation=fast)

  kinds = formats or (jnp.bfloat16, jnp.bfloat16)
  operands = [jax.ShapeDtypeStruct(s, d) for s, d in zip(((m, k), (n, k)), kinds, strict=True)]
  scales = {"scale": [jax.ShapeDtypeStruct((), jnp.float32)] * 2}
  step = lambda state, operands, scales: multiply(state, operands, scales["scale"])
  shapes = ({}, operands, scales)
  return Program(repeated(step, repeat), shapes, repeat, 2 * m * n * k, formats is not None)


def bare_programs(shape: Shape, options: Options) -> dict[str, Program]:
  """The three GEMMs of a layer, each in BF16 and in FP8: ``"fprop BF16"``, ..."""
  repeat = steps(shape.flops // 3, options)
  return {
    f"{kind} {name}": bare_program(
      shape.gemms[kind], FORMATS[kind] if name == FP8 else None, kind == "fprop", repeat
    )
    for kind in FORMATS
    for name in (BF16, FP8)
  }


def measure_bare(ready: Mapping[str, Ready], options: Options) -> dict[str, Any]:
  """Each GEMM beside its twin."""
  found: dict[str, Any] = {}
  for kind in FORMATS:
    names = {name: f"{kind} {name}" for name in (BF16, FP8)}
    pair = {name: ready[full] for name, full in names.items() if full in ready}
    found |= {names[name]: each for name, each in measure(pair, options).items()}
  return found


def bare_sum(found: Mapping[str, Any]) -> dict[str, Any]:
  """The three GEMMs together: ms, and the speedup of their sum."""
  rounds = {name: in_sum(found, name) for name in (BF16, FP8)}
  ms = {name: as_dict(spread(each)) for name, each in rounds.items()}
  return {"ms": ms, "speedup": as_dict(spread(speedups(rounds[BF16], rounds[FP8])))}


def in_sum(found: Mapping[str, Any], name: str) -> list[float]:
  """The ms of the three GEMMs in each round."""
  each_kind = [found[f"{kind} {name}"]["ms_rounds"] for kind in FORMATS]
  return [sum(one_round) for one_round in zip(*each_kind, strict=True)]


def summarize(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """Of a group's layers: the geometric mean of speedups, and the speedup of their sum."""
  found: dict[str, Any] = {}
  total = lambda name: sum(each[name]["ms"]["median"] for each in layers.values())
  for name in in_all(layers.values()):
    speeds = [each[name]["speedup"]["median"] for each in layers.values()]
    found[name] = {
      "geometric_mean": geometric_mean(speeds),
      "of_the_sum": total(BF16) / total(name),
      "ms": total(name),
      "bar": BARS.get(name),
    }
  return found


def in_all(cases: Iterable[Mapping[str, Any]]) -> list[str]:
  """The variants that ran in every case, in their order."""
  first, *others = cases
  return [name for name in first if all(name in other for other in others)]


KINDS = {"layers": (layer_programs, measure), "bare": (bare_programs, measure_bare)}


def measure_group(
  layers: Mapping[str, Shape], kind: str, options: Options
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Compiles all programs of a group's layers, or bare GEMMs, then measures layer by layer."""
  make, run = KINDS[kind]
  programs = {
    (layer, name): program
    for layer, shape in layers.items()
    for name, program in make(shape, options).items()
  }
  ready = prepare_all(programs, options)
  for layer in layers:
    own = {name: each for (of, name), each in ready.items() if of == layer}
    yield layer, run(own, options)


def measure_all(options: Options, console: Console) -> dict[str, Any]:
  """All groups, the published one first; JSON is written after every layer."""
  deadline, groups = Deadline(options.seconds), TINY if options.tiny else GROUPS
  results: dict[str, Any] = {"shapes": {}, "layers": {}, "bare": {}, "summary": {}, "left_out": []}
  for (group, layers), kind in itertools.product(groups.items(), KINDS):
    if deadline.passed():
      results["left_out"].append(f"{group}, {kind}")
      continue
    with console.status(f"{group}, {kind}"):
      for layer, found in measure_group(layers, kind, options):
        results["shapes"][f"{group}: {layer}"] = dataclasses.asdict(layers[layer])
        results[kind][f"{group}: {layer}"] = found
        finish(results, groups)
        script.write_json(options.out, "gemm", script.document(options, **results))
  return script.document(options, **results)


def finish(results: dict[str, Any], groups: Mapping[str, Any]) -> None:
  """Adds what follows from the figures so far; a group's means once it is whole."""
  whole = {name: each for name, each in results["bare"].items() if len(each) == 2 * len(FORMATS)}
  results["bare_sums"] = {name: bare_sum(each) for name, each in whole.items()}
  for group, layers in groups.items():
    names = [f"{group}: {layer}" for layer in layers]
    if results["layers"].keys() >= set(names):
      results["summary"][group] = summarize({name: results["layers"][name] for name in names})


def show(content: Mapping[str, Any], console: Console) -> None:
  """Prints the tables, and the means beside the bars."""
  script.print_note(content, console)
  console.print(script.table("Layers, forward and backward", "layer", content["layers"]))
  console.print(script.table("Bare GEMMs", "layer", content["bare"]))
  for name, each in content.get("bare_sums", {}).items():
    console.print(f"{name}, three bare GEMMs: {each['speedup']['median']:.3f} times BF16's speed")
  for group, variants in content["summary"].items():
    for name, each in variants.items():
      bar = f", to reach {each['bar']:.2f}" if each["bar"] and group == PUBLISHED else ""
      mean, whole = each["geometric_mean"], each["of_the_sum"]
      line = f"{group}, {name}: geometric mean {mean:.3f}, of the sum {whole:.3f}{bar}"
      console.print(line, highlight=False)
  for name in content["left_out"]:
    console.print(f"left out, the time was up: {name}", highlight=False)
  script.print_problems(content["failures"], content["layers"] | content["bare"], console)


def draw(figure: Any, content: Mapping[str, Any]) -> None:
  """Draws the speedup of each variant by layer, with quartiles; bars to reach as lines."""
  layers = content["layers"]
  figure.set_size_inches(11, 5)
  axes = figure.subplots()
  names = in_all(layers.values())
  width = 0.9 / len(names)
  for index, name in enumerate(names):
    speedups = [each[name]["speedup"] for each in layers.values()]
    middle = [each["median"] for each in speedups]
    spreads = [[m - e["low"], e["high"] - m] for m, e in zip(middle, speedups, strict=True)]
    places = [place + index * width for place in range(len(layers))]
    axes.bar(places, middle, width, yerr=list(zip(*spreads, strict=True)), label=name)
    if name in BARS:
      looks: Any = {"color": f"C{index}", "linestyle": ":", "linewidth": 0.8}
      axes.axhline(BARS[name], label=f"{name}, to reach", **looks)
  axes.set_xticks([place + 0.45 for place in range(len(layers))], layers, rotation=25, ha="right")
  axes.set_ylabel("speed, BF16 = 1")
  figure.legend(fontsize="small", loc="outside lower center", ncols=5)


def main() -> None:
  """Runs the benchmark."""
  options, console = script.read_options(__doc__, "gemm"), script.console()
  if options.replot:
    script.replot(options.out, "gemm", draw, console)
    return
  content = measure_all(options, console)
  script.write_json(options.out, "gemm", content)
  show(content, console)
  script.write_plot(options.out, "gemm", draw, content, console)


if __name__ == "__main__":
  main()
