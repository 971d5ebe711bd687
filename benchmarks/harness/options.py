"""The command line of benchmarks that time a GPU."""

import dataclasses
import os
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax

from flax_fp8.capability import capability
from harness.names import BF16
from harness.output import make_parser, positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What the command line says, and the programs that failed so far."""

  out: Path
  rounds: int = 10
  repeat: int = 10
  tiny: bool = False
  threads: int = 1
  seconds: float = 3600
  redraw: bool = False
  variants: Sequence[str] = ()
  failures: list[str] = dataclasses.field(default_factory=list[str])

  def choose(self, names: Iterable[str]) -> list[str]:
    """Those of a script's variants that are to be measured."""
    return [name for name in names if not self.variants or name in (BF16, *self.variants)]

  @contextmanager
  def noting(self, name: object, is_fp8: bool) -> Generator[None]:
    """Notes an FP8 program that does not compile or run, and goes on; BF16's must."""
    try:
      yield
    except Exception as error:
      if not is_fp8:
        raise
      self.failures.append(f"{name}: {type(error).__name__}: {str(error)[:1000]}")


def read_options(doc: str | None, name: str, *, times: bool = True) -> Options:
  """Reads the command line; with ``times``, ends the process where nothing can be timed."""
  parser = make_parser(doc)
  parser.add_argument("--rounds", type=positive, default=10, help="each runs every variant once")
  parser.add_argument("--repeat", type=positive, default=10, help="steps in a run, at least")
  parser.add_argument("--tiny", action="store_true", help="small shapes on any device: a test")
  threads = min(os.cpu_count() or 1, 8)
  help_threads = "that compile; with 1, nothing disturbs XLA's autotuning"
  parser.add_argument("--threads", type=positive, default=threads, help=help_threads)
  parser.add_argument("--seconds", type=float, default=3600, help="then nothing new begins")
  parser.add_argument("--variants", nargs="+", default=[], help="some, by name, besides BF16")
  options = Options(**vars(parser.parse_args()))
  able, reason = capability(jax.devices()[0])
  if times and not options.tiny and not options.redraw and not (on_gpu() and able):
    small = "--tiny runs small shapes here, as a test of the script."
    parser.exit(2, f"{name}: needs a GPU that multiplies FP8; got {reason}. {small}\n")
  return options


def on_gpu() -> bool:
  return jax.default_backend() == "gpu"
