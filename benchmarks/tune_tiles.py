"""Which tiles make the GEMM of block scaling fastest on this GPU?

    python benchmarks/tune_tiles.py              # needs an H100 or H200; about four minutes
    python benchmarks/tune_tiles.py --compile    # no GPU needed; about four minutes on two cores

Measures tiles for the GEMMs of layers, and writes the fastest to ``flax_fp8/kernels/tiles.json``,
where the package finds them. Layers are those of Transformer Engine, or ``--shapes``. GEMMs have
E4M3 operands that are ready, and bfloat16 results. Candidates run in two heats:

- all shapes of a tile that compile without spilled registers, with as many stages as fit;
- the winner with other numbers of stages, and other orders of tiles.

In each heat, the default tile and all candidates run in turn, as in ``gemm.py``. A tile is written
if it is faster than the default by more than 2 %, by the median over rounds. The file has only the
winners of this run, with card, JAX version and date; ``tune_tiles.json`` has all times. A run that
is cut short leaves the default for the GEMMs that it did not reach.

``--compile`` compiles all shapes of a tile for a described H100, and lists registers, spills and
shared memory. ``GEOMETRIES`` has those that spill neither with JAX 0.10.2 nor with JAX 0.12.0.1.
The exit code is 1 if one of them spills.
"""

import argparse
import dataclasses
import functools
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from rich.console import Console

import flax_fp8 as fp8
from flax_fp8.doctor import allow_missing_cuda
from flax_fp8.kernels import tiles
from flax_fp8.kernels.mosaic_gemm import BlockGemm
from flax_fp8.kernels.tiles import DEFAULT, SHARED_MEMORY, SIDE, Scales, Tile
from harness import clock, output
from harness.compiling import prepare_all
from harness.environment import environment
from harness.options import Options
from harness.programs import Arrays, Program, repeated
from harness.sizes import GROUPS, PUBLISHED, Shape
from harness.table import Column, print_table

NAME = "tune_tiles"
LEAST_SPEED = 1.02  # of a tile over the default: less may be noise
STAGES, RASTERS = range(3, 7), (4, 8, 16)
ALL_SCALES: tuple[Scales, ...] = ("blocks", "rows")
GEOMETRY = ("waves", "columns", "cell", "in_flight")
# Values of the fields of GEOMETRY that compile without spills with both releases of JAX.
GEOMETRIES: dict[Scales, tuple[tuple[int, ...], ...]] = {
  "blocks": (
    *((1, 64, 64, 1), (1, 128, 64, 1), (1, 128, 64, 2), (1, 128, 128, 1)),
    *((2, 64, 64, 1), (2, 64, 64, 2), (2, 128, 64, 1), (2, 128, 64, 2)),
  ),
  "rows": (
    *((1, 64, 64, 1), (1, 128, 64, 1), (1, 128, 64, 2), (1, 128, 128, 1)),
    *((1, 192, 64, 1), (1, 192, 64, 2), (1, 256, 64, 2), (1, 256, 128, 1)),
    *((2, 64, 64, 1), (2, 64, 64, 2), (2, 128, 64, 2), (2, 128, 128, 1)),
  ),
}


@dataclasses.dataclass(frozen=True)
class Gemm:
  """A product of ``[m, k]`` and ``[n, k]``, and how the second operand is scaled."""

  scales: Scales
  m: int
  n: int
  k: int

  @property
  def flops(self) -> int:
    return 2 * self.m * self.n * self.k

  @property
  def key(self) -> tiles.Key:
    return tiles.key_of(self.m, self.n, self.k, self.scales)

  def __str__(self) -> str:
    return f"{self.m} x {self.n} x {self.k}, {self.scales}"


Seconds: TypeAlias = Mapping[Tile, Sequence[float]]  # of one GEMM, round by round
Measure: TypeAlias = Callable[[Gemm, Sequence[Tile]], Seconds]


def gemms_of(shapes: Iterable[Shape]) -> list[Gemm]:
  """The distinct GEMMs of layers; those of the kernels' gradients, which are slowest, first."""
  found = {
    gemm.key: gemm
    for shape in shapes
    for kind, sizes in shape.gemms.items()
    for gemm in [Gemm("rows" if kind == "wgrad" else "blocks", *sizes)]
  }
  return sorted(found.values(), key=lambda gemm: gemm.scales == "blocks")


