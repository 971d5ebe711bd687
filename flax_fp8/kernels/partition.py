"""Shards hand-written kernels in programs for several devices with automatic mesh axes.

XLA can't shard a custom call, and would gather its operands. So a kernel is lowered to a custom
call of our own, which names it and its factors. When XLA partitions the program, it calls this
module, which replaces the call by the kernel on the shards of one device and sums the results. The
call contains all that this needs. So the program can be exported, and compiled in another process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pkgutil
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import jax
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import mlir

from flax_fp8._compat import hlo_sharding, lower_manually, partitioners, register_partitioner
from flax_fp8.kernels.base import Kernel
from flax_fp8.kernels.sharding_plan import Rule, ShardingPlan, make_plan
from flax_fp8.kernels.shardings import DeviceAxes, Dims, possible_axes

TARGET = "flax_fp8_partitioned"


def lower_partitioned(context: Any, *values: Any, kernel: Kernel) -> Sequence[Any]:
  """Lowers a kernel in a program for several devices, some mesh axes of which are automatic.

  Args:
    context: context of a lowering rule of JAX. ``register`` must have returned True.
    *values: values of the operands. Their shapes must be static.
    kernel: the kernel.

  Returns:
    Values of the results.
  """
  call: Any = stablehlo.CustomCallOp(
    [
      ir.RankedTensorType.get(aval.shape, mlir.dtype_to_ir_type(aval.dtype))
      for aval in context.avals_out
    ],
    list(values),
    call_target_name=ir.StringAttr.get(TARGET),
    has_side_effect=ir.BoolAttr.get(False),
    api_version=ir.IntegerAttr.get(ir.IntegerType.get_signless(32), 2),
    called_computations=ir.ArrayAttr.get([]),
    backend_config=ir.StringAttr.get(_Call.of(kernel, context).dump()),
  )
  shapes = [aval.shape for aval in (*context.avals_in, *context.avals_out)]
  call.attributes["sdy.sharding_rule"] = _shardy_rule(Rule.parse(kernel.rule), shapes)
  return call.results


def _shardy_rule(rule: Rule, shapes: Sequence[tuple[int, ...]]) -> ir.Attribute:
  """Writes a rule for Shardy, which propagates shardings through the call."""
  symbols = {name: chr(ord("i") + index) for index, name in enumerate(rule.factors())}
  dims = lambda arrays: ", ".join(
    f"[{', '.join(map(symbols.__getitem__, names))}]" for names in arrays
  )
  sizes = [f"{symbols[name]}={min(rule.lengths(shapes, name))}" for name in symbols]
  summed = [symbols[name] for name in rule.contracted()]
  reduction = f" reduction={{{', '.join(summed)}}}" if summed else ""
  text = f"({dims(rule.operands)})->({dims(rule.results)}) {{{', '.join(sizes)}}}{reduction}"
  return ir.Attribute.parse(f"#sdy.op_sharding_rule<{text}, custom>")


@dataclasses.dataclass(frozen=True)
class _Call:
  """What the custom call says.

  Attributes:
    version: version of flax_fp8, since JAX's compilation cache sees only the call.
    kernel: module and class of the kernel.
    fields: the fields of the kernel.
    mesh: for each mesh axis, its size and whether it is manual.
    platforms: the platforms that the program is lowered for.
  """

  version: str
  kernel: str
  fields: dict[str, Any]
  mesh: list[tuple[int, bool]]
  platforms: list[str]

  @classmethod
  def of(cls, kernel: Any, context: Any) -> _Call:
    """Describes a kernel and the program that is being lowered."""
    return cls(
      _version(),
      f"{type(kernel).__module__}:{type(kernel).__qualname__}",
      dataclasses.asdict(kernel),
      _mesh_of(context.module_context.axis_context),
      list(context.platforms or context.module_context.platforms),
    )

  @classmethod
  def load(cls, config: bytes) -> _Call:
    """Reads what ``dump`` wrote."""
    return cls(**json.loads(config))

  def dump(self) -> str:
    """Writes it as JSON, always in the same order, since the text is a key of caches."""
    return json.dumps(dataclasses.asdict(self), sort_keys=True)

  def load_kernel(self) -> Any:
    """Makes the kernel."""
    return pkgutil.resolve_name(self.kernel)(**self.fields)

  def possible_axes(self) -> list[DeviceAxes]:
    """Returns the axes that XLA may shard over. Inside of manual axes, XLA shows only these."""
    return possible_axes(tuple(size for size, is_manual in self.mesh if not is_manual))

  def named_axes(self, automatic: DeviceAxes) -> tuple[dict[str, int], list[str]]:
    """Returns names and sizes of all axes, and the names of the automatic axes."""
    parts = iter(automatic.sizes)
    axes: dict[str, int] = {}
    names: list[str] = []
    for size, is_manual in self.mesh:
      left = size
      while left > 1:
        part = size if is_manual else next(parts)
        name = f"axis{len(axes)}"
        names += [] if is_manual else [name]
        axes[name], left = part, left // part
    return axes, names


@functools.cache
def _version() -> str:
  with contextlib.suppress(metadata.PackageNotFoundError):
    return metadata.version("flax-fp8")
  return ""


def _mesh_of(context: Any) -> list[tuple[int, bool]]:
  if not hasattr(context, "num_devices"):  # inside of a shard_map
    return [(size, name in context.manual_axes) for name, size in context.mesh.shape.items()]
  mesh = context.abstract_mesh
  sizes = (context.num_devices,) if mesh is None else mesh.axis_sizes
  return [(size, False) for size in sizes]


class _Arrays:
  """The operands and results of a call that XLA partitions."""

  def __init__(self, operands: Any, given: Any, result: Any, wanted: Any, config: bytes) -> None:
    self.call = _Call.load(config)
    self.kernel = self.call.load_kernel()
    self.operands, self.result = list(operands), result
    self.results = list(result.tuple_shapes()) if result.is_tuple() else [result]
    shapes = [tuple(shape.dimensions()) for shape in (*self.operands, *self.results)]
    pairs = list(zip((*given, *wanted), shapes, strict=True))
    decode = lambda axes: [axes.decode(sharding, len(shape)) for sharding, shape in pairs]
    # The axes that explain most shardings.
    self.axes = max(self.call.possible_axes(), key=lambda axes: sum(map(any, decode(axes))))
    # Inside of manual axes, XLA numbers the devices of each group in an order that is unknown here.
    are_numbered = not any(is_manual for _, is_manual in self.call.mesh)
    rule = Rule.parse(self.kernel.rule)
    self.plan = make_plan(rule, shapes, decode(self.axes), self.axes, are_numbered=are_numbered)

  def shards(self, shapes: Any, dims: Sequence[Dims]) -> list[jax.ShapeDtypeStruct]:
    """Returns shape and dtype of one device's shard of each array."""
    divided = lambda shape, axes: tuple(map(self._divided, shape.dimensions(), axes))
    return [
      jax.ShapeDtypeStruct(divided(shape, axes), shape.numpy_dtype())
      for shape, axes in zip(shapes, dims, strict=True)
    ]

  def _divided(self, length: int, axes: tuple[int, ...]) -> int:
    return length // self.axes.count(axes)

  def result_sharding(self) -> Any:
    """Returns XLA's sharding of the result, which is a tuple if the kernel has several."""
    shardings = list(map(self.axes.encode, self.plan.results))
    if self.result.is_tuple():
      return hlo_sharding().tuple_sharding(self.result, shardings)
    return shardings[0]


