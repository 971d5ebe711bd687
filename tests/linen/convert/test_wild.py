"""Conversion of unusual models: nested applies, wrapped classes, lifted roots, bare parameters."""

import concurrent.futures
import functools
import pickle

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8

OWG = fp8.OVERWRITE_WITH_GRADIENT
KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
IDS = np.arange(8).reshape(2, 4)
INIT = nn.initializers.lecun_normal()


def contractions(variables):
  flat = flax.traverse_util.flatten_dict(variables.get(OWG, {}), sep="/")
  return sorted({path.rpartition("/")[0] for path in flat})


def error(got, wanted):
  got, wanted = np.float64(got), np.float64(wanted)
  return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


def rules(model, *args, config=None, **kwargs):
  report = (config or fp8.Fp8Config()).report(model, *args, **kwargs)
  return {row.layer.path: row.rule for row in report.rows}


class Tied(nn.Module):
  """A head that runs by a nested apply, with the embedding as its kernel."""

  how: str = "apply"

  def setup(self):
    self.embed = nn.Embed(64, 32)
    self.body = nn.Dense(32)
    self.lm_head = nn.Dense(64, use_bias=False)

  def __call__(self, ids):
    x = self.body(self.embed(ids))
    variables = {"params": {"kernel": self.embed.embedding.T}}
    if self.how == "bind":
      return self.lm_head.clone(parent=None).bind(variables)(x)
    return self.lm_head.apply(variables, x)


class TiedInScan(nn.Module):
  """``Tied`` inside a lifted transformation."""

  @nn.compact
  def __call__(self, ids):
    return nn.remat(Tied)(name="tied")(ids)


@pytest.mark.parametrize(
  ("model", "recipe"),
  [(Tied(), "delayed"), (Tied("bind"), "delayed"), (TiedInScan(), "delayed"), (Tied(), "current")],
  ids=["apply", "bind", "remat", "current"],
)
def test_nested_applies_stay_in_high_precision(model, recipe):
  config = fp8.Fp8Config(recipe=fp8.get_recipe(recipe))
  converted = fp8.fp8_linear_layers(model, config)
  variables = jax.jit(converted.init)(KEY, IDS)
  plain = jax.jit(model.init)(KEY, IDS)
  jax.tree.map(np.testing.assert_array_equal, plain["params"], variables["params"])
  prefix = "tied/" if isinstance(model, TiedInScan) else ""
  has_state = recipe == "delayed"
  assert contractions(variables) == [f"{prefix}body/Fp8DotGeneral_0"] * has_state
  rule = rules(model, IDS)[f"{prefix}lm_head"]
  assert rule == f"run by a nested apply; to convert it, pass functions='{prefix}lm_head'"
  body = fp8.fp8_linear_layers(
    Body(), fp8.Fp8Config(recipe=fp8.get_recipe(recipe))
  )  # the body in FP8; the head stays in high precision
  params = variables["params"]["tied"] if prefix else variables["params"]
  state = variables.get(OWG, {})
  state = state["tied"] if prefix and state else state
  x = body.apply({"params": params, OWG: state} if state else {"params": params}, IDS)
  got = converted.apply(variables, IDS)
  np.testing.assert_allclose(got, x @ params["embed"]["embedding"].T, rtol=1e-5, atol=1e-5)
  served, frozen = fp8.freeze_for_inference(converted, variables, IDS)
  np.testing.assert_allclose(served.apply(frozen, IDS), got, rtol=1e-5, atol=1e-5)


class Body(nn.Module):
  def setup(self):
    self.embed = nn.Embed(64, 32)
    self.body = nn.Dense(32)

  def __call__(self, ids):
    return self.body(self.embed(ids))


