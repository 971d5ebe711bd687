"""Every contraction of a layer or of a named module has a state, in every notation."""

import functools
import re

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.numpy import einsum as imported_einsum
from jax.sharding import PartitionSpec

import flax_fp8 as fp8

OWG = fp8.OVERWRITE_WITH_GRADIENT
KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32)
INIT = nn.initializers.lecun_normal()
DIMS = (((1,), (0,)), ((), ()))


class Calls(nn.Module):
  """A module that calls a function of its input and of some square matrices."""

  call: object
  matrices: int = 1

  @nn.compact
  def __call__(self, x):
    shape = (32, 32)
    return self.call(x, *(self.param(f"w{i}", INIT, shape) for i in range(self.matrices)))


class Around(nn.Module):
  inner: nn.Module

  @nn.compact
  def __call__(self, x):
    return self.inner.clone(name="own", parent=self)(x)


def flat(tree):
  return flax.traverse_util.flatten_dict(tree, sep="/")


def contractions(variables):
  return sorted({path.rpartition("/")[0] for path in flat(variables[OWG])})


def error(got, wanted):
  got, wanted = np.float64(got), np.float64(wanted)
  return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


def convert(call, matrices=1, functions="own"):
  model = Around(Calls(call, matrices))
  config = fp8.Fp8Config(functions=functions)
  converted = fp8.fp8_linear_layers(model, config)
  return model, converted, jax.jit(converted.init)(KEY, X), config


def looped(x, w):
  return lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=2)[0]


@functools.partial(jax.jit, static_argnums=0)
def swapped_arguments(flag, w, x):
  return x @ w if flag else x


def sharded(fun, **how):
  mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
  specs = {"in_specs": (PartitionSpec("d"), PartitionSpec()), "out_specs": PartitionSpec("d")}
  return jax.shard_map(fun, mesh=mesh, **specs, **how)


SPELLINGS = {
  "einsum": lambda x, w: jnp.einsum("bk,kn->bn", x, w),
  "imported": lambda x, w: imported_einsum("bk,kn->bn", x, w),
  "kernel_is_left_in_the_primitive": lambda x, w: jnp.einsum("bk,nk->nb", x, w).T,
  "blanks_and_no_arrow": lambda x, w: jnp.einsum(" a B, Bc", x, w),
  "digits": lambda x, w: jnp.einsum("1K,K2->12", x, w),
  "interleaved": lambda x, w: jnp.einsum(x, [0, 1], w, [1, 2]),
  "at": lambda x, w: x @ w,
  "dot": lambda x, w: jnp.dot(x, w),
  "method": lambda x, w: jnp.asarray(x).dot(w),
  "matmul": lambda x, w: jnp.matmul(x, w),
  "tensordot": lambda x, w: jnp.tensordot(x, w, 1),
  "inner": lambda x, w: jnp.inner(x, w),
  "vecmat": lambda x, w: jnp.vecmat(x, w[None]),
  "lax.dot": lambda x, w: lax.dot(x, w),
  "dot_general": lambda x, w: lax.dot_general(x, w, DIMS),
  "vmap": lambda x, w: jax.vmap(lambda row: row @ w)(x),
  "jit": lambda x, w: swapped_arguments(True, w, x),
  "remat": lambda x, w: jax.checkpoint(lambda x: jnp.tanh(x @ w))(x),
  "scan": looped,
  "fori_loop": lambda x, w: lax.fori_loop(0, 2, lambda _, c: jnp.tanh(c @ w), x),
  "cond": lambda x, w: lax.cond(x.sum() < 9e9, lambda: x @ w, lambda: x),
  "vmap_of_scan": lambda x, w: jax.vmap(lambda row: looped(row, w))(x),
  "shard_map": lambda x, w: sharded(lambda x, w: jnp.tanh(x @ w))(x, w),
  "unchecked_shard_map": lambda x, w: sharded(lambda x, w: looped(x, w), check_vma=False)(x, w),
  "gradient": lambda x, w: jax.grad(lambda x: jnp.sum(jnp.tanh(x @ w)))(x),
}


# The converted program is that of "einsum" or "dot_general".
ALIASES = (
  *("imported", "blanks_and_no_arrow", "digits", "interleaved", "at", "dot", "method", "matmul"),
  *("tensordot", "inner", "vecmat", "lax.dot"),
)


