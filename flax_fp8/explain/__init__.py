"""Reports on what the GPU compiler makes of a program, with or without a GPU."""

from flax_fp8.explain.explain import assert_fp8, explain
from flax_fp8.explain.report import Comparison, Report
from flax_fp8.explain.target import GpuTarget

__all__ = ["Comparison", "GpuTarget", "Report", "assert_fp8", "explain"]
