"""How much faster does torchao's float8 training make the same layers and block, over BF16?

    python benchmarks/against_torchao.py --out DIR   # needs an H100 or H200; about 100 seconds

BF16 is PyTorch's own. Block and layers are those of ``block.py`` and ``gemm.py``, whose speedups
are over JAX's BF16. If their JSON is in ``--out`` too, the last table has both, with times: a ratio
alone flatters the framework with the slower BF16. Everything is bfloat16, without bias, forward and
backward from a random output gradient, compiled by ``torch.compile`` for fixed shapes as one graph.
The block of ``block.py`` has a loss, so that XLA runs nothing of the backward pass ahead. PyTorch
never does: it compiles the two passes apart.
The variants are torchao's recipes ``tensorwise`` and ``rowwise``, which scale by current values as
our ``current`` and ``rowwise`` do. It has no delayed scaling. Every linear layer is converted.

Variants share parameters, input and output gradient. The gradients of input and parameters are new
tensors in each step, from ``torch.autograd.grad``, freed before the next: nothing accumulates, and
``.grad`` stays None. A run is ten steps or more, at least 20 ms, and ends synchronized. The first
step compiles and is timed apart. ``speedup`` is the median over rounds in which all variants ran in
turn. ``peak`` is what PyTorch holds at the peak of a step, parameters and input included.
``difference`` is the largest relative difference of a gradient from BF16's. TFLOP/s are of the
projections. Attention is cuDNN's or flash attention, whichever PyTorch takes. Nothing here may
import JAX, whose process would hold the GPU.
"""

import dataclasses
import functools
import gc
import pkgutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console

from harness import clock, output, sizes
from harness.names import BF16
from harness.sizes import GROUPS, PUBLISHED, Shape
from harness.table import CASE, TIMES, Column, print_table, rows_of
from lm.config import ModelShape

missing = ""
try:
  torch: Any = pkgutil.resolve_name("torch")
  float8: Any = pkgutil.resolve_name("torchao.float8")
except Exception as error:  # a build for another CUDA fails with more than ImportError
  missing = f"needs torch and torchao; got {type(error).__name__}: {error}"

Step: TypeAlias = Callable[[], Sequence[Any]]  # returns the gradients of input and parameters

NAME = "against_torchao"
VARIANTS = {BF16: None, "tensorwise": "tensorwise", "rowwise": "rowwise"}  # torchao's recipes
BLOCK, LAYERS = "block", "layers, geometric mean"
ROUNDS, LEAST_STEPS = 10, 10
KERNEL_SIZE = 1 / 64  # standard deviation, as in harness/programs.py
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Case:
  """What all variants compute."""

  flops: int  # of its projections in a step
  x: tuple[int, ...]  # the shape of its input
  out: tuple[int, ...]  # the shape of its output
  parts: dict[str, Any]  # its modules, in BF16
  apply: Callable[[Any, Any], Any]  # from such modules and the input to the output


def device() -> str:
  return "cuda" if torch.cuda.is_available() else "cpu"


def normal(*shape: int, size: float = 1.0) -> Any:
  return size * torch.randn(shape, device=device(), dtype=torch.bfloat16)


def linear(width: int, features: int) -> Any:
  layer = torch.nn.Linear(width, features, bias=False, device="meta")
  layer.weight = torch.nn.Parameter(normal(features, width, size=KERNEL_SIZE))
  return layer


def layer_case(shape: Shape) -> Case:
  parts = {"layer": linear(shape.width, shape.features)}
  x, out = (shape.tokens, shape.width), (shape.tokens, shape.features)
  return Case(shape.flops, x, out, parts, lambda parts, x: parts["layer"](x))


def block_case(shape: ModelShape, length: int) -> Case:
  """The block: RMSNorm, attention, RMSNorm, SwiGLU."""
  parts = {name: linear(*each) for name, each in shape.projections.items()}
  for name in ("before_attention", "before_mlp"):
    parts[name] = torch.nn.RMSNorm(shape.d_model, 1e-6, device=device(), dtype=torch.bfloat16)
  turns = rotation(length, shape.head_dim)
  silu, attend = torch.nn.functional.silu, torch.nn.functional.scaled_dot_product_attention

  def apply(parts: Any, x: Any) -> Any:
    normed = parts["before_attention"](x)
    heads = lambda name: parts[name](normed).unflatten(-1, (-1, shape.head_dim)).transpose(1, 2)
    query, key, value = rotate(heads("query"), turns), rotate(heads("key"), turns), heads("value")
    mixed = attend(query, key, value, is_causal=True, enable_gqa=True)
    x = x + parts["out"](mixed.transpose(1, 2).flatten(-2))
    normed = parts["before_mlp"](x)
    return x + parts["down"](silu(parts["gate"](normed)) * parts["up"](normed))

  x = (1, length, shape.d_model)
  return Case(sizes.block_flops(shape, length), x, x, parts, apply)


