"""What is asked of one model. Each question is a stage, and a failing stage stops no other."""

import functools
import time
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flax_fp8 as fp8
from zoo.models import Case, Model

STEPS, LEARNING_RATE = 8, 1e-3
TIMEOUT = 60.0  # seconds to compile a model in, for a GPU
Tree = Any


class Study:
  """One model, plain and converted with the defaults alone."""

  def __init__(self, model: Model, target: str | None) -> None:
    self.model, self.target = model, target
    self.modules = {"plain": model.module, "fp8": fp8.fp8_linear_layers(model.module)}
    arrays = {name: value for name, value in model.kwargs.items() if hasattr(value, "dtype")}
    self.static = {name: value for name, value in model.kwargs.items() if name not in arrays}
    self.inputs: tuple[Tree, Tree] = (model.args, arrays)

  @functools.cached_property
  def plain_variables(self) -> Tree:
    return self._init("plain")

  @functools.cached_property
  def variables(self) -> dict[str, Tree]:
    return {"plain": self.plain_variables, "fp8": self._init("fp8")}

  @functools.cached_property
  def batch(self) -> Tree:
    """The inputs, and what the loss wants: labels, or normal values."""
    out = jax.eval_shape(functools.partial(self.run, "plain"), self.plain_variables, self.inputs)
    key = jax.random.key(7)
    if self.model.labels:
      return self.inputs, jax.random.randint(key, out.shape[:-1], 0, out.shape[-1])
    return self.inputs, jax.random.normal(key, out.shape)

  def _keys(self, *names: str) -> dict[str, jax.Array]:
    return {name: jax.random.key(number) for number, name in enumerate((*names, *self.model.rngs))}

  def _init(self, which: str) -> Tree:
    module, (args, arrays) = self.modules[which], self.inputs
    init = lambda keys, args, arrays: module.init(keys, *args, **arrays, **self.static)
    return jax.jit(init)(self._keys("params"), args, arrays)

  def run(self, which: str, variables: Tree, inputs: tuple[Tree, Tree]) -> Any:
    """Runs a model, and returns the array that the loss reads."""
    args, arrays = inputs
    mutable = list(self.model.mutable)
    options: dict[str, Any] = {"rngs": self._keys() or None, "mutable": mutable or False}
    out = self.modules[which].apply(variables, *args, **arrays, **self.static, **options)
    return self.model.output(out[0] if mutable else out)

  def loss_and_output(self, which: str, variables: Tree, batch: Tree) -> tuple[Tree, jax.Array]:
    inputs, wanted = batch
    out = self.run(which, variables, inputs)
    if self.model.labels:
      return optax.softmax_cross_entropy_with_integer_labels(out, wanted).mean(), out
    return jnp.mean(jnp.square(out - wanted)), out

  def loss(self, variables: Tree, batch: Tree) -> jax.Array:
    return self.loss_and_output("fp8", variables, batch)[0]

  @functools.cached_property
  def differentiated(self) -> dict[str, Callable[..., Any]]:
    """Loss, output and gradients of both, compiled."""
    transforms = {"plain": jax.value_and_grad, "fp8": fp8.value_and_grad}
    return {
      name: jax.jit(
        differentiate(functools.partial(self.loss_and_output, name), has_aux=True, allow_int=True)
      )
      for name, differentiate in transforms.items()
    }

  def _train(self, which: str) -> tuple[Tree, float]:
    """The variables, and the loss after the last step."""
    made: dict[str, Any] = {"params": self.variables[which], "tx": optax.adam(LEARNING_RATE)}
    state = fp8.TrainState.create(apply_fn=self.modules[which].apply, **made)
    update = jax.jit(lambda state, gradients: state.apply_gradients(grads=gradients))
    differentiated = self.differentiated[which]
    for _ in range(STEPS):
      _, gradients = differentiated(state.params, self.batch)
      state = update(state, gradients)
    (loss, _), _ = differentiated(state.params, self.batch)
    return state.params, float(loss)

  # The stages.

  def plain(self) -> dict[str, Any]:
    """Runs the plain model: a failure here has nothing to do with conversion."""
    params = jax.tree.leaves(self.plain_variables["params"])
    return {"parameters": sum(leaf.size for leaf in params)}

  def layers(self) -> dict[str, Any]:
    """Counts the layers that become FP8, and the rules that leave out the others."""
    args, arrays = self.inputs
    report = fp8.Fp8Config().report(self.model.module, *args, **arrays, **self.static)
    contractions = [row for row in report.rows if row.contracts]
    left: Counter[str] = Counter()
    for row in contractions:
      left[row.rule] += 0 if row.taken else row.stacked
    return {
      "converted": sum(row.stacked for row in report.taken),
      "layers": sum(row.stacked for row in contractions),
      "left": {rule: count for rule, count in left.most_common() if count},
    }

  def init(self) -> dict[str, Any]:
    """Compares the parameters of both."""
    plain, ours = (self.variables[name]["params"] for name in ("plain", "fp8"))
    same = jax.tree.structure(plain) == jax.tree.structure(ours)
    pairs = zip(*map(jax.tree.leaves, (plain, ours)), strict=False)
    return {"params_equal": same and all(np.array_equal(*pair) for pair in pairs)}

  def errors(self) -> dict[str, Any]:
    """Compares outputs and gradients, at scale 1 and after calibration."""
    started = self.variables["fp8"]
    model = self.modules["fp8"]
    calibrated = fp8.calibrate(model, started, [self.batch], self.loss, progress=False)
    (_, out), gradients = self.differentiated["plain"](self.variables["plain"], self.batch)
    found: dict[str, Any] = {}
    for name, variables in {"fresh": started, "calibrated": calibrated}.items():
      (_, got), got_gradients = self.differentiated["fp8"](variables, self.batch)
      found[f"{name}_forward"] = relative(got, out)
      found[f"{name}_gradient"] = relative(got_gradients["params"], gradients["params"])
    return found

  @functools.cached_property
  def trained(self) -> dict[str, tuple[Tree, float]]:
    return {name: self._train(name) for name in ("plain", "fp8")}

  def training(self) -> dict[str, Any]:
    """Compares the losses after some steps."""
    return {f"loss_{name}": loss for name, (_, loss) in self.trained.items()}

  def frozen(self) -> dict[str, Any]:
    """Compares outputs of the frozen model with those of the trained one."""
    variables, (args, arrays) = self.trained["fp8"][0], self.inputs
    self.modules["frozen"], frozen = fp8.freeze_for_inference(
      self.modules["fp8"], variables, *args, **arrays, **self.static
    )
    runs = {"fp8": variables, "frozen": frozen}
    want, got = (
      jax.jit(functools.partial(self.run, which))(of, self.inputs) for which, of in runs.items()
    )
    return {"frozen_difference": float(jnp.max(jnp.abs(got - want)))}

  def gemms(self) -> dict[str, Any]:
    """Counts GEMMs of loss and gradients, as compiled for a GPU."""
    if self.target is None:
      return {}
    step = fp8.value_and_grad(self.loss, allow_int=True)
    shapes = jax.eval_shape(lambda tree: tree, (self.variables["fp8"], self.batch))
    report = fp8.explain(step, *shapes, target=self.target, timeout=TIMEOUT)
    return {"target": self.target, "fp8_gemms": report.fp8_gemms, "gemms": report.total_gemms}


