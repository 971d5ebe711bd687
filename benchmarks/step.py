"""How fast is a whole train step in FP8: layers, head, loss, gradients and AdamW?

    python benchmarks/step.py                # needs an H100 or H200; a few minutes

Two layers of Llama 3 8B's widths under ``nn.scan``, between an embedding and a head of 128,256
tokens; parameters and optimizer state in float32, activations in bfloat16; one sequence of 8,192
tokens. Only the projections of the layers are FP8. Embedding, attention (cuDNN's on a GPU), head,
loss and optimizer are the same in every variant. ``remat`` recomputes each layer in the backward
pass. A few steps run in one compiled loop, each from the state of the last one, on one batch.
``speedup`` is over BF16, the median over rounds in which all variants ran in turn (``timed/``).
TFLOP/s are of the projections, without those computed again.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from rich.console import Console

import flax_fp8 as fp8
from lm.model import ModelShape, Transformer
from lm.step import mean_loss
from timed import script
from timed.compiling import on_gpu, prepare_all
from timed.measure import Deadline, measure
from timed.options import Options
from timed.programs import Arrays, Program
from timed.variants import BF16, VARIANTS

WIDTHS = ModelShape(
  vocabulary=128_256, d_model=4096, d_ff=14336, layers=2, heads=32, kv_heads=8, attention="cudnn"
)
LENGTH = 8192
TINY = ModelShape(vocabulary=64, d_model=32, d_ff=48, layers=2, heads=4, kv_heads=2)
TINY_LENGTH = 16
CHOSEN = (BF16, "delayed", "current", "rowwise", "flax.linen.fp8_ops")
KINDS = {"remat": True, "all kept": False}
STEPS = 3
BAR = 1.25  # delayed over BF16 with remat: the model's 0.80 of BF16's time


def model(shape: ModelShape, name: str) -> Transformer:
  """The decoder with a variant's projections."""
  return Transformer(shape, VARIANTS[name].dot_general_cls)


def first_state(shape: ModelShape, name: str, length: int) -> fp8.TrainState:
  """The state before the first step."""
  made = model(shape, name)
  variables = made.init(jax.random.key(0), jnp.zeros((1, length), jnp.int32))
  state = fp8.TrainState.create(apply_fn=made.apply, params=variables, tx=optax.adamw(3e-4))
  return state.replace(step=jnp.zeros((), jnp.int32))


def train_step(shape: ModelShape, name: str) -> Callable[..., fp8.TrainState]:
  """One step; Flax's own ops do not know the dtype that ``fp8.grad`` casts to."""
  apply, grad = model(shape, name).apply, jax.grad if VARIANTS[name].flax else fp8.grad

  def step(state: fp8.TrainState, windows: jax.Array) -> fp8.TrainState:
    loss = lambda variables: mean_loss(apply, variables, windows)
    return state.apply_gradients(grads=grad(loss)(state.params))

  return step


def program(shape: ModelShape, name: str, length: int, repeat: int) -> Program:
  """A loop of steps; the state goes in as a tree of arrays, by the names of its fields."""
  state = jax.eval_shape(lambda: first_state(shape, name, length))
  step, windows = train_step(shape, name), jax.ShapeDtypeStruct((1, length + 1), jnp.int32)

  def loop(state: fp8.TrainState, windows: jax.Array) -> fp8.TrainState:
    return lax.fori_loop(0, repeat, lambda _, state: step(state, windows), state)

  per_layer = sum(rows * columns for rows, columns in shape.projections.values())
  flops = 6 * length * per_layer * shape.layers
  is_fp8 = VARIANTS[name].is_fp8
  return Program(jax.jit(loop), (state, windows), repeat, flops, is_fp8, bf16_modules=("head",))


def arguments(shape: ModelShape, length: int) -> Arrays:
  """BF16's first state, and a batch: what every variant shares."""
  tokens = jax.random.randint(jax.random.key(1), (1, length + 1), 0, shape.vocabulary)
  state = jax.jit(lambda: first_state(shape, BF16, length))()
  arrays = Arrays()
  arrays.add((state, tokens))
  return arrays


def measure_kind(
  shape: ModelShape, length: int, arrays: Arrays, options: Options
) -> dict[str, Any]:
  """All variants, compiled together and timed in turn."""
  repeat = options.repeat if options.tiny else STEPS
  names = [name for name in CHOSEN if name in options.choose(VARIANTS)]
  made = {name: program(shape, name, length, repeat) for name in names}
  found = measure(prepare_all(made, options), options, arrays)
  for each in found.values():
    each["tokens_per_second"] = 1e3 * length / each["ms"]["median"]
    each["peak_to_bf16"] = each["peak_mib"] / found[BF16]["peak_mib"]
  return found


def measure_all(options: Options, console: Console) -> dict[str, Any]:
  """With remat first; JSON is written after each kind."""
  deadline = Deadline(options.seconds)
  widths, length = (TINY, TINY_LENGTH) if options.tiny else (WIDTHS, LENGTH)
  if not on_gpu():
    widths = dataclasses.replace(widths, attention="xla")
  arrays = arguments(widths, length)
  results: dict[str, Any] = {"shape": dataclasses.asdict(widths), "found": {}, "left_out": []}
  for kind, remat in KINDS.items():
    if deadline.passed():
      results["left_out"].append(kind)
      continue
    with console.status(kind):
      shape = dataclasses.replace(widths, remat=remat)
      try:
        results["found"][kind] = measure_kind(shape, length, arrays, options)
      except Exception as error:
        options.fail(kind, error)
    script.write_json(options.out, "step", script.document(options, **results))
  return script.document(options, **results)


def show(content: Mapping[str, Any], console: Console) -> None:
  """Prints the table, tokens a second, and memory beside BF16's."""
  script.print_note(content, console)
  console.print(script.table("A train step", "", content["found"]))
  for kind, variants in content["found"].items():
    for name, each in variants.items():
      rate, peak = each["tokens_per_second"], each["peak_to_bf16"]
      line = f"{kind}, {name}: {rate:,.0f} tokens/s, peak {peak:.3f} of BF16's"
      console.print(line, highlight=False)
  for name in content["left_out"]:
    console.print(f"left out, the time was up: {name}", highlight=False)
  script.print_problems(content["failures"], content["found"], console)


def draw(figure: Any, content: Mapping[str, Any]) -> None:
  """Draws the speed of each variant, BF16 as 1."""
  found = content["found"]
  figure.set_size_inches(8, 2.5 * len(found))
  for axes, (kind, variants) in zip(
    figure.subplots(len(found), 1, squeeze=False)[:, 0], found.items(), strict=True
  ):
    names = list(variants)[::-1]
    axes.barh(names, [variants[name]["speedup"]["median"] for name in names])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(f"train step, {kind}: speed, BF16 = 1")


def main() -> None:
  """Runs the benchmark."""
  options, console = script.read_options(__doc__, "step"), script.console()
  if options.replot:
    script.replot(options.out, "step", draw, console)
    return
  content = measure_all(options, console)
  script.write_json(options.out, "step", content)
  show(content, console)
  script.write_plot(options.out, "step", draw, content, console)


if __name__ == "__main__":
  main()
