"""The only file that uses ``jax._src``.

The import needs only a few symbols, such as the base class of extended dtypes. Everything else is
looked up when it is used, by feature and not by version. If a symbol is missing and a public
alternative exists, the alternative is used.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import types
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import numpy as np
from jax.interpreters import ad


def require(module: str, attribute: str) -> Any:
  """Returns ``module.attribute`` of JAX's private modules; raises ImportError if it is missing."""
  try:
    return getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError) as error:
    raise ImportError(
      f"flax_fp8: JAX must have the private name {module}.{attribute}; got jax=={jax.__version__} "
      "without it. Install a JAX release that flax_fp8's changelog lists as tested, or a newer "
      "flax_fp8."
    ) from error


def find(module: str, attribute: str) -> Any | None:
  """Returns ``module.attribute`` of JAX's private modules; None if it is missing."""
  with contextlib.suppress(ImportError):
    return require(module, attribute)
  return None


# JAX 0.12 can't serialize a dot_general with an explicit FP8 algorithm for a compiler plugin:
# "failed to legalize operation 'vhlo.dot_general_v2'".
NAMES_FP8_ALGORITHM = jax.__version_info__ < (0, 12)

InconclusiveDimensionOperation: Any = require("jax._src.core", "InconclusiveDimensionOperation")
ExtendedDType: Any = require("jax._src.dtypes", "ExtendedDType")


class ResultHandler:
  """Makes an array of an extended dtype from the buffers that a compiled function returns.

  The physical array has the logical array's shape, so both have the same sharding.
  """

  def __init__(self, aval: Any, sharding: Any, committed: bool) -> None:
    """Prepares a handler for one type and sharding."""
    make = require("jax._src.interpreters.pxla", "global_result_handlers")[jax.core.ShapedArray]
    self._physical = make(require("jax._src.core", "physical_aval")(aval), sharding, committed)
    self._aval, self._array = aval, require("jax._src.earray", "EArray")

  def __call__(self, buffers: Any) -> Any:
    """Makes one array."""
    return self._array(self._aval, self._physical(buffers))

  def pre_wrap(self, check: Callable[[Any], Any]) -> ResultHandler:
    """Skips the check of ``jax_debug_infs``, since -inf is the neutral element of the maximum."""
    del check
    return self


def wrapped_from_shards(aval: Any, sharding: Any, arrays: Any, committed: bool) -> Any:
  """Assembles an array of an extended dtype from one array per device."""
  return ResultHandler(aval, sharding, committed)([array._data for array in arrays])


class ElementRules:
  """The rules that JAX requires of an extended dtype whose elements are scalars in memory."""

  allow_conversion: bool = True
  scalar_elements: bool = True
  global_sharded_result_handler = ResultHandler
  make_sharded_array = staticmethod(wrapped_from_shards)


def _add_eagerly(x: Any, y: Any) -> Any:
  return x.dtype._rules.add(x.dtype, x, y)


def _logical_sharding(shape: Any, dtype: Any, physical: Any) -> Any:
  """Replaces JAX's function, and is correct for dtypes whose elements are scalars in memory.

  JAX removes the element's own dimensions from a sharding with ``[:-ndim]``. For ``ndim == 0`` this
  removes all dimensions: a sharded array then raises or becomes replicated.
  """
  if getattr(dtype._rules, "scalar_elements", False):
    return physical
  return _jax_logical_sharding(shape, dtype, physical)


# Eager autodiff adds cotangents through a table that has no entry for arrays of extended dtypes.
# Without an entry, state used twice outside of jit raises KeyError. These arrays also lack the
# method `transpose`, which an eager vmap calls if the mapped axis is not the first.
_array: Any = require("jax._src.earray", "EArray")
_array.transpose = lambda self, *axes: jax.lax.transpose(self, np.ravel(axes).tolist())
_adders = find("jax._src.ad_util", "raw_jaxval_adders")
if _adders is not None:
  _adders.setdefault(_array, _add_eagerly)