def make_tile(**given: int) -> Tile | None:
  """A tile, or None where the kernel can't have it."""
  try:
    return Tile(**given)
  except ValueError:
    return None


def with_most_stages(**given: int) -> Tile | None:
  """A tile with as many stages as fit."""
  made = (make_tile(stages=stages, **given) for stages in reversed(STAGES))
  return next(filter(None, made), None)


def every_geometry(scales: Scales) -> list[Tile]:
  """All tiles of two consumers that the kernel can have, whatever the registers."""
  values = ((1, 2), (64, 128, 192, 256), (64, 128), (1, 2))
  most = SIDE if scales == "blocks" else 256  # columns
  given = (dict(zip(GEOMETRY, each, strict=True)) for each in itertools.product(*values))
  made = (with_most_stages(**each) for each in given if each["columns"] <= most)
  return list(filter(None, made))


def candidates(scales: Scales) -> list[Tile]:
  """The tiles of the first heat."""
  given = (dict(zip(GEOMETRY, each, strict=True)) for each in GEOMETRIES[scales])
  return list(filter(None, (with_most_stages(**each) for each in given)))


def variations(tile: Tile) -> list[Tile]:
  """The tiles of the second heat: other stages and rasters, the tile itself among them."""
  given = dataclasses.asdict(tile)
  pairs = itertools.product(STAGES, RASTERS)
  made = (make_tile(**given | {"stages": stages, "raster": raster}) for stages, raster in pairs)
  return list(filter(None, made))


def speeds(seconds: Seconds) -> dict[Tile, float]:
  """The speed of each tile over the default, the median over rounds."""
  median = lambda own: clock.spread(clock.speedups(seconds[DEFAULT], own))["median"]
  return {tile: median(own) for tile, own in seconds.items()}


def tune(gemm: Gemm, measure: Measure) -> dict[str, Any]:
  """Runs both heats of a GEMM.

  Returns:
    The fastest tile of the second heat, its speed over the default, and all tiles of both heats.
  """
  seconds = measure(gemm, with_default(candidates(gemm.scales)))
  first = rows(gemm, seconds)
  seconds = measure(gemm, with_default(variations(Tile(**fastest(first)["tile"]))))
  second = rows(gemm, seconds)
  return {**dataclasses.asdict(gemm), **fastest(second), "heats": [first, second]}


def with_default(others: Iterable[Tile]) -> list[Tile]:
  return list(dict.fromkeys((DEFAULT, *others)))


def fastest(heat: Iterable[dict[str, Any]]) -> dict[str, Any]:
  return max(heat, key=lambda each: each["speed"])


def rows(gemm: Gemm, seconds: Seconds) -> list[dict[str, Any]]:
  """The figures of each tile of a heat."""
  found = speeds(seconds)
  return [row(gemm, tile, seconds[tile], speed) for tile, speed in found.items()]


def row(gemm: Gemm, tile: Tile, seconds: Sequence[float], speed: float) -> dict[str, Any]:
  median = clock.spread(seconds)["median"]
  figures = {"speed": speed, "ms": 1e3 * median, "tflops": gemm.flops / median / 1e12}
  return {"tile": dataclasses.asdict(tile), **figures}


def table(found: Iterable[Mapping[str, Any]], measured: Mapping[str, Any]) -> dict[str, Any]:
  """What ``tiles.json`` has: the tiles that are faster than the default by more than noise."""
  winners = [each for each in found if each["speed"] > LEAST_SPEED]
  keys = [tiles.key_of(each["m"], each["n"], each["k"], each["scales"]) for each in winners]
  content = {
    "measured": dict(measured),
    "tiles": [
      dict(zip(("scales", "m", "n", "k"), key, strict=True))
      | {name: each[name] for name in ("tile", "speed", "tflops")}
      for key, each in zip(keys, winners, strict=True)
    ],
  }
  tiles.read_table(content)  # which the package must be able to read
  return content


