"""Train Flax Linen models in FP8. The guides are in ``docs/``. Start with these names.

- ``Fp8DotGeneral`` runs one layer in FP8: ``nn.Dense(n, dot_general_cls=fp8.Fp8DotGeneral)``.
- ``fp8_linear_layers`` converts the linear layers of an existing model.
- ``TrainState`` applies gradients to parameters and stores the new FP8 state.
- ``value_and_grad`` is ``jax.value_and_grad`` for variables that hold FP8 state.
- ``assert_fp8`` fails unless every GEMM of a compiled program is FP8; ``explain`` lists them.
"""

from flax_fp8 import fp8_ops, ops, remat_policies
from flax_fp8.capability import capability
from flax_fp8.explain import GpuTarget, Report, assert_fp8, explain
from flax_fp8.formats import Format
from flax_fp8.fp8_ops.from_flax import from_flax_fp8_ops
from flax_fp8.kernels import use_kernels
from flax_fp8.linen import (
  ConversionReport,
  Fp8Config,
  Fp8DotGeneral,
  Fp8Einsum,
  Fp8FusedQKV,
  Fp8SwiGLU,
  cond,
  fp8_linear_layers,
  freeze_for_inference,
  scan,
  vmap,
)
from flax_fp8.linen.state import OVERWRITE_WITH_GRADIENT
from flax_fp8.meta_dtype import fp32_max_grad
from flax_fp8.ops.gated import geglu, reglu, swiglu
from flax_fp8.recipes import (
  RECIPES,
  DelayedScaling,
  Float8BlockScaling,
  Float8CurrentScaling,
  Float8RowwiseScaling,
  MXFP8BlockScaling,
  Recipe,
  get_recipe,
)
from flax_fp8.training import (
  DynamicScale,
  Stats,
  TrainState,
  TrainStepReport,
  accumulate_gradients,
  add_metrics,
  apply_updates,
  as_max_grad,
  calibrate,
  check_train_step,
  downgrade_variables,
  drop_metrics,
  grad,
  partition_for_grad_overwrite,
  restore_checkpoint,
  save_checkpoint,
  stats,
  upgrade_variables,
  value_and_grad,
)

__version__ = "0.1.0"

__all__ = [
  # Modules
  "Fp8DotGeneral",
  "Fp8Einsum",
  "Fp8FusedQKV",
  "Fp8SwiGLU",
  "cond",
  "scan",
  "vmap",
  # Activations
  "geglu",
  "reglu",
  "swiglu",
  # Models
  "ConversionReport",
  "Fp8Config",
  "fp8_linear_layers",
  "freeze_for_inference",
  # Recipes
  "DelayedScaling",
  "Float8CurrentScaling",
  "Float8RowwiseScaling",
  "Float8BlockScaling",
  "MXFP8BlockScaling",
  "Format",
  "RECIPES",
  "Recipe",
  "get_recipe",
  # Kernels
  "use_kernels",
  # State
  "OVERWRITE_WITH_GRADIENT",
  "as_max_grad",
  "fp32_max_grad",
  "grad",
  "value_and_grad",
  # Training
  "DynamicScale",
  "TrainState",
  "accumulate_gradients",
  "apply_updates",
  "partition_for_grad_overwrite",
  # Checkpoints
  "save_checkpoint",
  "restore_checkpoint",
  "upgrade_variables",
  "downgrade_variables",
  "from_flax_fp8_ops",
  # Diagnostics
  "Stats",
  "add_metrics",
  "calibrate",
  "drop_metrics",
  "stats",
  # Proof
  "TrainStepReport",
  "check_train_step",
  "GpuTarget",
  "Report",
  "assert_fp8",
  "capability",
  "explain",
  # Namespaces
  "fp8_ops",
  "ops",
  "remat_policies",
]
