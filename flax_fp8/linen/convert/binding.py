"""Contractions, handed to someone else where JAX binds them, while a module's method runs.

All spellings end in one primitive. While any thread needs it, the ``bind`` of that primitive, and
of those that hold programs, is replaced. A program (a jitted function, a loop, a remat) is bound
after it was traced, and JAX may have cached it. So nothing is replaced while it is traced. The
method's own contractions are marked, and where the program is bound, it is evaluated again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Protocol, TypeAlias

import jax
import jax.extend.core
from jax import lax
from jax.extend.core import Literal, primitives
from jax.interpreters import ad, batching, mlir

from flax_fp8 import _compat
from flax_fp8.linen.provenance import subprograms


class Handler(Protocol):
  """What contracts in the place of JAX."""

  def contract(
    self, lhs: jax.Array, rhs: jax.Array, *, kind: str, kernel: int, params: Mapping[str, Any]
  ) -> jax.Array | None:
    """Contracts.

    Args:
      lhs: left operand.
      rhs: right operand.
      kind: the function that was called, as users write it.
      kernel: the operand, 0 or 1, that stands on the right in that call.
      params: of the primitive ``dot_general``.

    Returns:
      The product; None to let JAX contract.
    """
    ...

  def repeated(self, program: Any) -> contextlib.AbstractContextManager[Any]:
    """Stands around one trace of a program, which JAX may trace several times."""
    ...

  def bound(self) -> None:
    """Is told that a program with contractions was bound: it is not traced again."""
    ...


# Marks the operand of a contraction that a method makes in a program which is still being traced.
_mark: Any = jax.extend.core.Primitive("own_contraction")
_mark.def_impl(lambda x: x)
_mark.def_abstract_eval(lambda x: x)
ad.deflinear2(_mark, lambda cotangent, _: [cotangent])
mlir.register_lowering(_mark, lambda context, x: [x])
batching.primitive_batchers[_mark] = lambda args, axes: (_mark.bind(*args), axes[0])

# Part of the key of JAX's caches: programs with marks are of no use elsewhere.
_marking: Any = jax.make_user_context(False)


@dataclasses.dataclass(frozen=True)
class _Active:
  """A handler, and where what is bound is for it.

  Attributes:
    handler: of the method that runs.
    trace: the staging trace in which the method runs; a program that is traced meanwhile is not
      looked at until it is bound.
    marks: of the program that is evaluated, those whose contraction is still to come; None where
      the method itself runs, all of whose contractions are its own.
    in_body: whether a shard_map is bound, which traces its body, once.
    depth: of backward passes in which the method runs; those that it asks for itself carry out what
      the handler has seen.
    kind: the jitted function of ``jnp`` whose program is evaluated.
    kernels: for the contractions of that program that are still to come, which operand stands on
      the right in the call.
    disable_jit: JAX's setting, for modules that the method calls.
  """

  handler: Handler
  trace: Any
  depth: int
  in_body: bool = False
  marks: list[bool] | None = None
  kind: str = "lax.dot_general"
  kernels: Iterator[int] = dataclasses.field(default_factory=lambda: iter(()))
  disable_jit: bool = False

  def is_here(self) -> bool:
    """Tells whether what is bound now is for the handler."""
    running = _compat.staging_trace()
    is_body = self.in_body and _compat.is_of_shard_map(running)
    return (running is self.trace or is_body) and _compat.transpositions() == self.depth

  def is_own(self) -> bool:
    """Tells whether a contraction that is bound here is the method's own."""
    return self.marks is None or bool(self.marks and self.marks.pop())


_active: ContextVar[_Active | None] = ContextVar("active", default=None)
_lock = threading.Lock()
_users = 0


