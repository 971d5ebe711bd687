"""The command ``flax-fp8``: explains how a program compiles for a GPU, and examines this machine.

Exit codes: 0 for success, 1 for a failed check or an error, 2 for a wrong command line, 130 for
Ctrl-C, 141 if the reader of the output closed it. Errors are short. ``--traceback`` shows the full
traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import inspect
import io
import json
import os
import pkgutil
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from flax_fp8 import doctor, tables
from flax_fp8.explain import plot
from flax_fp8.explain.compare import Comparison
from flax_fp8.explain.explain import explain
from flax_fp8.explain.report import Report
from flax_fp8.explain.target import NAMES

_EXPLAIN = """\
Compile a program for a GPU and show the result: which GEMMs are FP8, why the others are not,
kernels, bytes and memory. The program is never run. With --target, no GPU is needed.

MODULE:FUNCTION names a function that takes no arguments and returns (fn, *args). fn is a function
that jax.jit accepts. args are arrays or jax.ShapeDtypeStructs. Python must be able to import the
module from the current folder. For example, program.py contains:

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

exit codes: 0 for success, 1 if --assert-fp8 fails or an error occurs, 2 for a wrong command line
"""
_DOCTOR = """\
Show what this machine can do with FP8: versions, devices, the recipes that each device computes in
FP8, the driver, and whether the GPU compiler works. A command after -> installs what is missing.
"""
_DOCTOR_EXAMPLES = (
  "example:\n  flax-fp8 doctor\n\nexit codes: 0 for success, 1 if something is broken\n"
)


class UsageError(ValueError):
  """The command line names something that does not exist or can't be used."""


def make_parser() -> argparse.ArgumentParser:
  """Makes the parser of the command line."""
  parser = argparse.ArgumentParser(prog="flax-fp8", description="FP8 training for Flax Linen.")
  parser.epilog = "example: flax-fp8 explain program:step --target h100"
  version = f"%(prog)s {doctor.version('flax-fp8')}"
  parser.add_argument("--version", action="version", version=version)
  commands = parser.add_subparsers(required=True, metavar="COMMAND")
  _add_explain(commands)
  _command(
    commands, run_doctor, _DOCTOR, _DOCTOR_EXAMPLES, "show what this machine can do with FP8"
  )
  return parser


