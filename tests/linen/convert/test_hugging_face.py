"""Hugging Face's wrapper around converted and frozen modules: training, generating, saving.

The wrapper passes only ``params``. They contain the state under the names of its collections.
"""

import functools
import warnings

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_fp8 as fp8

with warnings.catch_warnings():
  warnings.simplefilter("ignore")  # deprecation warnings of transformers
  transformers = pytest.importorskip(
    "transformers", reason="transformers is in the test extra; this Python lacks it"
  )
  transformers.logging.set_verbosity_error()

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

OWG = fp8.OVERWRITE_WITH_GRADIENT
LENGTH, PROMPT, VOCABULARY = 32, 8, 96
SIZES = {
  "vocab_size": VOCABULARY,
  "n_embd": 64,
  "n_layer": 2,
  "n_head": 4,
  "n_positions": 2 * LENGTH,
}
IDS = jax.random.randint(jax.random.key(1), (2, LENGTH), 3, VOCABULARY)
INPUTS = (IDS, jnp.ones_like(IDS), jnp.broadcast_to(jnp.arange(LENGTH), IDS.shape))
CASES = {
  "current": (fp8.Float8CurrentScaling(), False),
  "delayed, tied head": (fp8.DelayedScaling(), True),
}


def pack(variables):
  """Moves all other collections into the parameters."""
  others = {name: value for name, value in variables.items() if name != "params"}
  return {**variables["params"], **others}


def make_wrapper(tied=True):
  config = transformers.GPT2Config(
    **SIZES, tie_word_embeddings=tied, pad_token_id=0, bos_token_id=1, eos_token_id=2
  )
  return transformers.FlaxGPT2LMHeadModel(config)


@pytest.fixture(autouse=True)
def ranks_as_transformers_has_them():
  """Attention masks in transformers promote ranks."""
  with jax.numpy_rank_promotion("allow"):
    yield


@pytest.fixture(params=CASES, scope="module")
def wrapped(request):
  """The wrapper of a converted module, and its calibrated variables."""
  recipe, tied = CASES[request.param]
  with jax.numpy_rank_promotion("allow"):
    wrapper = make_wrapper(tied)
    converted = fp8.fp8_linear_layers(wrapper.module, fp8.Fp8Config(recipe=recipe))
    plain = {"params": wrapper.params}
    variables = fp8.upgrade_variables(converted, plain, *INPUTS)
    if OWG in variables:
      variables = fp8.calibrate(converted, variables, [INPUTS], progress=False)
  wrapper._module = converted
  return wrapper, variables


def loss_of(apply_fn, packed):
  logits = apply_fn(packed, IDS)[:, :-1]
  return optax.softmax_cross_entropy_with_integer_labels(logits, IDS[:, 1:]).mean()


def logits_of(wrapper):
  return lambda packed, ids: wrapper(ids, params=packed).logits


def generate(wrapper, packed):
  made = wrapper.generate(IDS[:, :PROMPT], params=packed, max_length=LENGTH, do_sample=False)
  return np.asarray(made.sequences)


def test_the_wrapper_gives_what_the_module_gives(wrapped):
  wrapper, variables = wrapped
  got = jax.jit(logits_of(wrapper))(pack(variables), IDS)
  want = jax.jit(lambda variables: wrapper.module.apply(variables, *INPUTS).logits)(variables)
  np.testing.assert_array_equal(got, want)


def test_training_overwrites_the_state(wrapped):
  wrapper, variables = wrapped
  state = fp8.TrainState.create(
    apply_fn=logits_of(wrapper), params=pack(variables), tx=optax.adam(1e-3)
  )

  @jax.jit
  def step(state):
    loss, grads = fp8.value_and_grad(functools.partial(loss_of, state.apply_fn))(state.params)
    return state.apply_gradients(grads=grads), loss

  losses = []
  for _ in range(4):
    state, loss = step(state)
    losses.append(float(loss))
  assert losses == sorted(losses, reverse=True)
  assert OWG not in state.opt_state[0].mu
  if OWG in variables:
    of_module = train_module(wrapper, variables, steps=4)
    jax.tree.map(np.testing.assert_array_equal, state.params, pack(of_module))
    seen = state.params[OWG]["transformer"]["h"]["0"]["mlp"]["c_fc"]["Fp8DotGeneral_0"]
    assert (seen["output_grad_amax_history"] > 0).sum() == 4


