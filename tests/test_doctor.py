"""What ``flax-fp8 doctor`` reports on working and broken machines, and what it says to install."""

import os
import re
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import jax
import pytest

import flax_fp8 as fp8
from flax_fp8 import doctor
from flax_fp8.doctor import Line
from flax_fp8.explain import plugin

ROOT = Path(__file__).parents[1]
OPEN_MODULE = (
  "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (builder)\n"
  "GCC version:  gcc version 13.3.0 (Ubuntu 13.3.0-6ubuntu2~24.04)\n"
)
CLOSED_MODULE = (
  "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024\n"
)


@pytest.fixture
def machine(monkeypatch, tmp_path):
  """Sets the reported version of NVIDIA's driver, and JAX's settings."""
  monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

  def describe(driver=None, platforms="", visible=None):
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(doctor, "_platforms", lambda: platforms)
    if driver is not None:
      (tmp_path / "version").write_text(driver)
    if visible is not None:
      monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

  return describe


def run_doctor(**environment):
  """Runs the command in its own process, without the test suite's JAX settings."""
  inherited = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "CUDA_"))}
  return subprocess.run(
    [sys.executable, "-m", "flax_fp8.cli", "doctor"],
    env=inherited | environment | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
    timeout=300,
  )


class TestTheCommand:
  @pytest.mark.slow
  def test_this_machine(self):
    found = run_doctor(JAX_PLATFORMS="cpu")
    assert (found.returncode, found.stderr) == (0, "")
    assert re.search(rf"^jax +{re.escape(jax.__version__)}$", found.stdout, re.MULTILINE)
    assert re.search(r"^device +1 x cpu$", found.stdout, re.MULTILINE)
    for name in fp8.RECIPES:
      assert re.search(rf"^  {name} +FP8 is emulated", found.stdout, re.MULTILINE)
    assert found.stdout.endswith("\n\nNothing is broken.\n")

  @pytest.mark.slow
  @pytest.mark.skipif(doctor.driver_version() is not None, reason="JAX may look for CUDA")
  def test_jax_does_not_miss_cuda_where_there_is_no_driver(self):
    found = run_doctor()
    assert (found.returncode, found.stderr) == (0, "")

  @pytest.mark.slow
  @pytest.mark.skipif(doctor.driver_version() is not None, reason="there may be a GPU")
  def test_a_platform_that_is_not_there(self):
    found = run_doctor(JAX_PLATFORMS="cuda")
    assert found.returncode == 1
    assert "BROKEN: JAX finds no device with JAX_PLATFORMS=cuda: " in found.stdout
    assert "-> unset JAX_PLATFORMS\n" in found.stdout


class TestTrial:
  def test_compiles_fp8(self):
    pytest.importorskip("jax_plugins.xla_cuda13", reason="the CUDA plugin supports only Linux")
    line = doctor.trial()
    assert re.fullmatch(
      r"compiled a 256 x 256 E4M3 product for an H100 in [\d.]+ s; it is FP8", line.text
    )
    assert not line.broken

  def test_an_error_is_the_finding(self, monkeypatch):
    def explain(*args, **options):
      raise RuntimeError("explain: the compiler's process must answer")

    monkeypatch.setattr(doctor, "explain", explain)
    line = doctor.trial()
    assert line == Line(
      "trial", "RuntimeError: explain: the compiler's process must answer", broken=True
    )

  def test_a_product_that_is_not_fp8_is_broken(self, monkeypatch):
    class Report:
      fp8_gemms, total_gemms = 0, 1

    monkeypatch.setattr(doctor, "explain", lambda *args, **options: Report)
    assert doctor.trial().broken
    assert doctor.trial().text.endswith("s; it is not FP8")


