"""``flax-fp8 explain``: its output, its errors and its exit codes."""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import flax_fp8 as fp8
from flax_fp8 import cli
from flax_fp8.explain import plugin

ROOT = Path(__file__).parents[1]
PROGRAMS = """
import json

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


def a_nothing():
  pass


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


def interrupts():
  raise KeyboardInterrupt


def exits():
  raise SystemExit(3)


def in_json():
  return json.loads("")


def out_of_memory():
  raise MemoryError


def at_length():
  raise KeyError("x" * 10_000)


def of_ours():
  return fp8.get_recipe("nothing"), x


def of_other_shapes():
  def step(x):
    return x @ x

  return step, x
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Makes a folder with valid and invalid programs."""
  folder = tmp_path_factory.mktemp("programs")
  (folder / "programs.py").write_text(PROGRAMS)
  (folder / "lacks_a_module.py").write_text("import a_module_that_nobody_has\n")
  (folder / "a_script.py").write_text("import sys\n\nsys.exit(3)\n")
  (folder / "misspelt.py").write_text("def step(:\n")
  return folder


@pytest.fixture
def explain(folder, monkeypatch, capsys):
  """Runs ``flax-fp8 explain`` in that folder. Returns the exit code, stdout and stderr."""
  monkeypatch.chdir(folder)
  monkeypatch.setattr(sys, "path", list(sys.path))

  def run(*argv):
    code = cli.main(["explain", *map(str, argv)])
    return code, *capsys.readouterr()

  return run


@pytest.fixture(scope="module")
def reports():
  """An FP8 product and its BF16 variant, as the command names them."""
  pytest.importorskip("jax_plugins.xla_cuda13", reason="the CUDA plugin supports only Linux")
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
  pytest.importorskip("jax_plugins.xla_cuda13", reason="the CUDA plugin supports only Linux")


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

  def test_a_picture_is_written_to_the_path_that_was_checked(self, explain, folder):
    assert explain("programs:dense", "--target=h100", "--plot", "picture")[0] == 0
    assert (folder / "picture").read_bytes().startswith(b"\x89PNG")
    assert not (folder / "picture.png").exists()

  def test_a_program_that_must_be_fp8(self, explain):
    code, out, err = explain("programs:dense", "--target=h100", "--assert-fp8", "--format=json")
    assert (code, err) == (0, "")
    assert json.loads(out)["name"] == "programs:dense"

  def test_one_that_is_not(self, explain):
    code, out, err = explain("programs:bf16_dense", "--target", "h100", "--assert-fp8")
    assert code == 1
    assert "0 of 1 GEMMs are FP8" in " ".join(out.split())  # the report is printed first
    assert err.startswith("flax-fp8: assert_fp8: every GEMM of programs:bf16_dense must be FP8 on ")

  def test_one_that_need_not_be(self, explain):
    excluded = ("--assert-fp8", "--exclude", "Den*", "--format", "markdown")
    code, out, _ = explain("programs:bf16_dense", "--target", "h100", *excluded)
    assert code == 0
    assert "| Dense |" in out

  def test_a_pattern_that_matches_nothing(self, explain):
    excluded = ("--assert-fp8", "--exclude", "*/head", "Dense")
    code, _, err = explain("programs:bf16_dense", "--target", "h100", *excluded)
    assert code == 1
    assert re.match(r"flax-fp8: assert_fp8: each pattern of exclude .*; got '\*/head'", err)

  @pytest.mark.child
  def test_too_little_time(self, explain):
    code, _, err = explain("programs:dense", "--target=h100", "--timeout=0.001")
    assert code == 1
    assert re.match(r"flax-fp8: explain: compiling must end within timeout=0.001 sec.*\n$", err)


