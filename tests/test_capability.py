"""Which devices support which formats, and that XLA agrees when it compiles for them."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import SingleDeviceSharding

import flax_fp8 as fp8
from flax_fp8 import formats

FORMATS = {
  "HYBRID": fp8.Format.HYBRID,
  "E4M3": fp8.Format.E4M3,
  "HYBRID_FNUZ": fp8.Format.HYBRID_FNUZ,
  "mixed": fp8.Format(formats.E4M3, formats.E5M2_FNUZ),
  "E5M2": fp8.Format(formats.E5M2, formats.E5M2),
  "E5M2 forward": fp8.Format(formats.E5M2, formats.E4M3),
}


@dataclasses.dataclass
class Device:
  """The attributes of a JAX device that ``capability`` reads.

  It stands for devices that no plugin in the test environment can describe: AMD GPUs, TPUs, and
  NVIDIA GPUs that ``GpuTarget`` does not know. The fixture ``described`` makes the others.
  """

  platform: str
  device_kind: str
  compute_capability: str | None = None


STAND_INS = {
  "V100": Device("gpu", "Tesla V100", "7.0"),
  "MI250": Device("gpu", "AMD MI250", "gfx90a"),
  "MI300": Device("gpu", "AMD MI300X", "gfx942:sramecc+:xnack-"),
  "MI355": Device("gpu", "AMD MI355X", "gfx950"),
  "RX9070": Device("gpu", "AMD Radeon RX 9070", "gfx1201"),
  "TPU": Device("tpu", "TPU v4"),
}
DESCRIBED = ("a100", "l40s", "h100", "h200", "b200")
OCP, FNUZ = {"any", "HYBRID", "E4M3"}, {"any", "HYBRID_FNUZ"}
QUESTIONS = {
  "any": {},
  **{name: {"fp8_format": fp8_format} for name, fp8_format in FORMATS.items()},
  "MXFP8": {"recipe": fp8.MXFP8BlockScaling()},
}
ANSWERS = {
  "V100": set(),
  "a100": set(),
  "l40s": OCP,
  "h100": OCP,
  "h200": OCP,
  "b200": OCP | {"MXFP8"},
  "MI250": set(),
  "MI300": FNUZ,
  "MI355": OCP | {"MXFP8"},
  "RX9070": OCP,
  "TPU": set(),
}


@pytest.fixture
def find(request):
  described = lambda name: request.getfixturevalue("described")(name)
  return lambda name: STAND_INS[name] if name in STAND_INS else described(name)


@pytest.mark.parametrize("name", ANSWERS)
def test_by_device(find, name):
  device = find(name)
  answers = {key: fp8.capability(device, **question) for key, question in QUESTIONS.items()}
  assert {key for key, (supported, _) in answers.items() if supported} == ANSWERS[name]
  assert all(reason.startswith(device.device_kind) for _, reason in answers.values())


REASONS = {
  "none": ("a100", "any", r"A100.* \(compute capability 8.0\): no FP8 matrix units known; .* 8.9"),
  "AMD": ("MI250", "any", r"gfx90a\): no FP8 matrix units known; .* gfx94x"),
  "present": ("h100", "HYBRID", r"H100 .*compute capability 9.0\): FP8 matrix units present"),
  "format": ("h100", "HYBRID_FNUZ", "e4m3fn and float8_e5m2, not float8_e4m3fnuz or .*e5m2fnuz"),
  "one format": ("h100", "mixed", "multiply float8_e4m3fn and float8_e5m2, not float8_e5m2fnuz$"),
  "fnuz": ("MI300", "HYBRID", "multiply float8_e4m3fnuz and float8_e5m2fnuz, not float8_e4m3fn or"),
  "pair": ("h100", "E5M2", "fprop would multiply float8_e5m2 by float8_e5m2, .* must be E4M3"),
  "scales": ("h100", "MXFP8", r"do not apply float8_e8m0fnu block scales; .* 10.0 \(Blackwell\)"),
  "platform": ("TPU", "any", "TPU v4: no FP8 matrix units known on platform 'tpu'"),
}


@pytest.mark.parametrize(("name", "question", "match"), REASONS.values(), ids=REASONS)
def test_reasons(find, name, question, match):
  _, reason = fp8.capability(find(name), **QUESTIONS[question])
  with pytest.raises(ValueError, match=match):
    raise ValueError(reason)


def is_fp8_gemm(device, lhs, rhs):
  """Tells whether XLA emits an FP8 GEMM for a product on a device that need not be attached."""
  place = SingleDeviceSharding(device)
  args = [jax.ShapeDtypeStruct((256, 256), f.dtype, sharding=place) for f in (lhs, rhs)]
  dot = lambda x, y: lax.dot(x, y, preferred_element_type=jnp.float32)
  # Autotuning would time kernels on the device, and Triton kernels have no recognizable name.
  options = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
  compiled = jax.jit(dot).lower(*args).compile(compiler_options=options)
  program = compiled.as_text() or compiled.runtime_executable().serialize().decode("latin-1")
  assert "__cublas$" in program
  return "__cublas$lt$matmul$f8" in program


@pytest.mark.slow
@pytest.mark.parametrize("name", DESCRIBED)
def test_the_compiler_agrees(described, name):
  for fp8_format in FORMATS.values():
    forward, backward = fp8_format.forward, fp8_format.backward
    all_fp8 = all(is_fp8_gemm(described(name), f, forward) for f in (forward, backward))
    assert fp8.capability(described(name), fp8_format=fp8_format)[0] == all_fp8, fp8_format


@pytest.mark.parametrize("name", ["a100", "h100", "b200"])
@pytest.mark.parametrize("fp8_format", FORMATS.values(), ids=FORMATS)
def test_a_recipe_asks_for_its_formats(described, name, fp8_format):
  recipe = fp8.DelayedScaling(fp8_format=fp8_format)
  device = described(name)
  assert fp8.capability(device, recipe=recipe) == fp8.capability(device, fp8_format=fp8_format)


class TestDefaultDevice:
  def test_is_the_first(self):
    assert fp8.capability() == fp8.capability(jax.devices()[0])

  def test_is_that_of_the_context(self, described):
    with jax.default_device(described("a100")):
      assert fp8.capability() == fp8.capability(described("a100"))

  def test_is_that_of_a_platform(self):
    with jax.default_device("cpu"):
      assert fp8.capability() == fp8.capability(jax.devices("cpu")[0])


@pytest.mark.parametrize("question", QUESTIONS)
def test_cpu_emulates_and_says_so(question):
  supported, reason = fp8.capability(jax.devices("cpu")[0], **QUESTIONS[question])
  assert supported
  assert "emulated" in reason


WRONG = {
  "device": ({"device": "cpu"}, "device must be a JAX device; got device='cpu'. Pass one of"),
  "format": ({"fp8_format": "HYBRID"}, "fp8_format must be a Format; got fp8_format='HYBRID'"),
  "recipe": ({"recipe": "delayed"}, "recipe must be a recipe, such as .*; got recipe='delayed'"),
  "class": (
    {"recipe": fp8.DelayedScaling},
    "recipe must be .* got recipe=<class .*Pass an instance",
  ),
  "both": (
    {"recipe": fp8.DelayedScaling(), "fp8_format": fp8.Format.E4M3},
    "a recipe has its own formats; got both fp8_format=.* and recipe=.*. Pass only one of the two",
  ),
}


@pytest.mark.parametrize(("arguments", "match"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(arguments, match):
  with pytest.raises(TypeError, match=f"capability: {match}"):
    fp8.capability(**arguments)