def test_a_nested_apply_is_converted_if_functions_names_it():
  config = fp8.Fp8Config(functions="lm_head", default_exclude=())
  converted = fp8.fp8_linear_layers(Tied(), config)
  variables = jax.jit(converted.init)(KEY, IDS)
  assert contractions(variables) == ["body/Fp8DotGeneral_0", "lm_head/Fp8DotGeneral_0"]
  assert "lm_head" not in variables["params"]
  assert 1e-3 < error(converted.apply(variables, IDS), Tied().apply(variables, IDS)) < 0.1
  by_default = fp8.Fp8Config(functions="lm_head")
  assert (
    rules(Tied(), IDS, config=by_default)["lm_head/Fp8DotGeneral_0"] == "output head, by default"
  )


def registered(cls):
  """A class decorator that records the arguments of ``__init__``."""
  init = cls.__init__

  @functools.wraps(init)
  def wrapped(self, *args, **kwargs):
    object.__setattr__(self, "config", kwargs)
    init(self, *args, **kwargs)

  cls.__init__ = wrapped
  return cls


@registered
class Registered(nn.Module):
  features: int = 32

  @nn.compact
  def __call__(self, x):
    return nn.Dense(self.config["features"])(x)


def test_a_wrapped_init_runs():
  converted = fp8.fp8_linear_layers(Registered(features=48))
  assert converted.config["features"] == 48
  variables = jax.jit(converted.init)(KEY, X)
  assert contractions(variables) == ["Dense_0/Fp8DotGeneral_0"]
  assert converted.apply(variables, X).shape == (4, 48)
  assert converted.clone().config["features"] == 48


class Around(nn.Module):
  inner: nn.Module

  @nn.compact
  def __call__(self, x):
    return self.inner.clone(name="own", parent=self)(x)


class Own(nn.Module):
  @nn.compact
  def __call__(self, x):
    return x @ self.param("w", INIT, (32, 32)) @ self.param("v", INIT, (32, 32))


class Many(nn.Module):
  """Parameters of all kinds that no linear layer uses."""

  @nn.compact
  def __call__(self, ids):
    x = nn.Embed(64, 32, name="embed")(ids) + self.param("position", INIT, (4, 32))[None]
    x = nn.RNN(nn.OptimizedLSTMCell(32), name="rnn")(x)
    x = Own(name="own")(nn.Conv(32, (3,), name="conv")(x))
    return nn.Dense(64, name="out")(nn.LayerNorm()(x))


class Embedded(nn.Module):
  """Attention over embedded tokens and over images, for a report from shapes."""

  @nn.compact
  def __call__(self, ids, images, scale=1.0):
    images = nn.Conv(32, (3, 3), name="conv")(images).mean(1)
    x = scale * nn.Embed(64, 32, name="embed")(ids) + images
    return nn.Dense(64, name="up")(nn.softmax(jnp.einsum("btd,bsd->bts", x, x)) @ x)


def test_the_report_from_shapes_equals_that_from_arrays():
  images = jnp.ones((2, 5, 4, 3))
  shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  ids = IDS.astype(np.int32)
  said = rules(Embedded(), ids, images)
  assert said["embed"] == "lookup"
  assert rules(Embedded(), shape(ids), shape(images)) == said
  assert rules(Embedded(), shape(ids), images, scale=2.0) == said


def test_the_report_says_how_to_include_other_modules():
  said = rules(Many(), IDS)
  assert said.pop("out") == "target '*'"
  assert said.pop("embed") == "lookup"
  assert said.pop("") == "not contracted"
  assert said.pop("conv") == "convolution"
  assert said.pop("own") == "not a linear layer; to convert it, pass functions='own'"
  cell = "OptimizedLSTMCell_0"
  assert set(said) == {f"{cell}/{part}{gate}" for part in "hi" for gate in "ifgo"}
  assert set(said.values()) == {f"not a linear layer; to convert it, pass functions={cell!r}"}
  config = fp8.Fp8Config(functions=("own", cell))
  report = config.report(Many(), IDS)
  taken = [row.layer.path for row in report.taken]
  own = [f"{name}/Fp8DotGeneral_{i}" for name in (cell, "own") for i in range(2)]
  assert taken == [*own, "out"]
  params = jax.eval_shape(Many().init, KEY, IDS)["params"]
  matrices = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim > 1)
  assert sum(row.layer.kernel_size for row in report.rows) == matrices
  assert "5 of 5 layers become FP8" in str(report)
  converted = fp8.fp8_linear_layers(Many(), config)
  variables = jax.jit(converted.init)(KEY, IDS)
  assert error(converted.apply(variables, IDS), Many().apply(variables, IDS)) < 0.3


