"""The benchmark that chooses tiles, with times that are made up."""

import dataclasses
import importlib
import json
import sys

import jax
import pytest
from rich.console import Console

import flax_fp8 as fp8
import tune_tiles
from flax_fp8.kernels import block_gemm, tiles
from flax_fp8.kernels.tiles import DEFAULT, Tile
from gemm import bare_block_program
from harness import output, programs
from harness.options import Options
from harness.sizes import GROUPS, PUBLISHED, Shape
from tune_tiles import Compiled, Gemm

GEMM = Gemm("rows", 4096, 4096, 15872)
needs_kernels = pytest.mark.skipif(
  jax.__version_info__ < (0, 10, 2), reason="block's kernels need JAX 0.10.2"
)


def measure_with(seconds_of, asked=None):
  """Times that get longer from round to round, as on a GPU that gets warm."""

  def measure(gemm, entrants):
    if asked is not None:
      asked.append((gemm, entrants))
    return {tile: [seconds_of(tile) * (1 + index / 10) for index in range(3)] for tile in entrants}

  return measure


def seconds_of(tile):
  """Three stages and a raster of 16 are best, and the best of the first heat is not the last."""
  return 1.0 - 0.1 * (tile.columns == 256) - 0.05 * (tile.raster == 16) - 0.01 * (tile.stages == 3)


def test_gemms_are_those_of_the_published_layers_once_each():
  found = tune_tiles.gemms_of(GROUPS[PUBLISHED].values())
  assert [gemm.scales for gemm in found] == ["rows"] * 4 + ["blocks"] * 5
  assert len({gemm.key for gemm in found}) == 9


@needs_kernels
def test_gemms_are_those_that_a_layer_looks_up(monkeypatch):
  """Lowered for a described H100."""
  pytest.importorskip("jax_plugins.xla_cuda13", reason="the CUDA plugin supports only Linux")
  found = set()
  monkeypatch.setattr(block_gemm, "tile_for", lambda *sizes: found.add(sizes) or DEFAULT)
  shape = Shape(384, 256, 128)
  (made,) = programs.layer_programs(shape, ["block"], 1).values()
  compiling = importlib.import_module("flax_fp8.explain.compile")
  monkeypatch.setattr(compiling, "run_child", stop)
  with pytest.raises(RuntimeError, match="lowered"):
    fp8.explain(made.fn, *made.shapes, target="h100")
  wanted = {(each.m, each.n, each.k, each.scales) for each in tune_tiles.gemms_of([shape])}
  assert found == wanted


def stop(*_):
  raise RuntimeError("lowered")


@pytest.mark.parametrize("scales", tune_tiles.ALL_SCALES)
def test_candidates(scales):
  found, possible = tune_tiles.candidates(scales), tune_tiles.every_geometry(scales)
  assert len(found) == len(tune_tiles.GEOMETRIES[scales]) == len(set(found))
  assert set(found) < set(possible)
  assert DEFAULT in found
  for tile in possible:
    tile.check_scales(scales)
    assert tile.shared_memory(scales) <= tiles.SHARED_MEMORY


def test_the_second_heat_varies_the_winner_of_the_first():
  asked = []
  found = tune_tiles.tune(GEMM, measure_with(seconds_of, asked))
  first, second = (entrants for _, entrants in asked)
  assert first[0] == second[0] == DEFAULT
  assert {tile.columns for tile in second[1:]} == {256}
  assert Tile(**found["tile"]).columns == 256
  assert (found["tile"]["stages"], found["tile"]["raster"]) == (3, 16)
  assert found["speed"] == pytest.approx(1 / 0.84)
  assert found["tflops"] == pytest.approx(GEMM.flops / (0.84 * 1.1) / 1e12)
  assert [len(heat) for heat in found["heats"]] == [len(first), len(second)]


def test_a_tile_that_is_faster_by_noise_alone_is_not_written():
  fast, noise = {"speed": 1.05, "tflops": 900.0}, {"speed": 1.015, "tflops": 870.0}
  tile = dataclasses.asdict(Tile(stages=3))
  found = [{**dataclasses.asdict(GEMM), "tile": tile, **each} for each in (fast, noise)]
  written = tune_tiles.table(found, {"card": "H100"})
  assert written["measured"] == {"card": "H100"}
  (entry,) = written["tiles"]
  assert (entry["speed"], entry["k"]) == (1.05, 16384)
  assert tiles.read_table(written) == {GEMM.key: Tile(stages=3)}


def test_files_are_written_after_each_gemm(tmp_path):
  path, other = tmp_path / "own" / "tiles.json", Gemm("blocks", 512, 256, 256)
  options = Options(out=tmp_path, seconds=60)

  def fails(gemm, entrants):
    if gemm is other:
      raise KeyboardInterrupt
    return measure_with(seconds_of)(gemm, entrants)

  with pytest.raises(KeyboardInterrupt):
    tune_tiles.tune_all([GEMM, other], fails, options, path)
  written = json.loads(path.read_text())
  assert written["measured"].keys() == {"card", "jax", "date", "command"}
  assert written["measured"]["jax"] == jax.__version__
  assert list(tiles.read_table(written)) == [GEMM.key]
  assert len(output.read_json(tmp_path, "tune_tiles")["found"]) == 1