class TestCompiler:
  def test_installed(self):
    pytest.importorskip("jax_plugins.xla_cuda13", reason="the CUDA plugin supports only Linux")
    found = metadata.version("jax-cuda13-plugin")
    assert doctor.plugin() == Line("GPU compiler", f"jax-cuda13-plugin {found}")

  def test_missing_is_advice(self, monkeypatch):
    monkeypatch.setattr(plugin, "_PLUGINS", ("jax-cuda-plugin-that-nobody-has",))
    line = doctor.plugin()
    assert not line.broken
    assert line.text.startswith("compiling for a GPU that is not attached needs the compiler of")
    assert line.cure == plugin.install_line()

  def test_another_version_is_broken(self, monkeypatch):
    versions = {"jax-cuda13-plugin": "0.0.1", "jaxlib": "1.2.3"}
    monkeypatch.setattr(plugin.metadata, "version", versions.__getitem__)
    line = doctor.plugin()
    assert line.broken
    assert "must have jaxlib's version; got jax-cuda13-plugin 0.0.1 with jaxlib 1.2.3" in line.text
    assert line.cure == plugin.install_line()

  def test_missing_flatbuffers_are_advice(self, monkeypatch):
    versions = {"jax-cuda13-plugin": "1.2.3", "jaxlib": "1.2.3"}

    def version(name):
      if name not in versions:
        raise metadata.PackageNotFoundError(name)
      return versions[name]

    monkeypatch.setattr(plugin.metadata, "version", version)
    line = doctor.plugin()
    assert not line.broken
    assert line.cure == "pip install flatbuffers"

  def test_cannot_be_had_everywhere(self, monkeypatch):
    monkeypatch.setattr(doctor.platform, "system", lambda: "Darwin")
    assert doctor.plugin() == Line("GPU compiler", "none; JAX's CUDA plugin supports only Linux")

  def test_is_not_tried_where_it_is_missing(self, monkeypatch):
    monkeypatch.setattr(plugin, "_PLUGINS", ())
    lines = doctor.examine()
    assert lines[-1].label == "GPU compiler"
    assert not any(line.broken for line in lines)


class TestDriver:
  def test_none(self, machine):
    machine()
    assert doctor.driver(sees_gpu=False) == Line("NVIDIA driver", "none")

  @pytest.mark.parametrize("driver", [OPEN_MODULE, CLOSED_MODULE], ids=["open", "closed"])
  def test_jax_sees_the_gpu(self, machine, driver):
    machine(driver)
    version = doctor.driver_version()
    assert version in ("580.95.05", "550.54.14")
    assert doctor.driver(sees_gpu=True) == Line("NVIDIA driver", f"{version}; JAX sees the GPU")

  @pytest.mark.parametrize(
    ("driver", "name", "extra"),
    [
      (OPEN_MODULE, "580.95.05", "cuda13"),
      (CLOSED_MODULE, "550.54.14", "cuda12"),
      ("?", "unknown version", "cuda13"),
    ],
    ids=["new", "old", "unknown"],
  )
  def test_jax_sees_no_gpu(self, machine, driver, name, extra):
    machine(driver)
    assert doctor.driver(sees_gpu=False) == Line(
      "NVIDIA driver",
      f"{name}, but JAX sees no GPU",
      f"pip install 'jax[{extra}]'",
      broken=True,
    )

  @pytest.mark.parametrize(
    ("settings", "reason"),
    [
      ({"platforms": "cpu"}, "JAX_PLATFORMS=cpu"),
      ({"visible": ""}, "CUDA_VISIBLE_DEVICES="),
      ({"visible": "-1"}, "CUDA_VISIBLE_DEVICES=-1"),
    ],
    ids=["platform", "none visible", "negative"],
  )
  def test_hidden_on_purpose(self, machine, settings, reason):
    machine(OPEN_MODULE, **settings)
    assert doctor.driver(sees_gpu=False) == Line(
      "NVIDIA driver", f"580.95.05; {reason} hides the GPU from JAX"
    )

  @pytest.mark.parametrize("settings", [{"platforms": "cuda,cpu"}, {"visible": "0"}], ids=str)
  def test_asked_for_is_not_hidden(self, machine, settings):
    machine(OPEN_MODULE, **settings)
    assert doctor.driver(sees_gpu=False).broken


