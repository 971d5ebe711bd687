"""The command ``flax-fp8``: what the GPU compiler makes of a program; what this machine can do.

It exits with 0; with 1 where the answer is no (a GEMM is not FP8, something is broken); with 2
where there is no answer. An error that says what to change is shown as it is; a bug, with its
traceback.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from flax_fp8 import doctor
from flax_fp8.explain.compare import Comparison
from flax_fp8.explain.explain import explain
from flax_fp8.explain.report import Report
from flax_fp8.explain.target import NAMES

_EXPLAIN = """\
Show what the GPU compiler makes of a program: which GEMMs are FP8 and why the others are not,
kernels, bytes, memory. The program is compiled, never run; with --target no GPU is needed.

MODULE:FUNCTION is a function without arguments, importable from the current folder, that returns
(fn, *args): what jax.jit takes, and arrays or jax.ShapeDtypeStructs. In program.py, for example:

  def dense():
    layer = nn.Dense(256, dtype=jnp.bfloat16, dot_general_cls=fp8.Fp8DotGeneral)
    variables = layer.init(jax.random.key(0), x := jnp.ones((32, 128), jnp.bfloat16))
    return layer.apply, variables, x
"""
_EXPLAIN_EXAMPLES = """\
examples:
  flax-fp8 explain program:dense --target h100
  flax-fp8 explain program:dense --target h100 --against program:bf16_dense --plot both.png
  flax-fp8 explain program:dense --target h100 --assert-fp8 --exclude '*/head'

