"""The public names: which they are, and that each is documented."""

import importlib
import inspect
import pkgutil
from pathlib import Path

import jax
import pytest

import flax_fp8 as fp8
from flax_fp8 import fp8_ops

ROOT = Path(__file__).parents[1]
NAMES = {
  "ConversionReport", "DelayedScaling", "DynamicScale", "Float8BlockScaling",
  "Float8CurrentScaling", "Float8RowwiseScaling", "Format",
  "Fp8Config", "Fp8DotGeneral", "Fp8Einsum", "Fp8FusedQKV", "Fp8SwiGLU", "GpuTarget",
  "MXFP8BlockScaling", "OVERWRITE_WITH_GRADIENT", "RECIPES", "Recipe", "Report", "Stats",
  "TrainState", "TrainStepReport", "accumulate_gradients", "add_metrics", "apply_updates",
  "as_max_grad", "assert_fp8",
  "calibrate", "capability", "check_train_step", "cond", "downgrade_variables", "drop_metrics",
  "explain",
  "fp32_max_grad",
  "fp8_linear_layers", "fp8_ops", "freeze_for_inference", "from_flax_fp8_ops", "get_recipe",
  "grad", "ops", "partition_for_grad_overwrite", "restore_checkpoint", "save_checkpoint", "scan",
  "remat_policies", "stats", "upgrade_variables", "use_kernels", "value_and_grad", "vmap",
}  # fmt: skip
MODULES = sorted(m.name for m in pkgutil.walk_packages(fp8.__path__, "flax_fp8."))
RULES = ("_fwd", "_bwd", "_jvp")  # differentiation rules that Flax's namespace exports


def documented(module):
  """Maps names to the functions and classes of a namespace that this package defines."""
  values = {name: getattr(module, name) for name in module.__all__}
  return {
    name: value
    for name, value in values.items()
    if (inspect.isclass(value) or callable(value)) and not name.endswith(RULES)
    and getattr(value, "__module__", "").startswith("flax_fp8")
  }  # fmt: skip


EXPORTED = {**documented(fp8), **{f"fp8_ops.{k}": v for k, v in documented(fp8_ops).items()}}
ALIASES = {"fp8_ops.fp8_meta_dtype", "fp8_ops.fp8_meta_dtype_wrapper", "fp8_ops.Fp8MetaTyRules"}


def test_names_are_pinned():
  assert set(fp8.__all__) == NAMES
  assert fp8.OVERWRITE_WITH_GRADIENT == "_overwrite_with_gradient"


@pytest.mark.parametrize("name", sorted(EXPORTED.keys() - ALIASES - {"Recipe"}))
def test_docstrings_have_the_sections(name):
  value = EXPORTED[name]
  doc = inspect.getdoc(value)
  assert doc, f"{name} has no docstring"
  sections = ["Example:", "References:"]
  if not inspect.isclass(value) and not isinstance(value, jax.custom_vjp):
    sections += ["Args:", "Returns:"]
  missing = [section for section in sections if section not in doc]
  assert not missing, f"{name} lacks {missing}"
  summary = doc.splitlines()[0]
  assert summary.endswith((".", ":"))


@pytest.mark.parametrize("name", ["flax_fp8", *MODULES])
def test_modules_open_with_their_idea(name):
  doc = importlib.import_module(name).__doc__
  assert doc
  assert len(doc.strip().splitlines()) <= 8


@pytest.mark.parametrize("name", MODULES)
def test_files_stay_small(name):
  source = Path(importlib.import_module(name).__file__ or "").read_text()
  assert len(source.splitlines()) <= 400


@pytest.mark.parametrize("name", sorted(NAMES))
def test_readme_names_every_symbol(name):
  assert name in (ROOT / "README.md").read_text()


def test_version_is_in_the_changelog():
  assert f"## [{fp8.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
