"""The dtype ``fp32_max_grad`` under JAX's operations and transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flax_fp8 import fp32_max_grad, meta_dtype
from tests.transformations import mesh

X = jnp.array([1.0, -2.0, 3.0, 0.5])
RUNS = pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])


@jax.custom_vjp
def emit(state, new):
  """Uses the state in a way that makes its cotangent ``new``."""
  return jnp.float32(0)


emit.defvjp(
  lambda state, new: (jnp.float32(0), new),
  lambda new, g: (meta_dtype.to_max_grad(new), jnp.zeros_like(new)),
)


def new_state(program, state=X):
  """Differentiates a function of the cast state with respect to the state before the cast."""
  return jax.grad(lambda s: program(meta_dtype.to_max_grad(s)))(state)


class TestConversion:
  @RUNS
  def test_there_and_back(self, run):
    cast = run(meta_dtype.to_max_grad)(X)
    assert cast.dtype == fp32_max_grad
    assert cast.shape == X.shape
    assert jnp.issubdtype(cast.dtype, meta_dtype.max_grad)
    np.testing.assert_array_equal(run(meta_dtype.to_float32)(cast), X)

  @RUNS
  def test_astype(self, run):
    assert run(lambda x: x.astype(fp32_max_grad))(X).dtype == fp32_max_grad

  def test_is_idempotent(self):
    cast = meta_dtype.to_max_grad(X)
    assert meta_dtype.to_max_grad(cast) is cast
    assert meta_dtype.to_float32(X) is X

  @pytest.mark.parametrize("dtype", ["bfloat16", "int32", "float16"])
  def test_only_float32_converts(self, dtype):
    with pytest.raises(ValueError, match=r"fp32_max_grad"):
      lax.convert_element_type(X.astype(dtype), fp32_max_grad)
    with pytest.raises(ValueError, match=r"fp32_max_grad"):
      lax.convert_element_type(meta_dtype.to_max_grad(X), dtype)

  def test_other_dtypes_in_memory_are_refused(self):
    with pytest.raises(ValueError, match=r"MaxGradDType: .*must be float32; got .*bfloat16"):
      meta_dtype.MaxGradDType(jnp.bfloat16)

  def test_is_one_dtype(self):
    assert meta_dtype.MaxGradDType(jnp.float32) == fp32_max_grad
    assert hash(meta_dtype.MaxGradDType(jnp.float32)) == hash(fp32_max_grad)
    assert (repr(fp32_max_grad), fp32_max_grad.itemsize) == ("fp32_max_grad", 4)


class TestRules:
  @RUNS
  def test_full(self, run):
    got = run(lambda: lax.full((2, 3), np.float32(7), fp32_max_grad))()
    np.testing.assert_array_equal(meta_dtype.to_float32(got), np.full((2, 3), 7.0))

  @RUNS
  def test_what_a_select_leaves_out_came_on_no_path(self, run):
    """Elements that a select drops get -inf, in both of its operands."""
    which = np.array([True, False])

    def new(x):
      states = [meta_dtype.to_max_grad(jnp.zeros(2))] * 2
      pull = jax.vjp(lambda a, b: lax.select(which, a, b), *states)[1]
      return list(map(meta_dtype.to_float32, pull(meta_dtype.to_max_grad(x))))

    first, second = run(new)(jnp.asarray([5.0, 6.0]))
    np.testing.assert_array_equal(first, [5, -np.inf])
    np.testing.assert_array_equal(second, [-np.inf, 6])

  @RUNS
  def test_full_of_its_own_kind(self, run):
    got = run(lambda x: lax.full((2,), meta_dtype.to_max_grad(x), fp32_max_grad))(jnp.float32(4))
    np.testing.assert_array_equal(meta_dtype.to_float32(got), [4.0, 4.0])

  def test_zero_is_neutral(self):
    zero = meta_dtype.to_float32(meta_dtype.MaxGradRules.zero(fp32_max_grad))
    assert zero == -np.inf

  @RUNS
  def test_add_is_max(self, run):
    both = lambda s: emit(s, X) + emit(s, -X)
    np.testing.assert_array_equal(run(lambda x: new_state(both, x))(X), jnp.abs(X))

  @RUNS
  def test_arithmetic_is_refused(self, run):
    with pytest.raises(TypeError, match=r"fp32_max_grad"):
      run(lambda x: lax.mul(x, x))(meta_dtype.to_max_grad(X))


NEW = jnp.stack([X, -X, X * 2, X / 4])  # new values from four paths
MAX = NEW.max(0)


def _scan(s):
  return lax.scan(lambda total, new: (total + emit(s, new), None), jnp.float32(0), NEW)[0]


def _scan_carry(s):
  step = lambda carry, new: ((carry[0] + emit(carry[1], new), carry[1]), None)
  return lax.scan(step, (jnp.float32(0), s), NEW)[0][0]


def _fori(s):
  return lax.fori_loop(0, 4, lambda i, total: total + emit(s, NEW[i]), jnp.float32(0))


def _cond(s):
  return emit(s, NEW[0]) + lax.cond(X[0] > 0, lambda t: emit(t, MAX), lambda t: jnp.float32(0), s)


def _switch(s):
  branches = [lambda t, i=i: emit(t, NEW[i]) for i in range(4)]
  return sum(lax.switch(jnp.int32(i), branches, s) for i in range(4))


def _remat(s):
  return sum(jax.checkpoint(emit)(s, new) for new in NEW)


def _jit(s):
  return sum(jax.jit(emit)(s, new) for new in NEW)


def _custom_vmap_free(s):
  return sum(jax.vmap(emit, in_axes=(None, None), axis_size=3)(s, new)[0] for new in NEW)


LOOPS = {
  "scan": _scan,
  "scan, state carried": _scan_carry,
  "fori_loop": _fori,
  "cond": _cond,
  "switch": _switch,
  "remat": _remat,
  "jit": _jit,
  "vmap": _custom_vmap_free,
}


@RUNS
@pytest.mark.parametrize("program", LOOPS.values(), ids=LOOPS)
def test_cotangents_meet_at_the_max(program, run):
  np.testing.assert_array_equal(run(lambda x: new_state(program, x))(X), MAX)


@RUNS
def test_scanned_over_state(run):
  def program(states):
    step = lambda total, s_new: (total + emit(*s_new) + emit(s_new[0], -s_new[1]), None)
    return lax.scan(step, jnp.float32(0), (states, NEW))[0]

  np.testing.assert_array_equal(run(lambda x: new_state(program, x))(NEW), jnp.abs(NEW))


@RUNS
def test_mapped_state(run):
  program = lambda s: jnp.sum(jax.vmap(emit)(s, NEW) + jax.vmap(emit)(s, -NEW))
  np.testing.assert_array_equal(run(lambda x: new_state(program, x))(NEW), jnp.abs(NEW))


@RUNS
def test_carried_forward_through_a_while_loop(run):
  def program(s):
    body = lambda i_s: (i_s[0] + 1, i_s[1])
    return lax.while_loop(lambda i_s: i_s[0] < 3, body, (0, meta_dtype.to_max_grad(s)))[1]

  np.testing.assert_array_equal(meta_dtype.to_float32(run(program)(X)), X)


def test_a_path_not_taken_is_minus_infinity():
  program = lambda s: lax.cond(X[0] > 9, lambda t: emit(t, X), lambda t: jnp.float32(0), s)
  np.testing.assert_array_equal(jax.jit(lambda x: new_state(program, x))(X), np.full(4, -np.inf))


class TestSharding:
  def test_compiled_results_keep_their_sharding(self):
    sharding = NamedSharding(mesh(), P("data"))
    x = jax.device_put(X, sharding)
    cast = jax.jit(meta_dtype.to_max_grad)(x)
    assert cast.sharding.is_equivalent_to(sharding, 1)
    np.testing.assert_array_equal(jax.jit(meta_dtype.to_float32)(cast), X)

  def test_out_shardings(self):
    sharding = NamedSharding(mesh(), P("data"))
    cast = jax.jit(meta_dtype.to_max_grad, out_shardings=sharding)(X)
    assert cast.sharding.is_equivalent_to(sharding, 1)

  def test_constraint_inside_jit(self):
    sharding = NamedSharding(mesh(), P("data"))
    f = lambda x: meta_dtype.to_float32(
      lax.with_sharding_constraint(meta_dtype.to_max_grad(x), sharding)
    )
    np.testing.assert_array_equal(jax.jit(f)(X), X)

  @RUNS
  def test_shard_map_sharded_state(self, run):
    def local(s, new):
      return lax.psum(emit(s, new) + emit(s, -new), "data")

    program = jax.shard_map(local, mesh=mesh(), in_specs=(P("data"), P("data")), out_specs=P())
    got = run(lambda x: new_state(lambda s: program(s, X), x))(X)
    np.testing.assert_array_equal(got, jnp.abs(X))


def test_eager_results_print_and_unflatten():
  cast = meta_dtype.to_max_grad(X)
  assert "1." in repr(cast)
  leaves, structure = jax.tree.flatten({"s": cast})
  assert jax.tree.unflatten(structure, leaves)["s"].dtype == fp32_max_grad
  assert jax.eval_shape(meta_dtype.to_max_grad, X).dtype == fp32_max_grad


class TestTranspositions:
  """Slices and copies between the cast and the uses: each element gets the maximum of its uses."""

  @RUNS
  @pytest.mark.parametrize(
    "cut",
    [
      lambda s: (s[:2], s[1:]),
      lambda s: (lax.slice(s, (0,), (3,), (2,)), s[3:]),
      lambda s: tuple(s),
    ],
    ids=["overlapping", "strided", "unpacked"],
  )
  def test_slices(self, run, cut):
    want = np.full(4, -np.inf, np.float32)
    for i, part in enumerate(cut(np.arange(4))):
      want[part] = np.maximum(want[part], i + 1.0)

    def program(state):
      return sum(emit(part, jnp.full(part.shape, i + 1.0)) for i, part in enumerate(cut(state)))

    got = run(lambda s: meta_dtype.to_float32(jax.grad(program, allow_int=True)(s)))(
      meta_dtype.to_max_grad(X)
    )
    np.testing.assert_array_equal(got, want)

  @RUNS
  def test_what_no_slice_took(self, run):
    program = lambda s: emit(s[1:3], jnp.array([5.0, -7.0]))
    got = run(lambda s: meta_dtype.to_float32(jax.grad(program, allow_int=True)(s)))(
      meta_dtype.to_max_grad(X)
    )
    np.testing.assert_array_equal(got, [-np.inf, 5.0, -7.0, -np.inf])

  @RUNS
  @pytest.mark.parametrize(
    ("shape", "axes"), [((3, 4), (1,)), ((4, 3), (0,)), ((2, 4, 3), (1,))], ids=str
  )
  def test_copies(self, run, shape, axes):
    new = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    copied = tuple(axis for axis in range(len(shape)) if axis not in axes)
    program = lambda s: emit(lax.broadcast_in_dim(s, shape, axes), new)
    got = run(lambda s: meta_dtype.to_float32(jax.grad(program, allow_int=True)(s)))(
      meta_dtype.to_max_grad(X)
    )
    np.testing.assert_array_equal(got, new.max(copied))

  def test_an_eager_map_over_the_second_axis(self):
    cast = meta_dtype.to_max_grad(X.reshape(2, 2))
    back = jax.vmap(meta_dtype.to_float32, in_axes=1)(cast)
    np.testing.assert_array_equal(back, X.reshape(2, 2).T)