CLEAR = {
  "a path": (["programs.py:dense"], r"be named MODULE:FUNCTION, .*; got 'programs.py:dense'\. "),
  "a folder": (["./programs:dense"], r"be named MODULE:FUNCTION, .*; got './programs:dense'\. "),
  "no function": (["programs"], r"be named MODULE:FUNCTION, .*; got 'programs'\. Write the"),
  "no module": (["no.such:dense"], r"import the module 'no.such' from .*; got No module"),
  "no package": (["programs.x:dense"], r"import the module 'programs.x' from .*; got .*not a"),
  "misspelt": (["programs:dens"], r"must have the function 'dens'; got none in .*are \['dense'\]"),
  "no callable": (
    ["programs:x"],
    r"programs:x must be a function that takes no .*; got Array\w*\. Write",
  ),
  "an argument": (
    ["programs:needs_an_argument"],
    r"takes no arguments; got function: missing .*'x'",
  ),
  "a list": (["programs:a_list"], r"must return \(fn, \*args\), .* got list\. Return the"),
  "arguments": (["programs:the_arguments_alone"], r"must return .*; got \(Array\w*, Array\w*\)\. "),
  "against": (
    ["programs:dense", "--against", "programs:"],
    r"named MODULE:F.*; got 'programs:'\. ",
  ),
  "exclude": (["programs:dense", "--exclude", "a", "b"], r"got --exclude a b alone. Add --assert-"),
}


@pytest.mark.parametrize(("argv", "match"), CLEAR.values(), ids=CLEAR)
def test_clear_errors_are_one_line(explain, argv, match):
  code, out, err = explain(*argv)
  assert (code, out) == (2, "")
  assert re.fullmatch(rf"flax-fp8: explain: .*{match}.*\n", err)


PLOTS = {
  "no folder": ("no/such.png", r"writable file; got no/such\.png \(No such file or directory\)\. "),
  "no file": (".", r"writable file; got \. \(Is a directory\)\. "),
  "no name": ("", r"writable file; got \. \(Is a directory\)\. "),
  "a file for a folder": ("programs.py/a.png", r"writable file; got .* \(Not a directory\)\. "),
  "a file that none may write": ("/proc/version", r"writable file; got /proc/version \(.*\)\. "),
  "a folder that none may write to": ("/proc/self/a.png", r"writable file; got .* \(.*\)\. "),
  "a format": (
    "picture.of_no_format",
    r"file with one of the suffixes .* png, .*; got picture.of_no_for",
  ),
}


@pytest.mark.parametrize(("path", "match"), PLOTS.values(), ids=PLOTS)
def test_a_plot_that_cannot_be_written_is_refused_first(explain, folder, path, match):
  before = sorted(folder.iterdir())
  code, out, err = explain("programs:interrupts", "--target=h100", "--plot", path)
  assert (code, out) == (2, "")
  assert re.fullmatch(rf"flax-fp8: explain: --plot must name a .*{match}.*\n", err)
  assert sorted(folder.iterdir()) == before


def test_the_check_of_a_plot_leaves_an_older_one_as_it_is(explain, folder):
  (folder / "older.png").write_bytes(b"older")
  explain("programs:raises", "--target=h100", "--plot", "older.png")
  assert (folder / "older.png").read_bytes() == b"older"
  (folder / "older.png").unlink()


def test_a_plot_without_matplotlib_is_refused_first(explain, monkeypatch):
  monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
  code, _, err = explain("programs:interrupts", "--plot", "a.png")
  assert (code, err.partition(";")[0]) == (1, "flax-fp8: plot: drawing needs matplotlib")


def test_a_missing_compiler(explain, monkeypatch):
  monkeypatch.setattr(plugin, "_PLUGINS", ())
  code, _, err = explain("programs:dense", "--target", "h100")
  assert code == 1
  assert re.fullmatch(r"flax-fp8: explain: compiling for a GPU .* Run: pip install .*\n", err)


def test_no_gpu(explain):
  code, _, err = explain("programs:dense")
  assert code == 1
  assert re.fullmatch(r"flax-fp8: explain: target=None needs an attached GPU; got .*\n", err)


@pytest.mark.parametrize(
  "kind", [MemoryError, RuntimeError, TimeoutError], ids=lambda k: k.__name__
)
def test_what_ends_the_compiler(capsys, kind):
  assert cli.tell(kind("explain: the compiler's process must answer")) == 1
  assert capsys.readouterr().err == "flax-fp8: explain: the compiler's process must answer\n"


def test_what_jax_refuses(explain):
  code, _, err = explain("programs:a_string", "--target=h100")
  assert code == 1
  assert err.startswith("flax-fp8: ")
  assert "Traceback" not in err


