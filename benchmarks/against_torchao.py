"""How much faster does torchao's float8 training make the same layers and block, over BF16?

    python benchmarks/against_torchao.py --out DIR   # needs an H100 or H200; about 100 seconds

BF16 is PyTorch's own; block and layers are those of ``block.py`` and ``gemm.py``, whose own
speedups are over JAX's. If their JSON is in ``--out`` too, the last table has both, with times: a
ratio alone flatters whoever has the slower BF16. All is bfloat16, without bias, forward and
backward from a random output gradient, compiled by ``torch.compile`` for fixed shapes as one graph.
The variants are torchao's recipes ``tensorwise`` and ``rowwise``, which scale by the current values
as our ``current`` and ``rowwise`` do; it has no delayed scaling. Every linear layer is converted.

Variants share parameters, input and output gradient. The gradients of input and parameters are new
tensors in each step, from ``torch.autograd.grad``, freed before the next: nothing accumulates, and
``.grad`` stays None. A run is ten steps or more, at least 20 ms, and ends synchronized; the first
step compiles and is timed apart. ``speedup`` is the median over rounds in which all variants ran in
turn (``timed/clock.py``); ``peak`` is what PyTorch holds at the peak of a step, parameters and
input included; ``difference`` is from BF16's gradients, the largest of the relative ones. TFLOP/s
are of the projections. Nothing here may import JAX, whose process would hold the GPU.
"""

import argparse
import dataclasses
import datetime
import gc
import json
import math
import pkgutil
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.table import Table

from lm.files import write_text
from timed.clock import geometric_mean, interleave, speedups, spread

missing = ""
try:
  torch: Any = pkgutil.resolve_name("torch")
  float8: Any = pkgutil.resolve_name("torchao.float8")
except Exception as error:  # a build for another CUDA fails with more than ImportError
  missing = f"needs torch and torchao; got {type(error).__name__}: {error}"

Step: TypeAlias = Callable[[], Sequence[Any]]  # gives the gradients of input and parameters

NAME = "against_torchao"
BF16 = "BF16"
VARIANTS = {BF16: None, "tensorwise": "tensorwise", "rowwise": "rowwise"}  # torchao's recipes
ATTENTION = ("cudnn", "flash")  # block.py's, and the next best
BLOCK = "block"
LAYERS, PUBLISHED = "layers, geometric mean", "Transformer Engine"  # and gemm.py's name for them
RESULTS = Path(__file__).resolve().parent / "results"
ROUNDS, LEAST_STEPS = 10, 10
FASTEST, LEAST_SECONDS = 800e12, 0.02  # as in timed/measure.py
KERNEL_SIZE = 1 / 64  # standard deviation, as in timed/programs.py
MIB = 2**20
NVIDIA_SMI = "name,driver_version,power.limit,clocks.max.sm"


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """Of a block."""

  sequences: int = 1
  length: int = 8192
  width: int = 4096
  heads: int = 32
  kv_heads: int = 8
  hidden: int = 14336

  @property
  def head_dim(self) -> int:
    """Width of a head."""
    return self.width // self.heads

  @property
  def projections(self) -> dict[str, tuple[int, int]]:
    """Input and output features of each."""
    width, hidden, kv_width = self.width, self.hidden, self.kv_heads * self.head_dim
    attention = {"query": (width, width), "key": (width, kv_width), "value": (width, kv_width)}
    mlp = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    return {**attention, "out": (width, width), **mlp}

  @property
  def flops(self) -> int:
    """Of the projections, forward and backward."""
    return 6 * self.sequences * self.length * sum(a * b for a, b in self.projections.values())


# gemm.py's GROUPS["Transformer Engine"] and block.py's Sizes(): those files import JAX. A test
# compares them.
SHAPES = {
  "query, key, value": Shape(15872, 4096, 12288),
  "attention out": Shape(15872, 4096, 4096),
  "MLP up": Shape(15872, 4096, 16384),
  "MLP down": Shape(15872, 16384, 4096),
}
TINY_SHAPES = {"small": Shape(32, 16, 48), "smaller": Shape(16, 16, 16)}
TINY_SIZES = Sizes(length=16, width=64, heads=4, kv_heads=2, hidden=96)


