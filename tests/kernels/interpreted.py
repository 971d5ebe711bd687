"""Kernels as if a GPU were there: chosen as for one, and interpreted on the CPU."""

import pytest
from jax.experimental import pallas as pl

from flax_fp8.kernels import choice, dispatch


@pytest.fixture
def interpreted(monkeypatch):
  """Has kernels chosen, and run by Pallas' interpreter."""
  call = pl.pallas_call
  monkeypatch.setattr(choice, "_gpu", lambda: choice.Gpu.ROWS_ONLY)
  monkeypatch.setattr(dispatch, "kernel_or_plain", lambda kernel, plain, *args: kernel(*args))
  monkeypatch.setattr(pl, "pallas_call", lambda *a, **k: call(*a, **{**k, "interpret": True}))
