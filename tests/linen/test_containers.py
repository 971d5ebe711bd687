"""Mappings keep their type when their items change."""

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from flax_fp8.linen.containers import leaves_with_path, like, map_with_path, with_items
from tests.containers import CONTAINERS, Tagged

TREE = {"params": {"b": {"x": 1.0, "y": [2.0, {"z": None}]}, "a": 3.0}, "_overwrite_with_gradient":
        {"b": {"s": 4.0}}}  # fmt: skip
containers = pytest.mark.parametrize("wrap", CONTAINERS.values(), ids=CONTAINERS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Models(Mapping):
  """A mapping with fixed keys."""

  one: float
  other: float

  def __getitem__(self, key):
    return getattr(self, key)

  def __iter__(self):
    return iter(("one", "other"))

  def __len__(self):
    return 2


class TestWithItems:
  @containers
  def test_same_keys_give_the_same_structure(self, wrap):
    tree = wrap(TREE)
    assert jax.tree.structure(with_items(tree, dict(tree))) == jax.tree.structure(tree)
    assert jax.tree.structure(like(tree, TREE)) == jax.tree.structure(tree)

  @containers
  def test_other_keys_keep_the_type(self, wrap):
    tree = wrap(TREE)
    assert type(with_items(tree, {"params": 1.0})) is type(tree)
    assert set(with_items(tree, {"params": 1.0, "more": 2.0})) == {"params", "more"}
    assert tree["params"]["a"] == 3.0  # untouched

  def test_order_is_the_old_one_and_new_keys_come_last(self):
    made = with_items(OrderedDict(b=1, a=2, c=3), {"new": 0, "a": 5, "b": 4})
    assert list(made.items()) == [("b", 4), ("a", 5), ("new", 0)]

  def test_other_attributes_of_a_mapping_stay(self):
    assert with_items(Tagged({"a": 1}, "mine"), {"a": 2}).tag == "mine"

  def test_a_mapping_with_fixed_keys_becomes_a_dict_if_one_is_missing(self):
    assert with_items(Models(1, 2), {"other": 3, "one": 4}) == Models(4, 3)
    assert with_items(Models(1, 2), {"one": 4}) == {"one": 4}


@containers
def test_paths_have_the_keys_of_every_mapping(wrap):
  found = {jax.tree_util.keystr(path): leaf for path, leaf in leaves_with_path(wrap(TREE))}
  assert found == {
    "['params']['a']": 3.0,
    "['params']['b']['x']": 1.0,
    "['params']['b']['y'][0]": 2.0,
    "['_overwrite_with_gradient']['b']['s']": 4.0,
  }
  named = map_with_path(
    lambda path, x, y: (jax.tree_util.keystr(path), x + y), wrap(TREE), wrap(TREE)
  )
  assert named["params"]["b"]["x"] == ("['params']['b']['x']", 2.0)


def test_paths_are_those_of_jax():
  tree = {"a": nn.Partitioned(jnp.ones(2), ("x",)), "b": (1, [2, {"c": 3}]), "d": None, "e": {}}
  theirs = jax.tree_util.tree_leaves_with_path(tree)
  assert [path for path, _ in leaves_with_path(tree)] == [path for path, _ in theirs]
  assert leaves_with_path(5.0) == [((), 5.0)]
  is_box = lambda x: isinstance(x, nn.Partitioned)
  assert next(leaf for _, leaf in leaves_with_path(tree, is_box)) is tree["a"]
