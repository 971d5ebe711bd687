"""Leaves that can't be restored raise an error before anything is written."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8

X = jnp.ones(2)
Pair = collections.namedtuple("Pair", "x y")


def deleted():
  (array := jnp.ones(3)).delete()
  return array


REFUSED = {
  "slash": ({"a/b": X, "a": {"b": X}}, ValueError, r"paths of leaves must differ.*\['a/b'\]\. Ren"),
  "dot": ({"a.b": X, "a": {"b": X}}, ValueError, r"paths of leaves must differ.*\['a\.b'\]\. Ren"),
  "nothing": ({}, ValueError, r"state must have leaves; got none"),
  "empty": (
    {"a": jnp.ones((0, 3))},
    ValueError,
    r"arrays must have elements.*\['a \(0, 3\)'\]",
  ),
  "donated": (
    {"a": deleted()},
    ValueError,
    r"arrays must not be deleted; .* \['a'\]\. Save",
  ),
  "object": ({"a": object()}, TypeError, r"leaves must be arrays.*\['a object'\]\. Convert"),
  "complex": ({"a": 1j}, TypeError, r"leaves must be arrays.*\['a complex'\]"),
  "bytes": ({"a": b"b"}, TypeError, r"leaves must be arrays.*\['a bytes'\]"),
  "too long": (
    {"a": 2**70},
    TypeError,
    r"leaves must be .*64 bits.*\['a int'\]",
  ),
  "bool": ({"a": np.bool_(True)}, TypeError, r"leaves must be arrays.*\['a bool'\]"),
  "strings": ({"a": np.array(["b"])}, TypeError, r"leaves must be arrays.*\['a ndarray'\]"),
}


@pytest.mark.parametrize(("state", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(state, kind, message, tmp_path):
  with pytest.raises(kind, match=f"save_checkpoint: {message}") as raised:
    fp8.save_checkpoint(tmp_path, state)
  assert len(str(raised.value)) <= 600
  assert not list(tmp_path.iterdir())


def test_refused_within_jit(tmp_path):
  with pytest.raises(TypeError, match=r"save_checkpoint: leaves must be arrays.*Tracer'\]\. Conv"):
    jax.jit(lambda x: fp8.save_checkpoint(tmp_path, {"x": x}))(X)


def test_targets_whose_paths_are_the_same(tmp_path):
  fp8.save_checkpoint(tmp_path, {"a/b": X})
  with pytest.raises(ValueError, match=r"restore_checkpoint: paths of leaves must differ"):
    fp8.restore_checkpoint(tmp_path, {"a/b": X, "a": {"b": X}})


def test_kept(tmp_path):
  """Saves all kinds of keys and containers; all leaves have different values."""
  leaf = lambda n: jnp.arange(2.0) + 10 * n
  state = {
    "empty": {"": leaf(0)},
    "a/b": leaf(1),
    "a.b": {"c d\n%2F": leaf(2), "..": leaf(3)},
    "integers": {1: leaf(4), 2: None},
    "strings": {"1": leaf(5), "empty": {}, "text": "text"},
    "k" * 300: collections.OrderedDict(b=leaf(6), a=leaf(7)),
    "pair": Pair([leaf(8)], (leaf(9), ())),
    "numpy": [np.float32(2.1), np.int8(-3), np.array(7, np.int16), np.arange(3)],
    "python": [3, 2.5, True, float("inf"), 2**63],
    "low": [leaf(1).astype(d) for d in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "int4")],
  }
  fp8.save_checkpoint(tmp_path, state)
  got = fp8.restore_checkpoint(tmp_path, state).tree
  assert jax.tree.structure(got) == jax.tree.structure(state)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(state), strict=True):
    assert type(a) is type(b)
    assert np.asarray(a).dtype == np.asarray(b).dtype
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  ("saved", "target", "want"),
  [(2.7, jnp.zeros(()), np.float32(2.7)), (2, 1.0, 2.0), (jnp.int32(4), 1, 4),
   (np.float32(2.5), jnp.bfloat16(0), 2.5), (3, jax.ShapeDtypeStruct((), jnp.int32), 3)],
  ids=str,
)  # fmt: skip
def test_numbers_take_the_type_of_their_target(saved, target, want, tmp_path):
  fp8.save_checkpoint(tmp_path, {"n": saved})
  got = fp8.restore_checkpoint(tmp_path, {"n": target}).tree["n"]
  assert got == want
  assert getattr(got, "dtype", type(got)) == getattr(target, "dtype", type(target))


@pytest.mark.parametrize(
  ("saved", "target"),
  [(2**40, jnp.int32(0)), (2.7, 1), (1e300, np.float32(0)), (float("nan"), 1), (3, True)],
  ids=str,
)
def test_numbers_that_do_not_fit(saved, target, tmp_path):
  fp8.save_checkpoint(tmp_path, {"n": saved})
  with pytest.raises(
    ValueError, match=r"restore_checkpoint: numbers must fit .* got 'n'=.* Use a wider"
  ):
    fp8.restore_checkpoint(tmp_path, {"n": target})


class TestKeys:
  @pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
  @pytest.mark.parametrize("abstract", [False, True])
  def test_round_trip(self, impl, abstract, tmp_path):
    state = {"one": jax.random.key(3, impl=impl), "n": [jax.random.split(jax.random.key(1), 4)]}
    fp8.save_checkpoint(tmp_path, state)
    target = {"one": jax.random.key(0, impl=impl), "n": [jax.random.split(jax.random.key(0), 4)]}
    got = fp8.restore_checkpoint(tmp_path, jax.eval_shape(lambda: target) if abstract else target)
    for a, b in zip(jax.tree.leaves(got.tree), jax.tree.leaves(state), strict=True):
      assert (a.dtype, a.shape) == (b.dtype, b.shape)
      np.testing.assert_array_equal(*map(jax.random.key_data, (a, b)))

  def test_over_devices(self, tmp_path):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    keys = jax.device_put(jax.random.split(jax.random.key(3), 8), sharding)
    fp8.save_checkpoint(tmp_path, {"keys": keys})
    got = fp8.restore_checkpoint(tmp_path, {"keys": keys}).tree["keys"]
    assert got.sharding.is_equivalent_to(sharding, 1)
    np.testing.assert_array_equal(*map(jax.random.key_data, (got, keys)))

  @pytest.mark.parametrize(
    ("saved", "target", "message"),
    [
      (jax.random.key(0), jax.random.key(0, impl="rbg"), r"'k key<fry>\(\) for key<rbg>\(\)'"),
      (jax.random.key(0, impl="rbg"), jax.random.key(0, impl="unsafe_rbg"), "key<urbg>"),
      (jax.random.PRNGKey(0), jax.random.key(0), r"'k uint32\(2,\) for key<fry>\(\)'"),
      (jax.random.key(0), jax.random.PRNGKey(0), r"'k key<fry>\(\) for uint32\(2,\)'"),
      (jax.random.split(jax.random.key(0)), jax.random.key(0), r"'k key<fry>\(2,\) for key"),
    ],
    ids=["threefry for rbg", "rbg for unsafe_rbg", "data for key", "key for data", "shape"],
  )
  def test_another_implementation(self, saved, target, message, tmp_path):
    fp8.save_checkpoint(tmp_path, {"k": saved})
    with pytest.raises(ValueError, match=f"restore_checkpoint: PRNG keys .*{message}.*impl="):
      fp8.restore_checkpoint(tmp_path, {"k": target})
