"""Checks how a training step handles FP8 state."""

from flax_fp8.training.check.check import check_train_step
from flax_fp8.training.check.report import TrainStepReport

__all__ = ["TrainStepReport", "check_train_step"]
