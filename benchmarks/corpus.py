"""Do public Linen models, unmodified, convert with the defaults alone?

    pip install -e '.[dev]' && pip install --no-deps -r benchmarks/zoo/requirements.txt
    python benchmarks/corpus.py              # no GPU needed; about 30 minutes on two CPU cores
    python benchmarks/corpus.py --only transformers brax/MLP

Each model comes from a package on PyPI, with a small configuration. ``fp8_linear_layers(model)``
converts it; then it is compared with the plain model in float32, on the same parameters and batch:

- ``layers``: how many become FP8, of all; ``left`` says by which rule the others don't.
- ``params``: whether ``init`` makes the same bits.
- ``forward``, ``gradient``: ``norm(got - want) / norm(want)`` of output and of the gradients of all
  parameters, at scale 1 and after ``fp8.calibrate`` on the batch.
- ``loss``: after 8 steps of Adam on one batch, plain and FP8.
- ``frozen``: the largest difference between the outputs of ``freeze_for_inference`` and of the
  trained model, both jitted.
- ``GEMMs``: FP8 among all of loss and gradients, as compiled for a described GPU.

A stage that fails is written down, and the others go on. Packages that are not installed are
listed. Rows of earlier runs stay in the JSON unless they are measured again.
"""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from flax_fp8.doctor import allow_missing_cuda
from lm.files import write_text
from lm.report import environment
from zoo import diffusers_models, flax_modules, hugging_face, language, old_names, others
from zoo.model import Case
from zoo.study import study

RESULTS = Path(__file__).resolve().parent / "results"
CASES: tuple[Case, ...] = (
  *flax_modules.CASES,
  *hugging_face.CASES,
  *diffusers_models.CASES,
  *language.CASES,
  *others.CASES,
)
HEADINGS = (
  "package", "model", "layers", "left", "params", "forward, %", "gradient, %", "loss", "frozen",
  "GEMMs", "failures",
)  # fmt: skip


def chosen(only: Sequence[str]) -> list[Case]:
  """The models of some packages, or of some names; all if there are none."""
  names = {case: (case.package, case.name, f"{case.package}/{case.name}") for case in CASES}
  for name in only:
    if not any(name in known for known in names.values()):
      raise SystemExit(f"corpus: no package or model is called {name!r}; see zoo/.")
  return [case for case in CASES if not only or not set(only).isdisjoint(names[case])]


def cells(row: Mapping[str, Any]) -> list[str]:
  """One row of the table."""
  pair = lambda names, form: " → ".join(form(row[name]) if name in row else "-" for name in names)
  percent = lambda value: f"{100 * value:.1f}"
  kinds = ("fresh", "calibrated")
  left = "; ".join(f"{count} {rule}" for rule, count in row.get("left", {}).items())
  return [
    f"{row['package']} {row['version']}",
    row["name"],
    f"{row['converted']}/{row['layers']}" if "layers" in row else "-",
    left,
    {True: "same bits", False: "differ", None: "-"}[row.get("params_equal")],
    pair([f"{kind}_forward" for kind in kinds], percent),
    pair([f"{kind}_gradient" for kind in kinds], percent),
    " ".join(f"{row[name]:.4f}" if name in row else "-" for name in ("loss_plain", "loss_fp8")),
    {0.0: "same bits", None: "-"}.get(
      row.get("frozen_difference"), f"{row.get('frozen_difference', 0):.1g}"
    ),
    f"{row['fp8_gemms']}/{row['gemms']}" if "gemms" in row else row.get("gemms_left_out", "-"),
    "; ".join(f"{stage}: {error}" for stage, error in row["failures"].items()),
  ]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
  """The table for a page of documentation."""
  escaped = ([cell.replace("|", "\\|") for cell in cells(row)] for row in rows)
  lines = (f"| {' | '.join(each)} |" for each in (HEADINGS, ["---"] * len(HEADINGS), *escaped))
  return "\n".join([summary(rows), "", *lines]) + "\n"


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
  """Counts the models without a failure."""
  passed = sum(not row["failures"] for row in rows)
  return f"{passed} of {len(rows)} models pass every stage."


def earlier(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
  """The rows of an earlier run, by package and name."""
  if not path.exists():
    return {}
  found = json.loads(path.read_text())["found"]
  return {(row["package"], row["name"]): row for row in found}


def measure(cases: Sequence[Case], arguments: argparse.Namespace, console: Console) -> list[Any]:
  """Studies the models, and writes what is known after each."""
  arguments.out.mkdir(parents=True, exist_ok=True)
  path = arguments.out / "corpus.json"
  rows, absent = earlier(path), set[str]()
  target = None if arguments.target == "none" else arguments.target
  for case in cases:
    with console.status(f"{case.package}, {case.name}"):
      row = study(case, target, arguments.timeout)
    if row.get("absent"):
      absent.add(case.package)
      continue
    rows[case.package, case.name] = row
    console.print(*cells(row), sep=" | ", markup=False, highlight=False, soft_wrap=True)
    order = [(case.package, case.name) for case in CASES]
    known = [rows[key] for key in order if key in rows]
    document = {"environment": environment(), "found": known}
    write_text(path, json.dumps(document, indent=1) + "\n")
    write_text(arguments.out / "corpus.md", markdown(known))
  if absent:
    console.print(f"Not installed: {', '.join(sorted(absent))}.", highlight=False)
  return list(rows.values())


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="packages or models")
  parser.add_argument("--tiny", action="store_true", help="one model that needs no other package")
  parser.add_argument("--target", default="h100", help="the GPU to compile for, or none")
  parser.add_argument("--timeout", type=float, default=60.0, help="seconds to compile a model in")
  parser.add_argument("--out", type=Path, default=RESULTS, help="folder of JSON and table")
  return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> list[Any]:
  """Runs the benchmark; returns its rows."""
  arguments = parse(words)
  allow_missing_cuda()
  os.environ.setdefault("HF_HUB_OFFLINE", "1")  # configurations are made here, never fetched
  # Hundreds of programs are compiled, each to run once or a few times.
  os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
  console = Console()
  if arguments.tiny:
    cases = [flax_modules.TINY]
  else:
    old_names.restore()
    cases = chosen(arguments.only)
  console.print(*HEADINGS, sep=" | ", highlight=False, soft_wrap=True)
  rows = measure(cases, arguments, console)
  console.print(summary(rows), highlight=False)
  return rows


if __name__ == "__main__":
  main()
