"""Every way in which the compiler's process can end: one clear error, nothing left behind."""

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
  """Puts another program in the place of the child's."""

  def replace(source):
    script = tmp_path / "child.py"
    script.write_text(textwrap.dedent(source))
    monkeypatch.setattr(child, "_CHILD", script)

  return replace


@pytest.fixture(autouse=True)
def nothing_left_behind(monkeypatch, tmp_path):
  """The folder for temporary files is empty again, and no process of ours is left."""
  folder = tmp_path / "temporary"
  folder.mkdir()
  monkeypatch.setattr(tempfile, "tempdir", str(folder))
  yield
  assert list(folder.iterdir()) == []
  assert children() == []


def children():
  """Processes that this one started and that have not ended."""
  listed = subprocess.run(
    ["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())],
    capture_output=True,
    text=True,
    check=False,
  )
  return [line for line in listed.stdout.splitlines() if "child.py" in line or "deviceless" in line]


def test_a_run_leaves_nothing():
  assert run().launches == 1


def test_killed(replaced):
  replaced("""
    import os, signal, sys
    print("about to die", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
  """)
  with pytest.raises(
    RuntimeError, match=r"was killed by SIGKILL \(the system's out-of-memory"
  ) as e:
    run()
  assert "about to die" in str(e.value)


def test_crashed(replaced):
  replaced("import os; os.abort()")
  with pytest.raises(RuntimeError, match="was killed by SIGABRT"):
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


def test_ends_with_its_parent(replaced, tmp_path):
  """The child of a process that was killed outright does not live on."""
  replaced("")
  waiting = tmp_path / "child.py"
  waiting.write_text(
    textwrap.dedent(f"""
      import os, runpy, sys, time
      module = runpy.run_path({str(DEVICELESS)!r})
      module["end_with_parent"](int(sys.argv[1]))
      open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
      time.sleep(600)
    """)
  )
  parent = tmp_path / "parent.py"
  parent.write_text(
    textwrap.dedent(f"""
      import jax, jax.numpy as jnp
      from pathlib import Path
      import flax_fp8 as fp8
      from flax_fp8.explain import child
      child._CHILD = Path({str(waiting)!r})
      fp8.explain(lambda x: x, jnp.ones(4), target="h100")
    """)
  )
  process = subprocess.Popen(
    [sys.executable, str(parent)], env=os.environ | {"PYTHONPATH": str(ROOT)}
  )
  pid = wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
  process.send_signal(signal.SIGKILL)
  process.wait()
  wait_for(lambda: not Path(f"/proc/{pid}").exists())


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
  with pytest.raises(RuntimeError, match=r"refused the program: .*mend GpuTarget\(description"):
    fp8.explain(lambda x: x, spec(4), target=broken)
