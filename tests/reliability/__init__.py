"""Experiments on reliability. Each is a command with a recorded result; its small form is a test.

    python -m tests.reliability.kill_and_resume --kills 20

The results are in ``benchmarks/results``. ``test_reliability.py`` runs each with small sizes.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