def transpose_in(dtype: Any, primitive: Any, transpose: Callable[..., Any]) -> None:
  """Replaces the transpose rule of a unary JAX primitive for cotangents of one dtype.

  JAX's own rule sums cotangents or pads them with zeros. The dtype supports neither.

  Args:
    dtype: dtype of the cotangents.
    primitive: the primitive.
    transpose: function of the cotangent, the operand's shape and the primitive's parameters.
  """
  fancy: Any = find("jax._src.interpreters.ad", "fancy_transposes") or {}
  plain: Any = ad.primitive_transposes
  is_own = lambda cotangent: getattr(cotangent, "dtype", None) == dtype
  if (own_fancy := fancy.get(primitive)) is not None:

    def accumulate(cotangent: Any, operand: Any, **params: Any) -> None:
      if is_own(cotangent):
        operand.accum(transpose(cotangent, operand.aval.shape, **params))
      else:
        own_fancy(cotangent, operand, **params)

    fancy[primitive] = accumulate
  elif (own := plain.get(primitive)) is not None:

    def rule(cotangent: Any, operand: Any, **params: Any) -> Any:
      if is_own(cotangent) and ad.is_undefined_primal(operand):
        return [transpose(cotangent, operand.aval.shape, **params)]
      return own(cotangent, operand, **params)

    plain[primitive] = rule


_jax_logical_sharding: Any = find("jax._src.sharding_impls", "logical_sharding")
if _jax_logical_sharding is not None:
  _sharding_impls: Any = importlib.import_module("jax._src.sharding_impls")
  _sharding_impls.logical_sharding = _logical_sharding


def under_trace_of(tracer: Any) -> contextlib.AbstractContextManager[Any]:
  """Makes a context whose operations belong to a tracer's own trace, not to the current one.

  Its operations are outside of every loop that closes over the tracer.
  """
  return under_trace(getattr(tracer, "_trace", None))


def under_trace(trace: Any) -> contextlib.AbstractContextManager[Any]:
  """Makes a context whose operations belong to a trace; None means the current trace."""
  enter = find("jax._src.core", "set_current_trace")
  return contextlib.nullcontext() if enter is None or trace is None else enter(trace)


def current_trace() -> Any:
  """Returns the current trace."""
  return getattr(find("jax._src.core", "trace_ctx"), "trace", None)


def staging_trace() -> Any:
  """Returns the innermost trace that stages out a jaxpr; None under eager evaluation."""
  kinds = ("DynamicJaxprTrace", "JaxprTrace")
  return next((trace for trace in _running() if type(trace).__name__ in kinds), None)


def is_of_shard_map(staging_trace: Any) -> bool:
  """Tells whether a trace stages out the body of a shard_map."""
  debug_info = getattr(getattr(staging_trace, "frame", None), "debug_info", None)
  return getattr(debug_info, "traced_for", "") == "shard_map"


def transpositions() -> int:
  """Counts the enclosing backward passes, as recorded in JAX's name stack."""
  stack = require("jax._src.source_info_util", "current_name_stack")().stack
  return sum(getattr(entry, "name", "") == "transpose" for entry in stack)


def python_dispatch() -> contextlib.AbstractContextManager[Any]:
  """Makes a context in which JAX binds each jitted function that is called, even eagerly.

  Outside of a trace and without named axes, JAX runs a compiled function without binding it.
  """
  if not require("jax._src.core", "trace_state_clean")():
    return contextlib.nullcontext()
  return require("jax._src.core", "extend_axis_env_nd")([("eager", 1)])


def remat_primitive() -> Any:
  """Returns the primitive of ``jax.checkpoint``."""
  return require("jax._src.ad_checkpoint", "remat_p")


def shard_map_primitive() -> Any:
  """Returns the primitive of ``jax.shard_map``."""
  return require("jax._src.shard_map", "shard_map_p")