def test_parameters_that_are_trees_of_arrays():
  class Bag(nn.Module):
    @nn.compact
    def __call__(self, x):
      make = lambda key: {"w": INIT(key, (32, 32)), "v": [INIT(key, (32, 32))]}
      params = self.param("bag", make)
      return nn.Dense(32, name="out")(x @ params["w"] @ params["v"][0])

  said = rules(Bag(), X)
  assert said == {"out": "target '*'", "": "not a linear layer; to convert it, pass functions=''"}
  converted = fp8.fp8_linear_layers(Bag(), fp8.Fp8Config(functions=""))
  variables = jax.jit(converted.init)(KEY, X)
  assert len(contractions(variables)) == 3
  served, frozen = fp8.freeze_for_inference(converted, variables, X)
  np.testing.assert_allclose(served.apply(frozen, X), converted.apply(variables, X), rtol=1e-6)


def test_the_report_warns_of_a_converted_output_layer(monkeypatch):
  monkeypatch.setenv("COLUMNS", "200")
  text = str(fp8.Fp8Config().report(nn.Sequential([nn.Dense(32), nn.Dense(48)]), X))
  assert "layers_1 computes the model's output in FP8." in text
  assert "pass exclude='layers_1'" in text
  assert "computes the model's output" not in str(fp8.Fp8Config().report(Tied(), IDS))


def test_a_hidden_layer_before_the_head_is_converted():
  class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.Dense(32, name="pre_logits")(x)
      return nn.Dense(48, name="unembed")(nn.Dense(48, name="logits")(x))

  said = rules(Classifier(), X)
  assert said["pre_logits"] == "target '*'"
  assert said["logits"] == said["unembed"] == "output head, by default"


def test_the_error_for_a_model_without_linear_layers_names_its_modules():
  model, message = nn.RNN(nn.OptimizedLSTMCell(32)), r"got none of 8.*functions=.+cell.*see how to"
  with pytest.raises(ValueError, match=message):
    fp8.fp8_linear_layers(model, None, X[None])
  with pytest.raises(ValueError, match=message):
    fp8.fp8_linear_layers(model).init(KEY, X[None])


@pytest.mark.parametrize("pattern", ["out", "Many/out", "*/out", "Many/out/Fp8DotGeneral_0"])
def test_patterns_accept_the_paths_that_assert_fp8_shows(pattern):
  with pytest.raises(ValueError, match="got none of 1"):
    fp8.fp8_linear_layers(Many(), fp8.Fp8Config(exclude=pattern), IDS)


