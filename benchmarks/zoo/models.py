"""Makes the models of ``models.toml``: imports their packages, and calls what it names."""

import dataclasses
import functools
import inspect
import pkgutil
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

ROWS, LENGTH, VOCABULARY, MEL_BINS = 2, 32, 96, 16
NOTHING = None  # TOML has no null
Fields = Mapping[str, Any]


class Model(NamedTuple):
  """A Linen module as its package makes it, and its inputs, arrays or static values.

  Attributes:
    read: the output's attribute or key that the loss reads; else its first array.
    labels: the loss is cross-entropy over the last axis; else the square error to normal values.
    rngs: PRNG keys of ``init`` and ``apply`` besides ``params``.
    mutable: collections that every run changes; the changes are dropped.
  """

  module: nn.Module
  args: tuple[Any, ...]
  kwargs: Fields
  read: str = ""
  labels: bool = False
  rngs: tuple[str, ...] = ()
  mutable: tuple[str, ...] = ()

  def output(self, out: Any) -> jax.Array:
    get = out.get if isinstance(out, Mapping) else lambda name: getattr(out, name, None)
    named = get(self.read) if self.read else None
    floats = (leaf for leaf in jax.tree.leaves(out) if jnp.issubdtype(leaf.dtype, jnp.floating))
    return next(floats) if named is None else named


@dataclasses.dataclass(frozen=True)
class Case:
  """A model of the corpus: its package on PyPI, its name, and what makes it."""

  package: str
  name: str
  make: Callable[[], Model]


def build(value: Any) -> Any:
  """Replaces calls and names by what they stand for, and lists by tuples."""
  if isinstance(value, list):
    return tuple(map(build, value))
  if not isinstance(value, dict):
    return value
  fields = {key: build(each) for key, each in value.items() if key not in ("call", "args")}
  if "ref" in fields:
    return pkgutil.resolve_name(fields["ref"])
  if "call" not in value:
    return fields
  return pkgutil.resolve_name(value["call"])(*build(value.get("args", [])), **fields)


def tokens(seed: int = 0, length: int = LENGTH, vocabulary: int = VOCABULARY) -> jax.Array:
  return jax.random.randint(jax.random.key(seed), (ROWS, length), 3, vocabulary)


def normal(*shape: int, seed: int = 0) -> jax.Array:
  return jax.random.normal(jax.random.key(seed), shape)


def positions() -> jax.Array:
  return jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))


def pixels(*shape: int) -> jax.Array:
  return jax.random.randint(jax.random.key(0), shape, 0, 256)


def symbols(seed: int, length: int) -> jax.Array:
  """One-hot characters of evojax's addition."""
  count = build({"ref": "evojax.policy.seq2seq:char_table.vocab_size"})
  return jax.nn.one_hot(tokens(seed, length, count), count)


def record(**fields: Any) -> Any:
  """A frozen configuration of these fields."""
  return dataclasses.make_dataclass("Record", fields, frozen=True)(**fields)


def made(config: Any) -> Any:
  return config.make()


class AttentionStack(nn.Module):
  """Two layers of ``nn.MultiHeadDotProductAttention``, each on the residual stream."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for _ in range(2):
      x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
    return x


def named_inputs() -> dict[str, Any]:
  """The inputs of Hugging Face's models, by their names."""
  mask, wave = jnp.ones((ROWS, LENGTH), jnp.int32), normal(ROWS, 640)
  text = {"attention_mask": mask, "position_ids": positions()}
  decoder = {f"decoder_{name}": value for name, value in text.items()}
  ids = {"input_ids": tokens(), "decoder_input_ids": tokens(1), "token_type_ids": 0 * mask}
  images = {"pixel_values": normal(ROWS, 32, 32, 3)}
  speech = {"input_features": normal(ROWS, MEL_BINS, 4 * LENGTH), "input_values": wave}
  return {**text, **decoder, **ids, **images, **speech, "head_mask": None}


def hugging_face(sizes: Fields, name: str, config: str, shared: str, own: Fields = {}) -> Model:  # noqa: B006
  """Makes the module inside a wrapper, with the inputs that its signature takes."""
  fields = functools.reduce(lambda found, key: found | sizes[key], shared.split(), dict(own))
  shape = {"input_shape": (1, MEL_BINS, 4 * LENGTH)} if config == "Whisper" else {}
  wrapper = pkgutil.resolve_name(f"transformers:{name.split(', ')[0]}")
  made = pkgutil.resolve_name(f"transformers:{config}Config")(**fields)
  module = wrapper(made, _do_init=False, **shape).module
  taken = inspect.signature(module.__call__).parameters
  kwargs = {key: value for key, value in named_inputs().items() if key in taken}
  if "input_values" in taken:
    kwargs["attention_mask"] = jnp.ones((ROWS, 640), jnp.int32)
  return Model(module, (), kwargs, "logits", labels=True)


def make(inputs: Fields, of: Fields) -> Model:
  """Makes a model of another package."""
  asked = of.get("inputs", [])
  asked = inputs[asked] if isinstance(asked, str) else asked
  args = (normal(*asked),) if asked and isinstance(asked[0], int) else build(asked)
  known = named_inputs() if "named" in of else {}
  kwargs = {name: known[name] for name in of.get("named", ())} | of.get("static", {})
  names = ("read", "labels", "rngs", "mutable")
  options = {name: build(of[name]) for name in names if name in of}
  return Model(build(of["module"]), args, kwargs, **options)


def read_cases() -> tuple[Case, ...]:
  """The corpus, in the order of its file; Hugging Face's models after Flax's."""
  packages = tomllib.loads(Path(__file__).with_name("models.toml").read_text())
  sizes, inputs = packages.pop("sizes"), packages.pop("inputs")
  wrapped = packages.pop("transformers")
  cases = [
    Case(package, name, functools.partial(make, inputs, of))
    for package, models in packages.items()
    for name, of in models.items()
  ]
  ours = [
    Case("transformers", name, functools.partial(hugging_face, sizes, name, *of))
    for name, of in wrapped.items()
  ]
  flax = [case for case in cases if case.package == "flax"]
  return (*flax, *ours, *cases[len(flax) :])


CASES = read_cases()