def keeps_its_operands(tracer: Any) -> bool:
  """Tells whether a tracer keeps its operands alive, as tracers of a jaxpr do."""
  return hasattr(tracer, "parent") or hasattr(tracer, "recipe")


def scan_counts(params: Any) -> tuple[int, int] | None:
  """Returns the numbers of constants and carries of a scan's equation; None if unknown."""
  if "num_consts" in params:
    return params["num_consts"], params["num_carry"]
  if "ft_in" in params:
    constants, carries, _ = map(len, params["ft_in"].unpack())
    return constants, carries
  return None


def is_ambiguous_sharding(error: Exception) -> bool:
  """Tells whether JAX rejected an operation because the sharding of its result is ambiguous."""
  kind = find("jax._src.core", "ShardingTypeError")
  return kind is not None and isinstance(error, kind)


def _with_parents(trace: Any) -> list[Any]:
  """Returns a trace and its parents without the EvalTrace. The last is the trace of a body."""
  traces: list[Any] = []
  while trace is not None:
    if type(trace).__name__ != "EvalTrace":
      traces.append(trace)
    trace = getattr(trace, "parent_trace", None)
  return traces


def _running() -> list[Any]:
  return _with_parents(current_trace())


def running_body() -> weakref.ref[Any] | None:
  """Returns a reference to the trace of the innermost running shard_map body.

  JAX runs the backward pass of a shard_map in a separate body. A backward pass from ``jax.grad``
  inside of a body runs in that same body.
  """
  traces = _running()
  return weakref.ref(traces[-1]) if traces else None


def is_of_running_body(tracer: Any) -> bool:
  """Tells whether a tracer was made in the innermost running shard_map body."""
  own, running = _with_parents(getattr(tracer, "_trace", None)), _running()
  return bool(own and running) and own[-1] is running[-1]


def in_running_body() -> contextlib.AbstractContextManager[Any]:
  """Makes a context whose operations belong to the body, not to a loop or remat inside of it."""
  enter, traces = find("jax._src.core", "set_current_trace"), _running()
  if enter is None or not traces:
    return contextlib.nullcontext()
  is_loop = [type(trace).__name__ == "DynamicJaxprTrace" for trace in traces[:-1]]
  outside = len(is_loop) - is_loop[::-1].index(True) if True in is_loop else 0
  return enter(traces[outside])


def split_jaxpr(jaxpr: Any, known: int, unknown: int, saveable: Any) -> tuple[Any, Any]:
  """Splits a jaxpr into the part that depends only on its first ``known`` inputs, and the rest.

  Args:
    jaxpr: a jaxpr without references.
    known: the number of known inputs.
    unknown: the number of inputs after them.
    saveable: a policy of ``jax.checkpoint``. It selects the results of the first part that the
      second part takes as inputs. The second part recomputes the others.

  Returns:
    The first part, which maps the known inputs to the selected results, and the second part, which
    maps these results and all inputs to the results of ``jaxpr``.
  """
  partial_eval = require("jax._src.interpreters.partial_eval", "partial_eval_jaxpr_custom")
  dce = require("jax._src.interpreters.partial_eval", "dce_jaxpr")
  are_unknown = [False] * known + [True] * unknown
  once, rest, _, _, count = partial_eval(jaxpr, are_unknown, True, True, True, saveable)
  rest, used = dce(rest, [True] * len(rest.outvars), [False] * count + [True] * len(are_unknown))
  once, _ = dce(once, used[:count], [True] * known)
  return once, rest


_HOST_CALLBACKS = (
  ("pure_callback_p", "jax._src.callback", "pure_callback_lowering"),
  ("io_callback_p", "jax._src.callback", "io_callback_lowering"),
  ("debug_callback_p", "jax._src.debugging", "debug_callback_lowering"),
  ("debug_print_p", "jax._src.debugging", "debug_print_lowering_rule"),
)