def _command(
  commands: Any, run: Callable[..., int], description: str, epilog: str, summary: str
) -> argparse.ArgumentParser:
  """Adds a command named after the function ``run``, without its prefix ``run_``."""
  parser: argparse.ArgumentParser = commands.add_parser(
    run.__name__.removeprefix("run_"),
    help=summary,
    description=description,
    epilog=epilog,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.set_defaults(run=run)
  parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
  return parser


def _add_explain(commands: Any) -> None:
  summary = "show how a program compiles for a GPU"
  add = _command(commands, run_explain, _EXPLAIN, _EXPLAIN_EXAMPLES, summary).add_argument
  add("program", metavar="MODULE:FUNCTION", help="function that returns the program")
  add("--target", choices=NAMES, help="GPU to compile for; default: the attached GPU")
  add("--against", metavar="MODULE:FUNCTION", help="program to compare with")
  add("--format", choices=("text", "markdown", "json"), default="text", help="default: text")
  add("--plot", type=Path, metavar="FILE.png", help="plot bytes and roofline time by kernel class")
  add("--assert-fp8", action="store_true", help="exit with 1 unless every GEMM is FP8")
  excluded = "modules that --assert-fp8 ignores, such as '*/head'"
  add("--exclude", nargs="+", action="extend", default=[], metavar="PATTERN", help=excluded)
  limit = "time limit for compilation in seconds; default: 600"
  add("--timeout", type=_seconds, default=600.0, metavar="S", help=limit)


def _seconds(text: str) -> float:
  with contextlib.suppress(ValueError):
    if (seconds := float(text)) > 0:
      return seconds
  raise argparse.ArgumentTypeError(f"must be a positive number of seconds; got {_cut(text)}")


def run_explain(arguments: argparse.Namespace) -> int:
  """Explains one or two programs. ``--assert-fp8`` checks only the first."""
  _require_consistent(arguments)
  doctor.allow_missing_cuda()
  specs = [spec for spec in (arguments.program, arguments.against) if spec is not None]
  programs = [load(spec) for spec in specs]  # load all first, so errors appear before compilation
  options = {"target": arguments.target, "timeout": arguments.timeout}
  reports = [
    explain(*program, name=spec, **options) for spec, program in zip(specs, programs, strict=True)
  ]
  print(tables.printable(render(reports, arguments.format)), flush=True)
  if arguments.plot is not None:
    form = arguments.plot.suffix[1:] or "png"
    _shown(reports).plot().savefig(arguments.plot, format=form)
  if arguments.assert_fp8:
    reports[0].assert_fp8(arguments.exclude)
  return 0


def _require_consistent(arguments: argparse.Namespace) -> None:
  if arguments.exclude and not arguments.assert_fp8:
    raise UsageError(
      "explain: --exclude needs --assert-fp8; got --exclude "
      f"{_cut(' '.join(arguments.exclude))} alone. Add --assert-fp8."
    )
  if arguments.plot is not None:
    _require_drawable(arguments.plot)


def _require_drawable(path: Path) -> None:
  """Raises UsageError if the plot can't be drawn or written. Leaves no file behind."""
  formats = plot.formats()
  if path.suffix and path.suffix[1:].lower() not in formats:
    raise UsageError(
      f"explain: --plot must name a file with one of the suffixes {', '.join(formats)}; got "
      f"{_cut(path.name)}. Use the suffix .png."
    )
  try:
    with tempfile.TemporaryFile(dir=path.parent):
      if path.exists():
        path.open("ab").close()
  except OSError as error:
    raise UsageError(
      f"explain: --plot must name a writable file; got {_cut(str(path))} ({error.strerror}). "
      "Choose another file, or create its folder."
    ) from error


def run_doctor(arguments: argparse.Namespace) -> int:
  """Examines this machine."""
  del arguments
  doctor.allow_missing_cuda()
  lines = doctor.examine()
  print(tables.printable(doctor.render(lines)), flush=True)
  return int(any(line.broken for line in lines))


# Loading a program from MODULE:FUNCTION.


def load(spec: str) -> tuple[Any, ...]:
  """Loads a program from a function of a module.

  Args:
    spec: ``MODULE:FUNCTION``. The module is imported with the current folder first on the path.

  Returns:
    ``(fn, *args)``, the result of the function.

  Raises:
    UsageError: ``spec`` does not have this form, the module or the function is missing, or the
      function takes arguments or returns anything else.
    RuntimeError: the module or the function ends the process.
  """
  module, _, function = spec.partition(":")
  names = [*module.split("."), function]
  if not all(name.isidentifier() for name in names) or module.endswith(".py"):
    raise UsageError(
      "explain: a program must be named MODULE:FUNCTION, such as package.module:step; got "
      f"{_cut(repr(spec))}. Write the module as in an import, with dots, without slashes or .py."
    )
  try:
    program = _builder(_module(module), function)()
  except SystemExit as error:
    raise RuntimeError(
      f"explain: {spec} must return a program; got SystemExit({error.code!r}). Put code that runs "
      'the script under if __name__ == "__main__".'
    ) from error
  if not (isinstance(program, tuple) and program and callable(program[0])):
    raise UsageError(
      f"explain: {spec} must return (fn, *args), a tuple that starts with a function; got "
      f"{_kind(program)}. Return the function to compile and its arguments."
    )
  return program


def _kind(value: Any) -> str:
  """Returns the type of a value, or the types of the elements of a tuple."""
  if isinstance(value, tuple):
    return f"({', '.join(type(part).__name__ for part in value)})"
  return type(value).__name__


def _module(name: str) -> ModuleType:
  if os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())
  try:
    return pkgutil.resolve_name(f"{name}:")
  except ModuleNotFoundError as error:
    if not f"{name}.".startswith(
      f"{error.name}."
    ):  # the module exists; one of its imports does not
      raise
    raise UsageError(
      f"explain: Python must be able to import the module {_cut(repr(name))} from {os.getcwd()}; "
      f"got {_cut(str(error))}. Change to its folder, or add the folder to PYTHONPATH."
    ) from error


