"""Defines a computation that has both a kernel and plain JAX code that the kernel must equal."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, ClassVar

import jax


class Kernel(abc.ABC):
  """A kernel and its plain code.

  Subclasses are frozen dataclasses whose fields are strings, numbers, and tuples of them: a program
  for several devices contains them as JSON.

  Attributes:
    name: name scope of the computation, by which ``explain`` knows it.
    rule: letters of the dimensions of all operands and results, for example ``"mk nk -> mn"``.
      Dimensions with the same letter are sharded alike.
  """

  name: ClassVar[str]
  rule: ClassVar[str]

  @abc.abstractmethod
  def plain(self, *args: jax.Array) -> tuple[jax.Array, ...]:
    """Computes in plain JAX."""

  @abc.abstractmethod
  def run(self, *args: jax.Array) -> tuple[jax.Array, ...]:
    """Computes with the kernel, on one GPU."""

  @abc.abstractmethod
  def refusal(self, *args: Any) -> str:
    """Returns why the kernel can't take arguments of these shapes and dtypes; empty if it can."""

  @abc.abstractmethod
  def batch(
    self, size: int, args: Sequence[jax.Array], is_mapped: Sequence[bool]
  ) -> tuple[jax.Array, ...]:
    """Computes for arguments with a mapped leading axis, with one call.

    Args:
      size: size of the mapped axis.
      args: arguments; those that are mapped have the axis first.
      is_mapped: whether each argument is mapped.

    Returns:
      Results with the mapped axis first.
    """

  def using(self, used: Sequence[bool]) -> Kernel:
    """Returns the kernel for a program that uses only some results. Others may have any value."""
    del used
    return self
