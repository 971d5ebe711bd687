"""How fast is a whole train step in FP8: layers, head, loss, gradients and AdamW?

    python benchmarks/step.py                # needs an H100 or H200; a few minutes

Two layers of Llama 3 8B's widths under ``nn.scan``, between an embedding and a head of 128,256
tokens; parameters and optimizer state in float32, activations in bfloat16; one sequence of 8,192
tokens. Only the projections of the layers are FP8. Embedding, attention (cuDNN's on a GPU), head,
loss and optimizer are the same in every variant. ``remat`` recomputes each layer in the backward
pass. A few steps run in one compiled loop, each from the state of the last one, on one batch.
``speedup`` is over BF16, the median over rounds in which all variants ran in turn. TFLOP/s are of
the projections, without those computed again.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

import flax_fp8 as fp8
from harness import timed
from harness.names import BF16
from harness.options import Options, on_gpu
from harness.programs import Arrays, Program
from harness.sizes import LLAMA, TINY_LLAMA, block_flops
from harness.variants import VARIANTS
from lm.model import ModelShape, Transformer
from lm.step import mean_loss

WIDTHS = dataclasses.replace(LLAMA, vocabulary=128_256, layers=2)
TINY = dataclasses.replace(TINY_LLAMA, vocabulary=64)
KINDS = {"remat": True, "all kept": False}
STEPS = 3


def model(shape: ModelShape, name: str) -> Transformer:
  return Transformer(shape, VARIANTS[name].dot_general_cls)


def first_state(shape: ModelShape, name: str, length: int) -> fp8.TrainState:
  """The state before the first step."""
  made = model(shape, name)
  variables = made.init(jax.random.key(0), jnp.zeros((1, length), jnp.int32))
  state = fp8.TrainState.create(apply_fn=made.apply, params=variables, tx=optax.adamw(3e-4))
  return state.replace(step=jnp.zeros((), jnp.int32))


def train_step(
  made: Transformer, grad: Any, state: fp8.TrainState, windows: jax.Array
) -> fp8.TrainState:
  """One step with the gradients of ``grad``."""
  loss = lambda variables: mean_loss(made.apply, variables, windows)
  return state.apply_gradients(grads=grad(loss)(state.params))


def program(shape: ModelShape, name: str, length: int, repeat: int) -> Program:
  """A loop of steps; the state goes in as a tree of arrays, by the names of its fields."""
  state = jax.eval_shape(lambda: first_state(shape, name, length))
  windows = jax.ShapeDtypeStruct((1, length + 1), jnp.int32)
  variant, made = VARIANTS[name], model(shape, name)
  # Flax's own ops do not know the dtype to which ``fp8.grad`` and ``state.apply_fn`` cast.
  grad = jax.grad if variant.flax else fp8.grad
  loop = lambda state, windows: lax.fori_loop(
    0, repeat, lambda _, last: train_step(made, grad, last, windows), state
  )
  flops = block_flops(shape, length) * shape.layers
  how: Any = {"is_fp8": variant.is_fp8, "tokens": length, "bf16_modules": ("head",)}
  return Program(jax.jit(loop), (state, windows), repeat, flops, **how)


def arguments(shape: ModelShape, length: int) -> Arrays:
  """BF16's first state, and a batch: what every variant shares."""
  tokens = jax.random.randint(jax.random.key(1), (1, length + 1), 0, shape.vocabulary)
  return Arrays((jax.jit(lambda: first_state(shape, BF16, length))(), tokens))


def sizes(options: Options) -> tuple[ModelShape, int]:
  """Widths and length; on a GPU, attention is cuDNN's."""
  shape, length = (TINY, 16) if options.tiny else (WIDTHS, 8192)
  return dataclasses.replace(shape, attention="cudnn" if on_gpu() else "xla"), length


def cases(kind: str, options: Options) -> dict[str, dict[str, Program]]:
  """All variants."""
  shape, length = sizes(options)
  shape = dataclasses.replace(shape, remat=KINDS[kind])
  repeat = options.repeat if options.tiny else STEPS
  names = options.choose(VARIANTS)
  return {kind: {name: program(shape, name, length, repeat) for name in names}}


def groups(options: Options) -> timed.Groups:
  """With remat first."""
  return {kind: functools.partial(cases, kind, options) for kind in KINDS}


draw = timed.bar_plot("A train step: speed over BF16", (7, 4))


def main() -> None:
  arrays = lambda options: arguments(*sizes(options))
  timed.run(__doc__, "step", groups, timed.models_summary, draw, arrays=arrays)


if __name__ == "__main__":
  main()
