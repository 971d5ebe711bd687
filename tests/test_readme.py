"""README: its programs run, its table is the tests'."""

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import flax_fp8 as fp8
from tests import test_defects

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_first_model_trains(capsys):
  """As pasted into an empty file."""
  program = next(b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "import" in b)
  exec(compile(program, "first_model.py", "exec"), {"__name__": "__main__"})
  out = capsys.readouterr().out
  assert float(re.search(r"loss (\S+)", out)[1]) < 0.1
  assert "output_grad_amax_history" in out


def test_the_report_is_that_of_the_first_model(capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "100")
  fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
  programs = [body for language, body in fences if language == "python"]
  first = next(program for program in programs if "import" in program)
  proof = next(program for program in programs if "fp8.explain(" in program)
  namespace = {"__name__": "__main__"}
  exec(compile(first.replace("range(200)", "range(1)"), "first_model.py", "exec"), namespace)
  capsys.readouterr()
  exec(compile(proof, "proof.py", "exec"), namespace)
  out = [line.split() for line in capsys.readouterr().out.splitlines()]
  shown = next(body for language, body in fences if not language and "GEMMs are FP8" in body)
  gemms = [line.split() for line in shown[: shown.index("\n\n kernels")].splitlines()]
  assert out[: len(gemms)] == gemms


def test_the_table_of_defects_is_that_of_the_checks():
  section = README[README.index("## Why not") :]
  rows = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
  assert rows == [check.__name__ for check in test_defects.CHECKS]


def test_the_table_of_recipes_is_the_registry():
  section = README[README.index("## Recipes") : README.index("## Proof")]
  rows = re.findall(r"^\| `(\w+)` \| `fp8\.(\w+)` \|", section, re.MULTILINE)
  assert rows == [(name, recipe.__name__) for name, recipe in fp8.RECIPES.items()]


def test_links_lead_somewhere():
  root = Path(__file__).parents[1]
  links = re.findall(r"\]\(([^)#]+)\)", README)
  assert links
  missing = [link for link in links if not (root / link).exists()]
  assert not missing


def test_commands_stand_below_their_markers():
  for name in ("train", "test"):
    assert re.search(rf"<!-- command: {name} -->\n```bash\n[^\n]+\n```\n", README)


class Experts(nn.Module):
  @nn.compact
  def __call__(self, x):
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (2, 32, 32))
    return jnp.einsum("bk,ekn->ben", x, kernel).sum(1)


class Layer(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Dense(32, name="out")(nn.gelu(nn.Dense(64, name="up")(x)))
    return x + nn.Dense(32, name="down")(Experts(name="experts")(x))


class Model(nn.Module):
  @nn.compact
  def __call__(self, x):
    for i in range(3):
      x = Layer(name=f"layers_{i}")(x)
    return x


def test_the_programs_of_whole_models_run(capsys):
  section = README[README.index("## Whole models") : README.index("## Recipes")]
  programs = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
  x = jax.random.normal(jax.random.key(0), (4, 32))
  model = Model()
  names = {
    "fp8": fp8,
    "re": re,
    "model": model,
    "x": x,
    "bf16_variables": (plain := jax.jit(model.init)(jax.random.key(1), x)),
    "batches": [x, 2 * x],
    "loss_fn": lambda variables, x: jnp.mean(names["converted"].apply(variables, x) ** 2),
  }
  for program in programs:
    exec(compile(program, "whole_models.py", "exec"), names)
  shown = capsys.readouterr().out
  assert "jnp.einsum" in shown
  assert "3 of 12 layers become FP8" in shown
  assert "layers_2/up" in shown
  jax.tree.map(np.testing.assert_array_equal, names["bf16_variables"], plain)
  got = jax.jit(names["served"].apply)(names["frozen"], x)
  np.testing.assert_array_equal(got, jax.jit(names["converted"].apply)(names["variables"], x))