class Inner(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(32)(jnp.tanh(nn.Dense(64)(x)))


class Block(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.relu(nn.Dense(32)(x))


class Differentiated(nn.Module):
  """A layer with its own gradient, by ``nn.custom_vjp``."""

  @nn.compact
  def __call__(self, x):
    call = lambda layer, x: layer(x)
    forward = lambda layer, x: nn.vjp(call, layer, x)
    double = lambda vjp, grad: (vjp(grad)[0], 2 * vjp(grad)[1])
    return nn.custom_vjp(call, forward_fn=forward, backward_fn=double)(nn.Dense(32), x)


ROOTS = {
  "remat": nn.remat(Inner)(),
  "jit": nn.jit(Inner)(),
  "remat_dense": nn.remat(nn.Dense)(32),
  "remat_scan": nn.remat_scan(Block, lengths=(2, 2))(),
  "custom_vjp": Differentiated(),
  "vmap": nn.vmap(Inner, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=4)(),
}


@pytest.mark.parametrize("name", ROOTS)
def test_lifted_roots(name):
  model = ROOTS[name]
  converted = fp8.fp8_linear_layers(model)
  variables = jax.jit(converted.init)(KEY, X)
  assert contractions(variables)
  got = jax.jit(converted.apply)(variables, X)
  assert 1e-4 < error(got, model.apply({"params": variables["params"]}, X)) < 0.2
  assert pickle.loads(pickle.dumps(fp8.fp8_linear_layers(Inner()))) == fp8.fp8_linear_layers(
    Inner()
  )
  state = jax.jit(fp8.grad(lambda v: converted.apply(v, X).sum()))(variables)[OWG]
  assert all(leaf.any() for leaf in jax.tree.leaves(state))


def test_a_scanned_root():
  model = nn.scan(Scanned, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
  converted = fp8.fp8_linear_layers(model)
  variables = jax.jit(converted.init)(KEY, X, None)
  assert variables[OWG]["Dense_0"]["Fp8DotGeneral_0"]["input_scale"].shape == (3, 1)
  got, _ = jax.jit(converted.apply)(variables, X, None)
  assert error(got, model.apply({"params": variables["params"]}, X, None)[0]) < 0.2


class Scanned(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return nn.Dense(32)(x), None


class Mapped(nn.Module):
  names: tuple = ("kernel", "bias", "input_scale")

  @nn.compact
  def __call__(self, x):
    def double(tree):
      change = lambda path, leaf: 2 * leaf if path[-1].key in self.names or not self.names else leaf
      return jax.tree_util.tree_map_with_path(change, tree)

    return nn.map_variables(nn.Dense, "params", trans_in_fn=double, init=True)(32, name="d")(x)


def test_functions_that_map_parameters_must_leave_state_alone():
  right = fp8.fp8_linear_layers(Mapped(("kernel", "bias")))
  variables = jax.jit(right.init)(KEY, X)
  assert error(right.apply(variables, X), Mapped(("kernel", "bias")).apply(variables, X)) < 0.1
  everything = fp8.fp8_linear_layers(Mapped(()))
  with pytest.raises(ValueError, match=r"such as in nn\.map_variables, must not change FP8 state"):
    everything.apply(variables, X)


def test_threads_with_models_that_contract_by_themselves():
  class Uses(nn.Module):
    @nn.compact
    def __call__(self, x):
      return Own(name="own")(x)

  converted = fp8.fp8_linear_layers(Uses(), fp8.Fp8Config(functions="own"))
  variables = jax.jit(converted.init)(KEY, X)
  wanted = [model.apply(variables, X) for model in (Uses(), converted)]
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    runs = [pool.submit(model.apply, variables, X) for model in (Uses(), converted) * 8]
  for i, run in enumerate(runs):
    np.testing.assert_array_equal(run.result(), wanted[i % 2])


@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen"])
def test_state_may_be_among_the_parameters(frozen):
  """A wrapper that passes only parameters needs this."""
  model = fp8.fp8_linear_layers(Inner())
  variables = jax.jit(model.init)(KEY, X)
  name = OWG
  if frozen:
    model, variables = fp8.freeze_for_inference(model, variables, X)
    name = "fp8_frozen"
  packed = {**variables["params"], name: variables[name]}
  np.testing.assert_array_equal(model.apply({"params": packed}, X), model.apply(variables, X))
  with pytest.raises(ValueError, match="must be passed once"):
    model.apply({"params": packed, name: variables[name]}, X)
  if not frozen:
    grads = jax.jit(fp8.grad(lambda p: model.apply({"params": p}, X).sum()))(packed)
    wanted = jax.jit(fp8.grad(lambda v: model.apply(v, X).sum()))(variables)
    jax.tree.map(np.testing.assert_array_equal, grads, {**wanted["params"], OWG: wanted[OWG]})


def returned(x, w):
  return x @ w, w.T.astype(jnp.bfloat16)


def looped(x, w):
  stack = jnp.stack([w, 2 * w])
  return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), w), x, stack)


def chosen(x, w):
  other = jax.lax.cond(x.sum() > 0, lambda: w, lambda: 2 * w)
  return x @ w, x @ other


@pytest.mark.parametrize("call", [returned, looped, chosen])
def test_a_parameter_that_is_also_returned_stays(call):
  class Hands(nn.Module):
    @nn.compact
    def __call__(self, x):
      return call(x, self.param("w", INIT, (32, 32)))

  converted = fp8.fp8_linear_layers(Hands(), fp8.Fp8Config(functions=""))
  variables = jax.jit(converted.init)(KEY, X)
  served, frozen = fp8.freeze_for_inference(converted, variables, X)
  got, wanted = (jax.jit(m.apply)(v, X) for m, v in ((served, frozen), (converted, variables)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, wanted)


@pytest.mark.parametrize("how", ["scan", "map", "vmap"])
def test_a_stack_that_the_model_maps_over_itself_is_frozen(how):
  class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
      w = self.param("w", INIT, (3, 32, 32))
      if how == "scan":
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0]
      each = lambda w: x @ w
      return (jax.lax.map(each, w) if how == "map" else jax.vmap(each)(w)).sum(0)

  converted = fp8.fp8_linear_layers(Stack(), fp8.Fp8Config(functions=""))
  variables = jax.jit(converted.init)(KEY, jnp.asarray(X))
  served, frozen = fp8.freeze_for_inference(converted, variables, X)
  got, wanted = served.apply(frozen, jnp.asarray(X)), converted.apply(variables, jnp.asarray(X))
  np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_nothing_leaks():
  config = fp8.Fp8Config(functions="own")
  model = Around(Own())
  converted = fp8.fp8_linear_layers(model, config)
  variables = jax.jit(converted.init)(KEY, X)
  with jax.checking_leaks():
    config.report(model, X)
    fp8.freeze_for_inference(converted, variables, X)
    jax.jit(fp8.grad(lambda v: converted.apply(v, X).sum()))(variables)


def test_the_report_names_contractions_inside_custom_derivatives():
  @jax.custom_vjp
  def product(x, w):
    return x @ w

  product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))

  class Custom(nn.Module):
    @nn.compact
    def __call__(self, x):
      return product(nn.Dense(32, name="first")(x), self.param("w", INIT, (32, 32)))

  assert rules(Custom(), X)[""] == (
    "contracted by lax.ragged_dot or in a custom_jvp or custom_vjp function"
  )


