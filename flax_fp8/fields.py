"""Checks arguments of public functions and classes: numbers, flags, choices, dtypes.

NumPy scalars are accepted and converted to Python scalars, so a dataclass that holds them is
hashable. Arrays do not count as numbers. Errors show arrays by dtype and shape.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_SHOWN = 160


class _Text(str):
  """Text that ``repr`` shows without quotes."""

  __slots__ = ()
  __repr__ = str.__str__


def show(value: Any) -> str:
  """Formats a value for an error: arrays by dtype and shape, long text truncated."""
  is_array = lambda x: hasattr(x, "shape") and hasattr(x, "dtype") and not isinstance(x, np.generic)
  brief = lambda x: _Text(f"{x.dtype}{list(x.shape)}") if is_array(x) else x
  if isinstance(value, type):
    return f"<class {value.__name__!r}>"
  try:
    text = repr(jax.tree.map(brief, value))
  except ValueError:  # dictionary keys that can't be sorted
    return type(value).__name__
  if "rray(" in text:  # an array inside of an object that is not a pytree
    return type(value).__name__
  return cut(text)


def cut(text: Any, limit: int = _SHOWN) -> str:
  """Formats text, such as the message of another error, as one short line."""
  line = " ".join(str(text).split())
  return line if len(line) <= limit else f"{line[:limit]}..."


def integer(owner: str, field: str, value: Any, advice: str, *, least: int = 1) -> int:
  """Returns an integer; raises the same errors as ``number``."""
  holds = lambda x: isinstance(x, numbers.Integral) and int(x) >= least
  return int(number(owner, field, value, f"an integer of at least {least}", holds, advice))


def number(
  owner: str, field: str, value: Any, rule: str, holds: Callable[[Any], bool], advice: str
) -> float:
  """Returns a real number; raises TypeError for other types, ValueError if the rule fails.

  Args:
    owner: the public name that takes the argument.
    field: the name of the argument.
    value: the given value.
    rule: what the value must be, in words.
    holds: tells whether a number meets the rule; must return False for NaN.
    advice: what the user should do.
  """
  is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
  if not is_number or not holds(value):
    raise (ValueError if is_number else TypeError)(
      f"{owner}: {field} must be {rule}; got {field}={show(value)}. {advice}"
    )
  plain: Any = value.item() if isinstance(value, np.generic) else value
  return plain


def flag(owner: str, field: str, value: Any, advice: str = "Pass a bool.") -> bool:
  """Returns a bool; raises TypeError for anything else."""
  if not isinstance(value, bool | np.bool_):
    raise TypeError(f"{owner}: {field} must be True or False; got {field}={show(value)}. {advice}")
  return bool(value)


def choice(owner: str, field: str, value: Any, choices: Sequence[str]) -> None:
  """Raises ValueError unless a value is one of the allowed strings."""
  if not isinstance(value, str) or value not in choices:
    raise ValueError(
      f"{owner}: {field} must be one of {tuple(choices)}; got {field}={show(value)}. Pass one of "
      "these strings."
    )


def function(owner: str, field: str, value: Any, advice: str) -> None:
  """Raises TypeError unless a value is callable."""
  if not callable(value):
    raise TypeError(f"{owner}: {field} must be a function; got {field}={show(value)}. {advice}")


def dtype(owner: str, field: str, value: Any, names: Sequence[str], advice: str) -> Any:
  """Returns a dtype; raises TypeError unless it has one of the given names."""
  try:
    found = jnp.dtype(value)
  except TypeError:
    found = None
  if found is None or found.name not in names:
    raise TypeError(
      f"{owner}: {field} must be one of {', '.join(names)}; got {field}={show(value)}. {advice}"
    )
  return found
