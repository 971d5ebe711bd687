"""The table of ``stats``: numbers, names, text and plot."""

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8
from flax_fp8.training.paths import leaves_by_path
from tests.linen import lifts

OWG = fp8.OVERWRITE_WITH_GRADIENT


def tensor(role, amaxes, scale, stack=(), **metrics):
  """Returns the state of a tensor with the given amaxes, newest first."""
  newest, *older = amaxes
  history = np.array([newest, *reversed(older)], np.float32)
  leaves = {"scale": np.array([scale]), "amax_history": history}
  leaves |= {name: np.array([value]) for name, value in metrics.items()}
  shape = lambda leaf: jnp.asarray(np.broadcast_to(leaf, (*stack, *leaf.shape)), jnp.float32)
  return {f"{role}_{name}": shape(leaf) for name, leaf in leaves.items()}


STATE = tensor("input", [8.0, 2.0, 4.0, 1.0], 1 / 448) | tensor(
  "output_grad",
  [1.0, 0.0],
  4 / 57344,
  saturated=0.25,
  flushed=0.0,
  noise=0.001,
  amax=1.0,
  nonfinite=0.0,
)
VARIABLES = {"params": {}, OWG: {"Dense_0": {"Fp8DotGeneral_0": STATE}}}


def test_figures():
  stats = fp8.stats(VARIABLES)
  rows = {(row.layer, row.role): row for row in stats.rows}
  assert set(rows) == {("Dense_0", "input"), ("Dense_0", "output_grad")}
  first, second = rows.values()
  assert first.history == (1, 4, 2, 8)
  assert (first.amax, first.largest, first.jump) == (8, 8, 2)
  assert first.headroom == pytest.approx(-3, abs=1e-6)
  assert first.scale == pytest.approx(1 / 448)
  assert math.isnan(first.sqnr)
  assert second.headroom == pytest.approx(2, abs=1e-6)
  assert math.isnan(second.jump)  # no older amax
  assert second.sqnr == pytest.approx(30)
  by_name = stats.scalars()
  assert by_name["Dense_0/output_grad/saturated"] == 0.25
  assert by_name["Dense_0/input/jump"] == 2
  assert "Dense_0/output_grad/jump" not in by_name
  assert all(type(value) is float and math.isfinite(value) for value in by_name.values())


def test_repr_omits_the_history():
  (row, _) = fp8.stats(VARIABLES).rows
  assert "history" not in repr(row)
  assert row.history == (1.0, 4.0, 2.0, 8.0)


def test_the_format_sets_the_range():
  rows = fp8.stats(VARIABLES, fp8_format=fp8.Format.E4M3).rows
  assert rows[1].limit == pytest.approx(448 * 4 / 57344)


def test_exact_values_and_unused_state():
  """Unused state has a scale of zero, or is -inf."""
  exact = tensor("input", [1.0, 1.0], 1.0, noise=0.0, amax=1.0)
  unused = tensor("kernel", [0.0, 0.0], 0.0) | tensor("output_grad", [-np.inf], -np.inf)
  rows = fp8.stats({OWG: {"layer": exact | unused}}).rows
  assert rows[0].sqnr == math.inf
  assert all(math.isnan(row.scale) and math.isnan(row.headroom) for row in rows[1:])
  assert rows[2].history == (0,)


def test_stacked_layers_have_a_row_each():
  stacked = tensor("kernel", [2.0, 1.0], 1.0, (3,))
  experts = tensor("input", [2.0, 1.0], 1.0, (2, 2))
  kernel = stacked["kernel_amax_history"].at[2, 0].set(7.0)
  tree = {
    "params": {"twin": {OWG: tensor("input", [1.0], 1.0)}},  # nested state
    OWG: {
      "layers": {
        "attention": {"query": {"Fp8DotGeneral_0": {**stacked, "kernel_amax_history": kernel}}},
        "mlp": {"Fp8Einsum_0": stacked, "Fp8Einsum_1": stacked},
      },
      "experts": {"up": experts},
      "head": tensor("input", [1.0], 1.0),
    },
  }
  rows = {row.layer: row for row in fp8.stats(tree).rows}
  each = [
    *(f"layers[{i}]/attention/query" for i in range(3)),
    *(f"layers[{i}]/mlp/Fp8Einsum_{j}" for i in range(3) for j in range(2)),
    *(f"experts[{i},{j}]/up" for i in range(2) for j in range(2)),
  ]
  assert set(rows) == {"twin", "head", *each}
  assert [rows[f"layers[{i}]/attention/query"].amax for i in range(3)] == [2, 2, 7]