def rotation(length: int, head_dim: int) -> tuple[Any, Any]:
  """Cosines and sines of rotary positions, once for all steps, in float32."""
  ramp = lambda count: torch.arange(count, device=device(), dtype=torch.float32)
  angle = torch.outer(ramp(length), 10_000.0 ** (-ramp(head_dim // 2) / (head_dim // 2)))
  return angle.cos(), angle.sin()


def rotate(x: Any, turns: tuple[Any, Any]) -> Any:
  """Turns heads ``[B, heads, T, head_dim]``, as ``lm.model.rotate`` does."""
  first, second = x.float().chunk(2, dim=-1)
  cos, sin = turns
  return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def make_step(case: Case, recipe: str | None, x: Any, grad: Any, tiny: bool) -> Step:
  """Forward and backward, compiled as it first runs; parameters are the case's own tensors."""
  modules = torch.nn.ModuleDict(case.parts)
  if recipe is not None:
    config = float8.Float8LinearConfig.from_recipe_name(recipe)
    config = dataclasses.replace(config, emulate=tiny)
    modules = float8.convert_to_float8_training(modules, config=config)
  forward = lambda x: case.apply(modules, x)
  if not tiny:
    forward = torch.compile(forward, dynamic=False, fullgraph=True)
  inputs = (x, *modules.parameters())
  return lambda: torch.autograd.grad(forward(x), inputs, grad)


def synchronize() -> None:
  if device() == "cuda":
    torch.cuda.synchronize()


def several(step: Step, repeat: int) -> None:
  for _ in range(repeat):
    step()
  synchronize()


def difference(grads: Sequence[Any], wanted: Sequence[Any]) -> float:
  """The norm of the difference over the norm of what is wanted: the largest of all gradients."""
  pairs = [(a.float(), b.float()) for a, b in zip(grads, wanted, strict=True)]
  return torch.stack([(a - b).norm() / b.norm() for a, b in pairs]).max().item()


def peak_mib(step: Step) -> float | None:
  """What is allocated at the peak of a step; None on a CPU."""
  if device() == "cpu":
    return None
  gc.collect()  # what is left of the case before
  torch.cuda.reset_peak_memory_stats()
  step()
  synchronize()
  return torch.cuda.max_memory_allocated() / MIB


def prepare(case: Case, tiny: bool, failures: list[str]) -> Iterator[tuple[str, Step, Any]]:
  """Compiles the variants: name, step, and what is known about it; BF16 must work."""
  x, grad = normal(*case.x).requires_grad_(), normal(*case.out)
  baseline: Any = None
  for name, recipe in VARIANTS.items():
    try:
      step = make_step(case, recipe, x, grad, tiny)
      start = time.perf_counter()
      grads = step()
      synchronize()
      seconds = time.perf_counter() - start
      baseline = grads if recipe is None else baseline
      known = {"compile_seconds": seconds, "difference": difference(grads, baseline)}
    except Exception as error:
      if recipe is None:
        raise
      failures.append(f"{name}: {describe(error)}")
    else:
      yield name, step, known


def measure(case: Case, tiny: bool, failures: list[str]) -> dict[str, Any]:
  """All variants in turn: the figures of each."""
  ready = {name: (step, known) for name, step, known in prepare(case, tiny, failures)}
  repeat = 2 if tiny else clock.steps(case.flops, LEAST_STEPS)
  for step, known in ready.values():
    known.update(peak_mib=peak_mib(step), repeat=repeat)
  runs = {name: functools.partial(several, step, repeat) for name, (step, _) in ready.items()}
  times = clock.interleave(runs, 2 if tiny else ROUNDS)
  per_step = {name: [each / repeat for each in seconds] for name, seconds in times.items()}
  return {
    name: clock.figures(seconds, per_step[BF16], case.flops) | ready[name][1]
    for name, seconds in per_step.items()
  }


def describe(error: Exception) -> str:
  return f"{type(error).__name__}: {str(error)[:1000]}"


def document(tiny: bool) -> dict[str, Any]:
  """The JSON, before anything is measured."""
  names = ("torch", "triton", "torchao")
  versions = {name: pkgutil.resolve_name(name).__version__ for name in names}
  built = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
  card = {
    "device": torch.cuda.get_device_name() if device() == "cuda" else "cpu",
    "nvidia_smi": output.nvidia_smi(),
  }
  return {
    "measurement": not tiny,
    "note": output.NO_MEASUREMENT if tiny else "",
    "environment": {**output.host(), **card, **versions, **built},
    "method": {"rounds": ROUNDS, "least_steps": LEAST_STEPS, "compiled": not tiny},
    **{"found": {}, "summary": {}, "failures": [], "left_out": []},
  }


def measure_all(out: Path, seconds: float, tiny: bool, console: Console) -> None:
  """The block first; JSON is written after each case."""
  end, layers = time.monotonic() + seconds, (sizes.TINY_GROUPS if tiny else GROUPS)[PUBLISHED]
  block = sizes.llama(tiny)
  cases = {BLOCK: functools.partial(block_case, *block)}
  cases |= {name: functools.partial(layer_case, shape) for name, shape in layers.items()}
  content, found = document(tiny), dict[str, Any]()
  # Every case compiles the same functions again: past the limit, that would fail.
  torch._dynamo.config.recompile_limit = 8 * len(cases)
  for slow in () if tiny else ("mem_efficient", "math"):
    getattr(torch.backends.cuda, f"enable_{slow}_sdp")(False)
  for name, make in cases.items():
    if time.monotonic() > end:
      content["left_out"].append(name)
      continue
    failures: list[str] = []
    try:
      with console.status(name):
        found[name] = measure(make(), tiny, failures)
    except Exception as error:
      failures.append(describe(error))
    content["failures"] += [f"{name}: {failure}" for failure in failures]
    if found.keys() >= layers.keys():
      content["summary"] = clock.summarize({layer: found[layer] for layer in layers}, BF16)
    output.write_json(out, NAME, content | {"found": found})


COLUMNS = (
  *(CASE, Column("", "{variant}", left=True), *TIMES),
  *(Column("difference", "{difference:.3f}"), Column("compile s", "{compile_seconds:.1f}")),
)
BOTH = (
  *(Column("", "{of}", left=True), Column("", "{library}", left=True)),
  Column("", "{variant}", left=True),
  *(Column("speedup", "{speedup:.3f}"), Column("ms", "{ms:.3f}")),
)


def compare(content: Mapping[str, Any], out: Path) -> list[dict[str, Any]]:
  """Rows of torchao's speedups, and of ours whose JSON lies beside theirs."""
  read = lambda name: output.read_json(out, name) if (out / f"{name}.json").exists() else {}
  found, names = read("gemm").get("found", {}), [f"{PUBLISHED}: {n}" for n in GROUPS[PUBLISHED]]
  whole = found.keys() >= set(names)
  ours = clock.summarize({name: found[name] for name in names}, BF16) if whole else {}
  rows: list[tuple[Any, ...]] = []
  for library, document in {"torchao": content, "flax_fp8": read("block")}.items():
    for name, each in document.get("found", {}).get(BLOCK, {}).items():
      rows.append((BLOCK, library, name, each["speedup"]["median"], each["ms"]["median"]))
  for library, summary in {"torchao": content["summary"], "flax_fp8": ours}.items():
    rows += [(LAYERS, library, name, s["geometric_mean"], s["ms"]) for name, s in summary.items()]
  return [dict(zip(("of", "library", "variant", "speedup", "ms"), r, strict=True)) for r in rows]


def show(content: Mapping[str, Any], out: Path, console: Console) -> None:
  """Prints the tables, and what did not run."""
  output.say(console, *filter(None, [content["note"]]))
  title = "torchao's float8 training, forward and backward"
  print_table(console, title, COLUMNS, rows_of(content["found"]))
  title = "Each over the BF16 of its own framework"
  print_table(console, title, BOTH, compare(content, out), "of")
  output.say_what_is_missing(console, content)


def refusal(tiny: bool) -> str:
  """Why nothing can be timed here; empty where it can."""
  if missing or tiny:
    return missing
  able = device() == "cuda" and torch.cuda.get_device_capability() >= (8, 9)
  needs = "needs a GPU that multiplies FP8. --tiny runs small shapes here, as a test of the script."
  return "" if able else needs


def main() -> None:
  parser = output.make_parser(__doc__)
  parser.add_argument("--seconds", type=float, default=100, help="then nothing new begins")
  parser.add_argument("--tiny", action="store_true", help="small shapes, not compiled: a test")
  arguments = parser.parse_args()
  console = output.make_console()
  if not arguments.redraw:
    if reason := refusal(arguments.tiny):
      parser.exit(2, f"{NAME}: {reason}\n")
    measure_all(arguments.out, arguments.seconds, arguments.tiny, console)
  show(output.read_json(arguments.out, NAME), arguments.out, console)


if __name__ == "__main__":
  main()
