"""The command line of benchmarks that time a GPU."""

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax

from flax_fp8.capability import capability
from harness.names import BF16
from harness.output import make_parser, positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What the command line says."""

  out: Path  # folder of JSON and plot
  rounds: int = 10  # each runs every variant once
  repeat: int = 10  # steps in a run, at least
  tiny: bool = False  # small shapes on any device, to test the script
  threads: int = 1  # that compile
  seconds: float = 3600  # after these nothing new begins
  redraw: bool = False  # draw the JSON in ``out``, measure nothing
  variants: Sequence[str] = ()  # which to measure besides BF16; empty for all
  # programs that did not compile or run, so far
  failures: list[str] = dataclasses.field(default_factory=list[str])

  def choose(self, names: Iterable[str]) -> list[str]:
    """Those of a script's variants that are to be measured."""
    return [name for name in names if not self.variants or name in (BF16, *self.variants)]

  def fail(self, name: object, error: Exception) -> None:
    """Notes a program that did not compile or run; the others go on."""
    self.failures.append(f"{name}: {type(error).__name__}: {str(error)[:1000]}")


def read_options(doc: str | None, name: str) -> Options:
  """Reads the command line; ends the process where nothing can be timed."""
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
  if not options.tiny and not options.redraw and (reason := no_gpu()):
    parser.exit(2, f"{name}: {reason} --tiny runs small shapes here, as a test of the script.\n")
  return options


def on_gpu() -> bool:
  return jax.default_backend() == "gpu"


def no_gpu() -> str:
  """Why nothing can be timed here; empty on a GPU with FP8."""
  device = jax.devices()[0]
  if not on_gpu():
    kind = repr(device.device_kind)
    return f"needs a GPU that multiplies FP8; got {kind}. Emulation says nothing about speed."
  able, reason = capability(device)
  return "" if able else f"needs a GPU that multiplies FP8; got {device.device_kind!r}: {reason}."
