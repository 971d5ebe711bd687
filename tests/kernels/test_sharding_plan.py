"""Plans for the usual ways to shard training. Axis 0 is data, axis 1 is the model."""

import pytest

from flax_fp8.kernels.sharding_plan import Rule, divides, make_plan
from flax_fp8.kernels.shardings import DeviceAxes

AXES = DeviceAxes((2, 2))
GEMM = Rule.parse("mk nk km kn -> mn")
SHAPES = [(512, 512), (512, 512), (4, 512), (4, 512), (512, 512)]
D, T = (0,), (1,)


def plan(a, b, result, **options):
  none = ((), ())
  return make_plan(GEMM, SHAPES, [a, b, none, none, result], AXES, **options)


@pytest.mark.parametrize(
  ("lengths", "count", "expected"),
  [
    ([6, 6], 2, True),
    ([6, 6], 4, False),
    ([512, 4], 4, True),
    ([512, 4], 8, False),
    ([768, 6], 4, False),
    ([192, 256, 2], 2, False),
    ([256, 256, 2], 2, True),
    ([1, 128, 1], 2, False),
  ],
)
def test_shards_consist_of_whole_blocks(lengths, count, expected):
  assert divides(lengths, count) is expected


@pytest.mark.parametrize(
  ("a", "b", "result", "operands", "results"),
  [
    ((D, ()), ((), D), (D, ()), [(D, ()), ((), ())], (D, ())),
    ((D, ()), (D, ()), (D, ()), [(D, ()), ((), ())], (D, ())),
    ((D, ()), (T, D), (D, T), [(D, ()), (T, ())], (D, T)),
    ((D, T), (D, T), (D, ()), [(D, T), ((), T)], (D, ())),
    ((D, T), ((), T), (D + T, ()), [(D, T), ((), T)], (D + T, ())),
    (((), D), ((), D), ((), ()), [((), D), ((), D)], ((), ())),
    (((), D), ((), D), (D, ()), [((), D), ((), D)], (D, ())),
    (((), D), ((), D + T), ((), T), [((), D), (T, D)], ((), T)),
    ((D, ()), ((), ()), ((), ()), [(D, ()), ((), ())], (D, ())),
  ],
  ids=[
    "FSDP of k",
    "FSDP of n",
    "column parallel",
    "row parallel",
    "row parallel, sequence sharded",
    "weight gradient",
    "weight gradient, FSDP",
    "weight gradient, part shared",
    "result replicated",
  ],
)
def test_plan(a, b, result, operands, results):
  found = plan(a, b, result)
  assert list(found.operands[:2]) == operands
  assert found.results == [results]
  scales = [tuple(reversed(dims)) for dims in operands]
  assert list(found.operands[2:]) == scales


def test_a_sum_is_scattered_where_the_result_is_sharded():
  assert plan(((), D), ((), D), (D, T)).scattered == ((D, ()),)


@pytest.mark.parametrize(("k", "summed"), [(D, ()), (D + T, D + T)], ids=["one of two", "all"])
def test_without_device_numbers_sums_are_over_all_devices_or_none(k, summed):
  found = plan(((), k), ((), k), (D, ()), are_numbered=False)
  assert found.summed == summed
  assert found.scattered == (((), ()),)