@dataclasses.dataclass(frozen=True)
class Case:
  """What all variants compute.

  Attributes:
    flops: of its projections in a step.
    x: the shape of its input.
    out: the shape of its output.
    parts: its modules, in BF16.
    apply: from such modules and the input to the output.
  """

  flops: int
  x: tuple[int, ...]
  out: tuple[int, ...]
  parts: dict[str, Any]
  apply: Callable[[Any, Any], Any]


def device() -> str:
  """Where all is computed."""
  return "cuda" if torch.cuda.is_available() else "cpu"


def normal(*shape: int, size: float = 1.0) -> Any:
  """Random numbers."""
  return size * torch.randn(shape, device=device(), dtype=torch.bfloat16)


def linear(width: int, features: int) -> Any:
  """A layer of random weights."""
  layer = torch.nn.Linear(width, features, bias=False, device="meta")
  layer.weight = torch.nn.Parameter(normal(features, width, size=KERNEL_SIZE))
  return layer


def layer_case(shape: Shape) -> Case:
  """One layer."""
  parts = {"layer": linear(shape.width, shape.features)}
  x, out = (shape.tokens, shape.width), (shape.tokens, shape.features)
  return Case(shape.flops, x, out, parts, lambda parts, x: parts["layer"](x))


def block_case(sizes: Sizes) -> Case:
  """The block: RMSNorm, attention, RMSNorm, SwiGLU."""
  parts = {name: linear(*each) for name, each in sizes.projections.items()}
  for name in ("before_attention", "before_mlp"):
    parts[name] = torch.nn.RMSNorm(sizes.width, 1e-6, device=device(), dtype=torch.bfloat16)
  turns = rotation(sizes.length, sizes.head_dim)
  silu, attend = torch.nn.functional.silu, torch.nn.functional.scaled_dot_product_attention

  def apply(parts: Any, x: Any) -> Any:
    normed = parts["before_attention"](x)
    heads = lambda name: parts[name](normed).unflatten(-1, (-1, sizes.head_dim)).transpose(1, 2)
    query, key, value = rotate(heads("query"), turns), rotate(heads("key"), turns), heads("value")
    mixed = attend(query, key, value, is_causal=True, enable_gqa=True)
    x = x + parts["out"](mixed.transpose(1, 2).flatten(-2))
    normed = parts["before_mlp"](x)
    return x + parts["down"](silu(parts["gate"](normed)) * parts["up"](normed))

  shape = (sizes.sequences, sizes.length, sizes.width)
  return Case(sizes.flops, shape, shape, parts, apply)


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


def attend_by(backend: str) -> None:
  """Allows one implementation of attention; PyTorch raises where it can't be taken."""
  for name in ("cudnn", "flash", "mem_efficient", "math"):
    getattr(torch.backends.cuda, f"enable_{name}_sdp")(name == backend)


def converted(parts: Mapping[str, Any], recipe: str | None, tiny: bool) -> Any:
  """The modules, linear layers in float8 if there is a recipe; parameters are the same tensors."""
  modules = torch.nn.ModuleDict(parts)
  if recipe is None:
    return modules
  config = float8.Float8LinearConfig.from_recipe_name(recipe)
  config = dataclasses.replace(config, emulate=tiny)
  return float8.convert_to_float8_training(modules, config=config)


def make_step(case: Case, modules: Any, x: Any, grad: Any, tiny: bool) -> Step:
  """Forward and backward, compiled as it first runs."""
  forward = lambda x: case.apply(modules, x)
  if not tiny:
    forward = torch.compile(forward, dynamic=False, fullgraph=True)
  inputs = (x, *modules.parameters())
  return lambda: torch.autograd.grad(forward(x), inputs, grad)


def synchronize() -> None:
  """Waits for the GPU, if there is one."""
  if device() == "cuda":
    torch.cuda.synchronize()


def several(step: Step, repeat: int) -> Callable[[], None]:
  """A run of the clock."""

  def run() -> None:
    for _ in range(repeat):
      step()
    synchronize()

  return run