@functools.cache
def plain_variables():
  return jax.jit(Around(Calls(SPELLINGS["at"])).init)(KEY, X)


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_notation(name):
  model, converted, variables, config = convert(SPELLINGS[name])
  kind = "Fp8Einsum" if "einsum" in name or name in EINSUMS else "Fp8DotGeneral"
  assert contractions(variables) == [f"own/{kind}_0"]
  (row,) = config.report(model, X).rows
  assert (row.layer.path, row.layer.contracted, row.layer.features) == (f"own/{kind}_0", 32, 32)
  plain = plain_variables()
  jax.tree.map(np.testing.assert_array_equal, plain["params"], variables["params"])
  wanted = jax.jit(model.apply)(plain, X)
  got = jax.jit(converted.apply)(variables, X)
  assert 1e-5 < error(got, wanted) < 0.15
  if name in ALIASES:
    return
  if "shard_map" not in name:  # JAX runs an eager shard_map one operation at a time
    np.testing.assert_allclose(converted.apply(variables, X), got, rtol=1e-5, atol=1e-5)
  grads = jax.jit(fp8.grad(lambda v: jnp.sum(converted.apply(v, X) ** 2)))(variables)
  amaxes = {role: flat(grads[OWG])[f"own/{kind}_0/{role}_amax_history"][0] for role in ROLES}
  kernel = np.abs(plain["params"]["own"]["w0"]).max()
  if name != "gradient":  # a derivative inside the model does not update the state
    assert amaxes["kernel"] == kernel
    assert amaxes["input"] >= np.abs(X).max()


EINSUMS = (
  "imported",
  "kernel_is_left_in_the_primitive",
  "blanks_and_no_arrow",
  "digits",
  "interleaved",
)
ROLES = ("input", "kernel")


def test_while_loop():
  call = lambda x, w: lax.while_loop(lambda c: jnp.abs(c).sum() < 1e3, lambda c: 4 * c @ w, x)
  model, converted, variables, _ = convert(call)
  assert contractions(variables) == ["own/Fp8DotGeneral_0"]
  wanted = model.apply({"params": variables["params"]}, X)
  assert 1e-5 < error(jax.jit(converted.apply)(variables, X), wanted) < 0.3


def test_three_operands_are_contracted_in_pairs():
  _, converted, variables, _ = convert(lambda x, v, w: jnp.einsum("bk,kn,nm->bm", x, v, w), 2)
  assert contractions(variables) == ["own/Fp8Einsum_0", "own/Fp8Einsum_1"]
  assert converted.apply(variables, X).shape == X.shape


def both_branches(x, v, w):
  return lax.cond(x.sum() > 0, lambda: 100 * x @ v, lambda: x @ w)


SITES = {
  "branches": (both_branches, 2),
  "in_a_loop_and_behind_it": (lambda x, v, w: looped(x, v) @ w, 2),
  "in_two_loops": (lambda x, v, w: looped(looped(x, v), w), 2),
  "in_two_remats": (
    lambda x, v, w: jax.checkpoint(lambda x: x @ w)(jax.checkpoint(lambda x: x @ v)(x)),
    2,
  ),
}


@pytest.mark.parametrize("name", SITES)
def test_one_state_for_each_contraction(name):
  call, count = SITES[name]
  _, converted, variables, _ = convert(call, 2)
  assert len(contractions(variables)) == count
  jax.jit(fp8.grad(lambda v: jnp.sum(converted.apply(v, X))))(variables)


class Mixed(nn.Module):
  """Lifted functions that contract and that call layers, and a lifted method."""

  @nn.compact
  def __call__(self, x):
    w = self.param("w", INIT, (32, 32))
    step = nn.scan(
      lambda module, c, _: (nn.Dense(32, name="in_scan")(c) @ w, None),
      variable_broadcast="params",
      split_rngs={"params": False},
      length=2,
    )
    x, _ = step(self, x, None)
    x = nn.remat(lambda module, x: nn.Dense(32, name="in_remat")(x) @ w)(self, x)
    return self.project(self.project(x, w), w)

  @nn.remat
  def project(self, x, w):
    return jnp.tanh(x @ w)