@contextlib.contextmanager
def handed_to(handler: Handler | None) -> Generator[None]:
  """While inside, contractions that this thread binds go to ``handler``; None is JAX."""
  outer = _active.get()
  if handler is None:
    if outer is None:
      yield
      return
    with _set(None), jax.disable_jit(outer.disable_jit), _marking(False):
      yield
    return
  disable_jit = outer.disable_jit if outer else _disables_jit()
  here = _compat.staging_trace(), _compat.transpositions()
  inner = _Active(handler, *here, disable_jit=disable_jit)
  # Functions of jnp are told apart by their jit.
  how = jax.disable_jit(False), _marking(True), _compat.python_dispatch()
  with _installed(), _set(inner), how[0], how[1], how[2]:
    yield


def _disables_jit() -> bool:
  config: Any = jax.config
  return bool(config.jax_disable_jit)


@contextlib.contextmanager
def _set(active: _Active | None) -> Generator[None]:
  token = _active.set(active)
  try:
    yield
  finally:
    _active.reset(token)


@contextlib.contextmanager
def _installed() -> Generator[None]:
  global _users
  with _lock:
    _users += 1
    if _users == 1:
      for primitive, rule in _rules():
        primitive.bind = _dispatch(primitive.bind, rule)
  try:
    yield
  finally:
    with _lock:
      _users -= 1
      if not _users:
        for primitive, _ in _rules():
          del primitive.bind


Rule: TypeAlias = Callable[[_Active, Callable[..., Any], Sequence[Any], Mapping[str, Any]], Any]


def _dispatch(original: Callable[..., Any], rule: Rule) -> Callable[..., Any]:
  def bind(*args: Any, **params: Any) -> Any:
    active = _active.get()
    if active is None:
      return original(*args, **params)
    if active.is_here():
      out = rule(active, original, args, params)
      if any(map(_contracts, subprograms(params))):
        active.handler.bound()
      return out
    if rule is _dot_general:
      args = (_mark.bind(args[0]), *args[1:])
    return original(*args, **params)

  return bind


def _by_jax(original: Callable[..., Any], args: Sequence[Any], params: Mapping[str, Any]) -> Any:
  """Lets JAX bind; what it binds to carry that out, as under vmap, is no call of the method."""
  with _set(None), _marking(False):
    return original(*args, **params)


def _rules() -> Sequence[tuple[Any, Rule]]:
  return (
    (_mark, _own),
    (primitives.dot_general_p, _dot_general),
    (primitives.jit_p, _jit),
    (primitives.scan_p, _scan),
    (primitives.while_p, _while),
    (primitives.cond_p, _cond),
    (_compat.remat_primitive(), _remat),
    (_compat.shard_map_primitive(), _shard_map),
  )


def _own(
  active: _Active, original: Callable[..., Any], args: Sequence[Any], params: Mapping[str, Any]
) -> Any:
  if active.marks is None:
    return original(*args, **params)
  active.marks.append(True)
  return args[0]


def _dot_general(
  active: _Active, original: Callable[..., Any], args: Sequence[Any], params: Mapping[str, Any]
) -> Any:
  kernel = next(active.kernels, 1)
  if not active.is_own():
    return _by_jax(original, args, params)
  lhs, rhs = args
  with _set(None), _marking(False):
    out = active.handler.contract(lhs, rhs, kind=active.kind, kernel=kernel, params=params)
  return _by_jax(original, args, params) if out is None else out


def _jit(
  active: _Active, original: Callable[..., Any], args: Sequence[Any], params: Mapping[str, Any]
) -> Any:
  closed = params["jaxpr"]
  if not _is_marked(closed.jaxpr):
    return _by_jax(original, args, params)
  if (kind := _FUNCTIONS.get(params["name"])) is not None:
    active = dataclasses.replace(active, kind=kind, kernels=iter(_kernels(closed.jaxpr)))
  with _set(dataclasses.replace(active, marks=[])):
    return jax.extend.core.jaxpr_as_fun(closed)(*args)


# By the name of what JAX jits.
_FUNCTIONS = {
  name: f"jnp.{name.lstrip('_')}"
  for name in ("_einsum", "matmul", "dot", "inner", "vdot", "vecdot", "matvec", "vecmat")
}


