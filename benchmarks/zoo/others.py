"""Models of smaller packages that see images, act, or transport: vision, control, geometry."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp

from zoo.model import Case, Model, first_array, normal


def _flaim(file: str, name: str, **fields: Any) -> Model:
  library: Any = importlib.import_module(f"flaim.models.{file}")
  return Model(getattr(library, name)(n_classes=16, **fields), (normal(2, 32, 32, 3),), labels=True)


def _transformer_in_transformer() -> Model:
  library: Any = importlib.import_module("transformer_in_transformer_flax")
  config = library.TNTConfig(
    num_classes=16,
    depth=1,
    image_size=32,
    patch_size=16,
    inner_dim=32,
    inner_heads=2,
    inner_dim_head=16,
    outer_dim=64,
    outer_heads=4,
    outer_dim_head=16,
  )
  return Model(library.TransformerInTransformer(config), (normal(2, 32, 32, 3),), labels=True)


def _bottleneck() -> Model:
  library: Any = importlib.import_module("bottleneck_transformer_flax.botnet")
  config = library.BoTNetConfig(
    stage_sizes=[1, 1, 1, 1], num_classes=16, num_heads=2, head_dim=16, initial_filters=16
  )
  return Model(library.BoTNet(config), (normal(2, 64, 64, 3),), {"train": False}, labels=True)


def _resnet() -> Model:
  library: Any = importlib.import_module("jax_resnet")
  return Model(library.ResNet18(n_classes=16), (normal(2, 32, 32, 3),), labels=True)


def _stylegan() -> Model:
  library: Any = importlib.import_module("flaxmodels.stylegan2.generator")
  module = library.MappingNetwork(z_dim=32, w_dim=32, num_layers=2, num_ws=4)
  return Model(module, (normal(2, 32),), {"train": False})


def _policy() -> Model:
  library: Any = importlib.import_module("brax.training.networks")
  return Model(library.MLP(layer_sizes=(64, 64, 16), layer_norm=True), (normal(32, 48),))


def _spectral_policy() -> Model:
  library: Any = importlib.import_module("brax.training.networks")
  return Model(
    library.SNMLP(layer_sizes=(64, 64, 16)),
    (normal(32, 48),),
    rngs=("sing_vec",),
    mutable=("sing_vec",),
  )


def _vision_policy() -> Model:
  library: Any = importlib.import_module("brax.training.networks")
  module = library.VisionMLP(layer_sizes=(64, 16), normalise_channels=True)
  return Model(module, ({"pixels/view": normal(16, 32, 32, 3)},))


def _potential(name: str, file: str, **fields: Any) -> Model:
  library: Any = importlib.import_module(f"ott.neural.networks.{file}")
  return Model(getattr(library, name)(**fields), (normal(32, 32),), {}, first_array)


def _dopamine(name: str) -> Model:
  library: Any = importlib.import_module("dopamine.jax.networks")
  image = jax.random.randint(jax.random.key(0), (84, 84, 4), 0, 256)
  fields = {"num_atoms": 16} if name == "RainbowNetwork" else {}
  more = (jnp.linspace(-1, 1, 16),) if fields else ()
  return Model(getattr(library, name)(num_actions=16, **fields), (image, *more), {}, first_array)


def _equivariant() -> Model:
  library: Any = importlib.import_module("e3x")
  return Model(library.nn.Dense(32), (normal(16, 1, 9, 32),))


CASES = (
  Case(
    "flaim",
    "Swin",
    lambda: _flaim("swin", "Swin", depths=(1, 1), token_dim=32, n_heads=(2, 4), window_size=4),
  ),
  Case(
    "flaim", "ConvNeXt", lambda: _flaim("convnext", "ConvNeXt", depths=(1, 1), out_dims=(32, 64))
  ),
  Case("transformer-in-transformer-flax", "TNT", _transformer_in_transformer),
  Case("bottleneck-transformer-flax", "BoTNet", _bottleneck),
  Case("jax-resnet", "ResNet18", _resnet),
  Case("flaxmodels", "MappingNetwork", _stylegan),
  Case("brax", "MLP", _policy),
  Case("brax", "SNMLP", _spectral_policy),
  Case("brax", "VisionMLP", _vision_policy),
  Case("ott-jax", "ICNN", lambda: _potential("ICNN", "icnn", dim_data=32, dim_hidden=(64, 64))),
  Case(
    "ott-jax",
    "PotentialMLP",
    lambda: _potential("PotentialMLP", "potentials", dim_hidden=(64, 64), is_potential=False),
  ),
  Case("dopamine-rl", "NatureDQNNetwork", lambda: _dopamine("NatureDQNNetwork")),
  Case("dopamine-rl", "RainbowNetwork", lambda: _dopamine("RainbowNetwork")),
  Case("e3x", "Dense", _equivariant),
)
