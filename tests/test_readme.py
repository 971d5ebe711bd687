"""README: its programs run, its table of recipes is the registry's, its links exist."""

import re
from pathlib import Path

import flax_fp8 as fp8

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_programs_run_one_after_the_other(capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "100")
  namespace = {"__name__": "__main__"}
  for program in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
    exec(compile(program, "README.md", "exec"), namespace)
  out = capsys.readouterr().out
  assert float(re.search(r"loss (\S+)", out)[1]) < 0.1
  assert "2 of 2 layers become FP8" in out
  assert re.search(r"```\n(train_step on H100 .*)\n```", README)[1] in out


def test_the_table_of_recipes_is_the_registry():
  rows = re.findall(r"^\| `(\w+)` \| `fp8\.(\w+)` \|", README, re.MULTILINE)
  assert rows == [(name, recipe.__name__) for name, recipe in fp8.RECIPES.items()]


def test_links_lead_somewhere():
  links = re.findall(r"\]\(([^)#:]+)\)", README)
  assert len(links) > 10
  missing = [link for link in links if not (ROOT / link).exists()]
  assert not missing


def test_commands_stand_below_their_markers():
  for name in ("train", "test"):
    assert re.search(rf"<!-- command: {name} -->\n```bash\n[^\n]+\n```\n", README)


def test_it_is_one_page():
  assert len(README.splitlines()) <= 160
