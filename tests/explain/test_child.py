"""Each failure of the compiler process gives one clear error and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import jax.numpy as jnp
import pytest

import flax_fp8 as fp8
from flax_fp8.explain import child
from tests.explain.programs import spec

pytestmark = pytest.mark.child

ROOT = Path(__file__).parents[2]
DEVICELESS = ROOT / "flax_fp8" / "explain" / "deviceless.py"


def run():
  return fp8.explain(lambda x: jnp.tanh(x), spec(64), target="h100")


@pytest.fixture
def replaced(monkeypatch, tmp_path):
  """Replaces the program of the child."""

  def replace(source):
    script = tmp_path / "child.py"
    script.write_text(textwrap.dedent(source))
    monkeypatch.setattr(child, "_CHILD", script)

  return replace


@pytest.fixture(autouse=True)
def nothing_left_behind(monkeypatch, tmp_path):
  """Checks that no temporary file and no child process is left."""
  folder = tmp_path / "temporary"
  folder.mkdir()
  monkeypatch.setattr(tempfile, "tempdir", str(folder))
  yield
  assert list(folder.iterdir()) == []
  assert children() == []


def children():
  """Returns the running child processes."""
  listed = subprocess.run(
    ["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())],
    capture_output=True,
    text=True,
    check=False,
  )
  return [line for line in listed.stdout.splitlines() if "child.py" in line or "deviceless" in line]


def test_a_run_leaves_no_files_or_processes():
  assert run().launches == 1


def test_killed(replaced):
  replaced("""
    import os, signal, sys, tempfile
    os.mkdir(os.environ["TMPDIR"])
    tempfile.mkstemp()
    print("x" * 10_000, "about to die", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
  """)
  with pytest.raises(
    RuntimeError, match=r"was killed by SIGKILL \(the system's out-of-memory"
  ) as e:
    run()
  assert "about to die" in str(e.value)
  assert len(str(e.value)) <= 600


def test_crashed(replaced):
  replaced("import os; os.abort()")
  with pytest.raises(RuntimeError, match="was killed by SIGABRT"):
    run()


def test_crashed_without_libdevice(replaced):
  replaced("""
    import os, sys
    words = "load_ir_module.cc:29] ./libdevice.10.bc:-1:-1: Could not open input file"
    print(words, file=sys.stderr, flush=True)
    os.abort()
  """)
  with pytest.raises(
    RuntimeError, match=r"needs ptxas and libdevice.*pip install nvidia-cuda-nvcc"
  ):
    run()


def test_ended_without_an_answer(replaced):
  replaced("raise SystemExit(3)")
  with pytest.raises(RuntimeError, match="it ended with code 3"):
    run()


LIMIT = """
    import importlib.util, resource
    import jax

    def limit():
      used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
      resource.setrlimit(resource.RLIMIT_AS, (used + 2**24, -1))

    spec = importlib.util.spec_from_file_location("deviceless", {path!r})
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
"""


def test_out_of_memory_when_it_loads_the_compiler(replaced):
  replaced(LIMIT.format(path=str(DEVICELESS)) + "    limit()\n    module.main()")
  with pytest.raises(MemoryError, match="the compiler's process ran out of memory"):
    run()


def test_out_of_memory_when_it_compiles(replaced):
  replaced(
    LIMIT.format(path=str(DEVICELESS))
    + """
    compile = module.compile_with_text
    module.compile_with_text = lambda lowered: limit() or compile(lowered)
    module.main()
    """
  )
  with pytest.raises(MemoryError, match="the compiler's process ran out of memory"):
    run()


def test_timed_out():
  begun = time.monotonic()
  with pytest.raises(TimeoutError, match=r"must end within timeout=0\.2 seconds; it did not"):
    fp8.explain(lambda x: jnp.tanh(x), spec(64), target="h100", timeout=0.2)
  assert time.monotonic() - begun < 60


def test_what_is_printed_does_not_break_the_reply(replaced):
  """Some JAX settings, such as MOSAIC_GPU_DUMP_PTXAS=1, print to stdout."""
  replaced(f"""
    import os, runpy
    os.write(1, b"registers: 168")
    print("spills: 0", flush=True)
    runpy.run_path({str(DEVICELESS)!r}, run_name="__main__")
  """)
  assert run().launches == 1


def test_standard_streams_may_be_closed():
  """Closed standard streams, as in a daemon: the first opened files get their numbers."""
  saved = [os.dup(number) for number in range(3)]
  os.closerange(0, 3)
  try:
    assert run().launches == 1
    with pytest.raises(OSError, match="Bad file descriptor"):
      os.fstat(0)
  finally:
    for number, copy in enumerate(saved):
      os.dup2(copy, number)
      os.close(copy)


SLOW = f"""
    import os, runpy, tempfile, time
    from pathlib import Path

    def compile_for_long(request, program):
      file, _ = tempfile.mkstemp()
      Path("pid").with_name("pid.part").write_text(str(os.getpid()))
      os.rename("pid.part", "pid")
      while True:
        os.write(file, b"temporary")
        time.sleep(0.01)

    main = runpy.run_path({str(DEVICELESS)!r})["main"]
    main.__globals__["answer"] = compile_for_long
    main()
"""
# If the tests run in the background of a shell, Python ignores SIGINT.
PARENT = f"""
    import runpy
    import signal
    from pathlib import Path

    signal.signal(signal.SIGINT, signal.default_int_handler)
    run_child = runpy.run_path({str(ROOT / "flax_fp8" / "explain" / "child.py")!r})["run_child"]
    run_child.__globals__["_CHILD"] = Path("child.py")
    run_child({{}}, b"", 600)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  "number",
  [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL],
  ids=lambda number: number.name,
)
def test_ends_with_its_parent(replaced, tmp_path, number):
  """A signal to only the parent also ends the child and removes its temporary files."""
  replaced(SLOW)
  (tmp_path / "parent.py").write_text(textwrap.dedent(PARENT))
  process = subprocess.Popen(
    [sys.executable, "parent.py"],
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": tempfile.gettempdir()},
    stderr=subprocess.DEVNULL,
  )
  wait_for((tmp_path / "pid").exists)
  assert list((tmp_path / "temporary").glob("flax_fp8_*/*"))
  process.send_signal(number)
  assert process.wait(60) == -number
  wait_for(lambda: not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists())


def wait_for(condition):
  for _ in range(600):
    if found := condition():
      return found
    time.sleep(0.1)
  raise AssertionError("waited for a minute")


def test_a_program_that_the_compiler_refuses():
  h100 = fp8.GpuTarget.named("h100")
  broken = fp8.GpuTarget(
    name="broken",
    description="gpu_device_info { no such field }",
    peak_flops=h100.peak_flops,
    memory_bandwidth=1,
    link_bandwidth=1,
    memory_bytes=1,
  )
  with pytest.raises(RuntimeError, match=r"refused the program: .*fix GpuTarget\(description"):
    fp8.explain(lambda x: x, spec(4), target=broken)
