"""What kernels in Pallas Mosaic GPU share, and differences between JAX releases.

Only code that lowers a kernel imports this module, because it imports Pallas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

F32 = jnp.float32
WGMMA = plgpu.Layout.WGMMA

_LOADS_REFS = jax.__version_info__ >= (0, 11)  # older releases take indices and swap axes otherwise


def load(ref: Any, layout: Any) -> jax.Array:
  """Loads an array from shared memory to registers."""
  indices: tuple[Any, ...] = () if _LOADS_REFS else ((),)
  return plgpu.load(ref, *indices, layout=layout)


def transposed(ref: Any) -> Any:
  """Returns the transpose of a matrix in shared memory, without moving it."""
  return ref.transpose((1, 0)) if _LOADS_REFS else plgpu.transpose_ref(ref, (1, 0))


def swizzled(dtype: Any) -> tuple[Any, Any]:
  """Returns the layout of matrices in shared memory for wgmma and TMA: rows of 128 bytes."""
  width = 128 // jnp.dtype(dtype).itemsize
  return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(128)


def kernel(name: str, body: Callable[..., Any], out: Any, **options: Any) -> Callable[..., Any]:
  """Makes a function of arrays that runs a kernel.

  Args:
    name: name of the kernel in profiles.
    body: function of the operands, the results and the scratch, as references.
    out: shapes and dtypes of the results.
    **options: grid, scratch and threads, as for ``plgpu.kernel``.
  """
  body.__name__ = name
  lane = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)
  launch = plgpu.kernel(body, out_type=out, compiler_params=lane, **options)

  def run(*operands: jax.Array) -> Any:
    with jax.enable_x64(False):  # indices in a kernel are int32
      return launch(*operands)

  return run


def along(x: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
  """Broadcasts a vector along the other axis of a matrix."""
  return jax.lax.broadcast_in_dim(x, shape, (axis,))