def test_intermediates_of_init():
  converted = fp8.fp8_linear_layers(Inner())
  made = converted.init(KEY, X, capture_intermediates=True)
  assert made.keys() == {"params", OWG, "intermediates"}


def test_a_model_with_random_numbers_is_frozen():
  class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(32)(x) + jax.random.normal(self.make_rng("noise"), (4, 32))

  converted = fp8.fp8_linear_layers(Noisy())
  variables = jax.jit(converted.init)(KEY, X)
  served, frozen = fp8.freeze_for_inference(converted, variables, X)
  rngs = {"noise": KEY}
  np.testing.assert_array_equal(
    served.apply(frozen, X, rngs=rngs), converted.apply(variables, X, rngs=rngs)
  )


def test_a_served_model_initializes_what_is_not_frozen():
  class Cached(nn.Module):
    @nn.compact
    def __call__(self, x):
      self.variable("cache", "last", jnp.zeros_like, x)
      return nn.Dense(32)(x)

  converted = fp8.fp8_linear_layers(Cached())
  variables = jax.jit(converted.init)(KEY, X)
  served, frozen = fp8.freeze_for_inference(converted, variables, X)
  assert jax.jit(served.init)(KEY, X).keys() == {"cache"}
  np.testing.assert_array_equal(served.apply(frozen, X), converted.apply(variables, X))