def _builder(module: ModuleType, name: str) -> Callable[[], Any]:
  builder = getattr(module, name, None)
  if builder is None:
    near = difflib.get_close_matches(name, vars(module), n=3)
    raise UsageError(
      f"explain: the module {module.__name__!r} must have the function {_cut(repr(name))}; got "
      f"none in {getattr(module, '__file__', None)}. Close matches are {near}."
    )
  try:
    inspect.signature(builder).bind()
  except (TypeError, ValueError) as error:  # ValueError: some C functions have no signature
    why = f": {error}" if callable(builder) else ""
    raise UsageError(
      f"explain: {module.__name__}:{name} must be a function that takes no arguments; got "
      f"{_kind(builder)}{why}. Write one that returns (fn, *args)."
    ) from error
  return builder


# Output.


def render(reports: Sequence[Report], form: str) -> str:
  """Formats one report, or the comparison of two.

  Args:
    reports: one or two reports.
    form: ``"text"``, ``"markdown"`` or ``"json"``.

  Returns:
    The text. For two reports, the JSON has the keys ``one``, ``other`` and ``comparison``.
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


def _shown(reports: Sequence[Report]) -> Report | Comparison:
  return reports[0] if len(reports) == 1 else reports[0].compare(reports[1])


# Errors.

_CLEAR = (ImportError, MemoryError, RuntimeError, TimeoutError, TypeError, ValueError)
_PACKAGE = Path(__file__).parent
_LIBRARIES = (_PACKAGE, *(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")))


def tell(error: Exception, *, whole: bool = False) -> int:
  """Prints an error to stderr.

  An error of this package says what to change and is printed unchanged. Any other error, such as an
  error in user code during tracing, is printed with its type and the line in the user's code.

  Args:
    error: the exception, with its traceback from the command's first frame on.
    whole: whether to print the traceback.

  Returns:
    The exit code.
  """
  if whole:
    traceback.print_exception(error)
  else:
    print(f"flax-fp8: {_words(error)}", file=sys.stderr or io.StringIO())
  return 2 if isinstance(error, UsageError) else 1


def _words(error: Exception) -> str:
  frames = traceback.extract_tb(error.__traceback__)
  users = [frame for frame in frames if _is_users(frame.filename)]
  is_ours = not users and all(_PACKAGE in Path(frame.filename).parents for frame in frames[-1:])
  is_verdict = isinstance(error, AssertionError) and str(error).startswith("assert_fp8: ")
  if is_ours and (is_verdict or isinstance(error, _CLEAR)) and str(error):
    return str(error)
  place = ""
  if isinstance(error, SyntaxError) and error.filename:
    place = f"\n  at {error.filename}:{error.lineno}"
  elif frames:
    frame = (users or frames)[-1]
    place = f"\n  at {frame.filename}:{frame.lineno}, in {frame.name}"
  text = _cut(error.msg if isinstance(error, SyntaxError) else str(error), 400)
  name = ": ".join(filter(None, [type(error).__name__, text]))
  return f"{name}{place}\n  --traceback shows the full traceback"


def _is_users(filename: str) -> bool:
  parents = Path(filename).parents
  return not filename.startswith("<") and not any(folder in parents for folder in _LIBRARIES)


def _cut(text: str, length: int = 100) -> str:
  return text if len(text) <= length else f"{text[:length]}..."


def _run(argv: list[str] | None) -> int:
  arguments = make_parser().parse_args(argv)
  try:
    return arguments.run(arguments)
  except BrokenPipeError:
    raise
  except Exception as error:
    return tell(error, whole=arguments.traceback)


def main(argv: list[str] | None = None) -> int:
  """Runs the command.

  Args:
    argv: the command line without the program's name. None reads ``sys.argv``.

  Returns:
    The exit code.
  """
  stdout: IO[str] = sys.stdout or io.StringIO()  # it may be closed
  try:
    try:
      return _run(argv)
    finally:
      stdout.flush()
  except KeyboardInterrupt:
    print("flax-fp8: interrupted", file=sys.stderr or io.StringIO())
    return 130
  except OSError as error:  # the reader closed the pipe, as head does, or the disk is full
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())  # Python flushes it again at exit
    return 141 if isinstance(error, BrokenPipeError) else tell(error)


if __name__ == "__main__":
  sys.exit(main())
