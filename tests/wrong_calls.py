"""Wrong calls of the public API, as data: the call, and the text that the error must have."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

import flax_fp8 as fp8
from flax_fp8 import fp8_ops, ops
from flax_fp8.fields import show

X = np.ones((4, 16), np.float32)
W = np.ones((16, 16), np.float32)
DIMS = (((1,), (0,)), ((), ()))
DELAYED, CURRENT = fp8.DelayedScaling(), fp8.Float8CurrentScaling()


class Wrong(NamedTuple):
  """A wrong call.

  Attributes:
    name: the public name that the message must contain.
    what: what is wrong with the call.
    call: makes the call.
    error: the expected exception type.
    words: regular expression that the message must match.
  """

  name: str
  what: str
  call: Callable[[], Any]
  error: type[Exception]
  words: str


DENSE = nn.Dense(16, dot_general_cls=fp8.Fp8DotGeneral)


@functools.cache
def variables() -> Any:
  """Makes variables of a layer without running it."""
  made = jax.eval_shape(DENSE.init, jax.eval_shape(lambda: jax.random.key(0)), X)
  return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), made)


def dot(lhs: Any = X, rhs: Any = W, dims: Any = DIMS, **options: Any) -> Any:
  how = {"recipe": CURRENT, "state": {}, **options}
  return jax.eval_shape(lambda: ops.dot_general(lhs, rhs, dims, **how))


def einsum(equation: Any = "mk,kn->mn", lhs: Any = X, rhs: Any = W, **options: Any) -> Any:
  how = {"recipe": CURRENT, "state": {}, **options}
  return jax.eval_shape(lambda: ops.einsum(equation, lhs, rhs, **how))


def init(module: Any, *args: Any, **options: Any) -> Any:
  return jax.eval_shape(lambda: module.init(jax.random.key(0), *(args or (X,)), **options))


def fields(
  name: str, make: Callable[..., Any], error: type[Exception], words: str, **values: Any
) -> Iterator[Wrong]:
  """Makes a case for each wrong value of each field."""
  for field, wrong in values.items():
    for value in wrong:
      call = functools.partial(make, **{field: value})
      yield Wrong(name, f"{field}={show(value):.24}", call, error, f"{field} {words}")


def _recipes() -> Iterator[Wrong]:
  delayed, name = fp8.DelayedScaling, "DelayedScaling"
  arrays = jnp.ones((3, 2)), np.float32([1, 2])
  integers = ("16", None, True, np.True_, jnp.int32(4), [4], *arrays)
  integer = "must be an integer of at least 1; got"
  yield from fields(name, delayed, TypeError, integer, amax_history_len=integers, interval=integers)
  low = (0, -1, 1.0, 1.5, float("nan"), np.float64(4), np.int64(0))
  yield from fields(name, delayed, ValueError, integer, amax_history_len=low, interval=low)
  number = "must be a number of powers of two within ±64; got"
  numbers = ("1", None, True, [1], 1j, jnp.float32(1), np.ones(2), *arrays)
  yield from fields(name, delayed, TypeError, number, margin=numbers)
  out = (float("nan"), float("inf"), -float("inf"), 65, -65.0, np.float32(np.nan))
  yield from fields(name, delayed, ValueError, number, margin=out)
  traced = lambda: jax.eval_shape(lambda m: fp8.DelayedScaling(margin=m) and m, jnp.float32(1))
  yield Wrong(
    name,
    "margin traced",
    traced,
    TypeError,
    "margin must be a number of powers of two within ±64; got",
  )
  choice = r"must be one of \('.*'\); got"
  choices = ("MAX", "Max", "", None, 1, True, jnp.ones(2), ["max"])
  kinds = {"amax_compute_algo": choices, "first_step": choices, "overflow": choices}
  yield from fields(name, delayed, ValueError, choice, **kinds)
  for cls in fp8.RECIPES.values():
    name = cls.__name__
    formats = ("HYBRID", "hybrid", None, fp8.Format, jnp.float8_e4m3fn, 8, jnp.ones((2, 2)))
    yield from fields(name, cls, TypeError, "must be a Format; got", fp8_format=formats)
    kept = (
      {"fprop": True}, "fprop,dgrad", "FPROP", ["fprop", 1], None, 5, [("fprop",)], ("bias",),
      ("fprop", "dgrad", "wgrad"), jnp.ones((2, 2)), b"fprop",
    )  # fmt: skip
    at_most = r"must name at most two of \('fprop', 'dgrad', 'wgrad'\); got"
    yield from fields(name, cls, ValueError, at_most, high_precision=kept)
    rounding = ("Stochastic", "up", True, None, jnp.ones(2))
    yield from fields(name, cls, ValueError, choice, grad_rounding=rounding)
    if hasattr(cls, "power_of_two"):
      flags = ("no", "False", 1, 0, None, jnp.bool_(True), jnp.ones(2))
      yield from fields(name, cls, TypeError, "must be True or False; got", power_of_two=flags)
    is_no_module = r"is a recipe, not a module; .*dot_general_cls=recipe.dot_general_cls"
    for recipe in (cls(), cls):
      what = "class" if isinstance(recipe, type) else "instance"
      dense = nn.Dense(16, dot_general_cls=recipe)
      yield Wrong(
        name, f"dot_general_cls= {what}", lambda d=dense: init(d), TypeError, is_no_module
      )
  dense = nn.Dense(16, dot_general=DELAYED)
  yield Wrong(
    "DelayedScaling", "dot_general=", lambda: init(dense), TypeError, "dot_general_cls=rec"
  )
  mx = fp8.MXFP8BlockScaling
  yield from fields("MXFP8BlockScaling", mx, ValueError, choice, scale_rounding=("UP", 1, None))
  name = "get_recipe"
  for recipe in ("Delayed", "delay", "", None, 5, ["delayed"], fp8.DelayedScaling, DELAYED):
    call = functools.partial(fp8.get_recipe, recipe)
    yield Wrong(name, f"{show(recipe):.20}", call, ValueError, r"name must be one of \('delayed'")
  unknown = lambda: fp8.get_recipe("current", amax_history_len=16)
  yield Wrong(name, "field", unknown, TypeError, "fp8_format.*'amax_history_len'")


def _formats() -> Iterator[Wrong]:
  for value in (jnp.float8_e5m2, "E4M3", None, fp8.Format.E4M3, 8):
    call = lambda v=value: fp8.Format(v, v)
    yield Wrong(
      "Format", f"{show(value):.20}", call, TypeError, "forward must be a formats.Float8; got"
    )
  bfloat16 = lambda: fp8_ops.fp8_meta_dtype_wrapper(jnp.bfloat16)
  yield Wrong("MaxGradDType", "bfloat16", bfloat16, ValueError, "in memory must be float32; got")


class WrongOperand(NamedTuple):
  """An operand that every contraction rejects, and its form in the message."""

  value: Any
  shown: str


def _operands() -> Iterator[WrongOperand]:
  for dtype in (jnp.int32, jnp.complex64, jnp.bool_, jnp.float8_e4m3fn, jnp.uint8):
    yield WrongOperand(
      jnp.ones((4, 16), dtype), rf"of dtype {jnp.dtype(dtype)} and shape \(4, 16\)"
    )
  yield WrongOperand(jax.random.key(0), r"of dtype key<fry>")
  yield WrongOperand(jnp.ones((4, 16)).astype(fp8.fp32_max_grad), "of dtype fp32_max_grad")
  for value in (None, "x", b"x", object(), {"x": X}, [[1.0], "x"]):
    yield WrongOperand(value, f"of type {type(value).__name__}")


def _contractions() -> Iterator[Wrong]:
  for name, call in (("dot_general", dot), ("einsum", einsum)):
    options = lambda what, error, words, name=name, call=call, **options: Wrong(
      name, what, functools.partial(call, **options), error, words
    )
    dtypes = "operands must be of dtype float32, bfloat16, float16; got "
    for i, (value, shown) in enumerate(_operands()):
      yield options(f"lhs {i}", TypeError, f"{dtypes}lhs {shown}", lhs=value)
      yield options(f"rhs {i}", TypeError, f"{dtypes}rhs {shown}", rhs=value)
    for value in (jnp.int32, jnp.float8_e5m2, "float99", 3, X, jnp.complex64):
      words = "preferred_element_type must be one of float32, bfloat16, float16; got"
      what = f"preferred {show(value):.20}"
      yield options(what, TypeError, words, preferred_element_type=value)
    for value in (None, fp8.DelayedScaling, "delayed", {"recipe": DELAYED}, fp8.Format.HYBRID):
      words = r"recipe must be a recipe, such as DelayedScaling\(\); got recipe="
      yield options(f"recipe {show(value):.20}", TypeError, words, recipe=value)
    fresh, short = ops.init_state(DELAYED), ops.init_state(fp8.DelayedScaling(amax_history_len=4))
    for what, value in {"none": {}, "part": {"input": fresh["input"]}}.items():
      words = r"the state of \w+ must hold \['amax_history', 'scale'\]; got \[\]. Make it with ops"
      yield options(f"state {what}", ValueError, words, recipe=DELAYED, state=value)
    for value in (None, [], "state", X, {"input": X}, {"input": 1.0}):
      words = "state must be a mapping of mappings, as ops.init_state returns; got"
      yield options(f"state {show(value):.20}", TypeError, words, recipe=DELAYED, state=value)
    words = r"input_amax_history must have shape \(1024,\).*; got shape \(4,\)"
    yield options("state shorter", ValueError, words, recipe=DELAYED, state=short)
    words = r"the state of input must hold \[\]; got \['amax_history', 'scale'\]"
    yield options("state too much", ValueError, words, state=fresh)
    for leaf in (jnp.ones(1, jnp.bfloat16), jnp.ones(1, jnp.int32), 1.0, None, "one"):
      broken = {**fresh, "kernel": {**fresh["kernel"], "scale": leaf}}
      words = "must be float32; got kernel_scale of dtype"
      yield options(f"leaf {show(leaf):.20}", TypeError, words, recipe=DELAYED, state=broken)
    for value in ("x", 5, [None, "x"]):
      words = "out_sharding must be a PartitionSpec or NamedSharding of at most 2 axes.*; got"
      yield options(f"out_sharding {value!r}", ValueError, words, out_sharding=value)
    words = "out_sharding must be a PartitionSpec or NamedSharding of at most 2 axes"
    long = PartitionSpec("a", "b", "c")
    yield options("out_sharding long", ValueError, words, out_sharding=long)
    for value in ("key", 0, jnp.ones(2), jnp.ones((2, 2))):
      words = r"key must be one PRNG key, such as jax.random.key\(seed\); got"
      stochastic = fp8.Float8CurrentScaling(grad_rounding="stochastic")
      yield options(f"key {show(value):.20}", TypeError, words, key=value, recipe=stochastic)
  batched = (((2,), (1,)), ((0,), (0,)))
  for dims in (
    None, "mk,kn->mn", (1, 0), 1, ((1,), (0,)), (((1,), (0,)),), (((1.0,), (0,)), ((), ())),
    (((2,), (0,)), ((), ())), (((1, 1), (0, 0)), ((), ())), (((0,), (0,)), ((), ())), batched,
    (((1,), (0, 1)), ((), ())), (((1,), (0,)), ((1,), (0,))), ((("1",), (0,)), ((), ())), X,
  ):  # fmt: skip
    words = r"dimension_numbers must be \(\(lhs_contracting, rhs_contracting\), \(lhs_batch"
    call = functools.partial(dot, dims=dims)
    yield Wrong("dot_general", f"dims {show(dims):.40}", call, ValueError, words)
  words = r"got .*lhs of shape \(4, 16\), rhs of shape \(8, 16\)"
  call = functools.partial(dot, rhs=W[:8])
  yield Wrong("dot_general", "shapes", call, ValueError, words)
  for equation, words in {
    "mk->mk": "the equation must have two operands; got equation='mk->mk'. Use jnp.einsum",
    "mk,kn,n->mn": "the equation must have two operands",
    "": "the equation must have two operands",
    "mk,kn->mz": "each output label must occur once in the output and in an operand; got",
    "mk,kn->mmn": "each output label must occur once in the output and in an operand; got",
    "mk,kn->m->n": "labels must be single characters",
    "mk,k.n->mn": "labels must be single characters",
    "mkb,kn->mn": "an operand must have one dimension for each label; got .*with shapes",
    "mk,k->m": "an operand must have one dimension for each label",
    "...mkz,kn->...mn": "got equation='...mkz,kn->...mn' for operands of rank 2 and 2",
    "mk,mn->kn": r"a label must have one size; got .*'m' is 4 in \(4, 16\) and 16 in \(16, 16\)",
    "mm,kn->mn": "must have one",
  }.items():
    yield Wrong("einsum", f"{equation!r}", functools.partial(einsum, equation), ValueError, words)
  for equation in (None, 5, b"mk,kn->mn", X, ["mk", "kn"]):
    words = "the equation must be a string; got .*'mk,kn->mn'"
    call = functools.partial(einsum, equation)
    yield Wrong("einsum", f"equation {show(equation):.20}", call, TypeError, words)
  for value in (fp8.DelayedScaling, "delayed", None):
    words = "recipe must be a recipe"
    call = functools.partial(ops.init_state, value)
    yield Wrong("init_state", f"{show(value):.20}", call, TypeError, words)


def _activations() -> Iterator[Wrong]:
  for fun in (fp8.swiglu, fp8.geglu, fp8.reglu):
    name = fun.__name__
    run = lambda gate=X, up=X, fun=fun: jax.eval_shape(lambda: fun(gate, up))
    dtypes = "operands must be of dtype float32, bfloat16, float16; got "
    for i, (value, shown) in enumerate(_operands()):
      for side in ("gate", "up"):
        call = functools.partial(run, **{side: value})
        yield Wrong(name, f"{side} {i}", call, TypeError, f"{dtypes}{side} {shown}")
    words = r"gate and up must have the same shape; got gate=float32\[4, 16\], up=float32"
    for up in (X[:1], X[:, :8], X[0], 1.0):
      call = functools.partial(run, up=up)
      yield Wrong(name, f"up {np.shape(up)}", call, ValueError, words)
  run = lambda approximate: fp8.geglu(X, X, approximate=approximate)
  words = "must be True or False; got"
  yield from fields("geglu", run, TypeError, words, approximate=("tanh", None, 1))


def _modules() -> Iterator[Wrong]:
  arguments = {"Fp8DotGeneral": (X, W, DIMS), "Fp8Einsum": ("mk,kn->mn", X, W)}
  for cls in (fp8.Fp8DotGeneral, fp8.Fp8Einsum):
    name = cls.__name__
    run = lambda cls=cls, name=name, **field: init(cls(**field), *arguments[name])
    recipes = (fp8.DelayedScaling, "delayed", None, fp8.Format.HYBRID)
    yield from fields(name, run, TypeError, "must be a recipe, such as Delayed", recipe=recipes)
    yield from fields(name, run, TypeError, "must be True or False", emulate=("no", None, 1))
    for value in ("highest", "fastest", jax.lax.Precision.HIGHEST, 5):
      call = lambda c=cls, n=name, v=value: init(c(), *arguments[n], precision=v)
      words = "precision must be None; got precision="
      yield Wrong(name, f"precision {value}", call, ValueError, words)
    for options in ({}, {"dims": DIMS}, {"lhs": X}):
      call = lambda c=cls, o=options: jax.eval_shape(lambda: c().init(jax.random.key(0), **o))
      yield Wrong(name, f"called with {[*options]}", call, TypeError, "must be called as Fp8")
    call = lambda c=cls, n=name: init(c(), *arguments[n][:2])
    yield Wrong(name, "called with two", call, TypeError, "must be called as Fp8")
    fun = lambda c=cls, n=name: c(*arguments[n])
    yield Wrong(
      name, "arrays to its class", fun, TypeError, "arrays must be passed to the call, not"
    )
    bare = lambda c=cls, n=name: c().apply({"params": {}}, *arguments[n])
    words = "applying the model needs the collection '_overwrite_with_gradient'"
    yield Wrong(name, "without state", bare, ValueError, words)
  fun = lambda: CURRENT.einsum_cls("mk,kn->mn", X, W)
  yield Wrong("Fp8Einsum", "einsum_cls", fun, TypeError, "arrays must be passed to the call, not")
  for what, value in {"class": fp8.Fp8DotGeneral, "cls": DELAYED.dot_general_cls}.items():
    dense = nn.Dense(16, dot_general=value)
    words = "arrays must be passed to the call, not.*dot_general_cls="
    yield Wrong("Fp8DotGeneral", f"dot_general= {what}", lambda d=dense: init(d), TypeError, words)
  dense = nn.Dense(16, dot_general_cls=fp8.Fp8DotGeneral())
  words = "must be called as .*dot_general_cls=Fp8DotGeneral"
  yield Wrong("Fp8DotGeneral", "dot_general_cls= instance", lambda: init(dense), TypeError, words)
  traced = lambda: fp8.Fp8DotGeneral().apply(variables(), X, W, DIMS)
  yield Wrong("Fp8DotGeneral", "another module's state", traced, ValueError, "needs the collection")
  yield from _fused()


def _fused() -> Iterator[Wrong]:
  for cls, sizes in (
    (fp8.Fp8FusedQKV, {"num_heads": 4, "head_dim": 4}),
    (fp8.Fp8SwiGLU, {"hidden_features": 32}),
  ):
    name = cls.__name__
    run = lambda cls=cls, sizes=sizes, **field: init(cls(**{**sizes, **field}))
    yield from fields(
      name, run, TypeError, "must be a recipe", recipe=(fp8.DelayedScaling, "delayed", None)
    )
    flags = {"emulate": ("no", None, 1)}
    flags |= {"use_bias": ("no", 1)} if cls is fp8.Fp8FusedQKV else {}
    yield from fields(name, run, TypeError, "must be True or False", **flags)
    scales = {"kernel_scales": ("Joint", None, True)}
    yield from fields(name, run, ValueError, r"must be .*'joint'.*; got", **scales)
    kinds = ("4", None, True)
    yield from fields(
      name, run, TypeError, "must be an integer of at least 1", **dict.fromkeys(sizes, kinds)
    )
    low = (0, -4, 4.0)
    yield from fields(
      name, run, ValueError, "must be an integer of at least 1", **dict.fromkeys(sizes, low)
    )
    dtypes = {
      "dtype": (jnp.int32, "float99", jnp.float8_e5m2, X),
      "param_dtype": (jnp.int8, "float99"),
    }
    yield from fields(name, run, TypeError, "must be one of float32, bfloat16, float16", **dtypes)
    inits = {"kernel_init": (None, "ones", X)}
    yield from fields(name, run, TypeError, "must be a function", **inits)
    for value in (None, "x", jnp.float32(1)):
      call = lambda c=cls, s=sizes, v=value: jax.eval_shape(
        lambda: c(**s).init(jax.random.key(0), v)
      )
      yield Wrong(name, f"x {show(value):.20}", call, TypeError, r"x must be an array \[..., D\]")
    separate = lambda c=cls, s=sizes: c(**s).from_separate({"query": {}, "up": {}})
    yield Wrong(f"{name}.from_separate", "keys", separate, ValueError, "the keys must be .*; got")
    back = lambda c=cls, s=sizes: c(**s).to_separate(variables())
    yield Wrong(f"{name}.to_separate", "keys", back, ValueError, "the keys must be .*; got")
  qkv = fp8.Fp8FusedQKV
  odd = lambda: init(qkv(num_heads=4, head_dim=4, num_kv_heads=3))
  yield Wrong("Fp8FusedQKV", "num_kv_heads", odd, ValueError, "num_heads must be a positive mult")
  layer = lambda: qkv(num_heads=4, head_dim=4).to_separate({}, layer=nn.Conv)
  yield Wrong(
    "Fp8FusedQKV", "layer", layer, ValueError, "layer must be nn.Dense or nn.DenseGeneral"
  )


TABLE: tuple[Wrong, ...] = (
  *_recipes(),
  *_formats(),
  *_contractions(),
  *_activations(),
  *_modules(),
)