def test_no_gemm_begins_when_the_time_is_up(tmp_path):
  options, console = Options(out=tmp_path, seconds=-1), Console(width=150)
  tune_tiles.tune_all([GEMM], measure_with(seconds_of), options, tmp_path / "tiles.json")
  content = output.read_json(tmp_path, "tune_tiles")
  assert content["left_out"] == ["4096 x 4096 x 15872, rows"]
  assert json.loads((tmp_path / "tiles.json").read_text())["tiles"] == []
  with console.capture() as shown:
    tune_tiles.show(content, console)
  assert "left out, the time was up: 4096 x 4096 x 15872, rows" in shown.get()


def test_the_table_shows_the_default_too(tmp_path):
  options, console = Options(out=tmp_path), Console(width=150)
  tune_tiles.tune_all([GEMM], measure_with(seconds_of), options, tmp_path / "tiles.json")
  with console.capture() as shown:
    tune_tiles.show(output.read_json(tmp_path, "tune_tiles"), console)
  assert "1.190" in shown.get()
  assert "4096 x 4096 x 15872, rows" in shown.get()


def test_what_does_not_run_is_noted_and_the_default_must(monkeypatch, tmp_path):
  """With GEMMs of this CPU in the place of the kernel's."""
  small, options = Gemm("blocks", 16, 16, 128), Options(out=tmp_path, rounds=3, threads=1)

  def make(gemm, tile, repeat):
    if tile == failing:
      raise_in_trace = lambda state, *_: 1 / 0
      return programs.Program(jax.jit(raise_in_trace), ({},), repeat, gemm.flops, is_fp8=True)
    return bare_block_program((gemm.m, gemm.n, gemm.k), "fprop", 2)

  monkeypatch.setattr(tune_tiles, "program", make)
  failing, other = Tile(stages=3), Tile(raster=4)
  found = tune_tiles.time_tiles(options)(small, [DEFAULT, failing, other])
  assert {tile: len(times) for tile, times in found.items()} == {DEFAULT: 3, other: 3}
  assert all(seconds > 0 for times in found.values() for seconds in times)
  assert "ZeroDivisionError" in options.failures[0]
  failing = DEFAULT
  with pytest.raises(RuntimeError, match="the default tile must run"):
    tune_tiles.time_tiles(options)(small, [DEFAULT, other])


def compile_one(gemm, tile):
  fields = tuple(getattr(tile, name) for name in tune_tiles.GEOMETRY)
  return Compiled(168, 0 if fields in tune_tiles.GEOMETRIES[gemm.scales] else 236)


def test_tiles_that_spill_are_dropped():
  console = Console(width=150)
  with console.capture() as shown:
    assert tune_tiles.compile_all(compile_one, console, 1)
  assert shown.get().count("kept") == 20
  assert shown.get().count("dropped: spills 236 bytes") == 12
  assert "GEOMETRIES" not in shown.get()


def test_a_candidate_that_spills_is_told():
  console = Console(width=150)
  with console.capture() as shown:
    assert not tune_tiles.compile_all(lambda *_: Compiled(168, 8), console, 1)
  assert "in GEOMETRIES, but spilling: blocks [(1, 64, 64, 1)," in shown.get()


def test_a_tile_that_spills_with_another_jax_may_be_kept():
  console = Console(width=150)
  with console.capture() as shown:
    assert tune_tiles.compile_all(lambda *_: Compiled(168, 0), console, 1)
  assert "kept, and not in GEOMETRIES: rows [(1, 256, 64, 1)," in shown.get()


@needs_kernels
@pytest.mark.slow
@pytest.mark.child
def test_ptxas_tells_of_spills():
  gemm = Gemm("blocks", 256, 256, 256)
  spilling = Tile(waves=2, columns=128, cell=128, in_flight=2)
  assert tune_tiles.compile_tile(gemm, spilling).spilled
  assert str(tune_tiles.compile_tile(gemm, DEFAULT)) == "kept"


def main(monkeypatch, *words):
  monkeypatch.setattr(sys, "argv", ["tune_tiles.py", *words])
  with pytest.raises(SystemExit) as stopped:
    tune_tiles.main()
  return stopped.value.code


def test_without_a_gpu_it_says_so_and_offers_to_compile(monkeypatch, capsys, tmp_path):
  assert main(monkeypatch, "--out", str(tmp_path)) == 2
  assert "needs an H100 or H200; got cpu. --compile compiles" in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


def test_shapes_are_checked(monkeypatch, capsys):
  assert main(monkeypatch, "--shapes", "4096x4096") == 2
  assert "must be TOKENSxWIDTHxFEATURES" in capsys.readouterr().err
  assert main(monkeypatch, "--shapes", "8192x4096x1000") == 2
  assert "must be multiples of 128" in capsys.readouterr().err
