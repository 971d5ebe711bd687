"""``flax-fp8 explain``: what it prints, each error that it can end with, and the exit codes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flax_fp8 as fp8
from flax_fp8 import cli
from flax_fp8.explain import plugin

ROOT = Path(__file__).parents[1]
PROGRAMS = """
import flax.linen as nn
import jax
import jax.numpy as jnp

import flax_fp8 as fp8

x = jnp.ones((32, 128), jnp.bfloat16)


def build(**options):
  layer = nn.Dense(256, dtype=jnp.bfloat16, **options)
  return layer.apply, layer.init(jax.random.key(0), x), x


def dense():
  return build(dot_general_cls=fp8.Fp8DotGeneral)


def bf16_dense():
  return build()


def needs_an_argument(x):
  return build()


def a_list():
  return [jnp.sin, x]


def the_arguments_alone():
  return x, x


def a_string():
  return jnp.sin, "x"


def raises():
  raise ValueError("the builder's own mistake")


def asserts():
  assert x.shape == (0,), "assert_fp8: looks like ours"


def of_other_shapes():
  def step(x):
    return x @ x

  return step, x
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder of programs, good and bad."""
  folder = tmp_path_factory.mktemp("programs")
  (folder / "programs.py").write_text(PROGRAMS)
  (folder / "lacks_a_module.py").write_text("import a_module_that_nobody_has\n")
  (folder / "misspelt.py").write_text("def step(:\n")
  return folder


@pytest.fixture
def explain(folder, monkeypatch, capsys):
  """Runs ``flax-fp8 explain`` in that folder; returns exit code, stdout and stderr."""
  monkeypatch.chdir(folder)
  monkeypatch.setattr(sys, "path", list(sys.path))

  def run(*argv):
    code = cli.main(["explain", *map(str, argv)])
    return code, *capsys.readouterr()

  return run


@pytest.fixture(scope="module")
def reports():
  """An FP8 product and its BF16 twin, as the command names them."""
  pytest.importorskip("jax_plugins.xla_cuda13", reason="the CUDA plugin exists for Linux alone")
  sys.modules.pop("programs", None)
  namespace = {}
  exec(compile(PROGRAMS, "programs.py", "exec"), namespace)
  return [
    fp8.explain(*namespace[name](), target="h100", name=f"programs:{name}")
    for name in ("dense", "bf16_dense")
  ]


class TestRender:
  def test_one_program_is_its_report(self, reports):
    assert cli.render(reports[:1], "text") == str(reports[0])
    assert cli.render(reports[:1], "markdown") == reports[0].to_markdown().rstrip("\n")
    assert cli.render(reports[:1], "json") == json.dumps(reports[0].to_dict(), indent=2)

  @pytest.mark.parametrize("form", ["text", "markdown"])
  def test_two_programs_are_their_titles_and_the_comparison(self, reports, form):
    one, other, *rest = cli.render(reports, form).split("\n\n", 2)
    assert (one, other) == (reports[0].title, reports[1].title)
    assert "programs:dense" in rest[0]
    assert re.search(r"FP8 GEMMs[ |]+1[ |]+0", rest[0])

  def test_json_of_two_programs_has_both_whole(self, reports):
    found = json.loads(cli.render(reports, "json"))
    assert (found["one"]["fp8_gemms"], found["other"]["fp8_gemms"]) == (1, 0)
    assert found["comparison"]["names"] == ["programs:dense", "programs:bf16_dense"]
    assert found["comparison"]["FP8 GEMMs"] == {"one": 1, "other": 0, "ratio": None}


@pytest.fixture
def compiler():
  pytest.importorskip("jax_plugins.xla_cuda13", reason="the CUDA plugin exists for Linux alone")


@pytest.mark.usefixtures("compiler")
class TestExplain:
  def test_against_with_a_picture(self, explain, folder):
    picture = folder / "both.png"
    code, out, err = explain(
      "programs:dense", "--against", "programs:bf16_dense", "--target=h100", "--plot", picture
    )
    assert (code, err) == (0, "")
    first, second, rest = out.split("\n\n", 2)
    assert first.startswith("programs:dense on H100 (described, not attached; 1 device): 1 of 1")
    assert second.startswith("programs:bf16_dense on H100")
    assert "ratio" in rest
    assert picture.read_bytes().startswith(b"\x89PNG")

  def test_a_program_that_must_be_fp8(self, explain):
    code, out, err = explain("programs:dense", "--target=h100", "--assert-fp8", "--format=json")
    assert (code, err) == (0, "")
    assert json.loads(out)["name"] == "programs:dense"

  def test_one_that_is_not(self, explain):
    code, out, err = explain("programs:bf16_dense", "--target", "h100", "--assert-fp8")
    assert code == 1
    assert "0 of 1 GEMMs are FP8" in " ".join(out.split())  # the report comes first
    assert err.startswith("flax-fp8: assert_fp8: every GEMM of programs:bf16_dense must be FP8 on ")

  def test_one_that_need_not_be(self, explain):
    excluded = ("--assert-fp8", "--exclude", "Den*", "--format", "markdown")
    code, out, _ = explain("programs:bf16_dense", "--target", "h100", *excluded)
    assert code == 0
    assert "| Dense |" in out

  def test_a_pattern_that_matches_nothing(self, explain):
    excluded = ("--assert-fp8", "--exclude", "*/head", "Dense")
    code, _, err = explain("programs:bf16_dense", "--target", "h100", *excluded)
    assert code == 2
    assert re.match(r"flax-fp8: assert_fp8: each pattern of exclude .*; got '\*/head'", err)

  def test_a_format_that_pictures_do_not_have(self, explain, folder):
    code, _, err = explain(
      "programs:dense", "--target=h100", "--plot", folder / "picture.of_no_format"
    )
    assert code == 2
    assert re.match(r"flax-fp8: Format 'of_no_format' is not supported .*\n$", err)

  @pytest.mark.child
  def test_too_little_time(self, explain):
    code, _, err = explain("programs:dense", "--target=h100", "--timeout=0.001")
    assert code == 2
    assert re.match(r"flax-fp8: explain: compiling must end within timeout=0.001 sec.*\n$", err)


CLEAR = {
  "a path": (["programs.py:dense"], r"be named MODULE:FUNCTION, .*; got 'programs.py:dense'\. "),
  "a folder": (["./programs:dense"], r"be named MODULE:FUNCTION, .*; got './programs:dense'\. "),
  "no function": (["programs"], r"be named MODULE:FUNCTION, .*; got 'programs'\. Write the"),
  "no module": (["no.such:dense"], r"module 'no.such' must be importable from .*; got none"),
  "no package": (["programs.x:dense"], r"module 'programs.x' must be importable from .*; got none"),
  "misspelt": (["programs:dens"], r"must have the function 'dens'; got none in .*are \['dense'\]"),
  "no callable": (
    ["programs:x"],
    r"programs:x must be a function that takes no .*; got Array\w*\. Write",
  ),
  "an argument": (
    ["programs:needs_an_argument"],
    r"takes no arguments; got function: missing .*'x'",
  ),
  "a list": (["programs:a_list"], r"must return \(fn, \*args\), .* got list\. Return what"),
  "arguments": (["programs:the_arguments_alone"], r"must return .*; got \(Array\w*, Array\w*\)\. "),
  "against": (
    ["programs:dense", "--against", "programs:"],
    r"named MODULE:F.*; got 'programs:'\. ",
  ),
  "exclude": (["programs:dense", "--exclude", "a", "b"], r"got --exclude a b alone. Add --assert-"),
  "picture": (["programs:dense", "--plot", "no/such.png"], r"in a folder that exists; got no/such"),
  "no GPU": (["programs:dense"], r"target=None takes the attached GPU; got none, .* is 'cpu'\. "),
}


@pytest.mark.parametrize(("argv", "match"), CLEAR.values(), ids=CLEAR)
def test_clear_errors_are_one_line(explain, argv, match):
  code, out, err = explain(*argv)
  assert (code, out) == (2, "")
  assert re.fullmatch(rf"flax-fp8: explain: .*{match}.*\n", err)


def test_a_missing_compiler(explain, monkeypatch):
  monkeypatch.setattr(plugin, "_PLUGINS", ())
  code, _, err = explain("programs:dense", "--target", "h100")
  assert code == 2
  assert re.fullmatch(r"flax-fp8: explain: compiling for a GPU .* Run: pip install .*\n", err)


@pytest.mark.parametrize(
  "kind", [MemoryError, RuntimeError, TimeoutError], ids=lambda k: k.__name__
)
def test_what_ends_the_compiler(capsys, kind):
  assert cli.tell(kind("explain: the compiler's process must answer")) == 2
  assert capsys.readouterr().err == "flax-fp8: explain: the compiler's process must answer\n"


def test_what_jax_refuses_is_no_bug_of_ours(explain):
  code, _, err = explain("programs:a_string", "--target=h100")
  assert code == 2
  assert err.startswith("flax-fp8: ")
  assert "Traceback" not in err


BUGS = {
  "builder": ("programs:raises", "ValueError: the builder's own mistake"),
  "assertion": ("programs:asserts", "AssertionError: assert_fp8: looks like ours"),
  "traced": ("programs:of_other_shapes", "TypeError: dot_general requires contracting dimensions"),
  "import": ("lacks_a_module:f", "ModuleNotFoundError: No module named 'a_module_that_nobody_has'"),
  "syntax": ("misspelt:f", "SyntaxError: invalid syntax"),
}


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("spec", "last"), BUGS.values(), ids=BUGS)
def test_bugs_of_the_user_show_their_traceback(explain, spec, last):
  code, out, err = explain(spec, "--target=h100")
  assert (code, out) == (2, "")
  assert err.startswith("Traceback (most recent call last):\n")
  assert f"{spec.partition(':')[0]}.py" in err
  assert f"\n{last}" in err


def test_an_error_without_a_word_shows_its_traceback(capsys):
  assert cli.tell(RuntimeError()) == 2
  assert capsys.readouterr().err == "RuntimeError\n"


class TestCommandLine:
  @pytest.mark.parametrize(
    ("argv", "match"),
    [
      ([], "required: COMMAND"),
      (["explain"], "required: MODULE:FUNCTION"),
      (["explain", "a:b", "--target", "v100"], "--target: invalid choice: 'v100'"),
      (["explain", "a:b", "--timeout", "0"], "--timeout: must be above 0; got 0"),
      (["explain", "a:b", "--timeout", "soon"], "--timeout: invalid .* value: 'soon'"),
    ],
    ids=["no command", "no program", "target", "no time", "no number"],
  )
  def test_usage_errors(self, capsys, argv, match):
    with pytest.raises(SystemExit, match="2"):
      cli.main(argv)
    assert re.search(match, capsys.readouterr().err)

  def test_version(self, capsys):
    with pytest.raises(SystemExit, match="0"):
      cli.main(["--version"])
    assert capsys.readouterr().out == f"flax-fp8 {fp8.__version__}\n"

  @pytest.mark.parametrize("command", ["explain", "doctor"])
  def test_help_gives_an_example(self, capsys, command):
    with pytest.raises(SystemExit, match="0"):
      cli.main([command, "--help"])
    assert re.search(rf"examples?:\n  flax-fp8 {command}", capsys.readouterr().out)

  @pytest.mark.parametrize(("broken", "code"), [(False, 0), (True, 1)], ids=["well", "broken"])
  def test_doctor_tells_whether_something_is_broken(self, monkeypatch, capsys, broken, code):
    lines = [cli.doctor.Line("trial", "as it is", broken=broken)]
    monkeypatch.setattr(cli.doctor, "examine", lambda: lines)
    assert cli.main(["doctor"]) == code
    assert capsys.readouterr().out == cli.doctor.render(lines) + "\n"


@pytest.mark.usefixtures("compiler")
def test_from_a_shell(folder):
  """Finds the module in the current folder, and keeps stderr empty."""
  inherited = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
  start = "import sys; from flax_fp8.cli import main; sys.path.remove(''); sys.exit(main())"
  found = subprocess.run(
    [sys.executable, "-c", start, "explain", "programs:dense", "--target", "h100"],
    cwd=folder,
    env=inherited | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
    timeout=300,
  )
  assert (found.returncode, found.stderr) == (0, "")
  assert "Dense/Fp8DotGeneral_0" in found.stdout
