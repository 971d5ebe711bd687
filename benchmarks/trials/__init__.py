"""The pieces of ``convergence.py``: arms, one trial, trials side by side, statistics, report."""
