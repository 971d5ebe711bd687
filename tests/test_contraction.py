"""GEMMs derived from dimension numbers, compared with JAX's differentiation and einsum."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flax_fp8 import contraction

hypothesis.settings.register_profile("here", deadline=None, max_examples=20, derandomize=True)
hypothesis.settings.load_profile("here")


def integers(shape, seed=0):
  """Makes small integers, whose contractions are exact in float32."""
  return np.random.default_rng(seed).integers(-3, 4, size=shape).astype(np.float32)


@st.composite
def contractions(draw):
  """Makes two shapes with matching dimension numbers."""
  batch, contract = (
    draw(st.lists(st.integers(1, 3), max_size=2)),
    draw(st.lists(st.integers(1, 3), max_size=2)),
  )
  lhs_kept, rhs_kept = (draw(st.lists(st.integers(1, 3), max_size=2)) for _ in range(2))
  operands = []
  for kept in (lhs_kept, rhs_kept):
    sizes = batch + contract + kept
    order = draw(st.permutations(range(len(sizes))))
    shape = tuple(sizes[i] for i in order)
    where = [order.index(i) for i in range(len(sizes))]
    operands.append((shape, where[len(batch) : len(batch) + len(contract)], where[: len(batch)]))
  (lhs, lhs_c, lhs_b), (rhs, rhs_c, rhs_b) = operands
  return lhs, rhs, ((tuple(lhs_c), tuple(rhs_c)), (tuple(lhs_b), tuple(rhs_b)))


def dot_general(lhs, rhs, dims):
  """``lax.dot_general`` in NumPy, which compiles nothing."""
  (lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch) = dims
  left, right = list(range(lhs.ndim)), list(range(lhs.ndim, lhs.ndim + rhs.ndim))
  for i, j in zip((*lhs_contracting, *lhs_batch), (*rhs_contracting, *rhs_batch), strict=True):
    right[j] = left[i]
  batch = [left[i] for i in lhs_batch]
  kept = [label for label in (*left, *right) if (label in left) != (label in right)]
  return np.einsum(lhs, left, rhs, right, batch + kept)


@hypothesis.given(contractions())
def test_backward_gemms_equal_jax(case):
  lhs_shape, rhs_shape, dims = case
  lhs, rhs = integers(lhs_shape), integers(rhs_shape, 1)
  out, vjp = jax.vjp(lambda x, y: lax.dot_general(x, y, dims), lhs, rhs)
  g = integers(out.shape, 2)
  dgrad, wgrad = contraction.backward_gemms(dims, lhs.shape, rhs.shape)
  got = [
    dot_general(g, other, gemm.dimension_numbers).transpose(gemm.permutation)
    for gemm, other in ((dgrad, rhs), (wgrad, lhs))
  ]
  for ours, theirs in zip(got, vjp(g), strict=True):
    np.testing.assert_array_equal(ours, theirs)


EQUATIONS = {
  "mk,kn->mn": ((2, 3), (3, 4)),
  "mk,kn": ((2, 3), (3, 4)),
  "mk,kn->nm": ((2, 3), (3, 4)),
  "mk , kn -> mn": ((2, 3), (3, 4)),
  "ebk,ekn->ebn": ((2, 3, 4), (2, 4, 5)),
  "bhqd,bhkd->bhqk": ((2, 3, 4, 5), (2, 3, 6, 5)),
  "BSEM,EMH->EBSH": ((2, 3, 4, 5), (4, 5, 6)),
  "...k,kn->...n": ((2, 3, 4), (4, 5)),
  "...mk,...kn->...mn": ((2, 3, 4, 5), (3, 5, 6)),
  "...mk,...kn": ((2, 3, 4, 5), (2, 3, 5, 6)),
  "k...,kn->n...": ((4, 2, 3), (4, 5)),
  "...,...->...": ((2, 3), (2, 3)),
  "mkl,lkn->mn": ((2, 3, 4), (4, 3, 5)),
  "amk,kn->mn": ((6, 2, 3), (3, 4)),
  "mk,kna->mn": ((2, 3), (3, 4, 6)),
  "mk,kn->": ((2, 3), (3, 4)),
  "iik,kn->in": ((2, 2, 3), (3, 4)),
  "ii,ij->j": ((3, 3), (3, 4)),
  "aaa,ab->b": ((3, 3, 3), (3, 4)),
  "m,n->mn": ((2,), (3,)),
  "bk,bk->b": ((2, 3), (2, 3)),
  "k,k->": ((3,), (3,)),
  ",k->k": ((), (3,)),
  "bmk,bkn->bmn": ((1, 2, 3), (5, 3, 4)),
  "mk,kn->mn ": ((2, 1), (3, 4)),
  "zY,Yz->zY": ((2, 3), (3, 2)),
  "BSD,2KDH->2BSKH": ((2, 3, 4), (2, 3, 4, 5)),
  "1_,_%": ((2, 3), (3, 4)),
}


def by_plan(equation, lhs, rhs):
  plan = contraction.plan_einsum(equation, lhs.shape, rhs.shape)
  operands = jnp.einsum(plan.lhs_reduction, lhs), jnp.einsum(plan.rhs_reduction, rhs)
  first, second = operands[::-1] if plan.swap else operands
  return lax.transpose(lax.dot_general(first, second, plan.dimension_numbers), plan.permutation)


@pytest.mark.parametrize("equation", ["mk,kn->mn", "mk,kn->nm", "ebk,ekn->ebn", "ebk,ekn->enb"])
def test_the_order_of_operands_saves_a_transposition(equation):
  lhs, rhs = EQUATIONS["ebk,ekn->ebn" if "e" in equation else "mk,kn->mn"]
  plan = contraction.plan_einsum(equation, lhs, rhs)
  assert plan.permutation == tuple(range(len(plan.permutation)))


@pytest.mark.parametrize(("equation", "shapes"), EQUATIONS.items(), ids=EQUATIONS)
def test_plan_equals_jnp_einsum(equation, shapes):
  lhs, rhs = integers(shapes[0]), integers(shapes[1], 1)
  np.testing.assert_array_equal(by_plan(equation, lhs, rhs), jnp.einsum(equation, lhs, rhs))


@st.composite
def equations(draw):
  """Makes an equation with random labels: some repeated, some summed, in random output order."""
  sizes = dict(zip("abcd", (2, 3, 1, 4), strict=True))
  lhs, rhs = (draw(st.text("abcd", max_size=4)) for _ in range(2))
  out = draw(st.permutations(sorted(set(lhs + rhs))))
  out = "".join(out[: draw(st.integers(0, len(out)))])
  shape = lambda labels: tuple(sizes[c] for c in labels)
  return f"{lhs},{rhs}->{out}", shape(lhs), shape(rhs)


@pytest.mark.slow
@hypothesis.given(equations())
def test_random_equations_equal_jnp_einsum(case):
  equation, lhs_shape, rhs_shape = case
  lhs, rhs = integers(lhs_shape), integers(rhs_shape, 1)
  np.testing.assert_array_equal(by_plan(equation, lhs, rhs), jnp.einsum(equation, lhs, rhs))


BAD = {
  "one operand": ("mk->m", (2, 3), (3, 4), "two operands"),
  "three operands": ("mk,kn,n->m", (2, 3), (3, 4), "two operands"),
  "unknown output": ("mk,kn->mz", (2, 3), (3, 4), "labels must be single characters"),
  "repeated output": ("mk,kn->mm", (2, 3), (3, 4), "labels must be single characters"),
  "lone dot": ("m.,.n->mn", (2, 3), (3, 4), "labels must be single characters"),
  "too few labels": ("m,kn->mn", (2, 3), (3, 4), "one dimension for each label"),
  "too many labels": ("mkz,kn->mn", (2, 3), (3, 4), "one dimension for each label"),
  "too many beside dots": ("...mkz,kn->mn", (2, 3), (3, 4), "labels must be single characters"),
  "sizes differ": ("mk,kn->mn", (2, 3), (4, 5), "one size.*'k' is 3 in .* and 4 in"),
  "diagonal differs": ("mm,mn->n", (2, 3), (2, 4), "one dimension for each label"),
  "lone dots in output": ("mk,kn->...mn->", (2, 3), (3, 4), "labels must be single characters"),
}


@pytest.mark.parametrize(("equation", "lhs", "rhs", "message"), BAD.values(), ids=BAD)
def test_bad_equations(equation, lhs, rhs, message):
  with pytest.raises(ValueError, match=f"Fp8Einsum: .*{message}"):
    contraction.plan_einsum(equation, lhs, rhs)


@pytest.mark.slow
@hypothesis.given(contractions(), st.integers(0, 1))
def test_a_gemm_multiplies_stacks_of_matrices(case, kernel):
  """The views and the shape agree with the dimension numbers, in the kernel's order of axes."""
  lhs_shape, rhs_shape, dims = case
  lhs, rhs = integers(lhs_shape), integers(rhs_shape, 1)
  gemm = contraction.forward_gemm(dims, lhs.shape, rhs.shape, kernel=kernel)
  assert gemm.dimension_numbers == dims
  view = (gemm.lhs, gemm.rhs)[kernel]
  assert list(view.contracting) == sorted(view.contracting)
  out = np.einsum("bmk,bnk->bmn", gemm.lhs.matrices(lhs), gemm.rhs.matrices(rhs))
  np.testing.assert_array_equal(out.reshape(gemm.shape), dot_general(lhs, rhs, dims))


def test_in_blocks():
  x = jnp.arange(2.0 * 3 * 5).reshape(2, 3, 5)
  blocks = contraction.in_blocks(x, 2, 4)
  assert blocks.shape == (2, 2, 2, 2, 4)
  np.testing.assert_array_equal(blocks[1, 0, :, 0], x[1, :2, :4])
  np.testing.assert_array_equal(blocks[0, 1, :, 1], [[14.0, 0, 0, 0], [0, 0, 0, 0]])
  assert contraction.in_blocks(x[:, :0], 2, 4).shape == (2, 0, 2, 2, 4)