def _partition(operands: Any, given: Any, result: Any, wanted: Any, config: bytes) -> Any:
  """Returns the program of one device, and the shardings of its operands and result."""
  wanted = wanted.tuple_elements() if result.is_tuple() else [wanted]
  arrays = _Arrays(operands, given, result, wanted, config)
  plan = arrays.plan
  args = arrays.shards(arrays.operands, plan.operands)
  program, avals = _program(config, arrays.axes, plan, tuple(args))
  expected = arrays.shards(arrays.results, plan.results)
  if [(x.shape, x.dtype) for x in avals] != [(x.shape, x.dtype) for x in expected]:
    raise ValueError(
      f"{type(arrays.kernel).__name__}: results of shards must be shards of the result; got "
      f"{avals} instead of {expected}. Change its rule, {arrays.kernel.rule!r}."
    )
  return program, list(map(arrays.axes.encode, plan.operands)), arrays.result_sharding()


@functools.cache
def _program(
  config: bytes, device_axes: DeviceAxes, plan: ShardingPlan, args: tuple[jax.ShapeDtypeStruct, ...]
) -> tuple[bytes, list[Any]]:
  """Lowers the program of one device, once for all equal calls."""
  call = _Call.load(config)
  axes, automatic = call.named_axes(device_axes)
  run = _summed(call.load_kernel().run, plan, automatic)
  return lower_manually(run, args, axes, tuple(call.platforms))


def _summed(run: Callable[..., Any], plan: ShardingPlan, names: list[str]) -> Callable[..., Any]:
  """Returns the function of one device: the kernel, then the sums over devices."""
  named = lambda axes: tuple(names[axis] for axis in axes)

  def add(x: jax.Array, scattered: Dims) -> jax.Array:
    for dim, axes in enumerate(scattered):
      if axes:
        x = jax.lax.psum_scatter(x, named(axes), scatter_dimension=dim, tiled=True)
    rest = tuple(axis for axis in plan.summed if axis not in sum(scattered, ()))
    return jax.lax.psum(x, named(rest)) if rest else x

  return lambda *args: tuple(map(add, run(*args), plan.scattered))


def _infer(operands: Any, given: Any, result: Any, config: bytes) -> Any:
  """Returns the result's sharding from those of the operands. Only GSPMD asks for it."""
  count = len(result.tuple_shapes()) if result.is_tuple() else 1
  return _Arrays(operands, given, result, [None] * count, config).result_sharding()


@functools.cache
def register() -> bool:
  """Registers the partitioner with XLA. Returns False if this JAX has no such interface."""
  return register_partitioner(
    TARGET, propagate=lambda sharding, *_: sharding, partition=_partition, infer=_infer
  )


partitioners[TARGET] = f"{__name__}:register"