USERS = {
  "builder": ("programs:raises", "ValueError: the builder's own mistake", "raise Val", "raises"),
  "assertion": (
    "programs:asserts",
    "AssertionError: assert_fp8: looks like",
    "assert x",
    "asserts",
  ),
  "traced": ("programs:of_other_shapes", "TypeError: dot_general requires", "return x @ x", "step"),
  "library": ("programs:in_json", "JSONDecodeError: Exp", "json.loads", "in_json"),
  "ours": ("programs:of_ours", "ValueError: get_recipe: ", "fp8.get_recipe(", "of_ours"),
  "no text": ("programs:out_of_memory", "MemoryError", "raise MemoryError", "out_of_memory"),
  "long": ("programs:at_length", f"KeyError: '{'x' * 300}", "raise KeyError", "at_length"),
}


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("spec", "first", "line", "function"), USERS.values(), ids=USERS)
def test_errors_of_the_user_name_their_line(explain, folder, spec, first, line, function):
  code, out, err = explain(spec, "--target=h100")
  number = 1 + next(i for i, text in enumerate(PROGRAMS.splitlines()) if line in text)
  assert (code, out) == (1, "")
  assert err.startswith(f"flax-fp8: {first}")
  assert f"\n  at {folder / 'programs.py'}:{number}, in {function}\n" in err
  assert err.endswith("\n  --traceback shows the full traceback\n")
  assert len(err) < 800


MODULES = {
  "import": (
    "lacks_a_module",
    "ModuleNotFoundError: No module named 'a_module_that_nobody_has'",
    1,
  ),
  "syntax": ("misspelt", "SyntaxError: invalid syntax", 1),
}


@pytest.mark.parametrize(("module", "first", "number"), MODULES.values(), ids=MODULES)
def test_modules_that_cannot_be_imported(explain, folder, module, first, number):
  code, out, err = explain(f"{module}:f", "--target=h100")
  assert (code, out) == (1, "")
  assert err.startswith(f"flax-fp8: {first}\n  at {folder / module}.py:{number}")
  assert "Traceback" not in err


def test_the_whole_traceback(explain):
  code, _, err = explain("programs:raises", "--target=h100", "--traceback")
  assert code == 1
  assert err.startswith("Traceback (most recent call last):\n")
  assert err.endswith("\nValueError: the builder's own mistake\n")


@pytest.mark.parametrize("spec", ["programs:exits", "a_script:f"])
def test_a_program_that_exits(explain, spec):
  code, _, err = explain(spec, "--target=h100")
  assert code == 1
  assert re.fullmatch(rf"flax-fp8: explain: {spec} must return .*; got SystemExit\(3\)\. .*\n", err)


def test_an_error_without_a_word(capsys):
  assert cli.tell(RuntimeError()) == 1
  assert capsys.readouterr().err == (
    "flax-fp8: RuntimeError\n  --traceback shows the full traceback\n"
  )