exit codes: 0; 1 where --assert-fp8 finds GEMMs that are not FP8; 2 for errors
"""
_DOCTOR = """\
Say what this machine can do with FP8: versions, devices and the formats that they multiply, the
driver, the GPU compiler and whether it works. Commands after -> install what is missing.
"""
_DOCTOR_EXAMPLES = "example:\n  flax-fp8 doctor\n\nexit codes: 0; 1 where something is broken\n"


def make_parser() -> argparse.ArgumentParser:
  """The command line."""
  parser = argparse.ArgumentParser(prog="flax-fp8", description="FP8 training for Flax Linen.")
  parser.epilog = "example: flax-fp8 explain program:step --target h100"
  version = f"%(prog)s {doctor.version('flax-fp8')}"
  parser.add_argument("--version", action="version", version=version)
  commands = parser.add_subparsers(required=True, metavar="COMMAND")
  _add_explain(commands)
  _command(commands, run_doctor, _DOCTOR, _DOCTOR_EXAMPLES, "what this machine can do with FP8")
  return parser


def _command(
  commands: Any, run: Callable[..., int], description: str, epilog: str, summary: str
) -> argparse.ArgumentParser:
  """Adds the command that ``run`` is named for."""
  parser: argparse.ArgumentParser = commands.add_parser(
    run.__name__.removeprefix("run_"),
    help=summary,
    description=description,
    epilog=epilog,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.set_defaults(run=run)
  return parser


def _add_explain(commands: Any) -> None:
  summary = "what the GPU compiler makes of a program"
  add = _command(commands, run_explain, _EXPLAIN, _EXPLAIN_EXAMPLES, summary).add_argument
  add("program", metavar="MODULE:FUNCTION", help="builds the program")
  add("--target", choices=NAMES, help="GPU to compile for; default: the one attached")
  add("--against", metavar="MODULE:FUNCTION", help="measure the program against this one")
  add("--format", choices=("text", "markdown", "json"), default="text")
  add("--plot", type=Path, metavar="FILE.png", help="draw bytes and roofline, by class of kernels")
  add("--assert-fp8", action="store_true", help="fail unless every GEMM of the program is FP8")
  excluded = "modules whose GEMMs may be of any dtype, as '*/head'"
  add("--exclude", nargs="+", action="extend", default=[], metavar="PATTERN", help=excluded)
  add("--timeout", type=_seconds, default=600.0, metavar="S", help="to compile in; default: 600")


def _seconds(text: str) -> float:
  if not (seconds := float(text)) > 0:
    raise argparse.ArgumentTypeError(f"must be above 0; got {text}")
  return seconds


def run_explain(arguments: argparse.Namespace) -> int:
  """Explains a program, or two; ``--assert-fp8`` then judges the first."""
  _require_consistent(arguments)
  doctor.allow_missing_cuda()
  specs = [arguments.program, *filter(None, [arguments.against])]
  programs = [load(spec) for spec in specs]  # whose mistakes show before anything is compiled
  options = {"target": arguments.target, "timeout": arguments.timeout}
  reports = [
    explain(*program, name=spec, **options) for spec, program in zip(specs, programs, strict=True)
  ]
  _print(render(reports, arguments.format))
  if arguments.plot is not None:
    _shown(reports).plot().savefig(arguments.plot)
  if arguments.assert_fp8:
    reports[0].assert_fp8(arguments.exclude)
  return 0


def _require_consistent(arguments: argparse.Namespace) -> None:
  if arguments.exclude and not arguments.assert_fp8:
    raise ValueError(
      f"explain: --exclude says what --assert-fp8 may pass over; got --exclude "
      f"{' '.join(arguments.exclude)} alone. Add --assert-fp8."
    )
  if arguments.plot is not None and not arguments.plot.parent.is_dir():
    raise ValueError(
      f"explain: --plot must name a file in a folder that exists; got {arguments.plot}. Make the "
      "folder, or name another."
    )


def run_doctor(arguments: argparse.Namespace) -> int:
  """Examines the machine."""
  del arguments
  doctor.allow_missing_cuda()
  lines = doctor.examine()
  _print(doctor.render(lines))
  return int(any(line.broken for line in lines))


# From MODULE:FUNCTION to a program.


def load(spec: str) -> tuple[Any, ...]:
  """Builds a program.

  Args:
    spec: ``MODULE:FUNCTION``; the module is found as Python finds it, the current folder first.

  Returns:
    ``(fn, *args)``, what the function returns.

  Raises:
    ValueError: ``spec`` is not of that form, or the module has no such function.
    ModuleNotFoundError: there is no such module.
    TypeError: the function takes arguments, or returns something else.
  """
  module, _, function = spec.partition(":")
  names = [*module.split("."), function]
  if not all(name.isidentifier() for name in names) or module.endswith(".py"):
    raise ValueError(
      f"explain: a program must be named MODULE:FUNCTION, as in package.module:step; got {spec!r}. "
      "Write the module as for import: dots, no slashes, no .py."
    )
  program = _builder(_module(module), function)()
  if not (isinstance(program, tuple) and program and callable(program[0])):
    raise TypeError(
      f"explain: {spec} must return (fn, *args), a tuple that starts with a function; got "
      f"{_kind(program)}. Return what to compile, and its arguments."
    )
  return program


def _kind(value: Any) -> str:
  """What a value is, without its numbers."""
  if isinstance(value, tuple):
    return f"({', '.join(type(part).__name__ for part in value)})"
  return type(value).__name__


def _module(name: str) -> ModuleType:
  if os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())
  try:
    return pkgutil.resolve_name(f"{name}:")
  except ModuleNotFoundError as error:
    if not f"{name}.".startswith(f"{error.name}."):  # the module is there; what it imports is not
      raise
    raise ModuleNotFoundError(
      f"explain: the module {name!r} must be importable from {os.getcwd()}; got none ({error}). "
      "Change to its folder, or name that in PYTHONPATH."
    ) from error


def _builder(module: ModuleType, name: str) -> Callable[[], Any]:
  builder = getattr(module, name, None)
  if builder is None:
    near = difflib.get_close_matches(name, vars(module), n=3)
    raise ValueError(
      f"explain: the module {module.__name__!r} must have the function {name!r}; got none in "
      f"{module.__file__}. The nearest names are {near}."
    )
  try:
    inspect.signature(builder).bind()
  except TypeError as error:
    why = f": {error}" if callable(builder) else ""
    raise TypeError(
      f"explain: {module.__name__}:{name} must be a function that takes no arguments; got "
      f"{_kind(builder)}{why}. Write one that builds the program and returns (fn, *args)."
    ) from error
  return builder


# What is printed.


def render(reports: Sequence[Report], form: str) -> str:
  """Shows one report, or compares the first with the second.

  Args:
    reports: one or two.
    form: ``"text"``, ``"markdown"`` or ``"json"``.

  Returns:
    The text. JSON of two holds both whole, as ``one`` and ``other``, beside the ``comparison``.
  """
  if form == "json":
    found = _shown(reports).to_dict()
    if len(reports) == 2:
      one, other = (report.to_dict() for report in reports)
      found = {"one": one, "other": other, "comparison": found}
    return json.dumps(found, indent=2)
  titles = [report.title for report in reports] if len(reports) == 2 else []
  body = _shown(reports).to_markdown() if form == "markdown" else str(_shown(reports))
  return "\n\n".join([*titles, body.rstrip("\n")])


def _print(text: str) -> None:
  """Prints; that a reader has read enough, as ``head`` has, is no error."""
  try:
    print(text, flush=True)
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at its end


def _shown(reports: Sequence[Report]) -> Report | Comparison:
  return reports[0] if len(reports) == 1 else reports[0].compare(reports[1])


# Errors.

_CLEAR = (ImportError, MemoryError, RuntimeError, TimeoutError, TypeError, ValueError)
_NOT_THE_USERS = sys.stdlib_module_names | {
  *("__main__", "flax_fp8", "flax", "jax", "jaxlib", "matplotlib", "numpy")
}


def tell(error: Exception) -> int:
  """Shows an error: one that says what to change as it is, any other with its traceback.

  What the user's own code raises, while it builds a program or while JAX traces it, is the user's
  to trace.

  Args:
    error: with its traceback, from the command's first frame on.

  Returns:
    The exit code.
  """
  is_verdict = isinstance(error, AssertionError) and str(error).startswith("assert_fp8: ")
  is_clear = is_verdict or (isinstance(error, _CLEAR) and str(error))
  if not is_clear or _is_raised_by_user(error):
    traceback.print_exception(error)
    return 2
  print(f"flax-fp8: {error}", file=sys.stderr)
  return 1 if is_verdict else 2


def _is_raised_by_user(error: Exception) -> bool:
  frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
  packages = {frame.f_globals.get("__name__", "").partition(".")[0] for frame in frames}
  return not packages <= _NOT_THE_USERS


def main(argv: list[str] | None = None) -> int:
  """Runs the command.

  Args:
    argv: the command line without the program's name; None reads the process's own.

  Returns:
    The exit code.
  """
  arguments = make_parser().parse_args(argv)
  try:
    return arguments.run(arguments)
  except Exception as error:
    return tell(error)


if __name__ == "__main__":
  sys.exit(main())
