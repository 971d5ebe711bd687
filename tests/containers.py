"""Variables in containers other than dict, as users and other libraries have them."""

from collections import OrderedDict, defaultdict
from collections.abc import Mapping

import flax.core
import jax

import flax_fp8 as fp8


class Tagged(Mapping):
  """An immutable mapping with something besides its items, registered with keys."""

  def __init__(self, items, tag="default"):
    self._items, self.tag = dict(items), tag

  def __getitem__(self, key):
    return self._items[key]

  def __iter__(self):
    return iter(self._items)

  def __len__(self):
    return len(self._items)


class Keyless(Tagged):
  """The same, registered without keys: JAX numbers its children."""


class Attributes(dict):
  """A mutable subclass of dict that is registered."""


def _flatten(tree):
  return tuple(tree.values()), (tuple(tree), getattr(tree, "tag", None))


def _flatten_with_keys(tree):
  keys, values = [jax.tree_util.DictKey(key) for key in tree], tree.values()
  return tuple(zip(keys, values, strict=True)), (tuple(tree), getattr(tree, "tag", None))


def _unflatten(cls):
  def unflatten(aux, children):
    items = dict(zip(aux[0], children, strict=True))
    return cls(items, aux[1]) if issubclass(cls, Tagged) else cls(items)

  return unflatten


for _cls in (Tagged, Attributes):
  jax.tree_util.register_pytree_with_keys(_cls, _flatten_with_keys, _unflatten(_cls))
jax.tree_util.register_pytree_node(Keyless, _flatten, _unflatten(Keyless))


def everywhere(make):
  """Makes each dict of a tree of another type, the innermost first."""

  def convert(tree):
    if not isinstance(tree, Mapping):
      return tree
    return make({key: convert(value) for key, value in tree.items()})

  return convert


def reversed_order(tree):
  return OrderedDict(reversed(tree.items()))


def below(collection, make):
  return lambda tree: {**tree, collection: everywhere(make)(tree[collection])}


CONTAINERS = {
  "FrozenDict": flax.core.freeze,
  "OrderedDict": everywhere(reversed_order),
  "OrderedDict_around": reversed_order,
  "defaultdict": everywhere(lambda tree: defaultdict(list, tree)),
  "Tagged": everywhere(lambda tree: Tagged(tree, "mine")),
  "Keyless": everywhere(lambda tree: Keyless(tree, "mine")),
  "Keyless_around": lambda tree: Keyless(tree, "mine"),
  "Attributes": everywhere(Attributes),
  "OrderedDict_in_params": below("params", reversed_order),
  "FrozenDict_in_params": below("params", flax.core.FrozenDict),
  "Tagged_in_state": below(fp8.OVERWRITE_WITH_GRADIENT, lambda tree: Tagged(tree, "mine")),
  "FrozenDict_in_state": below(fp8.OVERWRITE_WITH_GRADIENT, flax.core.FrozenDict),
}