def _kernels(jaxpr: Any) -> list[int]:
  """For each contraction of a program, which operand hangs on the later argument."""
  rank: dict[Any, float] = {var: i for i, var in enumerate(jaxpr.invars)}
  of = lambda atom: float("inf") if isinstance(atom, Literal) else rank.get(atom, float("inf"))
  found: list[int] = []
  for equation in jaxpr.eqns:
    ranks = [of(atom) for atom in equation.invars]
    rank |= dict.fromkeys(equation.outvars, min(ranks, default=float("inf")))
    if equation.primitive.name == "dot_general":
      found.append(0 if ranks[0] > ranks[1] else 1)
  return found


def _within(active: _Active, closed: Any) -> Callable[..., Any]:
  """Makes a function of a program, whose contractions go to the handler while it is traced."""

  def run(*args: Any) -> Any:
    here = dataclasses.replace(
      active, trace=_compat.staging_trace(), depth=_compat.transpositions(), marks=[]
    )
    with active.handler.repeated(closed), _set(here):
      return jax.extend.core.jaxpr_as_fun(closed)(*args)

  return run


def _scan(
  active: _Active, original: Callable[..., Any], args: Sequence[Any], params: Mapping[str, Any]
) -> Any:
  counts = _compat.scan_counts(params)
  if counts is None or not _is_marked(params["jaxpr"].jaxpr):
    return _by_jax(original, args, params)
  n, k = counts[0], counts[1]
  run = _within(active, params["jaxpr"])

  def body(carry: Any, xs: Any) -> Any:
    out = run(*args[:n], *carry, *xs)
    return tuple(out[:k]), tuple(out[k:])

  names = ("length", "reverse", "unroll", "_split_transpose")
  how = {name: params[name] for name in names if name in params}
  carry, ys = lax.scan(body, tuple(args[n : n + k]), tuple(args[n + k :]), **how)
  return [*carry, *ys]


def _while(
  active: _Active, original: Callable[..., Any], args: Sequence[Any], params: Mapping[str, Any]
) -> Any:
  cond, body = params["cond_jaxpr"], params["body_jaxpr"]
  if not _is_marked(cond.jaxpr) and not _is_marked(body.jaxpr):
    return _by_jax(original, args, params)
  n, k = params["cond_nconsts"], params["body_nconsts"]
  proceed, step = _within(active, cond), _within(active, body)
  out = lax.while_loop(
    lambda carry: proceed(*args[:n], *carry)[0],
    lambda carry: tuple(step(*args[n : n + k], *carry)),
    tuple(args[n + k :]),
  )
  return list(out)


def _cond(
  active: _Active, original: Callable[..., Any], args: Sequence[Any], params: Mapping[str, Any]
) -> Any:
  if not any(_is_marked(branch.jaxpr) for branch in params["branches"]):
    return _by_jax(original, args, params)
  index, *operands = args
  return lax.switch(index, [_within(active, branch) for branch in params["branches"]], *operands)


def _remat(
  active: _Active, original: Callable[..., Any], args: Sequence[Any], params: Mapping[str, Any]
) -> Any:
  if not _is_marked(params["jaxpr"]):
    return _by_jax(original, args, params)
  run = _within(active, jax.extend.core.ClosedJaxpr(params["jaxpr"], ()))
  how = {name: params[name] for name in ("prevent_cse", "policy")}
  return jax.checkpoint(run, **how)(*args)


def _shard_map(
  active: _Active, original: Callable[..., Any], args: Sequence[Any], params: Mapping[str, Any]
) -> Any:
  with _set(dataclasses.replace(active, in_body=True)):
    return original(*args, **params)


def _has(primitive: Any, jaxpr: Any) -> bool:
  """Tells whether a program, or one that it holds, binds a primitive."""
  return any(
    equation.primitive is primitive
    or any(_has(primitive, inner) for inner in subprograms(equation.params))
    for equation in jaxpr.eqns
  )


_is_marked = functools.partial(_has, _mark)
_contracts = functools.partial(_has, primitives.dot_general_p)
