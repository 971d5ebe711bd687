"""What a program for a GPU becomes: kernels, or plain JAX with a reason; alone and sharded."""

import functools
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_fp8 as fp8
from flax_fp8 import ops, platforms
from flax_fp8.kernels import call

NEEDS_KERNELS = pytest.mark.skipif(
  jax.__version_info__ < (0, 10, 2), reason="the kernels need JAX 0.10.2"
)
TOKENS, WIDE, NARROW = 1024, 512, 256
MESH = AbstractMesh((8,), ("data",), axis_types=(AxisType.Auto,))


def dense(x, w, fp8_format=fp8.Format.E4M3):
  recipe = fp8.Float8BlockScaling(fp8_format=fp8_format)
  dims = (((1,), (0,)), ((), ()))
  return ops.dot_general(x, w, dims, recipe=recipe, state=ops.init_state(recipe))


def loss(w, x):
  return jnp.mean(jnp.square(dense(x, w).astype(jnp.float32)))


def array(*shape, dtype=jnp.bfloat16, spec=None):
  sharding = None if spec is None else NamedSharding(MESH, spec)
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def quantized_bytes(report):
  return sum(total.bytes for total in report.classes if total.kind.name == "QUANTIZE")


@NEEDS_KERNELS
def test_a_forward_pass_writes_one_layout():
  """Each element is read as bfloat16 and written once; a scale is 4 bytes for 128 elements."""
  report = fp8.explain(dense, array(TOKENS, WIDE), array(WIDE, NARROW), target="h100")
  kernel = WIDE * NARROW
  scales = 4 * (TOKENS * WIDE // 128 + kernel // 128**2)
  assert quantized_bytes(report) == 3 * (TOKENS * WIDE + kernel) + scales
  assert report.launches == 3


@NEEDS_KERNELS
def test_fsdp_gathers_kernels_in_fp8():
  """Each device quantizes its share of the weights; gradients are scattered."""
  w, x = array(8 * WIDE, NARROW, spec=P("data")), array(8 * TOKENS, 8 * WIDE, spec=P("data"))
  step = jax.jit(jax.grad(loss), out_shardings=w.sharding)
  report = fp8.explain(step, w, x, target="h100", mesh=MESH)
  assert {gemm.kernel for gemm in report.gemms} == {"Mosaic GPU"}
  assert {gemm.extent.k for gemm in report.gemms} == {8 * WIDE, TOKENS}
  sent = {(each.kind, each.dtype) for each in report.collectives}
  assert sent == {("all-gather", "f8e4m3fn"), ("all-gather", "f32"), ("reduce-scatter", "bf16")}


@NEEDS_KERNELS
def test_64_bit_mode_changes_nothing():
  """Indices in a kernel stay int32."""
  with jax.enable_x64(True):
    report = fp8.explain(jax.grad(loss), array(WIDE, NARROW), array(TOKENS, WIDE), target="h100")
  assert {gemm.kernel for gemm in report.gemms} == {"Mosaic GPU"}


@NEEDS_KERNELS
def test_mixed_formats_need_a_newer_jax():
  def step(x, w):
    return jax.vjp(functools.partial(dense, fp8_format=fp8.Format.HYBRID), x, w)[1](x[:, :NARROW])

  report = fp8.explain(step, array(TOKENS, WIDE), array(WIDE, NARROW), target="h100")
  notes = {gemm.kernel: gemm.notes for gemm in report.gemms}
  if jax.__version_info__ >= (0, 11):
    assert notes == {"Mosaic GPU": ()}
  else:
    (note,) = notes["cuBLASLt FP8"]
    assert "multiplies no E5M2 by E4M3" in note


def module(kind="", *, capability=None, for_export=False):
  """Returns the part of a lowering context that tells the GPU of a program."""
  device = types.SimpleNamespace(device_kind=kind)
  if capability is not None:
    device.compute_capability = capability
  rules = (platforms.described_gpu(kind),) if for_export and kind else None
  parameters = types.SimpleNamespace(override_lowering_rules=rules, for_export=for_export)
  context = types.SimpleNamespace(num_devices=1, device_assignment=(device,))
  return types.SimpleNamespace(axis_context=context, lowering_parameters=parameters)


@pytest.mark.parametrize(
  ("kind", "options"),
  [
    ("NVIDIA H100 80GB HBM3", {}),
    ("NVIDIA H200", {"for_export": True}),
    ("NVIDIA GH200 480GB", {"for_export": True}),
    ("NVIDIA H800", {}),
    ("a card to come", {"capability": "9.0"}),
  ],
)
def test_hopper(kind, options):
  assert platforms.hopper_refusal(module(kind, **options)) == ""


@pytest.mark.parametrize(
  ("kind", "options", "reason"),
  [
    ("NVIDIA B200", {"for_export": True}, "there is no kernel for NVIDIA B200"),
    ("NVIDIA GB200", {}, "there is no kernel for NVIDIA GB200"),
    ("NVIDIA H100 80GB HBM3", {"capability": "8.9"}, "there is no kernel for NVIDIA H100"),
    ("", {"for_export": True}, "an exported program may run on any GPU"),
  ],
)
def test_other_gpus(kind, options, reason):
  assert platforms.hopper_refusal(module(kind, **options)).startswith(reason)


@pytest.mark.parametrize(
  ("theirs", "ours"),
  [("No PTX compilation provider is available.", "pip install nvidia-cuda-nvcc"), ("other", "oth")],
)
def test_a_machine_without_ptxas(theirs, ours, monkeypatch):
  def run(*args):
    raise RuntimeError(theirs)

  monkeypatch.setattr(call, "_jitted", lambda kernel: run)
  monkeypatch.setattr(call, "_refusal", lambda *_: "")
  step = jax.jit(dense).trace(array(8, 128), array(128, 8))
  with pytest.raises(RuntimeError, match=ours):
    step.lower(lowering_platforms=("cuda",))
