"""Programs with known GEMMs, for every transformation that models use.

Each case is a function, its arguments, and the GEMMs of one step: a count for each module path,
role and size.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_fp8 as fp8
from lm.config import PRESETS
from lm.step import create_state, train_step

BF16 = jnp.bfloat16
MESH = AbstractMesh((8,), ("data",), axis_types=(AxisType.Auto,))
Rows = Counter[tuple[str, str, int, int, int, int]]


@dataclasses.dataclass(frozen=True)
class Case:
  """A program and its GEMMs as ``(path, role, batch, m, n, k)``, sizes m and n in any order."""

  fn: Callable[..., Any]
  args: tuple[Any, ...]
  rows: Rows


def spec(*shape, dtype=BF16, sharding=None):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def row(path, role, m, n, k, batch=1):
  return (path, role, batch, *sorted((m, n)), k)


def three(path, m, n, k, batch=1, *, dgrad=True):
  """Returns the GEMMs of ``[m, k] @ [k, n]`` and its gradients."""
  rows = [row(path, "fprop", m, n, k, batch), row(path, "wgrad", k, n, m, batch)]
  return [*rows, row(path, "dgrad", m, k, n, batch)] if dgrad else rows


def mean_square(model):
  """A loss with a data-dependent cotangent, which the compiler can't constant-fold."""
  return lambda variables, *xs: jnp.mean(model.apply(variables, *xs).astype(jnp.float32) ** 2)


def shapes(model, *xs):
  return jax.eval_shape(model.init, jax.random.key(0), *xs)


def inner(dot_general_cls, name):
  """Returns the path that the module of a contraction adds to the path of its layer."""
  return f"{name}/{dot_general_cls.__name__}_0" if dot_general_cls else name


def dense(cls, m=512, n=256, k=128):
  model = nn.Dense(n, use_bias=False, dtype=BF16, dot_general_cls=cls)
  x = spec(m, k)
  path = inner(cls, "Dense")
  fn = jax.grad(mean_square(model), argnums=(0, 1))
  return Case(fn, (shapes(model, x), x), Counter(three(path, m, n, k)))


class MLP(nn.Module):
  """Two Dense layers. The input of the first has no gradient."""

  cls: Any = None
  hidden: int = 512
  out: int = 256

  @nn.compact
  def __call__(self, x):
    up = nn.Dense(self.hidden, use_bias=False, dtype=BF16, dot_general_cls=self.cls, name="up")
    down = nn.Dense(self.out, use_bias=False, dtype=BF16, dot_general_cls=self.cls, name="down")
    return down(nn.gelu(up(x)))


def mlp(cls, m=1024, k=128):
  model = MLP(cls)
  x = spec(m, k)
  up, down = (inner(cls, f"MLP/{name}") for name in ("up", "down"))
  rows = [*three(up, m, 512, k, dgrad=False), *three(down, m, 256, 512)]
  return Case(jax.value_and_grad(mean_square(model)), (shapes(model, x), x), Counter(rows))


class Residual(nn.Module):
  """A block with the signature for ``nn.scan``."""

  cls: Any = None

  @nn.compact
  def __call__(self, x, _):
    return x + MLP(self.cls, out=x.shape[-1], name="mlp")(x), None


class Stack(nn.Module):
  """Blocks with scan and remat."""

  cls: Any = None
  layers: int = 3

  @nn.compact
  def __call__(self, x):
    axes = {"params": 0, fp8.OVERWRITE_WITH_GRADIENT: 0}
    block = nn.remat(Residual, prevent_cse=False)
    scanned = nn.scan(block, variable_axes=axes, split_rngs={"params": True}, length=self.layers)
    return scanned(self.cls, name="layers")(x, None)[0]


def scan_remat(cls, m=1024, k=128, layers=3):
  model = Stack(cls, layers)
  x = spec(m, k)
  up, down = (inner(cls, f"Stack/layers/mlp/{name}") for name in ("up", "down"))
  one = [*three(up, m, 512, k), *three(down, m, k, 512), row(up, "fprop again", m, 512, k)]
  rows = Counter({each: layers * times for each, times in Counter(one).items()})
  return Case(jax.grad(mean_square(model)), (shapes(model, x), x), rows)


EINSUMS = {None: None, fp8.Fp8DotGeneral: fp8.Fp8Einsum, nn.Fp8DirectDotGeneralOp: nn.Fp8Einsum}