@pytest.mark.slow
def test_lifted_functions_and_methods():
  model = Around(Mixed())
  own = [f"own/{name}Fp8DotGeneral_{i}" for name in ("", "project_") for i in range(2)]
  layers = ["own/in_remat/Fp8DotGeneral_0", "own/in_scan/Fp8DotGeneral_0"]
  for functions, expected in (("own", [*own, *layers]), ((), layers)):
    converted = fp8.fp8_linear_layers(model, fp8.Fp8Config(functions=functions))
    variables = jax.eval_shape(converted.init, KEY, X)
    assert contractions(variables) == sorted(expected)
    assert contractions(converted.init(KEY, X)) == sorted(expected)
    jax.eval_shape(converted.apply, variables, X)


class Codec(nn.Module):
  """Two methods, each with a kernel, that the user calls."""

  def setup(self):
    self.a, self.b = self.param("a", INIT, (32, 64)), self.param("b", INIT, (64, 32))

  def encode(self, x):
    return jnp.einsum("bd,df->bf", x, self.a)

  def decode(self, x):
    return jnp.einsum("bd,df->bf", x, self.b)


class UsesCodec(nn.Module):
  def setup(self):
    self.codec = Codec()

  def __call__(self, x):
    return self.codec.decode(1000 * self.codec.encode(x))


class Shares(nn.Module):
  """A layer that shares the scope of the module around it."""

  def setup(self):
    self.layer = nn.Dense(32, use_bias=False)
    nn.share_scope(self, self.layer)
    self.extra = self.param("extra", INIT, (32, 32))

  def __call__(self, x):
    return (1000 * self.layer(x)) @ self.extra


class Table(nn.Module):
  name_of_kernel: str

  @nn.compact
  def __call__(self, x):
    return x @ self.param(self.name_of_kernel, INIT, (32, 32))


class Siblings(nn.Module):
  """Two modules that share one scope."""

  def setup(self):
    self.first, self.second = Table("a"), Table("b")
    nn.share_scope(self.first, self.second)

  def __call__(self, x):
    return self.second(1000 * self.first(x))


SHARED = {
  "methods": (UsesCodec(), "codec"),
  "outer_and_inner": (Around(Shares()), "own"),
  "siblings": (Around(Siblings()), "own/*"),
}


@pytest.mark.parametrize("name", SHARED)
def test_two_kernels_never_share_a_state(name):
  model, functions = SHARED[name]
  config = fp8.Fp8Config(functions=functions)
  converted = fp8.fp8_linear_layers(model, config)
  variables = jax.jit(converted.init)(KEY, X)
  assert len(contractions(variables)) == len(config.report(model, X).taken) == 2
  loss = lambda v, x: jnp.mean(converted.apply(v, x) ** 2)
  variables = fp8.calibrate(converted, variables, (X,), loss, progress=False)
  wanted = model.apply({"params": variables["params"]}, X)
  assert error(jax.jit(converted.apply)(variables, X), wanted) < 0.1
  served, frozen = fp8.freeze_for_inference(converted, variables, X)
  got, wanted = jax.jit(served.apply)(frozen, X), jax.jit(converted.apply)(variables, X)
  # The outputs are near 1e3, and XLA fuses the two programs differently.
  np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-3)


class AutoEncoder(nn.Module):
  """Methods with a common helper. ``__call__`` and the user call them."""

  def setup(self):
    self.a, self.b = self.param("a", INIT, (32, 64)), self.param("b", INIT, (64, 32))

  def project(self, x, w):
    return 100 * x @ w

  def encode(self, x):
    return self.project(x, self.a)

  def decode(self, x):
    return self.project(x, self.b)

  def __call__(self, x):
    return self.decode(self.encode(x))


@pytest.mark.parametrize("bound", [False, True], ids=["apply", "bind"])
def test_a_method_finds_its_state_from_every_caller(bound):
  model = AutoEncoder()
  converted = fp8.fp8_linear_layers(model, fp8.Fp8Config(functions=""))
  variables = jax.jit(converted.init)(KEY, X)
  names = [f"{method}_project_Fp8DotGeneral_0" for method in ("decode", "encode")]
  assert contractions(variables) == names
  loss = lambda v, x: jnp.mean(converted.apply(v, x) ** 2)
  variables = fp8.calibrate(converted, variables, (X,), loss, progress=False)
  z = model.apply(variables, X, method="encode")
  for method, x in (("encode", X), ("decode", z)):
    run = getattr(converted.bind(variables), method) if bound else None
    got = run(x) if bound else converted.apply(variables, x, method=method)
    assert error(got, model.apply(variables, x, method=method)) < 0.1


