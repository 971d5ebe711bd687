"""The Hopper kernels, interpreted on the CPU with race detection, equal plain JAX.

Quantized values and scales are the same bits, also as the scalar oracle's. Products differ only by
the order of their sums.
"""

import types

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flax_fp8.formats import E4M3, E5M2
from flax_fp8.kernels import block_gemm
from flax_fp8.kernels.block_gemm import BlockScaledGemm
from flax_fp8.kernels.block_quantize import BlockQuantize
from flax_fp8.kernels.tiles import DEFAULT, Tile
from tests import oracle
from tests.kernels.interpreter import IS_MISSING, REASON, interpret

pytestmark = pytest.mark.skipif(IS_MISSING, reason=REASON)

SLOW = pytest.mark.slow
SMALL = Tile(consumers=1, waves=1, columns=64, cell=64, in_flight=1, stages=2, raster=1)
WIDE = Tile(consumers=1, waves=1, columns=256, cell=128, in_flight=2, stages=2, raster=2)
AGAIN = 128 * (DEFAULT.stages + 2)  # of K: two stages are used again
BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32


def case(*sizes, out=F32, a=E4M3, b=E4M3, tile=None, bad=None, quick=False):
  """Returns ``(batch, m, n, k)`` and the rest of one product as a parameter of a test."""
  formats = "" if (a, b) == (E4M3, E4M3) else f" {a.name[7:11]} by {b.name[7:11]}"
  name = f"{'x'.join(map(str, sizes))} {jnp.dtype(out).name}{formats} {bad or ''}"
  marks = () if quick else SLOW
  return pytest.param(sizes, out, (a, b), tile, bad, marks=marks, id=name.strip())


BY_BLOCKS = [
  case(1, 264, 192, AGAIN, out=BF16, quick=True),
  case(1, 256, 128, AGAIN),  # one whole tile
  case(1, 8, 64, 128, out=F16),
  case(1, 1, 1, 128, out=BF16),
  case(1, 9, 65, 256),
  case(1, 63, 130, 256, out=F16),
  case(3, 7, 5, AGAIN, out=BF16),
  case(3, 40, 200, 128),
  case(1, 24, 96, AGAIN, a=E5M2),
  case(1, 24, 96, 256, a=E5M2, b=E5M2, out=BF16),
  case(1, 130, 300, 512, tile=SMALL, out=F16),
  case(1, 20, 136, 256, bad="zeros"),
  case(1, 20, 136, AGAIN, bad="NaN"),
]
BY_ROWS = [
  case(1, 100, 72, AGAIN, quick=True),
  case(1, 260, 136, AGAIN, out=BF16),
  case(1, 9, 33, 128, out=F16),
  case(3, 20, 31, AGAIN, out=BF16),
  case(1, 24, 96, AGAIN, b=E5M2, out=F16),
  case(1, 24, 96, 256, a=E5M2, b=E4M3),
  case(1, 70, 300, 512, tile=WIDE),
  case(1, 70, 100, 512, tile=SMALL, out=BF16),
  case(1, 20, 136, 256, bad="zeros"),
  case(1, 20, 136, AGAIN, bad="NaN", out=BF16),
]


