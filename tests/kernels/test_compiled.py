"""The Hopper kernels, compiled for a described H100: no spills, and the instructions they need.

They say what the interpreter can't: it runs on the CPU and knows no layouts and registers.
"""

import ctypes
import json
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from flax_fp8.formats import E4M3, E5M2
from flax_fp8.kernels import tiles
from flax_fp8.kernels.block_gemm import BlockScaledGemm
from flax_fp8.kernels.block_quantize import BlockQuantize

pytestmark = pytest.mark.skipif(
  jax.__version_info__ < (0, 10, 2), reason="the kernels need JAX 0.10.2"
)

MIXED = jax.__version_info__ >= (0, 11)
SIZES = 272, 208, 768  # M, N and K of the default tile
DTYPES = jnp.bfloat16, jnp.float16, jnp.float32


@pytest.fixture
def compiled(described, monkeypatch, capfd):
  """Returns a function that compiles for an H100, and returns what Mosaic and ptxas print."""
  sharding = SingleDeviceSharding(described("h100"))
  for what in ("PTX", "PTXAS"):
    monkeypatch.setenv(f"MOSAIC_GPU_DUMP_{what}", "1")

  def compile_and_read(fun, *shapes):
    args = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
    jax.jit(fun).trace(*args).lower(lowering_platforms=("cuda",)).compile()
    ctypes.CDLL(None).fflush(None)
    return "".join(capfd.readouterr())

  return compile_and_read


def shipped():
  """Yields an id, the granularity of scales, and sizes, for the default tile and each tuned one."""
  for scales in ("blocks", "rows"):
    assert tiles.tile_for(*SIZES, scales) is tiles.DEFAULT
    yield f"default, {scales}", scales, SIZES
  for scales, *sizes in tiles.read_table(json.loads(tiles.FILE.read_text(encoding="utf-8"))):
    yield f"{'x'.join(map(str, sizes))}, {scales}", scales, tuple(sizes)


def gemms():
  for name, scales, sizes in shipped():
    for out in DTYPES:
      kinds = [(E4M3, E4M3), *([(E5M2, E4M3), (E4M3, E5M2)] if MIXED else [])]
      for formats in kinds:
        words = name, jnp.dtype(out).name, *(each.name[7:11] for each in formats)
        quick = scales == "blocks" and sizes is SIZES and out == jnp.bfloat16
        is_slow = not quick or formats != (E4M3, E4M3)
        marks = (pytest.mark.slow, pytest.mark.exhaustive) if is_slow else ()
        yield pytest.param(scales, sizes, out, formats, id=" ".join(words), marks=marks)


def assert_no_spills(text):
  spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
  assert spills == [("0", "0")]


@pytest.mark.parametrize(("scales", "sizes", "out", "formats"), list(gemms()))
def test_gemm(scales, sizes, out, formats, compiled):
  m, n, k = sizes
  groups = n if scales == "rows" else -(-n // 128)
  text = compiled(
    BlockScaledGemm(out_dtype=jnp.dtype(out).name).run,
    ((1, m, k), formats[0].dtype),
    ((1, n, k), formats[1].dtype),
    ((1, k // 128, m), jnp.float32),
    ((1, k // 128, groups), jnp.float32),
  )
  assert_no_spills(text)
  kinds = set(re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.f32\.(\w+\.\w+)", text))
  assert kinds == {".".join(each.name[7:11] for each in formats)}
  assert "ftz" not in text


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("power_of_two", [True, False], ids=["power of two", ""])
@pytest.mark.parametrize("is_tiled", [False, True], ids=["strips", "tiles"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("float8", [E4M3, E5M2], ids=lambda float8: float8.name)
def test_quantizer(float8, dtype, is_tiled, power_of_two, compiled):
  """NaN and subnormal values are kept, and the conversion saturates."""
  quantizer = BlockQuantize(format=float8.name, tiles=is_tiled, power_of_two=power_of_two)
  text = compiled(quantizer.run, ((2, 264, 200), dtype))
  assert_no_spills(text)
  assert set(re.findall(r"\bmax\.[\w.]*f32", text)) == {"max.NaN.f32"}
  assert set(re.findall(r"cvt\.\w+\.satfinite[\w.]*", text)) == {
    f"cvt.rn.satfinite.{float8.name[7:11]}x2.f32"
  }
  assert "ftz" not in text


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", [0, 1], ids=["as it is", "transposed"])
@pytest.mark.parametrize("is_tiled", [False, True], ids=["strips", "tiles"])
def test_quantizer_of_one_layout(is_tiled, layout, compiled):
  quantizer = BlockQuantize(format=E4M3.name, tiles=is_tiled, power_of_two=True)
  used = tuple(number // 2 == layout for number in range(4))
  text = compiled(quantizer.using(used).run, ((2, 264, 200), jnp.bfloat16))
  assert_no_spills(text)
