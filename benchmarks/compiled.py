"""What does XLA make of FP8 programs? All are compiled for a described GPU, and never run.

    python benchmarks/compiled.py QUESTION               # no GPU needed; minutes on one CPU core
    python benchmarks/compiled.py traffic --cases 'Dense*' --target b200

Questions:

{questions}
Each program is compiled in BF16, with ``flax.linen.fp8_ops`` or with recipes of ``flax_fp8``. The
table compares each with the first program of its case. ``kernels`` are all that run, GEMMs too.
``MiB`` are read and written by kernels other than GEMMs. ``temp MiB`` is what the program allocates
beside its arguments and results. ``ms`` is a roofline,

    sum over kernels of max(FLOPs / peak rate, bytes / memory bandwidth)

by data-sheet rates: a lower bound without launches. It compares programs and predicts no time.
"""

import itertools
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rich.console import Console

from flax_fp8.doctor import allow_missing_cuda
from harness import output
from harness.environment import environment
from harness.names import BF16, FLAX, label
from harness.table import Column, print_table
from questions import QUESTIONS, Case, Figures


def measure(cases: Iterable[Case], targets: Iterable[str], console: Console) -> list[Figures]:
  """Compiles each case for each GPU: one row each.

  Raises:
    ValueError: a baseline is not BF16. No ratio to it would mean anything.
  """
  rows: list[Figures] = []
  for target, (case, variant, compile_for, known) in itertools.product(targets, cases):
    with console.status(f"{case}, {variant} for {target}"):
      found = compile_for(target)
    if variant == BF16 and found.get("operands", ["bf16"]) != ["bf16"]:
      raise ValueError(f"{case}: the baseline must be BF16; got {found['operands']}.")
    rows.append({"case": case, "variant": variant, "target": target, **found, **known})
  return rows


def show(name: str, content: Mapping[str, Any], console: Console) -> None:
  """Prints the table, and what the reports doubt."""
  rows: list[Figures] = [dict(row) for row in content["rows"]]
  place = lambda row: (row["target"], row["case"])
  bases: dict[Any, Figures] = {}
  flax = {place(row): row for row in rows if row["variant"] == FLAX}
  for row in rows:
    own = {"base": bases.setdefault(place(row), row), "flax": flax.get(place(row))}
    row.update(own, first=rows[0])
  case = lambda row: f"{row['case']} ({row['target'].upper()})" if row is row["base"] else ""
  variant = lambda row: label(row["variant"]) + (" (?)" if row.get("doubts") else "")
  left = (Column("case", case, left=True), Column("variant", variant, left=True))
  print_table(console, f"{name}: {content['note']}", (*left, *QUESTIONS[name].columns), rows)
  for row in rows:
    doubts = [f"(?) {row['case']}, {row['variant']}: {each}" for each in row.get("doubts", ())]
    output.say(console, *doubts)


def answer(
  name: str, cases: Iterable[Case], targets: Iterable[str], out: Path, note: str = ""
) -> None:
  """Compiles the cases of a question, writes its JSON, prints and draws it."""
  asked, console = QUESTIONS[name], output.make_console()
  rows = measure(cases, targets, console)
  made = {"environment": environment(), "note": note or asked.note, "target": ", ".join(targets)}
  output.write_json(out, name, {**made, "rows": rows})
  redraw(name, out, console)


def redraw(name: str, out: Path, console: Console) -> None:
  """Prints and draws the JSON of a question."""
  show(name, output.read_json(out, name), console)
  if draw := QUESTIONS[name].draw:
    output.redraw(out, name, draw)


def main() -> None:
  """Answers one question."""
  questions = "\n".join(f"{name}:\n  {each.doc.strip()}\n" for name, each in QUESTIONS.items())
  parser = output.make_parser((__doc__ or "").format(questions=questions))
  parser.add_argument("question", choices=QUESTIONS, metavar="QUESTION")
  parser.add_argument("--cases", default="*", metavar="GLOB", help="only cases of such names")
  parser.add_argument("--target", nargs="+", metavar="GPU", help="as fp8.explain knows them")
  arguments = parser.parse_args()
  name, asked = arguments.question, QUESTIONS[arguments.question]
  if arguments.redraw:
    redraw(name, arguments.out, output.make_console())
    return
  allow_missing_cuda()
  cases = [each for each in asked.cases() if fnmatch(each[0], arguments.cases)]
  answer(name, cases, arguments.target or asked.targets, arguments.out)


if __name__ == "__main__":
  main()