class TestAllowMissingCuda:
  @pytest.mark.parametrize(
    ("driver", "before", "after"),
    [(None, None, "1"), (None, "0", "0"), (OPEN_MODULE, None, None)],
    ids=["no driver", "set by the user", "driver"],
  )
  def test_only_without_a_driver(self, machine, monkeypatch, driver, before, after):
    machine(driver)
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", before or "")
    if before is None:
      monkeypatch.delenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK")
    doctor.allow_missing_cuda()
    assert os.environ.get("JAX_SKIP_CUDA_CONSTRAINTS_CHECK") == after


class TestDevices:
  def test_each_kind_once(self, described):
    found = [described("h100"), described("h100"), described("a100")]
    lines = list(doctor.devices(found, ""))
    assert [line.text for line in lines if line.label == "device"] == [
      f"2 x {described('h100').device_kind}",
      f"1 x {described('a100').device_kind}",
    ]
    assert not any(line.broken for line in lines)

  @pytest.mark.parametrize(
    ("name", "unsupported", "reason"),
    [
      ("a100", set(fp8.RECIPES), "no FP8 matrix units known; NVIDIA GPUs have them from"),
      ("h100", {"mxfp8"}, "its matrix units do not apply float8_e8m0fnu block scales;"),
      ("b200", set(), ""),
    ],
    ids=["no FP8", "no block scales", "all recipes"],
  )
  def test_each_recipe_with_its_reason(self, described, name, unsupported, reason):
    device, *lines = doctor.devices([described(name)], "")
    assert device == Line("device", f"1 x {described(name).device_kind}")
    answers = {line.label.strip(): line.text for line in lines}
    assert list(answers) == list(fp8.RECIPES)
    for recipe, text in answers.items():
      expected = f"no; {reason}" if recipe in unsupported else "yes; FP8 matrix units present"
      assert text.startswith(expected), recipe

  def test_a_gpu_with_fnuz_formats(self):
    mi300 = types.SimpleNamespace(
      platform="gpu", device_kind="AMD MI300X", compute_capability="gfx942:sramecc+:xnack-"
    )
    _, *lines = doctor.devices([mi300], "")
    answers = {line.label.strip(): line.text.partition(";")[0] for line in lines}
    assert answers == {
      "delayed": "yes, with fp8_format=Format.HYBRID_FNUZ",
      "current": "yes, with fp8_format=Format.HYBRID_FNUZ",
      "rowwise": "yes, with fp8_format=Format.E4M3_FNUZ",
      "block": "yes, with fp8_format=Format.E4M3_FNUZ",
      "mxfp8": "no",
    }

  def test_none(self, machine):
    machine()
    assert list(doctor.devices([], "RuntimeError no")) == [
      Line("device", "JAX finds no device: RuntimeError no", broken=True)
    ]


class TestVersions:
  def test_of_what_matters(self):
    found = {line.label: line.text for line in doctor.versions()}
    assert found["jaxlib"] == metadata.version("jaxlib")
    assert list(found) == ["Python", *doctor.PACKAGES, "matplotlib"]

  def test_without_matplotlib(self, monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda package: "not installed")
    assert doctor.matplotlib() == Line("matplotlib", "not installed", "pip install matplotlib")

  def test_not_installed(self):
    assert doctor.version("a-package-that-nobody-has") == "not installed"


def test_render():
  lines = [Line("one", "fine"), Line("three", "bad", "pip install good", broken=True)]
  assert doctor.render(lines) == (
    "one    fine\nthree  BROKEN: bad\n       -> pip install good\n\nBroken: three."
  )
  assert doctor.render(lines[:1]).endswith("\n\nNothing is broken.")


def test_install_commands_name_packages_on_pypi():
  """``pip install`` lines work from a checkout and from a wheel: flax-fp8 is not on PyPI."""
  package = Path(doctor.__file__).parent
  commands = [
    command
    for path in package.rglob("*.py")
    for command in re.findall(r"pip install ([^\n\"]+)", path.read_text())
  ]
  assert len(commands) >= 5
  for command in commands:
    assert not re.search(r"flax[-_]fp8|-e |\.\[|(^|\s)\.($|\s)", command), command
    assert "[" not in command or re.search(r"'[^']*\[.*'", command), command
