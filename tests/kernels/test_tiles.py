"""The table of tiles, and the tiles that the kernel can't have."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from flax_fp8.kernels import tiles
from flax_fp8.kernels.tiles import DEFAULT, Tile


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"stages": 0}, "stages must be an integer of at least 1; got stages=0"),
    ({"consumers": 4}, r"waves must be consumers \* waves \* 64 at most 256; got waves=2"),
    ({"cell": 32}, "cell must be a multiple of 64; got cell=32"),
    ({"columns": 96}, "columns must be a multiple of cell=64; got columns=96"),
    ({"columns": 320}, "columns must be at most 256; got columns=320"),
    ({"in_flight": 5}, "in_flight must be at most the 4 cells of a consumer; got in_flight=5"),
    ({"stages": 5}, r"shared memory suffices \(270,416 of 232,448 bytes\); got stages=5"),
  ],
  ids=["no stage", "rows", "cell", "columns", "wide", "in flight", "memory"],
)
def test_tiles_that_the_kernel_cannot_have(given, message):
  with pytest.raises(ValueError, match=f"^Tile: .*{message}"):
    Tile(**given)


def test_fields_are_integers():
  with pytest.raises(TypeError, match="Tile: raster must be an integer"):
    Tile(raster="8")


def test_one_scale_of_a_block_is_not_enough_for_wide_tiles():
  wide = Tile(waves=1, columns=256)
  wide.check_scales("rows")
  with pytest.raises(ValueError, match=r"Tile: columns must divide 128 .* got columns=256"):
    wide.check_scales("blocks")


@pytest.mark.skipif(jax.__version_info__ < (0, 10, 2), reason="the kernels need JAX 0.10.2")
def test_the_kernel_refuses_them_too():
  from flax_fp8.kernels import mosaic_gemm

  given = {"batch": 1, "m": 256, "n": 256, "k": 128, "out_dtype": jnp.bfloat16}
  tile = Tile(waves=1, columns=192)
  mosaic_gemm.BlockGemm(**given, by_rows=True, tile=tile)
  with pytest.raises(ValueError, match="columns must divide 128"):
    mosaic_gemm.BlockGemm(**given, by_rows=False, tile=tile)


@pytest.mark.parametrize("scales", ["blocks", "rows"])
def test_shared_memory_of_the_default(scales):
  """What JAX 0.10.2 and 0.12.0.1 ask for."""
  assert DEFAULT.shared_memory(scales) == {"blocks": 217_152, "rows": 219_200}[scales]


@pytest.fixture
def table(monkeypatch, tmp_path):
  """A table with a tile for each granularity."""
  entries = [
    {"scales": "blocks", "m": 16384, "n": 4096, "k": 4096, "tile": {"stages": 3}, "speed": 1.1},
    {"scales": "rows", "m": 4096, "n": 4096, "k": 16384, "tile": {"waves": 1, "columns": 256}},
  ]
  path = tmp_path / "tiles.json"
  path.write_text(json.dumps({"measured": {}, "tiles": entries}))
  monkeypatch.setattr(tiles, "FILE", path)
  monkeypatch.setattr(tiles, "_table", tiles._table.__wrapped__)


def test_the_number_of_tokens_is_rounded_up_and_widths_are_not(table):
  found = Tile(stages=3)
  assert [tiles.tile_for(m, 4096, 4096, "blocks") for m in (8193, 15872, 16384)] == [found] * 3
  assert tiles.tile_for(8192, 4096, 4096, "blocks") == DEFAULT
  assert tiles.tile_for(16384, 4096, 4224, "blocks") == DEFAULT
  by_rows = Tile(waves=1, columns=256)
  assert tiles.tile_for(4096, 4096, 15872, "rows") == by_rows
  assert tiles.tile_for(4095, 4096, 15872, "rows") == DEFAULT


def test_a_table_with_a_wrong_tile_is_an_error():
  entry = {"scales": "blocks", "m": 128, "n": 128, "k": 128, "tile": {"waves": 1, "columns": 256}}
  with pytest.raises(ValueError, match="columns must divide 128"):
    tiles.read_table({"tiles": [entry]})


def test_the_table_of_the_package_can_be_read():
  content = json.loads(tiles.FILE.read_text())
  assert len(tiles.read_table(content)) == len(content["tiles"])
  keys = {field.name for field in dataclasses.fields(Tile)}
  assert all(each["tile"].keys() <= keys for each in content["tiles"])