@pytest.mark.parametrize("length", [1, 3, 4])
@pytest.mark.parametrize("stack", [(3,), (3, 2), (4, 1), (1, 4)], ids=str)
def test_stacks_along_any_axis(stack, length):
  """Scales and histories together determine the stacking axes, even if sizes are equal."""
  state = tensor("kernel", range(1, length + 1), 0.5, stack, amax=1.0, noise=0.25)
  index = np.arange(np.prod(stack), dtype=np.float32).reshape(*stack, 1)
  state = {name: leaf + index for name, leaf in state.items()}
  wanted = fp8.stats({OWG: {"layers": {"up": state}}})
  for axis in range(len(stack)):
    moved = {name: jnp.moveaxis(leaf, -1, axis) for name, leaf in state.items()}
    got = fp8.stats({OWG: {"layers": {"up": moved}}})
    by_history = lambda rows: sorted((row.history, row.figures()["scale"]) for row in rows)
    assert by_history(got.rows) == by_history(wanted.rows)
    if 1 not in (*stack, length):
      assert str(got) == str(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1", "-2", "1 in 0", "params 1, state 0", "vmap in scan 1"])
def test_models_lifted_along_any_axis(name):
  """Each row has the amax of the kernel of its own layer."""
  recipe = fp8.DelayedScaling(amax_history_len=5)
  variables = lifts.trained(lifts.written(name, recipe))
  rows = [row for row in fp8.stats(variables).rows if row.role == "kernel" and "up" in row.layer]
  (kernel,) = (x for p, x in leaves_by_path(variables["params"]).items() if p.endswith("up/kernel"))
  sizes = [axis for axis, size in enumerate(kernel.shape) if size in (lifts.D, lifts.F)]
  np.testing.assert_array_equal([row.amax for row in rows], jnp.max(abs(kernel), sizes).ravel())


def test_of_a_contraction_that_is_the_model():
  state = tensor("input", [2.0, 1.0], 1.0)
  assert fp8.stats({OWG: state}).scalars()["input/amax"] == 2
  assert "(model)" in str(fp8.stats({OWG: state}))
  stacked = tensor("input", [2.0, 1.0], 1.0, (2,))
  assert fp8.stats({OWG: stacked}).scalars()["[1]/input/amax"] == 2


def test_select():
  layers = {"layers": {"up": {"Fp8DotGeneral_0": tensor("input", [1.0, 2.0], 0.5, stack=(2,))}}}
  stats = fp8.stats({OWG: layers | VARIABLES[OWG]})
  paths = lambda pattern: [row.path for row in stats.select(pattern).rows]
  assert paths("layers[1]/*") == ["layers[1]/up/input"]
  assert paths("*/output_grad") == ["Dense_0/output_grad"]
  message = r"got pattern='layers/\*', which matches none of 4 tensors. Pass .* such as '"
  with pytest.raises(ValueError, match=message):
    stats.select("layers/*")


def test_text(monkeypatch):
  monkeypatch.setenv("COLUMNS", "100")
  lines = str(fp8.stats(VARIABLES)).splitlines()
  assert lines[0].split() == [
    "tensor", "amax", "scale", "largest", "jump", "headroom", "saturated", "flushed", "SQNR", "dB",
  ]  # fmt: skip
  assert lines[1].split() == ["Dense_0"]
  assert lines[2].split() == ["input", "8", "0.00223", "8", "2", "-3"]
  assert lines[3].split() == [
    "output_grad", "1", "6.98e-05", "1", "2", "25", "%", "0", "%", "30.0",
  ]  # fmt: skip
  assert max(map(len, lines)) <= 100
  assert fp8.stats(VARIABLES).scalars()["Dense_0/output_grad/nonfinite"] == 0
  spoiled = {OWG: {"layer": tensor("input", [1.0, 1.0], 1.0, nonfinite=0.125)}}
  assert "nonfinite" in str(fp8.stats(spoiled))
  assert "12.5 %" in str(fp8.stats(spoiled))
  without = {OWG: {"layer": tensor("input", [1.0, 1.0], 1.0)}}
  assert "saturated" not in str(fp8.stats(without))


def test_of_the_gradient_of_state_cast_outside():
  """The gradient of cast variables is fp32_max_grad."""
  cast = fp8.as_max_grad(VARIABLES)
  assert fp8.stats(cast).scalars() == fp8.stats(VARIABLES).scalars()


def test_plot():
  figure = fp8.stats(VARIABLES).plot()
  first, second = figure.axes
  assert [axes.get_title() for axes in figure.axes] == ["Dense_0 input", "Dense_0 output_grad"]
  line, limit = first.lines
  np.testing.assert_array_equal(line.get_xydata(), [[-3, 1], [-2, 4], [-1, 2], [0, 8]])
  assert limit.get_ydata()[0] == pytest.approx(1)
  assert first.get_yscale() == "log"
  np.testing.assert_array_equal(second.lines[0].get_xydata(), [[0, 1]])  # the recorded amaxes
  figure.canvas.draw()


def test_plot_errors(monkeypatch):
  nothing = {OWG: {"layer": {"input_amax": jnp.ones(1)}}}
  with pytest.raises(ValueError, match=r"Stats.plot: at least one tensor must have an amax hist"):
    fp8.stats(nothing).plot()
  monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
  with pytest.raises(ImportError, match=r"Stats.plot: drawing needs matplotlib; got none"):
    fp8.stats(VARIABLES).plot()


def test_errors():
  for tree in ({"params": {}}, {OWG: {}}, {OWG: {"layer": {"other": jnp.ones(1)}}}, None):
    with pytest.raises(ValueError, match=r"stats: variables must have FP8 state .* got none in"):
      fp8.stats(tree)
  with pytest.raises(
    TypeError, match=r"stats: state must be concrete arrays; .*got Dense_0/.*Tracer"
  ):
    jax.jit(fp8.stats)(VARIABLES)
  with pytest.raises(TypeError, match=r"stats: state must be concrete arrays; .*ShapeDtypeStruct"):
    fp8.stats(jax.eval_shape(lambda: VARIABLES))
  with pytest.raises(TypeError, match=r"stats: fp8_format must be a Format; got fp8_format='E4M3'"):
    fp8.stats(VARIABLES, fp8_format="E4M3")