def train_module(wrapper, variables, steps):
  """Trains the module itself, with the state in its own collection."""
  apply_fn = lambda variables, ids: wrapper.module.apply(variables, ids, *INPUTS[1:]).logits
  state = fp8.TrainState.create(apply_fn=apply_fn, params=variables, tx=optax.adam(1e-3))

  @jax.jit
  def step(state):
    grads = fp8.grad(functools.partial(loss_of, state.apply_fn))(state.params)
    return state.apply_gradients(grads=grads)

  for _ in range(steps):
    state = step(state)
  return state.params


def test_a_loop_without_a_train_state(wrapped):
  wrapper, variables = wrapped
  packed, tx = pack(variables), optax.sgd(0.1)
  grads = jax.jit(fp8.grad(functools.partial(loss_of, logits_of(wrapper))))(packed)
  overwrite, grads = fp8.partition_for_grad_overwrite(grads)
  _, params = fp8.partition_for_grad_overwrite(packed)
  updates, _ = tx.update(grads, tx.init(params), params)
  new = fp8.apply_updates(packed, updates, overwrite)
  assert jax.tree.structure(new) == jax.tree.structure(packed)
  assert loss_of(logits_of(wrapper), new) < loss_of(logits_of(wrapper), packed)


def test_generate(wrapped):
  wrapper, variables = wrapped
  tokens = generate(wrapper, pack(variables))
  assert tokens.shape == (2, LENGTH)
  np.testing.assert_array_equal(tokens[:, :PROMPT], IDS[:, :PROMPT])
  # The first new token equals that of one pass over the prompt without a cache.
  logits = wrapper(IDS[:, :PROMPT], params=pack(variables)).logits
  np.testing.assert_array_equal(tokens[:, PROMPT], logits[:, -1].argmax(-1))


def test_a_frozen_model_generates_the_same_tokens(wrapped):
  wrapper, variables = wrapped
  served, frozen = fp8.freeze_for_inference(wrapper.module, variables, *INPUTS)
  other = make_wrapper(wrapper.config.tie_word_embeddings)
  other._module = served
  np.testing.assert_array_equal(generate(other, pack(frozen)), generate(wrapper, pack(variables)))


def test_save_pretrained_keeps_params_and_state(wrapped, tmp_path):
  wrapper, variables = wrapped
  wrapper.save_pretrained(tmp_path, params=pack(variables))
  saved = flax.serialization.msgpack_restore((tmp_path / "flax_model.msgpack").read_bytes())
  jax.tree.map(np.testing.assert_array_equal, saved, pack(variables))
  # A plain wrapper reads the parameters and ignores the state.
  plain = transformers.FlaxGPT2LMHeadModel.from_pretrained(tmp_path, local_files_only=True)
  jax.tree.map(np.testing.assert_array_equal, plain.params, variables["params"])


def test_checkpoints_keep_params_and_state(wrapped, tmp_path):
  wrapper, variables = wrapped
  state = fp8.TrainState.create(
    apply_fn=logits_of(wrapper), params=pack(variables), tx=optax.adam(1e-3)
  )
  fp8.save_checkpoint(tmp_path / "1", state)
  empty = jax.tree.map(jnp.zeros_like, state)
  restored, missing, extra = fp8.restore_checkpoint(tmp_path / "1", empty)
  assert (missing, extra) == ((), ())
  jax.tree.map(np.testing.assert_array_equal, restored.params, state.params)
  logits = jax.jit(logits_of(wrapper))
  np.testing.assert_array_equal(logits(restored.params, IDS), logits(state.params, IDS))