class Experts(nn.Module):
  """The two products of a mixture of experts, with experts along the batch dimension."""

  cls: Any = None

  @nn.compact
  def __call__(self, x, kernel):
    if self.cls is None:
      return jnp.einsum("ebk,ekn->ebn", x, kernel)
    return self.cls(name="einsum")("ebk,ekn->ebn", x, kernel)


def moe(cls, experts=4, m=256, n=128, k=64):
  model = Experts(EINSUMS[cls])
  x, kernel = spec(experts, m, k), spec(experts, k, n)
  path = "Experts" if cls is None else "Experts/einsum"
  fn = jax.grad(mean_square(model), argnums=(0, 1, 2))
  return Case(fn, (shapes(model, x, kernel), x, kernel), Counter(three(path, m, n, k, experts)))


def transformer(cls, remat=False):
  """Returns the train step of ``benchmarks/train_lm.py``."""
  preset = PRESETS["tiny"]
  config = dataclasses.replace(preset, shape=dataclasses.replace(preset.shape, remat=remat))
  state = jax.eval_shape(lambda: create_state(config, "bf16" if cls is None else "delayed"))
  windows = spec(config.batch_size, config.seq_len + 1, dtype=jnp.uint8)
  fn = jax.jit(train_step, donate_argnums=0)
  return Case(fn, (state, windows), transformer_rows(config, cls))


def transformer_rows(config, cls):
  """Projections, both attention products and the head; remat recomputes all but ``down``."""
  shape, tokens = config.shape, config.batch_size * config.seq_len
  heads = shape.head_dim * shape.kv_heads
  sizes = dict.fromkeys(("query", "out"), (shape.d_model, shape.d_model))
  sizes |= dict.fromkeys(("key", "value"), (shape.d_model, heads))
  sizes |= dict.fromkeys(("gate", "up"), (shape.d_model, shape.d_ff))
  sizes["down"] = (shape.d_ff, shape.d_model)
  assert sizes == shape.projections
  one = []
  for name, (k, n) in sizes.items():
    path = inner(cls, f"Transformer/layers/{name}")
    one += three(path, tokens, n, k)
    one += [row(path, "fprop again", tokens, n, k)] if shape.remat and name != "down" else []
  one += attention_rows(config)
  rows = Counter({each: shape.layers * times for each, times in Counter(one).items()})
  return rows + Counter(three("Transformer/head", tokens, shape.vocabulary, shape.d_model))


def attention_rows(config):
  """Products of attention, with the queries of a group stacked; heads of values come first."""
  shape, length, batch = config.shape, config.seq_len, config.batch_size * config.shape.kv_heads
  queries = length * shape.heads // shape.kv_heads
  path, products = "Transformer/layers", []
  for m, n, k in ((queries, length, shape.head_dim), (shape.head_dim, queries, length)):
    products += three(path, m, n, k, batch)
    products += [row(path, "fprop again", m, n, k, batch)] if shape.remat else []
  return products


def sharded(tree, where):
  """Abstract arrays on eight devices; ``where`` maps module names to kernel partitions."""

  def place(path, leaf):
    names = [getattr(key, "key", None) for key in path]
    partition = where(names[-2]) if names[-1] == "kernel" else P()
    return spec(*leaf.shape, dtype=leaf.dtype, sharding=NamedSharding(MESH, partition))

  return jax.tree_util.tree_map_with_path(place, tree)


def fsdp(cls, m=8192, k=128):
  """Shards kernels and batch over eight devices; each multiplies an eighth of the rows."""
  case = mlp(cls, m, k)
  x = spec(m, k, sharding=NamedSharding(MESH, P("data")))
  args = (sharded(case.args[0], lambda name: P("data")), x)
  return Case(case.fn, args, mlp(cls, m // 8, k).rows)


def tensor_parallel(cls, m=1024, k=128):
  """Shards the hidden dimension over eight devices."""
  case = mlp(cls, m, k)
  kernels = {"up": P(None, "data"), "down": P("data", None)}
  args = (sharded(case.args[0], kernels.__getitem__), spec(m, k, sharding=NamedSharding(MESH, P())))
  up, down = (inner(cls, f"MLP/{name}") for name in ("up", "down"))
  rows = [*three(up, m, 512 // 8, k, dgrad=False), *three(down, m, 256, 512 // 8)]
  return Case(case.fn, args, Counter(rows))


CASES = {
  "dense": dense,
  "square": lambda cls: dense(cls, 256, 256, 256),
  "mlp": mlp,
  "scan_remat": scan_remat,
  "moe": moe,
  "fsdp": fsdp,
  "tensor_parallel": tensor_parallel,
  "transformer": transformer,
}
