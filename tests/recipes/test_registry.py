"""Recipes by name, and recipes as values: comparable, hashable, copyable and picklable."""

import copy
import dataclasses
import pickle

import pytest

import flax_fp8 as fp8
from tests.recipes.cases import RECIPES

by_class = pytest.mark.parametrize("name", fp8.RECIPES)


@by_class
def test_by_name(name):
  assert fp8.get_recipe(name) == fp8.RECIPES[name]()
  assert fp8.get_recipe(name, high_precision=("wgrad",)).high_precision == ("wgrad",)


def test_fields_reach_the_recipe():
  assert fp8.get_recipe("delayed", margin=1) == fp8.DelayedScaling(margin=1)
  with pytest.raises(ValueError, match=r"DelayedScaling: margin .*margin=100"):
    fp8.get_recipe("delayed", margin=100)
  with pytest.raises(TypeError, match="momentum"):
    fp8.get_recipe("delayed", momentum=0.9)


def test_the_registry_is_read_only():
  with pytest.raises(TypeError, match="does not support item assignment"):
    fp8.RECIPES["mine"] = fp8.DelayedScaling


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_recipe_is_a_value(recipe):
  fields = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)}
  same = type(recipe)(**fields)
  assert recipe == same
  assert hash(recipe) == hash(same)
  for copied in (pickle.loads(pickle.dumps(recipe)), copy.copy(recipe), copy.deepcopy(recipe)):
    assert copied == recipe
    assert hash(copied) == hash(recipe)
  assert dataclasses.replace(recipe, fp8_format=fp8.Format.HYBRID_FNUZ) != recipe
  with pytest.raises(dataclasses.FrozenInstanceError):
    recipe.fp8_format = fp8.Format.E4M3


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_equal_recipes_bind_one_class_object(recipe):
  same = copy.deepcopy(recipe)
  assert recipe.dot_general_cls is same.dot_general_cls
  assert recipe.einsum_cls is same.einsum_cls
  assert recipe.dot_general_cls().recipe == recipe
  assert isinstance(recipe.dot_general_cls(), fp8.Fp8DotGeneral)
  assert isinstance(recipe.einsum_cls(), fp8.Fp8Einsum)


def test_recipes_of_different_classes_differ():
  assert len(set(RECIPES.values())) == len(RECIPES)
  assert fp8.Float8RowwiseScaling() != fp8.Float8BlockScaling()


@by_class
def test_positional_fields_are_refused(name):
  with pytest.raises(TypeError, match="positional argument"):
    fp8.RECIPES[name](fp8.Format.E4M3)


@by_class
class TestHighPrecision:
  @pytest.mark.parametrize(
    ("given", "want"),
    [
      ("wgrad", ("wgrad",)),
      (["wgrad", "fprop"], ("fprop", "wgrad")),
      ({"dgrad"}, ("dgrad",)),
      (("dgrad", "dgrad"), ("dgrad",)),
      ((), ()),
    ],
    ids=repr,
  )
  def test_order_and_container_do_not_matter(self, name, given, want):
    recipe = fp8.RECIPES[name](high_precision=given)
    assert recipe.high_precision == want
    assert recipe == fp8.RECIPES[name](high_precision=want)

  def test_all_three(self, name):
    with pytest.raises(ValueError, match="all three in high precision, exclude the layer from FP8"):
      fp8.RECIPES[name](high_precision=("fprop", "dgrad", "wgrad"))


def test_default_formats():
  """With fine-grained scales, gradients do not need a wider range."""
  default = {name: fp8.get_recipe(name).fp8_format for name in fp8.RECIPES}
  per_tensor = dict.fromkeys(("delayed", "current"), fp8.Format.HYBRID)
  assert default == per_tensor | dict.fromkeys(("rowwise", "block", "mxfp8"), fp8.Format.E4M3)
