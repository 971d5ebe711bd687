"""Types of command-line options that more than one benchmark has."""

import argparse


def positive(text: str) -> int:
  """Reads an integer above zero."""
  if (number := int(text)) < 1:
    raise argparse.ArgumentTypeError(f"must be at least 1; got {text}")
  return number


def not_negative(text: str) -> int:
  """Reads an integer that is zero or more."""
  if (number := int(text)) < 0:
    raise argparse.ArgumentTypeError(f"must be at least 0; got {text}")
  return number
