"""The tutorials run from top to bottom, and the committed notebooks are those of their sources."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from notebooks import build

sources = pytest.mark.parametrize("source", build.SOURCES, ids=lambda path: path.stem)


def write_source(folder: Path, code: str) -> Path:
  header = re.match(r"---\n.*?\n---\n", build.SOURCES[0].read_text(encoding="utf-8"), re.DOTALL)
  source = folder / "example.md"
  source.write_text(f"{header[0]}\n```{{code-cell}} ipython3\n{code}\n```\n", encoding="utf-8")
  return source


LONG = ("proof", "training_loop", "whole_models")


def committed(source: Path) -> nbformat.NotebookNode:
  return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str, str]]:
  return [(cell.id, cell.cell_type, cell.source) for cell in notebook.cells]


@pytest.mark.slow
@pytest.mark.parametrize(
  "source",
  [
    pytest.param(each, id=each.stem, marks=pytest.mark.exhaustive if each.stem in LONG else ())
    for each in build.SOURCES
  ],
)
def test_runs_without_errors_and_warnings(source: Path):
  build.execute(source)


@sources
def test_the_committed_notebook_has_the_cells_of_its_source(source: Path):
  assert cells(committed(source)) == cells(build.read(source))


@sources
def test_the_committed_outputs_are_of_one_clean_run(source: Path):
  notebook = committed(source)
  ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
  outputs = [output for cell in ran for output in cell.outputs]
  assert [cell.execution_count for cell in ran] == list(range(1, len(ran) + 1))
  assert {output.output_type for output in outputs} <= {"stream", "display_data"}
  assert all(output.get("name") != "stderr" for output in outputs)
  texts = [output.get("text", "") for output in outputs]
  assert not re.findall(r"(?m)(?:^|[\s\"'(])(?:/\w[\w.-]*){2,}", "\n".join(texts))


def test_every_notebook_has_a_source():
  notebooks = {path.stem for path in build.HERE.glob("*.ipynb")}
  assert notebooks == {path.stem for path in build.SOURCES}
  assert notebooks


def test_a_failing_cell_is_an_error(tmp_path: Path):
  source = write_source(tmp_path, "assert 1 + 1 == 3")
  with pytest.raises(CellExecutionError, match="AssertionError"):
    build.execute(source)


def test_a_warning_is_an_error(tmp_path: Path):
  source = write_source(tmp_path, "import warnings\nwarnings.warn('look here')")
  with pytest.raises(RuntimeError, match="look here"):
    build.execute(source)


def test_building_twice_gives_the_same_file(tmp_path: Path):
  source = write_source(tmp_path, "print(1)\nprint(2, flush=True)\nprint(3)")
  targets = [tmp_path / "first.ipynb", tmp_path / "second.ipynb"]
  for target in targets:
    build.write(build.execute(source), target)
  first, second = (target.read_bytes() for target in targets)
  assert first == second
