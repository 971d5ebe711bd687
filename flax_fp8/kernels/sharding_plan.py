"""Decides how the devices divide the work of a kernel.

Each dimension of an operand or result is named by one letter, its factor. Dimensions of the same
factor are sharded alike. They may differ in length: scales have one entry for a block of 128
elements, and a quantizer pads to whole blocks. A factor that no result has is contracted, and the
devices then sum their results.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from flax_fp8.kernels.shardings import Axes, DeviceAxes, Dims
from flax_fp8.kernels.tiles import SIDE

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
  """The factors of a kernel's operands and results.

  Attributes:
    operands: for each operand, one letter for each dimension.
    results: the same for each result.
  """

  operands: tuple[str, ...]
  results: tuple[str, ...]

  @classmethod
  def parse(cls, text: str) -> Rule:
    """Reads a rule, for example ``"mk nk -> mn"`` for a GEMM."""
    operands, results = text.split("->")
    return cls(tuple(operands.split()), tuple(results.split()))

  @property
  def arrays(self) -> tuple[str, ...]:
    """The letters of all operands and results."""
    return self.operands + self.results

  def contracted(self) -> list[str]:
    """Returns the factors that no result has."""
    return [factor for factor in self.factors() if factor not in "".join(self.results)]

  def factors(self) -> list[str]:
    """Returns all factors, in the order in which they occur."""
    return list(dict.fromkeys("".join(self.arrays)))

  def lengths(self, shapes: Sequence[Shape], factor: str) -> list[int]:
    """Returns the lengths of all dimensions of a factor."""
    arrays = zip(self.arrays, shapes, strict=True)
    return [shape[names.index(factor)] for names, shape in arrays if factor in names]


@dataclasses.dataclass(frozen=True)
class ShardingPlan:
  """How the devices divide the work.

  Attributes:
    operands: sharding of each operand.
    partial: sharding of each result of the kernel.
    scattered: axes along which the sum of each result is scattered, for each dimension.
    summed: all axes along which the devices have terms of the same sum.
  """

  operands: tuple[Dims, ...]
  partial: tuple[Dims, ...]
  scattered: tuple[Dims, ...]
  summed: Axes

  @property
  def results(self) -> list[Dims]:
    """Sharding of each result after the sums."""
    pairs = zip(self.partial, self.scattered, strict=True)
    return [tuple(map(tuple.__add__, partial, scattered)) for partial, scattered in pairs]

  def without_scatter(self) -> ShardingPlan:
    """Returns the plan in which all devices have the whole sums."""
    scattered = tuple(((),) * len(dims) for dims in self.scattered)
    return dataclasses.replace(self, scattered=scattered)


def divides(lengths: list[int], count: int) -> bool:
  """Tells whether all dimensions of a factor have ``count`` equal shards.

  A block of 128 elements must not lie in two shards. If all lengths are equal, there are no blocks.
  """
  if any(length % count for length in lengths):
    return False
  blocks = -(-max(lengths) // SIDE)
  long = [length for length in lengths if length > blocks]
  return len(set(lengths)) == 1 or all(length // count % SIDE == 0 for length in long)


def make_plan(
  rule: Rule,
  shapes: Sequence[Shape],
  given: Sequence[Dims],
  axes: DeviceAxes,
  *,
  are_numbered: bool = True,
) -> ShardingPlan:
  """Makes the plan that fits the given shardings best.

  Contracted factors come first. They take the axes that all their unscaled operands share, so that
  no operand is gathered. Each other factor takes the axes of a result, else of an operand.

  Args:
    rule: factors of the operands and results.
    shapes: shapes of the operands and results.
    given: shardings that the operands have, and that the results should have.
    axes: the mesh axes.
    are_numbered: whether the numbers of the devices are known. If not, sums are over all devices
      or none.
  """
  chosen: dict[str, Axes] = dict.fromkeys(rule.factors(), ())

  def take(factor: str, wanted: Iterable[int]) -> None:
    for axis in wanted:
      lengths = rule.lengths(shapes, factor)
      if axis in sum(chosen.values(), ()):
        continue
      if not divides(lengths, axes.count((*chosen[factor], axis))):
        break
      chosen[factor] += (axis,)

  operands = _Given(rule.operands, shapes[: len(rule.operands)], given)
  results = _Given(rule.results, shapes[len(rule.operands) :], given[len(rule.operands) :])
  contracted = rule.contracted()
  for factor in contracted:
    first, *others = operands.of(factor, max(rule.lengths(shapes, factor)))
    take(factor, [axis for axis in first if all(axis in other for other in others)])
  summed = sum(chosen.values(), ())
  if not are_numbered and len(summed) < len(axes.sizes):
    chosen |= dict.fromkeys(contracted, ())
  for source in (results, operands):
    for factor in rule.factors():
      for wanted in source.of(factor, max(rule.lengths(shapes, factor))):
        if factor not in contracted and not chosen[factor]:
          take(factor, wanted)
  plan = _finished(rule, results, chosen, axes)
  return plan if are_numbered else plan.without_scatter()


@dataclasses.dataclass(frozen=True)
class _Given:
  """Shapes and shardings of the operands, or of the results."""

  names: tuple[str, ...]
  shapes: Sequence[Shape]
  shardings: Sequence[Dims]

  def of(self, factor: str, length: int) -> list[Axes]:
    """Returns the axes of each dimension of a factor that has a certain length."""
    arrays = zip(self.names, self.shapes, self.shardings, strict=False)
    found = [(names.find(factor), shape, dims) for names, shape, dims in arrays]
    return [dims[at] for at, shape, dims in found if at >= 0 and shape[at] == length]


def _finished(
  rule: Rule, results: _Given, chosen: dict[str, Axes], axes: DeviceAxes
) -> ShardingPlan:
  summed = sum((chosen[factor] for factor in rule.contracted()), ())
  sharded = lambda arrays: tuple(tuple(chosen[name] for name in names) for names in arrays)
  partial = sharded(rule.results)

  def scatter(wanted: Axes, taken: Axes, length: int) -> Axes:
    ours = tuple(axis for axis in wanted if axis in summed)
    return ours if length % axes.count(taken + ours) == 0 else ()

  arrays = zip(results.shardings, partial, results.shapes, strict=True)
  scattered = tuple(tuple(map(scatter, *array)) for array in arrays)
  return ShardingPlan(sharded(rule.operands), partial, scattered, summed)
