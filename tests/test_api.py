"""The public names: which they are, and that each is documented."""

import importlib
import inspect
import pkgutil
from pathlib import Path

import jax

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
  "fp8_linear_layers", "fp8_ops", "freeze_for_inference", "from_flax_fp8_ops", "geglu",
  "get_recipe",
  "grad", "ops", "partition_for_grad_overwrite", "reglu", "restore_checkpoint", "save_checkpoint",
  "scan", "remat_policies", "stats", "swiglu", "upgrade_variables",
  "use_kernels", "value_and_grad", "vmap",
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


def lacks(name):
  """Yields what the docstring of an exported name lacks."""
  value = EXPORTED[name]
  doc = inspect.getdoc(value) or ""
  sections = ["Example:", "References:"]
  if not inspect.isclass(value) and not isinstance(value, jax.custom_vjp):
    sections += ["Args:", "Returns:"]
  yield from (section for section in sections if section not in doc)
  if not doc.partition("\n")[0].endswith((".", ":")):
    yield "a summary line that ends with a period"


def test_docstrings_have_the_sections():
  names = sorted(EXPORTED.keys() - ALIASES - {"Recipe"})
  assert not {name: missing for name in names if (missing := [*lacks(name)])}


def test_modules_open_with_their_idea_and_stay_small():
  wrong = []
  for name in ["flax_fp8", *MODULES]:
    module = importlib.import_module(name)
    if not 0 < len((module.__doc__ or "").strip().splitlines()) <= 8:
      wrong.append(f"{name}: the docstring must have 1 to 8 lines")
    if len(Path(module.__file__ or "").read_text().splitlines()) > 400:
      wrong.append(f"{name}: the file must have at most 400 lines")
  assert not wrong


def test_version_is_in_the_changelog():
  assert f"## [{fp8.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