def program(gemm: Gemm, tile: Tile, repeat: int) -> Program:
  """A loop of one GEMM with a tile."""
  by_rows = gemm.scales == "rows"
  sizes: Any = {"batch": 1, "m": gemm.m, "n": gemm.n, "k": gemm.k}
  kernel = BlockGemm(**sizes, by_rows=by_rows, out_dtype=jnp.bfloat16, tile=tile)

  def step(state: Any, operands: Any, scales: Any) -> tuple[Any, Any]:
    return state, kernel(*operands, *scales["scale"])

  array = lambda dtype, *shape: jax.ShapeDtypeStruct((1, *shape), dtype)
  operands = [array(jnp.float8_e4m3fn, rows, gemm.k) for rows in (gemm.m, gemm.n)]
  groups = gemm.n if by_rows else -(-gemm.n // SIDE)
  scales = [array(jnp.float32, gemm.k // SIDE, count) for count in (gemm.m, groups)]
  shapes = ({}, operands, {"scale": scales})
  return Program(repeated(step, repeat), shapes, repeat, gemm.flops, is_fp8=True)


def run_once(run: Callable[..., Any], arguments: Iterable[Any]) -> object:
  return jax.block_until_ready(run(*arguments))


def time_tiles(options: Options) -> Measure:
  """Makes what times tiles on the attached GPU, in turn; what does not run is left out."""

  def measure(gemm: Gemm, entrants: Sequence[Tile]) -> Seconds:
    repeat, arrays = clock.steps(gemm.flops, options.repeat), Arrays()
    ready = prepare_all({tile: program(gemm, tile, repeat) for tile in entrants}, options)
    runs = dict[Tile, Callable[[], object]]()
    for tile, each in ready.items():
      with options.noting(tile, is_fp8=True):
        run = functools.partial(run_once, each.run, arrays.fill(each.program.shapes))
        run()
        runs[tile] = run
    if DEFAULT not in runs:
      raise RuntimeError(f"{NAME}: the default tile must run; got {options.failures}.")
    times = clock.interleave({str(tile): run for tile, run in runs.items()}, options.rounds)
    return {tile: [each / repeat for each in times[str(tile)]] for tile in runs}

  return measure


def tune_all(gemms: Sequence[Gemm], measure: Measure, options: Options, path: Path) -> None:
  """Tunes GEMMs one after the other, and writes both files after each."""
  end, card = (
    time.monotonic() + options.seconds,
    environment() | {"nvidia_smi": output.nvidia_smi()},
  )
  measured = {"card": card["device"], **{name: card[name] for name in ("jax", "date", "command")}}
  found: list[dict[str, Any]] = []
  left_out: list[str] = []
  content = {"environment": card, "found": found, "left_out": left_out}

  def write() -> None:
    output.write_json(options.out, NAME, content | {"failures": options.failures})
    output.write_json(path.parent, path.stem, table(found, measured))

  for gemm in gemms:
    if time.monotonic() > end:
      left_out.append(str(gemm))
      continue
    found.append(tune(gemm, measure))
    write()
  write()


FIELDS = tuple(Column(field.name, f"{{tile[{field.name}]}}") for field in dataclasses.fields(Tile))
FIGURES = (Column("speed", "{speed:.3f}"), Column("TFLOP/s", "{tflops:,.0f}"))


def show(content: Mapping[str, Any], console: Console) -> None:
  """Prints the fastest tile of each GEMM, and the default's rate."""
  lines = [each | {"case": "{m} x {n} x {k}, {scales}".format(**each)} for each in content["found"]]
  default = dataclasses.asdict(DEFAULT)
  for each in lines:
    of = {str(tried["tile"]): tried["tflops"] for tried in each["heats"][-1]}
    each["default"] = of[str(default)]
  left = (Column("GEMM", "{case}", left=True), *FIELDS, *FIGURES)
  columns = (*left, Column("default's", "{default:,.0f}"))
  print_table(console, "The fastest tiles, over the default = 1", columns, lines, None)
  output.say_what_is_missing(console, content)


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What ptxas says of a tile."""

  registers: int
  spilled: int  # bytes

  def __str__(self) -> str:
    return f"dropped: spills {self.spilled} bytes" if self.spilled else "kept"


def compile_tile(gemm: Gemm, tile: Tile) -> Compiled:
  """Compiles a tile for a described H100."""
  made = program(gemm, tile, 1)
  (found,) = fp8.explain(made.fn, *made.shapes, target="h100").registers
  return Compiled(found.registers, found.spilled)


COMPILED = (
  *(Column("scales", "{case}", left=True), *FIELDS),
  *(Column("registers", "{registers}"), Column("spilled", "{spilled}")),
  *(Column("KiB", "{kib:.0f}"), Column("", "{says}", left=True)),
)


def compile_all(
  compile_one: Callable[[Gemm, Tile], Compiled], console: Console, threads: int
) -> bool:
  """Compiles all geometries, and prints what is kept; returns whether all ``GEOMETRIES`` are."""
  asked = [(Gemm(of, 8192, 6144, 4096), tile) for of in ALL_SCALES for tile in every_geometry(of)]
  lines: list[dict[str, Any]] = []
  kept: dict[Scales, set[tuple[int, ...]]] = {scales: set() for scales in ALL_SCALES}
  with ThreadPoolExecutor(threads) as pool:
    done = pool.map(lambda each: compile_one(*each), asked)
    for (gemm, tile), found in zip(asked, done, strict=True):
      known = dataclasses.asdict(found) | {"case": gemm.scales, "says": str(found)}
      kib = tile.shared_memory(gemm.scales) / 1024
      lines.append({"tile": dataclasses.asdict(tile), "kib": kib, **known})
      if not found.spilled:
        kept[gemm.scales].add(tuple(getattr(tile, name) for name in GEOMETRY))
  title = f"Compiled for a described H100 with {SHARED_MEMORY // 1024} KiB, JAX {jax.__version__}"
  print_table(console, title, COMPILED, lines)
  spilling = {of: set(GEOMETRIES[of]) - kept[of] for of in ALL_SCALES}
  for heading, each in (
    ("kept, and not in GEOMETRIES", {of: kept[of] - set(GEOMETRIES[of]) for of in ALL_SCALES}),
    ("in GEOMETRIES, but spilling", spilling),
  ):
    output.say(
      console, *(f"{heading}: {of} {sorted(found)}" for of, found in each.items() if found)
    )
  return not any(spilling.values())


def read_shape(text: str) -> Shape:
  """Parses tokens, width and features: multiples of a block, which need no padding."""
  try:
    tokens, width, features = map(int, text.split("x"))
  except ValueError:
    raise argparse.ArgumentTypeError(f"must be TOKENSxWIDTHxFEATURES; got {text!r}") from None
  if any(each < 1 or each % SIDE for each in (tokens, width, features)):
    raise argparse.ArgumentTypeError(f"must be multiples of {SIDE}; got {text!r}")
  return Shape(tokens, width, features)


def read_arguments() -> argparse.Namespace:
  """Reads the command line; ends the process where nothing can be timed."""
  parser = output.make_parser(__doc__)
  help_shapes = "layers, as TOKENSxWIDTHxFEATURES; default: Transformer Engine's"
  published = list(GROUPS[PUBLISHED].values())
  shape: dict[str, Any] = {
    "nargs": "+",
    "type": read_shape,
    "default": published,
    "metavar": "SHAPE",
  }
  parser.add_argument("--shapes", help=help_shapes, **shape)
  parser.add_argument("--seconds", type=float, default=240, help="then no other GEMM begins")
  parser.add_argument("--rounds", type=output.positive, default=8, help="each runs every tile once")
  threads = min(os.cpu_count() or 1, 8)
  parser.add_argument("--threads", type=output.positive, default=threads, help="that compile")
  parser.add_argument("--tiles", type=Path, default=tiles.FILE, help="file of the winners")
  help_compile = "compile all geometries for a described H100, measure nothing"
  parser.add_argument("--compile", action="store_true", help=help_compile)
  arguments = parser.parse_args()
  (device, *_) = jax.devices()
  is_hopper = getattr(device, "compute_capability", "") == "9.0"
  if not (is_hopper or arguments.compile or arguments.redraw):
    small = "--compile compiles all tiles for a described H100 instead."
    parser.exit(2, f"{NAME}: needs an H100 or H200; got {device.device_kind}. {small}\n")
  return arguments


def main() -> None:
  allow_missing_cuda()
  arguments, console = read_arguments(), output.make_console()
  if arguments.compile:
    sys.exit(not compile_all(compile_tile, console, arguments.threads))
  if not arguments.redraw:
    names = ("out", "rounds", "threads", "seconds")
    options = Options(**{name: getattr(arguments, name) for name in names})
    gemms = gemms_of(arguments.shapes)
    tune_all(gemms, time_tiles(options), options, arguments.tiles)
  show(output.read_json(arguments.out, NAME), console)


if __name__ == "__main__":
  main()
