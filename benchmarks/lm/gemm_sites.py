"""Which GEMMs a function asks for, counted in its jaxpr by the dtypes of the two operands.

A ``dot_general`` inside a scan counts once for each of its iterations. A ``while`` loop's length is
unknown, so its body counts once. This is what the program asks for, before any compiler.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

Sites = Counter[str]


def gemm_sites(jaxpr: Any) -> Sites:
  """Counts the ``dot_general`` equations of a jaxpr and of all jaxprs inside it.

  Args:
    jaxpr: a ``Jaxpr`` or ``ClosedJaxpr``.

  Returns:
    Counts keyed by ``"lhs_dtype x rhs_dtype"``.
  """
  sites: Sites = Counter()
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      sites[" x ".join(str(operand.aval.dtype) for operand in equation.invars[:2])] += 1
    times = equation.params["length"] if equation.primitive.name == "scan" else 1
    for inner in inner_jaxprs(equation.params.values()):
      for operands, count in gemm_sites(inner).items():
        sites[operands] += times * count
  return sites


def inner_jaxprs(values: Iterable[Any]) -> Iterator[Any]:
  """Finds the jaxprs among an equation's parameters, also those held in tuples and lists."""
  for value in values:
    if hasattr(value, "eqns"):
      yield value
    elif isinstance(value, tuple | list):
      yield from inner_jaxprs(value)


def fp8_sites(sites: Sites) -> int:
  """Counts the GEMMs whose two operands are both FP8."""
  return sum(
    count
    for operands, count in sites.items()
    if all(dtype.startswith("float8_") for dtype in operands.split(" x "))
  )
