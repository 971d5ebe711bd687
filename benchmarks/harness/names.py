"""One name and one color for each variant, in every table and plot."""

BF16 = "BF16"
FLAX = "flax.linen.fp8_ops"
BLOCK = "block"
RECIPES = ("delayed", "current", "rowwise", BLOCK, "mxfp8")
# Okabe and Ito's colors, which color-blind readers can tell apart, and a gray for the baseline.
COLORS = {
  "bf16-perturbed": "#999999",
  BF16: "#4d4d4d",
  FLAX: "#E69F00",
  "delayed": "#0072B2",
  "current": "#56B4E9",
  "rowwise": "#009E73",
  BLOCK: "#D55E00",
  "mxfp8": "#CC79A7",
  "float16": "#000000",
}
MARKERS = dict(zip(COLORS, ".osD^vPX*", strict=True))


def base(name: str) -> str:
  """The variant that a name begins with: ``delayed`` of ``delayed, fused``, ``BF16`` of ``bf16``.

  Raises:
    KeyError: no variant has such a name.
  """
  matches = [known for known in COLORS if name.lower().startswith(known.lower())]
  if not matches:
    raise KeyError(f"base: a name must begin with one of {', '.join(COLORS)}; got {name!r}.")
  return matches[0]


def label(name: str) -> str:
  """A name as tables and plots show it: ``FP8 delayed`` for ``delayed``."""
  return f"FP8 {name}" if name.startswith(RECIPES) else name


def color(name: str) -> str:
  return COLORS[base(name)]


def marker(name: str) -> str:
  return MARKERS[base(name)]
