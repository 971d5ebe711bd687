"""Tests of the card itself, collected only where a GPU is attached and JAX may use it.

``JAX_PLATFORMS=cuda,cpu python -m pytest -n 1 tests/gpu``
"""

import jax

collect_ignore_glob = [] if jax.default_backend() == "gpu" else ["test_*.py"]