STAGES = ("plain", "layers", "init", "errors", "training", "frozen", "gemms")
NEEDED = {"make", "plain", "init"}  # without these, nothing further can be asked


def relative(got: Tree, want: Tree) -> float:
  """The norm of the difference of two trees, over the norm of the second unless that is zero."""
  square = lambda tree: sum(float(jnp.sum(jnp.square(leaf))) for leaf in jax.tree.leaves(tree))
  difference = jax.tree.map(lambda a, b: a.astype(jnp.float32) - b, got, want)
  return (square(difference) / (square(want) or 1.0)) ** 0.5


def study(case: Case, target: str | None) -> dict[str, Any]:
  """Runs every stage for one model, and records why a stage failed."""
  failures: dict[str, str] = {}
  row: dict[str, Any] = {"package": case.package, "name": case.name, "failures": failures}
  row["version"] = metadata.version(case.package)
  started, studied = time.monotonic(), None
  for stage in ("make", *STAGES):
    try:
      if studied is None:
        studied = Study(case.make(), target)
      else:
        row |= getattr(studied, stage)()
    except Exception as error:  # the other stages and models continue
      first = (str(error).splitlines() or [""])[0]
      failures[stage] = f"{type(error).__name__}: {first}"
      if stage in NEEDED:
        break
  jax.clear_caches()
  return row | {"seconds": round(time.monotonic() - started, 1)}