def operands(sizes, formats, rows_of_scale, bad=None):
  """Returns FP8 matrices with scales of many magnitudes; two blocks of each are ``bad``."""
  random, (batch, m, n, k) = np.random.default_rng(0), sizes
  arrays, scales = [], []
  for rows, of_scale, float8 in zip((m, n), (1, rows_of_scale), formats, strict=True):
    x = random.normal(size=(batch, rows, k)).astype(np.float32) * 4
    scale = np.exp2(random.uniform(-8, 0, (batch, k // 128, -(-rows // of_scale))))
    if bad == "zeros":
      x[:, :of_scale, :128] = x[:, -1, -128:] = 0
    elif bad == "NaN":
      x[:, :of_scale, :128], scale[:, 0, 0] = np.nan, np.nan
      scale[:, -1, -1] = np.nan
    arrays.append(jnp.asarray(x).astype(float8.dtype))
    scales.append(jnp.asarray(scale, F32))
  return *arrays, *scales


def dequantized(x, scale):
  """Returns a stack of matrices in float64."""
  rows = x.shape[1]
  scale = np.asarray(scale, np.float64).swapaxes(1, 2)
  scale = np.repeat(scale, 1 if scale.shape[1] == rows else 128, axis=1)[:, :rows]
  return np.asarray(x, np.float64) * np.repeat(scale, 128, axis=2)


def exact(a, b, a_scale, b_scale):
  """Returns the products in float64, and those of all magnitudes."""
  a, b = dequantized(a, a_scale), dequantized(b, b_scale).swapaxes(1, 2)
  return a @ b, np.abs(a) @ np.abs(b)


def check_product(args, out_dtype):
  """Asserts that the kernel and plain JAX are as near to float64 as their roundings allow."""
  gemm, (want, magnitude) = BlockScaledGemm(out_dtype=jnp.dtype(out_dtype).name), exact(*args)
  blocks = args[0].shape[2] // 128
  # A term is added at most 127 times in its block, scaled twice, and added once for each block.
  tolerance = (129 + blocks) * np.finfo(np.float32).eps / 2 * magnitude
  if out_dtype != F32:
    final = jnp.finfo(out_dtype)
    tolerance += np.abs(want) * float(final.eps) / 2 + float(final.smallest_subnormal)
  for (got,) in (interpret(gemm.run, *args), gemm.plain(*args)):
    assert (got.shape, got.dtype) == (want.shape, out_dtype)
    got = np.asarray(got, np.float64)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    assert np.all(np.isnan(want) | (np.abs(got - want) <= tolerance))


@pytest.mark.parametrize(("sizes", "out", "formats", "tile", "bad"), BY_BLOCKS)
def test_products_by_blocks(sizes, out, formats, tile, bad, monkeypatch):
  """Blocks of 128×128 of the second operand share scales: fprop and dgrad."""
  if tile is not None:
    monkeypatch.setattr(block_gemm, "tile_for", lambda *_: tile)
  check_product(operands(sizes, formats, 128, bad), out)


@pytest.mark.parametrize(("sizes", "out", "formats", "tile", "bad"), BY_ROWS)
def test_products_by_rows(sizes, out, formats, tile, bad, monkeypatch):
  """Both operands have scales for each row: wgrad."""
  if tile is not None:
    monkeypatch.setattr(block_gemm, "tile_for", lambda *_: tile)
  check_product(operands(sizes, formats, 1, bad), out)


def test_a_load_into_a_stage_that_is_still_read_is_found(monkeypatch):
  """The interpreter finds the race that the fence at the end of a step prevents."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  from flax_fp8.kernels.mosaic_gemm import BlockGemm

  fence, store = plgpu.commit_smem, BlockGemm._store

  def store_with_fences(*args):
    monkeypatch.setattr(plgpu, "commit_smem", fence)
    store(*args)

  monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
  monkeypatch.setattr(BlockGemm, "_store", store_with_fences)
  args = operands((1, 8, 64, AGAIN), (E4M3, E4M3), 128)
  with pytest.raises(Exception, match="RACE DETECTED"):
    interpret(BlockScaledGemm(out_dtype="float32").run, *args)


SIZES = [(1, 256, 384), (1, 200, 264), (3, 136, 130), (1, 1, 5), (1, 300, 20), (2, 7, 129)]


def matrices(shape, dtype):
  """Returns values of many magnitudes. A line, and all but the first block, are special."""
  random, limits = np.random.default_rng(1), jnp.finfo(dtype)
  x = random.normal(size=shape) * np.exp2(random.integers(-12, 6, shape))
  subnormal = random.integers(-3, 4, shape) * float(limits.smallest_subnormal)
  x[0, 1:3, :128] = 0
  x[-1, :, 0] = subnormal[-1, :, 0]
  changes = [
    lambda block: np.where(np.arange(block.shape[2]) == 5, -np.inf, block),
    lambda block: block * 0,
    lambda block: np.sign(block) * float(limits.max),
    lambda block: subnormal[:, : block.shape[1], : block.shape[2]],
  ]
  blocks = list(np.ndindex(*(-(-size // 128) for size in shape[1:])))[1:]
  for (i, j), change in zip(blocks, changes, strict=False):
    block = np.s_[:, 128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
    x[block] = change(x[block])
  return jnp.asarray(x, dtype)


def by_oracle(x, rows, name, power_of_two):
  """Quantizes ``[batch, R, C]`` in blocks of ``rows`` by 128. Returns FP8 data and scales."""
  batch, high, wide = x.shape[0], -(-x.shape[1] // rows), -(-x.shape[2] // 128)
  padded = np.zeros((batch, high * rows, wide * 128))
  padded[:, : x.shape[1], : x.shape[2]] = x
  data, scale = np.zeros(padded.shape), np.zeros((batch, wide, high), np.float32)
  for item, i, j in np.ndindex(batch, high, wide):
    block = np.s_[item, rows * i : rows * i + rows, 128 * j : 128 * j + 128]
    values = np.full((rows, 128), np.nan) if np.isnan(padded[block]).any() else padded[block]
    data[block], scale[item, j, i] = oracle.quantize_by_amax(values, name, power_of_two)
  return data[:, : x.shape[1]], scale


def bits(x):
  """Returns the bits, with one code for all NaNs."""
  wide, whole = np.asarray(x, np.float32), np.asarray(x)
  code = whole.view({1: np.uint8, 4: np.uint32}[whole.itemsize])
  return np.where(np.isnan(wide), code.dtype.type(-1 % 2 ** (8 * whole.itemsize)), code)


def quantizer_cases():
  for number, sizes in enumerate(SIZES):
    for float8 in (E4M3, E5M2):
      dtype = (BF16, F16)[(number + (float8 is E5M2)) % 2]
      name = f"{'x'.join(map(str, sizes))} {jnp.dtype(dtype).name} {float8.name}"
      quick = sizes == SIZES[1] and float8 is E4M3
      yield pytest.param(sizes, dtype, float8, id=name, marks=() if quick else SLOW)


def check_quantizer(x, **options):
  """Asserts that data and scales of both layouts are the bits of plain JAX and of the oracle."""
  quantizer = BlockQuantize(**options)
  got, plain = interpret(quantizer.run, x), quantizer.plain(x)
  wide, rows = np.asarray(x, np.float64), 128 if quantizer.tiles else 1
  wide = np.where(
    np.abs(wide) < np.finfo(np.float32).tiny, np.copysign(0, wide), wide
  )  # as XLA on a CPU
  of_oracle = rows, quantizer.float8.name, quantizer.power_of_two
  wanted = (*by_oracle(wide, *of_oracle), *by_oracle(wide.swapaxes(1, 2), *of_oracle))
  for ours, theirs, want in zip(got, plain, wanted, strict=True):
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    np.testing.assert_array_equal(bits(ours), bits(theirs))
    np.testing.assert_array_equal(bits(ours), bits(want.astype(ours.dtype)))


POWER_OF_TWO = pytest.mark.parametrize("power_of_two", [True, False], ids=["power of two", ""])
TILES = pytest.mark.parametrize("tiles", [False, True], ids=["strips", "tiles"])


@POWER_OF_TWO
@TILES
@pytest.mark.parametrize(("sizes", "dtype", "float8"), list(quantizer_cases()))
def test_quantized_values(sizes, dtype, float8, tiles, power_of_two):
  """Strips of values and gradients, tiles of kernels; sizes with and without remainders."""
  x = matrices(sizes, dtype)
  check_quantizer(x, format=float8.name, tiles=tiles, power_of_two=power_of_two)


@pytest.mark.slow
@TILES
@pytest.mark.parametrize("layout", [0, 1], ids=["as it is", "transposed"])
def test_one_layout_alone(layout, tiles):
  """A program that uses one GEMM operand writes nothing else."""
  x = matrices((2, 136, 200), BF16)
  quantizer = BlockQuantize(format=E4M3.name, tiles=tiles, power_of_two=True)
  used = tuple(number // 2 == layout for number in range(4))
  got = interpret(quantizer.using(used).run, x)
  for ours, theirs, is_used in zip(got, quantizer.plain(x), used, strict=True):
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    if is_used:
      np.testing.assert_array_equal(bits(ours), bits(theirs))


@pytest.mark.slow
@TILES
@pytest.mark.parametrize("float8", [E4M3, E5M2], ids=lambda float8: float8.name)
def test_nan_reaches_the_scale_of_its_block(float8, tiles, monkeypatch):
  """XLA's CPU compiler drops NaN from maxima of large arrays, so bits are compared here.

  ``test_compiled.py`` checks the instruction on a GPU.
  """
  from flax_fp8.kernels import mosaic_quantize

  def largest(x, axis):  # magnitudes order as their bits
    integers = lax.bitcast_convert_type(x, jnp.int32)
    return lax.bitcast_convert_type(jnp.max(integers, axis), F32)

  replaced = types.SimpleNamespace(**{**vars(jnp), "max": largest})
  monkeypatch.setattr(mosaic_quantize, "jnp", replaced)
  x = matrices((2, 200, 264), BF16).at[0, 150, 3].set(jnp.nan).at[1, 7, 250].set(-jnp.nan)
  check_quantizer(x, format=float8.name, tiles=tiles, power_of_two=True)