def test_one_module_called_twice_has_one_state():
  class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
      own = Calls(SPELLINGS["at"], name="own")
      return own(own(x))

  converted = fp8.fp8_linear_layers(Twice(), fp8.Fp8Config(functions="own"))
  assert contractions(jax.jit(converted.init)(KEY, X)) == ["own/Fp8DotGeneral_0"]


@pytest.mark.parametrize("functions", ["*", "own*", re.compile("own"), lambda _: True])
def test_patterns_that_match_the_inserted_modules(functions):
  _, converted, variables, _ = convert(SPELLINGS["einsum"], functions=functions)
  assert contractions(variables) == ["own/Fp8Einsum_0"]
  converted.apply(variables, X)


def test_contractions_in_initializers_stay_in_high_precision():
  def init(key, shape):
    return jnp.dot(jax.random.normal(key, shape), jnp.eye(shape[1]) / 32)

  class Own(nn.Module):
    @nn.compact
    def __call__(self, x):
      return x @ self.param("w", init, (32, 32))

  model = Around(Own())
  converted = fp8.fp8_linear_layers(model, fp8.Fp8Config(functions="own"))
  variables = jax.jit(converted.init)(KEY, X)
  assert contractions(variables) == ["own/Fp8DotGeneral_0"]
  np.testing.assert_array_equal(
    variables["params"]["own"]["w"], jax.jit(model.init)(KEY, X)["params"]["own"]["w"]
  )


class OwnCall(nn.Dense):
  """A Dense with its own contraction."""

  @nn.compact
  def __call__(self, inputs):
    return inputs @ self.param("kernel", self.kernel_init, (inputs.shape[-1], self.features))


class LikeDense(nn.Module):
  """A custom layer with a parameter named ``kernel``, as in Linen's layers."""

  features: int

  @nn.compact
  def __call__(self, x):
    kernel = self.param("kernel", INIT, (self.features, x.shape[-1]))
    return lax.dot_general(x, kernel.T, DIMS)


@pytest.mark.parametrize("layer", [OwnCall(64), LikeDense(64)], ids=["subclass", "module"])
@pytest.mark.parametrize("functions", [(), "own"])
def test_layers_that_contract_by_themselves(layer, functions):
  config = fp8.Fp8Config(functions=functions)
  converted = fp8.fp8_linear_layers(Around(layer), config)
  variables = jax.jit(converted.init)(KEY, X)
  assert contractions(variables) == ["own/Fp8DotGeneral_0"]
  (row,) = config.report(Around(layer), X).rows
  if functions and isinstance(layer, LikeDense):
    assert (row.layer.path, row.layer.kind) == ("own/Fp8DotGeneral_0", "lax.dot_general")
  else:
    assert (row.layer.path, row.layer.kind) == ("own", type(layer).__name__)
  assert 1e-4 < error(converted.apply(variables, X), Around(layer).apply(variables, X)) < 0.1


@pytest.mark.parametrize("name", ["kernel_is_left_in_the_primitive", "scan"])
def test_disable_jit_gives_the_same_result(name):
  _, converted, variables, _ = convert(SPELLINGS[name])
  with jax.disable_jit():
    got = converted.apply(variables, X)
  np.testing.assert_allclose(got, jax.jit(converted.apply)(variables, X), rtol=1e-5, atol=1e-5)


def test_jax_is_restored_after_a_run():
  bound = lax.dot_general_p.bind
  _, converted, variables, _ = convert(SPELLINGS["at"])
  jax.jit(converted.apply)(variables, X)
  converted.apply(variables, X)
  assert "bind" not in vars(lax.dot_general_p)
  assert lax.dot_general_p.bind == bound
  program = str(jax.make_jaxpr(SPELLINGS["at"])(X, X.T))
  assert "own_contraction" not in program
