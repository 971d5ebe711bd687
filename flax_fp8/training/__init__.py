"""Training utilities: differentiation, train states, checkpoints, calibration and statistics.

FP8 state is overwritten by its gradient in each step. The optimizer updates parameters only.
"""

from flax_fp8.training.accumulate import accumulate_gradients
from flax_fp8.training.calibrate import calibrate
from flax_fp8.training.check import TrainStepReport, check_train_step
from flax_fp8.training.checkpoint import restore_checkpoint, save_checkpoint
from flax_fp8.training.downgrade import downgrade_variables
from flax_fp8.training.loss_scale import DynamicScale
from flax_fp8.training.max_grad import as_max_grad, grad, value_and_grad
from flax_fp8.training.metrics import add_metrics, drop_metrics
from flax_fp8.training.state import apply_updates, partition_for_grad_overwrite
from flax_fp8.training.stats import Stats, stats
from flax_fp8.training.train_state import TrainState
from flax_fp8.training.upgrade import upgrade_variables

__all__ = [
  "DynamicScale",
  "Stats",
  "TrainState",
  "TrainStepReport",
  "accumulate_gradients",
  "add_metrics",
  "apply_updates",
  "as_max_grad",
  "calibrate",
  "check_train_step",
  "downgrade_variables",
  "drop_metrics",
  "grad",
  "partition_for_grad_overwrite",
  "restore_checkpoint",
  "save_checkpoint",
  "stats",
  "upgrade_variables",
  "value_and_grad",
]
