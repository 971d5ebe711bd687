"""Name scopes that tell ``explain`` what a kernel of flax_fp8 computes.

To XLA, a Pallas kernel is a custom call of unknown content. A name scope around its call, which the
compiled program keeps, says what it is:

  with jax.named_scope(scopes.GEMM):
    out = kernel(a, b, a_scales, b_scales)
"""

from __future__ import annotations

import re
import urllib.parse

GEMM = "fp8_gemm"
QUANTIZE = "fp8_quantize"

# Other characters are percent-encoded: slashes and parentheses have a meaning in name stacks.
_SAFE = " .,:;=+"
_PLAIN = re.compile(r"plain_jax\(([^()]*)\)$")


def plain_jax(reason: str) -> str:
  """Returns the name of the scope for a block-scaled product that plain JAX computes.

  Args:
    reason: why no kernel computes it, in any characters.

  Returns:
    The name, for ``jax.named_scope``. It goes inside the scope ``GEMM``.

  Example:
    >>> plain_jax("JAX 0.8.1 is older than 0.10")
    'plain_jax(JAX 0.8.1 is older than 0.10)'
    >>> plain_jax("K = 100, not a multiple of 128 (a/b)")
    'plain_jax(K = 100, not a multiple of 128 %28a%2Fb%29)'
  """
  return f"plain_jax({urllib.parse.quote(reason, safe=_SAFE)})"


def plain_reason(scope: str) -> str | None:
  """Returns the reason in a name from ``plain_jax``; None for any other name.

  Example:
    >>> plain_reason("plain_jax(K = 100, not a multiple of 128 %28a%2Fb%29)")
    'K = 100, not a multiple of 128 (a/b)'
  """
  found = _PLAIN.fullmatch(scope)
  return urllib.parse.unquote(found[1]) if found else None