def difference(grads: Sequence[Any], wanted: Sequence[Any]) -> float:
  """The norm of what is off, over the norm of what is wanted: the largest of all gradients."""
  pairs = [(a.float(), b.float()) for a, b in zip(grads, wanted, strict=True)]
  largest = torch.stack([(a - b).norm() / b.norm() for a, b in pairs]).max().item()
  if not math.isfinite(largest):
    raise ArithmeticError("gradients are not finite")
  return largest


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
  """Compiles the variants: name, step, and what is known of it; BF16 must work."""
  x, grad = normal(*case.x).requires_grad_(), normal(*case.out)
  baseline: Any = None
  for name, recipe in VARIANTS.items():
    try:
      step = make_step(case, converted(case.parts, recipe, tiny), x, grad, tiny)
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
  repeat = 2 if tiny else max(LEAST_STEPS, round(LEAST_SECONDS * FASTEST / case.flops))
  for step, known in ready.values():
    known.update(peak_mib=peak_mib(step), repeat=repeat)
  runs = {name: several(step, repeat) for name, (step, _) in ready.items()}
  times = interleave(runs, 2 if tiny else ROUNDS)
  per_step = {name: [each / repeat for each in seconds] for name, seconds in times.items()}
  return {
    name: figures(seconds, per_step[BF16], case.flops) | ready[name][1]
    for name, seconds in per_step.items()
  }


def figures(seconds: Sequence[float], baseline: Sequence[float], flops: int) -> dict[str, Any]:
  """The numbers of one variant, named as ``timed.measure`` names them."""
  quartiles = lambda values: dataclasses.asdict(spread(values))
  return {
    "ms": quartiles([1e3 * each for each in seconds]),
    "tflops": quartiles([flops / each / 1e12 for each in seconds]),
    "speedup": quartiles(speedups(baseline, seconds)),
    "ms_rounds": [1e3 * each for each in seconds],
  }


