"""On a GPU, the compiled steps of an arm are searched for FP8 GEMMs before the arm is trained."""

import jax
import jax.numpy as jnp

import flax_fp8 as fp8
from lm.config import TrainConfig
from trials.arms import FLAX, GATES, Arm
from trials.trial import initializer, stretch


def explain_arm(config: TrainConfig, arm: Arm, target: str | None = None) -> fp8.Report:
  """Compiles the steps of a gate, as shapes, for the attached or a described GPU."""
  carry = jax.eval_shape(initializer(config, arm), jax.random.key(0))
  shape = (config.steps // GATES, config.batch_size, config.seq_len + 1)
  windows = jax.ShapeDtypeStruct(shape, jnp.uint8)
  run = stretch(config, arm, in_fp8=True)
  return fp8.explain(run, carry, jnp.int32(0), windows, jax.random.key(0), target=target)


def count_fp8_gemms(config: TrainConfig, arm: Arm, target: str | None = None) -> str:
  """Says how many GEMMs are FP8.

  Raises:
    AssertionError: none of an FP8 arm is, or one of a BF16 arm is.
  """
  report = explain_arm(config, arm, target)
  is_fp8 = arm.config is not None or arm == FLAX
  if is_fp8 != (report.fp8_gemms > 0):
    wanted = "some" if is_fp8 else "no"
    raise AssertionError(
      f"convergence: arm {arm.name!r} must have {wanted} FP8 GEMMs on {report.device_kind}; got "
      f"{report.fp8_gemms} of {report.total_gemms}. Set --xla_gpu_enable_triton_gemm=false in "
      "XLA_FLAGS, and print fp8.explain of the step."
    )
  return f"{report.fp8_gemms} of {report.total_gemms} GEMMs are FP8"
