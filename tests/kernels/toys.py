"""Kernels in plain JAX with the operands and results of the real ones."""

import dataclasses
from typing import ClassVar

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.interpreters import mlir

from flax_fp8.kernels.partition import lower_partitioned, register
from flax_fp8.platforms import is_alone


def pad(x, length, axis):
  return jnp.pad(x, [(0, length - n if at == axis else 0) for at, n in enumerate(x.shape)])


def wide(scale, length, axis):
  """Repeats each scale for its block of 128."""
  return jax.lax.slice_in_dim(jnp.repeat(scale, 128, axis), 0, length, axis=axis)


@dataclasses.dataclass(frozen=True)
class Gemm:
  """a [B, M, K], b [B, N, K], a_scale [B, K/128, M], b_scale [B, K/128, N or N/128]."""

  rule: ClassVar[str] = "bmk bnk bkm bkn -> bmn"
  dtype: str = "float32"

  def run(self, a, b, a_scale, b_scale):
    if b_scale.shape[2] < b.shape[1]:
      b_scale = wide(b_scale, b.shape[1], 2)
    a = a.astype("float32") * wide(a_scale, a.shape[2], 1).swapaxes(1, 2)
    b = b.astype("float32") * wide(b_scale, b.shape[2], 1).swapaxes(1, 2)
    return (jnp.einsum("bmk,bnk->bmn", a, b).astype(self.dtype),)


@dataclasses.dataclass(frozen=True)
class Quantizer:
  """x [B, R, C] -> q [B, R, C'], s [B, C'/128, R], qt [B, C, R'], st [B, R'/128, C].

  Primes are lengths that are padded to whole blocks.
  """

  rule: ClassVar[str] = "brc -> brc bcr bcr brc"

  def run(self, x):
    q, s = self.quantize(x)
    return q, s, *self.quantize(x.swapaxes(1, 2))

  def quantize(self, x):
    blocks = -(-x.shape[2] // 128)
    x = pad(x, 128 * blocks, 2)
    scale = jnp.abs(x.reshape(*x.shape[:2], blocks, 128)).max(3) + 1
    return x / jnp.repeat(scale, 128, 2), scale.swapaxes(1, 2)


@dataclasses.dataclass(frozen=True)
class Wrong:
  """Has eight results on any number of devices, and a rule that says otherwise."""

  rule: ClassVar[str] = "i -> i"

  def run(self, x):
    return (jnp.concatenate([x, x])[:8],)


kernel_p = jax.extend.core.Primitive("toy")
kernel_p.multiple_results = True
kernel_p.def_impl(lambda *args, kernel: jax.jit(lambda *args: call(kernel, *args))(*args))
kernel_p.def_abstract_eval(
  lambda *args, kernel: [
    jax.core.ShapedArray(x.shape, x.dtype)
    for x in jax.eval_shape(kernel.run, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args))
  ]
)


def call(kernel, *args):
  return kernel_p.bind(*args, kernel=kernel)


def gemm(*args):
  return call(Gemm(), *args)[0]


def lower(context, *values, kernel):
  if is_alone(context.module_context.axis_context):
    return mlir.lower_fun(kernel.run, multiple_results=True)(context, *values)
  assert register()
  return lower_partitioned(context, *values, kernel=kernel)


mlir.register_lowering(kernel_p, lower)