@functools.cache
def uncalled_host_callbacks(platform: str) -> tuple[tuple[Any, Any], ...]:
  """Returns lowering rules for host callbacks in a program that is compiled but never run.

  JAX's own rules need a client of the platform, and they keep the Python functions alive.
  """
  rules = [(find(module, name), find(module, rule)) for name, module, rule in _HOST_CALLBACKS]
  return tuple((name, _uncalled(rule, platform)) for name, rule in rules if name and rule)


def _uncalled(rule: Callable[..., Any], platform: str) -> Callable[..., Any]:
  client = types.SimpleNamespace(platform=platform)

  def lower(context: Any, *args: Any, **params: Any) -> Any:
    module = context.module_context.replace(backend=client, host_callbacks=[], keepalives=[])
    inner = context.replace(module_context=module)
    results = rule(inner, *args, **params)
    context.set_tokens_out(inner.tokens_out)
    return results

  return lower


def hlo_sharding() -> Any:
  """Returns XLA's class of shardings."""
  return require("jax._src.lib", "xla_client").HloSharding


def replicated_subgroup() -> Any:
  """Returns XLA's name for the last dimension of a sharding along which devices hold copies."""
  return require("jax._src.lib", "xla_client").OpSharding.Type.REPLICATED


# Functions that register a partitioner, as "module:function", by the name of their custom call.
partitioners: dict[str, str] = {}


def register_partitioner(
  name: str,
  *,
  propagate: Callable[..., Any],
  partition: Callable[..., Any],
  infer: Callable[..., Any],
) -> bool:
  """Registers a partitioner of custom calls for the CPU, and for plugins when they are loaded.

  Args:
    name: name of the custom call.
    propagate: function of the sharding that a user of the call wants. Only GSPMD calls it.
    partition: returns the program of one device and the shardings of operands and result.
    infer: returns the sharding of the result. Only GSPMD calls it.

  Returns:
    Whether this JAX has partitioners of custom calls.
  """
  register = getattr(find("jax._src.lib", "xla_client"), "register_custom_call_partitioner", None)
  for_plugins = find("jax._src.xla_bridge", "register_plugin_callbacks")
  if register is None or for_plugins is None:
    return False
  given = {
    "name": name,
    "prop_user_sharding": propagate,
    "partition": partition,
    "infer_sharding_from_operands": infer,
    "can_side_effecting_have_replicated_sharding": True,
  }
  register(**given)
  for_plugins(functools.partial(register, **given))
  return True


def lower_manually(
  fun: Callable[..., Any], args: Any, axes: dict[str, int], platforms: tuple[str, ...]
) -> tuple[bytes, list[Any]]:
  """Lowers the program of one device, in which all mesh axes are manual.

  Args:
    fun: function of arrays that returns a tuple of arrays. It may name the axes in collectives.
    args: shapes and dtypes of one device's arguments.
    axes: sizes of the mesh axes, by name.
    platforms: platforms to lower for.

  Returns:
    The module as bytecode, and the abstract values of its results.
  """
  mlir: Any = importlib.import_module("jax._src.interpreters.mlir")
  mesh = jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes))
  manual = require("jax._src.sharding_impls", "SPMDAxisContext")(mesh, frozenset(axes))
  # XLA copies the instructions, but not the table of their source lines, and warns about each.
  without_lines = require("jax._src.config", "traceback_in_locations_limit")(0)
  no_mesh = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))
  named = require("jax._src.core", "extend_axis_env_nd")(axes.items())
  with no_mesh, without_lines, named:
    jaxpr = jax.make_jaxpr(fun)(*args)
    module = mlir.build_mlir_module_helper(
      jaxpr, name="local", platforms=platforms, backend=None, axis_context=manual
    )
  return mlir.module_to_bytecode(module), list(jaxpr.out_avals)