class TestCommandLine:
  @pytest.mark.parametrize(
    ("argv", "match"),
    [
      ([], "required: COMMAND"),
      (["explain"], "required: MODULE:FUNCTION"),
      (["explain", "a:b", "--target", "v100"], "--target: invalid choice: 'v100'"),
      (
        ["explain", "a:b", "--timeout", "0"],
        "--timeout: must be a positive number of seconds; got 0",
      ),
      (
        ["explain", "a:b", "--timeout", "soon"],
        "--timeout: must be a positive number of .*; got soon",
      ),
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

  def test_interrupted(self, explain):
    assert explain("programs:interrupts", "--target=h100") == (130, "", "flax-fp8: interrupted\n")


ODD = (  # invalid command lines, as a shell splits them
  *("", "nothing", "explain", "explain ''", "explain :", "explain : :", "explain a", "explain a:"),
  *("explain :b", "explain a:b:c", "explain a.:b", "explain .a:b", "explain a..b:c", "explain .:f"),
  *("explain a/b:c", "explain a.py:b", "explain 'a b:c'", "explain a:b()", "explain a:b.c"),
  *("explain -", "explain --", "explain -- -:f", "explain 1:f", "explain a:1", "explain None:f"),
  *("explain class:f", "explain ä:ö", "explain 'a\n:f'", "explain '\t'", "explain LONG"),
  *("explain LONG:f", "explain programs:LONG", "explain programs:__name__"),
  *(
    "explain programs:__doc__",
    "explain programs:nn",
    "explain programs:jnp",
    "explain builtins:0",
  ),
  *("explain programs:DENSE", "explain builtins:dict", "explain builtins:len", "explain sys:path"),
  *("explain builtins:list", "explain os:getcwd", "explain sys:exit", "explain math:pi"),
  *("explain flax_fp8:explain", "explain flax_fp8:Fp8DotGeneral", "explain flax_fp8:ops"),
  *("explain json.nothing:f", "explain programs.dense:f"),
  *("explain programs:dense extra", "explain programs:dense --targets h100", "explain --help=x"),
  *("explain programs:dense --target", "explain programs:dense --target H100"),
  *("explain programs:dense --target ''", "explain programs:dense --format xml"),
  *("explain programs:dense --format", "explain programs:dense --against"),
  *("explain programs:dense --against nothing", "explain programs:dense --against ''"),
  *("explain programs:dense --against programs:x", "explain programs:dense --exclude"),
  *("explain programs:dense --exclude a", "explain programs:dense --exclude LONG"),
  *("explain --assert-fp8 --exclude a programs:dense", "explain programs:dense --assert-fp8=1"),
  *("explain programs:dense --timeout ''", "explain programs:dense --timeout nan"),
  *("explain programs:dense --timeout -1", "explain programs:dense --timeout 0"),
  *("explain programs:dense --timeout 1s", "explain programs:dense --timeout LONG"),
  *("explain programs:dense --plot", "explain programs:dense --plot /", "--version=1"),
  *("explain programs:dense --plot LONG", "explain programs:dense --plot no/such/folder/a.png"),
  *("explain programs:dense --plot a.doc", "explain programs:dense --plot programs.py/a.png"),
  *("doctor extra", "doctor --target h100", "doctor --traceback=1", "doctor '' ''", "Doctor"),
  *("explain programs:needs_an_argument", "explain programs:a_list", "explain programs:a_nothing"),
  *("explain programs:the_arguments_alone", "--help=1", "-x"),
)


@pytest.mark.parametrize("line", ODD, ids=ascii)
def test_odd_command_lines_are_refused_in_words(explain, folder, capsys, line):
  before = sorted(folder.iterdir())
  try:
    code = cli.main(shlex.split(line.replace("LONG", "x" * 10_000)))
  except SystemExit as exit:
    code = exit.code
  out, err = capsys.readouterr()
  assert (code, out) == (1 if line == "explain sys:exit" else 2, "")
  assert re.search(r"^flax-fp8( \w+)?: (error: |explain: )", err, re.MULTILINE)
  assert "Traceback" not in err
  assert len(err) < 1200
  assert sorted(folder.iterdir()) == before


class TestStreams:
  """A closed pipe, a full disk and a missing stdout each end the command without a traceback."""

  @pytest.fixture(autouse=True)
  def examined(self, monkeypatch):
    lines = [cli.doctor.Line("trial", "größe")]
    monkeypatch.setattr(cli.doctor, "examine", lambda: lines)

  @pytest.mark.parametrize("argv", [["doctor"], ["--help"], ["explain", "--help"]], ids=" ".join)
  def test_a_reader_that_has_gone(self, capsys, argv):
    reading, writing = os.pipe()
    os.close(reading)
    with contextlib.redirect_stdout(os.fdopen(writing, "w")) as stdout:
      assert cli.main(argv) == 141
      stdout.close()
    assert capsys.readouterr().err == ""

  @pytest.mark.skipif(not Path("/dev/full").exists(), reason="the device exists only on Linux")
  def test_a_full_disk(self, capsys):
    with contextlib.redirect_stdout(open("/dev/full", "w")) as stdout:
      assert cli.main(["doctor"]) == 1
      stdout.close()
    assert "OSError: [Errno 28] No space left on device" in capsys.readouterr().err

  def test_no_stdout(self):
    with contextlib.redirect_stdout(None):
      assert cli.main(["doctor"]) == 0

  def test_no_stderr(self, capsys):
    with contextlib.redirect_stderr(None):
      assert cli.main(["explain", "nothing"]) == 2
    assert capsys.readouterr().out == ""

  def test_ascii(self):
    written = io.BytesIO()
    with contextlib.redirect_stdout(io.TextIOWrapper(written, encoding="ascii")):
      assert cli.main(["doctor"]) == 0
      assert b"gr\\xf6\\xdfe" in written.getvalue()

  @pytest.mark.parametrize("argv", [["--help"], ["explain", "--help"], ["doctor", "--help"]])
  def test_help_is_ascii(self, capsys, argv):
    with pytest.raises(SystemExit, match="0"):
      cli.main(argv)
    assert capsys.readouterr().out.isascii()


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_from_a_shell(folder):
  """The command finds the module in the current folder and leaves stderr empty."""
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
