"""Formats compared with the oracle, which decodes each code."""

import jax.numpy as jnp
import numpy as np
import pytest

from flax_fp8 import Format, formats
from tests import oracle

ALL = [formats.E4M3, formats.E5M2, formats.E4M3_FNUZ, formats.E5M2_FNUZ]


@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.name)
class TestFloat8:
  def test_every_code_decodes_as_the_layout_says(self, fmt):
    codes = np.arange(256, dtype=np.uint8)
    ours = codes.view(fmt.dtype).astype(np.float64)
    truth = np.array([oracle.decode(int(c), oracle.LAYOUTS[fmt.name]) for c in codes])
    np.testing.assert_array_equal(ours, truth)

  def test_limits_are_those_of_the_codes(self, fmt):
    values = oracle.magnitudes(fmt.name)
    layout = oracle.LAYOUTS[fmt.name]
    assert fmt.max == values[-1]
    assert fmt.smallest_subnormal == values[1]
    assert fmt.smallest_normal == 2.0 ** (1 - layout.bias)
    assert fmt.mantissa_bits == layout.mantissa_bits
    assert fmt.epsilon == values[values.index(1.0) + 1] - 1.0
    assert fmt.has_inf == (layout.kind == "ieee")

  def test_is_found_by_its_dtype(self, fmt):
    assert formats.float8(fmt.dtype) is fmt
    assert formats.float8(fmt.name) is fmt


def test_other_dtypes_are_refused():
  with pytest.raises(ValueError, match=r"formats.float8: .*float8_e4m3fn.*got dtype=.*bfloat16"):
    formats.float8(jnp.bfloat16)


def test_format_pairs():
  assert (Format.HYBRID.forward, Format.HYBRID.backward) == (formats.E4M3, formats.E5M2)
  assert (Format.E4M3.forward, Format.E4M3.backward) == (formats.E4M3, formats.E4M3)
  assert Format.HYBRID_FNUZ.backward is formats.E5M2_FNUZ
  assert Format(formats.E4M3, formats.E5M2) == Format.HYBRID
  assert hash(Format(formats.E4M3, formats.E5M2)) == hash(Format.HYBRID)


def test_format_refuses_dtypes():
  with pytest.raises(TypeError, match=r"Format: forward must be a formats.Float8; got 'e4m3'"):
    Format("e4m3", formats.E5M2)
