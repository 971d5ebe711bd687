"""How fast is a whole train step in FP8: layers, head, loss, gradients and AdamW?

    python benchmarks/step.py                # on an H100 or H200: times it, in a few minutes
    python benchmarks/step.py                # without a GPU: compiles it, in a few minutes

Two layers of Llama 3 8B's widths under ``nn.scan``, between an embedding and a head of 128,256
tokens; parameters and optimizer state in float32, activations in bfloat16; one sequence of 8,192
tokens. Only the projections of the layers are FP8. Embedding, attention (cuDNN's on a GPU), head,
loss and optimizer are the same in every variant. ``remat`` recomputes each layer in the backward
pass. A few steps run in one compiled loop, each from the state of the last one, on one batch.
``speedup`` is over BF16, the median over rounds in which all variants ran in turn. TFLOP/s are of
the projections, without those computed again.

Without a GPU, this is ``compiled.py step_compiled``: the step is compiled for a described H100 and
never runs. Its table has layers that are unrolled, FSDP over eight GPUs, and 12 layers too. An
elementwise product stands for attention, and ``ms`` are estimated. Only ``--out``, ``--tiny`` and
``--variants`` matter then. ``compiled.py step_compiled --redraw`` draws its JSON.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

import compiled
from flax_fp8.doctor import allow_missing_cuda
from harness import output, timed
from harness.models import ATTENTION
from harness.names import BF16
from harness.options import Options, on_gpu, read_options
from harness.programs import Arrays, Program
from harness.sizes import block_flops
from harness.train import TINY, WIDTHS, decoder, first_state, train_step
from harness.variants import VARIANTS
from lm.config import ModelShape
from questions import QUESTIONS
from questions.training import step_compiled

KINDS = {"remat": True, "all kept": False}
STEPS = 3


def program(shape: ModelShape, name: str, length: int, repeat: int) -> Program:
  """A loop of steps; the state goes in as a tree of arrays, by the names of its fields."""
  variant = VARIANTS[name]
  model = decoder(shape, variant, shape.attention)
  state = jax.eval_shape(lambda: first_state(model, length))
  windows = jax.ShapeDtypeStruct((1, length + 1), jnp.int32)
  loop = lambda state, windows: lax.fori_loop(
    0, repeat, lambda _, last: train_step(model, variant, last, windows), state
  )
  return Program(
    fn=jax.jit(loop),
    shapes=(state, windows),
    repeat=repeat,
    flops=block_flops(shape, length) * shape.layers,
    is_fp8=variant.is_fp8,
    tokens=length,
    bf16_modules=("head", ATTENTION),
  )


def arguments(shape: ModelShape, length: int) -> Arrays:
  """BF16's first state, and a batch: what every variant shares."""
  model = decoder(shape, VARIANTS[BF16], shape.attention)
  tokens = jax.random.randint(jax.random.key(1), (1, length + 1), 0, shape.vocabulary)
  return Arrays((jax.jit(lambda: first_state(model, length))(), tokens))


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


def time_steps() -> None:
  arrays = lambda options: arguments(*sizes(options))
  timed.run(__doc__, "step", groups, timed.models_summary, draw, arrays=arrays)


def compile_steps(options: Options) -> None:
  """Compiles all programs for a described GPU."""
  asked = QUESTIONS[step_compiled.__name__]
  names = options.choose(VARIANTS)
  cases = [each for each in step_compiled(*sizes(options)) if each[1] in names]
  note = f"{asked.note}; {output.NO_MEASUREMENT}" if options.tiny else asked.note
  compiled.answer(step_compiled.__name__, cases, asked.targets, options.out, note)


def main() -> None:
  allow_missing_cuda()
  options = read_options(__doc__, "step", times=False)
  if on_gpu() or options.redraw:
    time_steps()
  else:
    compile_steps(options)


if __name__ == "__main__":
  main()
