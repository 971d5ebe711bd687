"""Steps of models, and loops of steps whose time on a GPU is that of the steps alone.

A loop costs the host one dispatch. In each of its iterations

- parameters, input and output gradient pass a barrier with the loop's counter. So they are
  quantized and transposed in every step, as in training, and not once before the loop;
- they and all results have row-major layouts. So no transposition moves out of the loop;
- all results are carried. So nothing is left out; the next step overwrites them;
- the FP8 state is that of the last step.

Without the barrier, a step's results could be the next step's input, but not the kernel, and XLA
would copy BF16's carried arrays more often than FP8's. Results begin as zeros, which every variant
writes once per loop. With ten steps this brings ratios nearer to 1 by a few tenths of a percent.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

import flax_fp8 as fp8
from flax_fp8.meta_dtype import to_float32
from harness.models import ATTENTION, dense
from harness.sizes import Shape
from harness.variants import VARIANTS, Variant

Step: TypeAlias = Callable[..., tuple[Any, Any]]
Apply: TypeAlias = Callable[[Any, jax.Array], Any]  # from variables and input to an output
KERNEL_SIZE = 1 / 64  # standard deviation: results of thousands of terms are near 1


@dataclasses.dataclass(frozen=True)
class Program:
  """A loop of steps, to be compiled."""

  fn: Any  # jitted; takes state and inputs, returns counter, last state and last results
  shapes: tuple[Any, ...]  # of its arguments
  repeat: int  # steps in the loop
  flops: int  # of one step's GEMMs that should be FP8, or BF16 in the baseline
  is_fp8: bool  # whether they should be FP8
  tokens: int = 0  # of one step
  # names of modules whose GEMMs are BF16 in every variant
  bf16_modules: tuple[str, ...] = (ATTENTION,)


def row_major(tree: Any) -> Any:
  """Fixes the layout of every array."""
  layout = lambda x: Layout(major_to_minor=tuple(range(x.ndim)))
  return jax.tree.map(lambda x: with_layout_constraint(x, layout(x)), tree)


def repeated(step: Step, repeat: int) -> Any:
  """Jits a loop of steps; a step goes from state and inputs to the next state and results."""

  def loop(state: Any, *inputs: Any) -> Any:
    shapes = jax.eval_shape(step, state, *inputs)[1]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def turn(counter: jax.Array, carry: Any) -> Any:
      counter, behind = lax.optimization_barrier((counter, inputs))
      state, results = step(carry[1], *row_major(behind))
      return counter, state, row_major(results)

    return lax.fori_loop(0, repeat, turn, (jnp.int32(0), state, zeros))

  return jax.jit(loop)


def loss_of(module: nn.Module) -> Apply:
  """From variables and input to half the sum of squares of the output, in float32.

  The output gradient is then the output. So no part of the backward pass can run beside the forward
  pass, as XLA may do where the output gradient is an argument.
  """
  apply: Any = module.apply
  return lambda variables, x: 0.5 * jnp.sum(jnp.square(apply(variables, x).astype(jnp.float32)))


def forward_and_backward(apply: Apply, *, max_grad: bool) -> Step:
  """A step from state, parameters, input and output gradient.

  ``apply`` is a layer's, whose output gradient is given, or a loss, whose output gradient is 1.
  Results are its output and the gradients of input and parameters. ``max_grad`` casts the state, as
  ``fp8.value_and_grad`` does; Flax's own ops do not know that dtype.
  """

  def step(state: Any, params: Any, x: jax.Array, grad: Any) -> tuple[Any, Any]:
    variables = {"params": params, **state}
    variables = fp8.as_max_grad(variables) if max_grad else variables
    out, pull_back = jax.vjp(apply, variables, x)
    grads, x_grad = pull_back(grad)
    new = dict(jax.tree.map(to_float32, grads))
    params_grad = new.pop("params")
    return new, (out, x_grad, params_grad)

  return step


def argument_shapes(module: nn.Module, apply: Apply, x: jax.ShapeDtypeStruct) -> tuple[Any, ...]:
  """A module's state, parameters and input, and the output gradient of ``apply``."""
  variables: Mapping[str, Any] = jax.eval_shape(module.init, jax.random.key(0), x)
  state = {name: leaves for name, leaves in variables.items() if name != "params"}
  return state, variables["params"], x, jax.eval_shape(apply, variables, x)


def make_program(
  variant: Variant,
  module: nn.Module,
  apply: Apply,
  shape: tuple[int, ...],
  *,
  repeat: int,
  flops: int,
) -> Program:
  """The loop of forward and backward of a module with a variant's GEMMs; its input has a shape.

  What is differentiated is ``module.apply`` of a layer alone, and ``loss_of(module)`` of models.
  """
  step = forward_and_backward(apply, max_grad=not variant.flax)
  shapes = argument_shapes(module, apply, jax.ShapeDtypeStruct(shape, jnp.bfloat16))
  tokens = math.prod(shape[:-1])
  return Program(repeated(step, repeat), shapes, repeat, flops, variant.is_fp8, tokens)


def layer_programs(shape: Shape, names: Iterable[str], repeat: int) -> dict[str, Program]:
  """A layer alone, without bias, in several variants, by name: its output gradient is given."""
  how = {"repeat": repeat, "flops": shape.flops}
  made = {name: dense(shape.features, VARIANTS[name]) for name in names}
  x = (shape.tokens, shape.width)
  return {
    name: make_program(VARIANTS[name], module, module.apply, x, **how)
    for name, module in made.items()
  }


class Arrays:
  """Makes arrays for shapes: scales and scalars 1, histories 0, all else normal.

  Arrays with the same name, shape and dtype are the same array: programs share their parameters.
  ``given`` is a pytree of arrays that are taken as they are.
  """

  def __init__(self, given: Any = ()) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(given)
    self.made = {self._key(path, array): array for path, array in leaves}

  def fill(self, shapes: Any) -> Any:
    """Arrays for a pytree of shapes."""
    return jax.tree_util.tree_map_with_path(self._array, shapes)

  def _key(self, path: Any, array: Any) -> Any:
    return jax.tree_util.keystr(path), array.shape, array.dtype

  def _array(self, path: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
    key = self._key(path, shape)
    if key not in self.made:
      self.made[key] = make_array(key[0], shape, jax.random.key(len(self.made)))
    return self.made[key]


def make_array(name: str, shape: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
  """One array, by the name of the variable."""
  if not shape.shape or "scale" in name or "history" in name:
    return jnp.full(shape.shape, "history" not in name, shape.dtype)
  size = KERNEL_SIZE if "kernel" in name else 1.0
  return (size * jax.random.normal(key, shape.shape, jnp.bfloat16)).astype(shape.dtype)
