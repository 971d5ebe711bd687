"""Do public Linen models, unmodified, convert with the defaults alone?

    pip install -e '.[dev]' && pip install --no-deps -r benchmarks/zoo/requirements.txt
    python benchmarks/corpus.py              # no GPU needed; about 30 minutes on two CPU cores
    python benchmarks/corpus.py --only transformers brax/MLP

Each model comes from a package on PyPI, with a small configuration. ``fp8_linear_layers(model)``
converts it. Then it is compared with the plain model in float32, on the same parameters and batch:

- ``layers``: how many become FP8, of all; ``left`` counts the others by the rule that leaves them.
- ``params``: whether ``init`` makes the same bits.
- ``forward``, ``gradient``: ``norm(got - want) / norm(want)`` of output and of the gradients of all
  parameters, at scale 1 and after ``fp8.calibrate`` on the batch.
- ``loss``: after 8 steps of Adam on one batch, plain and FP8.
- ``frozen``: the largest difference between the outputs of ``freeze_for_inference`` and of the
  trained model, both jitted.
- ``GEMMs``: FP8 among all of loss and gradients, as compiled for a described H100.

A failing stage is recorded, and the others continue. Packages must be installed to be measured.
Rows of earlier runs stay in the JSON unless they are measured again.
"""

import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console

from flax_fp8.doctor import allow_missing_cuda
from harness.environment import environment
from harness.output import make_console, make_parser, read_json, say, write_json, write_text
from harness.table import Column, markdown
from zoo import old_names
from zoo.models import CASES, Case
from zoo.study import study

Row = Mapping[str, Any]


def arrow(names: Sequence[str], form: str) -> Column:
  """A column of percentages before and after calibration."""
  kinds = [f"{kind}_{form}" for kind in names]
  text = lambda value: "-" if value is None else f"{100 * value:.1f}"
  return Column(f"{form}, %", lambda row: " → ".join(text(row.get(kind)) for kind in kinds), True)


def losses(row: Row) -> str:
  found = (row.get(name) for name in ("loss_plain", "loss_fp8"))
  return " ".join("-" if loss is None else f"{loss:.4f}" for loss in found)


def frozen(row: Row) -> str:
  known = {0.0: "same bits", None: "-"}
  difference = row.get("frozen_difference")
  return known.get(difference) or f"{difference:.1g}"


def gemms(row: Row) -> str:
  return f"{row['fp8_gemms']}/{row['gemms']}" if "gemms" in row else "-"


def escaped(parts: Sequence[str]) -> str:
  return "; ".join(parts).replace("|", "\\|")


def failures(row: Row) -> str:
  return escaped([f"{stage}: {error}" for stage, error in row["failures"].items()])


CONVERTED = lambda row: f"{row['converted']}/{row['layers']}" if "layers" in row else "-"
LEFT = lambda row: escaped([f"{count} {rule}" for rule, count in row.get("left", {}).items()])
SAME = {True: "same bits", False: "differ", None: "-"}
KINDS = ("fresh", "calibrated")
COLUMNS = (
  Column("package", "{package} {version}", True),
  Column("model", "{name}", True),
  Column("layers", CONVERTED, True),
  Column("left", LEFT, True),
  Column("params", lambda row: SAME[row.get("params_equal")], True),
  arrow(KINDS, "forward"),
  arrow(KINDS, "gradient"),
  Column("loss", losses, True),
  Column("frozen", frozen, True),
  Column("GEMMs", gemms, True),
  Column("failures", failures, True),
)


def chosen(only: Sequence[str]) -> list[Case]:
  """The models of some packages, or of some names; all if there are none."""
  names = {case: {case.package, case.name, f"{case.package}/{case.name}"} for case in CASES}
  for name in only:
    if not any(name in known for known in names.values()):
      raise SystemExit(f"corpus: no package or model is called {name!r}; see zoo/models.toml.")
  return [case for case in CASES if not only or not names[case].isdisjoint(only)]


def summary(rows: Sequence[Row]) -> str:
  passed = sum(not row["failures"] for row in rows)
  return f"{passed} of {len(rows)} models pass every stage."


def table(rows: Sequence[Row]) -> str:
  return f"{summary(rows)}\n\n{markdown(COLUMNS, rows)}"


def measure(cases: Sequence[Case], out: Path, target: str | None, console: Console) -> list[Row]:
  """Studies the models, and writes what is known after each."""
  earlier = read_json(out, "corpus")["found"] if (out / "corpus.json").exists() else []
  rows = {(row["package"], row["name"]): row for row in earlier}
  order = [(case.package, case.name) for case in (*CASES, *cases)]
  for case in cases:
    try:
      row = rows[case.package, case.name] = study(case, target)
    except metadata.PackageNotFoundError:
      say(console, f"{case.package} is not installed; {case.name} is left out.")
      continue
    say(console, " | ".join(column.text(row) for column in COLUMNS))
    known = [rows[key] for key in dict.fromkeys(order) if key in rows]
    write_json(out, "corpus", {"environment": environment(), "found": known})
    write_text(out / "corpus.md", table(known))
  return list(rows.values())


def main(words: Sequence[str] | None = None) -> list[Row]:
  """Runs the benchmark; returns its rows."""
  parser = make_parser(__doc__)
  parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="packages or models")
  parser.add_argument("--tiny", action="store_true", help="one model that needs no other package")
  arguments, console = parser.parse_args(words), make_console()
  allow_missing_cuda()
  os.environ.setdefault("HF_HUB_OFFLINE", "1")  # configurations are made here, never fetched
  # Hundreds of programs are compiled, each to run once or a few times.
  os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
  if not arguments.tiny:
    old_names.restore()
  say(console, " | ".join(column.heading for column in COLUMNS))
  cases, target = (CASES[:1], None) if arguments.tiny else (chosen(arguments.only), "h100")
  rows = measure(cases, arguments.out, target, console)
  say(console, summary(rows))
  return rows


if __name__ == "__main__":
  main()
