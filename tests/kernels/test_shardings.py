"""Every sharding along mesh axes is found again in XLA's form."""

import itertools

import pytest

from flax_fp8._compat import hlo_sharding
from flax_fp8.kernels.shardings import DeviceAxes, possible_axes, primes


@pytest.mark.parametrize(("size", "expected"), [(1, ()), (8, (2, 2, 2)), (12, (2, 2, 3))])
def test_primes(size, expected):
  assert primes(size) == expected


def shardings(axes):
  """All shardings of a matrix."""
  for order in itertools.permutations(range(axes)):
    for first, second in itertools.combinations_with_replacement(range(axes + 1), 2):
      yield order[:first], order[first:second]


@pytest.mark.parametrize("sizes", [(2, 2, 2), (3, 2), (2, 3)], ids=str)
def test_decodes_what_it_encodes(sizes):
  axes = DeviceAxes(sizes)
  for dims in shardings(len(sizes)):
    assert axes.decode(axes.encode(dims), 2) == dims


@pytest.mark.parametrize("sizes", [(2, 3), (3, 2)], ids=str)
def test_finds_the_axes_of_a_mesh_by_its_shardings(sizes):
  sharding = DeviceAxes(sizes).encode(((1,), ()))
  assert [axes.sizes for axes in possible_axes((6,)) if any(axes.decode(sharding, 2))] == [sizes]


@pytest.mark.parametrize(
  "sharding",
  [
    None,
    hlo_sharding().replicate(),
    hlo_sharding().from_string("{devices=[4,1]0,3,1,2}"),
    hlo_sharding().from_string("{devices=[2,1,2]0,3,1,2 last_tile_dim_replicate}"),
  ],
  ids=["none", "replicated", "other order", "other groups"],
)
def test_other_shardings_count_as_replicated(sharding):
  assert DeviceAxes((2, 2)).decode(sharding, 2) == ((), ())