def summarize(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """Of all layers, as ``gemm.py`` has them: mean of speedups, speedup of the sum, its ms."""
  total = lambda name: sum(each[name]["ms"]["median"] for each in layers.values())
  mean = lambda name: geometric_mean(e[name]["speedup"]["median"] for e in layers.values())
  return {
    name: {"geometric_mean": mean(name), "of_the_sum": total(BF16) / total(name), "ms": total(name)}
    for name in VARIANTS
    if all(name in each for each in layers.values())
  }


def document(tiny: bool, shapes: Mapping[str, Any]) -> dict[str, Any]:
  """The JSON, before anything is measured."""
  return {
    "measurement": not tiny,
    "note": "no measurement: small shapes, to test the script" if tiny else "",
    "environment": {
      "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
      "device": torch.cuda.get_device_name() if device() == "cuda" else "cpu",
      "nvidia_smi": driver(),
      "python": platform.python_version(),
      **{n: pkgutil.resolve_name(n).__version__ for n in ("torch", "triton", "torchao")},
      "cuda": torch.version.cuda,
      "cudnn": torch.backends.cudnn.version(),
    },
    "method": {"rounds": ROUNDS, "least_steps": LEAST_STEPS, "compiled": not tiny},
    "shapes": {name: dataclasses.asdict(each) for name, each in shapes.items()},
    **{"attention": "", "found": {}, "summary": {}, "failures": [], "left_out": []},
  }


def driver() -> dict[str, str]:
  """What nvidia-smi says of the GPU; empty where it does not."""
  command = ["nvidia-smi", f"--query-gpu={NVIDIA_SMI}", "--format=csv,noheader"]
  try:
    found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
  except (OSError, subprocess.SubprocessError):
    return {}
  values = found.splitlines()[0].split(", ") if found.strip() else []
  return dict(zip(NVIDIA_SMI.split(","), values, strict=False))


def describe(error: Exception) -> str:
  """One line, or some."""
  return f"{type(error).__name__}: {str(error)[:1000]}"


def attempt(name: str, shape: Any, tiny: bool, content: dict[str, Any]) -> None:
  """Measures a case, the block with the first attention that works; what fails is noted."""
  make: Callable[[Any], Case] = block_case if name == BLOCK else layer_case
  for backend in ATTENTION if name == BLOCK and not tiny else ("math",):
    attend_by(backend)
    failures: list[str] = []
    try:
      content["found"][name] = measure(make(shape), tiny, failures)
    except Exception as error:
      failures.append(describe(error))
    content["failures"] += [f"{name}, {backend} attention: {failure}" for failure in failures]
    if name in content["found"]:
      content["attention"] = backend if name == BLOCK else content["attention"]
      return


def measure_all(out: Path, seconds: float, tiny: bool, console: Console) -> dict[str, Any]:
  """The block first; JSON is written after each case."""
  end = time.monotonic() + seconds
  layers = TINY_SHAPES if tiny else SHAPES
  shapes = {BLOCK: TINY_SIZES if tiny else Sizes(), **layers}
  content = document(tiny, shapes)
  found = content["found"]
  # Every case compiles the same functions again: past the limit, that would fail.
  torch._dynamo.config.recompile_limit = 8 * len(shapes)
  for name, shape in shapes.items():
    if time.monotonic() > end:
      content["left_out"].append(name)
    else:
      with console.status(name):
        attempt(name, shape, tiny, content)
    if found.keys() >= layers.keys():
      content["summary"] = summarize({layer: found[layer] for layer in layers})
    write_text(out / f"{NAME}.json", json.dumps(content, indent=1) + "\n")
  return content


def table(found: Mapping[str, Mapping[str, Any]]) -> Table:
  """One row a variant of each case."""
  grid = Table("", "", title="torchao's float8 training, forward and backward")
  for heading in ("ms", "TFLOP/s", "speedup", "quartiles", "peak MiB", "difference", "compile s"):
    grid.add_column(heading, justify="right")
  for case, variants in found.items():
    for index, (name, each) in enumerate(variants.items()):
      speedup, peak = each["speedup"], each["peak_mib"]
      cells = [
        f"{each['ms']['median']:.3f}",
        f"{each['tflops']['median']:,.0f}",
        f"{speedup['median']:.3f}",
        f"{speedup['low']:.3f}-{speedup['high']:.3f}",
        "-" if peak is None else f"{peak:,.0f}",
        f"{each['difference']:.3f}",
        f"{each['compile_seconds']:.1f}",
      ]
      grid.add_row("" if index else case, name, *cells, end_section=index == len(variants) - 1)
  return grid


def compare(content: Mapping[str, Any], out: Path) -> list[tuple[str, str, str, float, float]]:
  """What torchao's speedups are, and ours that lie beside them.

  Returns:
    What of, library, variant, speedup and ms of each.
  """
  block, gemm = read(out, "block"), read(out, "gemm")
  blocks = {"torchao": content, "flax_fp8": block}
  layers = {"torchao": content["summary"], "flax_fp8": gemm.get("summary", {}).get(PUBLISHED, {})}
  return [
    (BLOCK, library, name, each["speedup"]["median"], each["ms"]["median"])
    for library, document in blocks.items()
    for name, each in document.get("found", {}).get(BLOCK, {}).items()
  ] + [
    (LAYERS, library, name, each["geometric_mean"], each["ms"])
    for library, variants in layers.items()
    for name, each in variants.items()
  ]


def read(out: Path, name: str) -> dict[str, Any]:
  """One of our JSON files; empty where it is not there."""
  path = out / f"{name}.json"
  return json.loads(path.read_text()) if path.exists() else {}


def show(content: Mapping[str, Any], out: Path, console: Console) -> None:
  """Prints the tables, and what did not run."""
  if content["note"]:
    console.print(content["note"], highlight=False)
  console.print(table(content["found"]))
  grid = Table("", "", "", title="Each over the BF16 of its own framework")
  for heading in ("speedup", "ms"):
    grid.add_column(heading, justify="right")
  for what, library, name, speedup, ms in compare(content, out):
    grid.add_row(what, library, name, f"{speedup:.3f}", f"{ms:.3f}")
  console.print(grid)
  for name in content["left_out"]:
    console.print(f"left out, the time was up: {name}", highlight=False)
  for failure in content["failures"]:
    console.print(f"FAILED {failure}", highlight=False, markup=False, soft_wrap=True)


def refusal(tiny: bool) -> str:
  """Why nothing can be timed here; empty where it can."""
  if missing or tiny:
    return missing
  if device() == "cpu":
    return (
      "needs a GPU that multiplies FP8. --tiny runs small shapes here, as a test of the script."
    )
  capability = torch.cuda.get_device_capability()
  return "" if capability >= (8, 9) else f"needs a GPU that multiplies FP8; got {capability}."


def main() -> None:
  """Runs the benchmark."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
  parser.add_argument("--seconds", type=float, default=100, help="then nothing new begins")
  parser.add_argument("--tiny", action="store_true", help="small shapes, not compiled: a test")
  arguments = parser.parse_args()
  if reason := refusal(arguments.tiny):
    parser.exit(2, f"{NAME}: {reason}\n")
  console = Console()
  console = console if console.is_terminal else Console(width=120)
  content = measure_all(arguments.out, arguments.seconds, arguments.tiny, console)
  show(content, arguments.out, console)


if __name__ == "__main__":
  main()
