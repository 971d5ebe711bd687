"""Checks for JAX's private features."""

import jax
import pytest

from flax_fp8 import _compat


@pytest.mark.parametrize(
  ("module", "attribute"), [("jax._src.core", "nothing"), ("jax._src.nothing", "core")]
)
def test_a_missing_feature_says_what_to_do(module, attribute):
  with pytest.raises(
    ImportError, match=rf"flax_fp8: .*{module}.{attribute}.*jax=={jax.__version__}"
  ):
    _compat.require(module, attribute)
