"""Redirects the contractions that a module's method binds to a handler.

Every contraction, however it is written, binds the primitive ``dot_general``. While a thread needs
it, this module replaces ``bind`` of ``dot_general`` and of the primitives that hold programs: a
jitted function, a loop, a remat. JAX traces a program before it binds it, and may have cached the
trace. So contractions inside a program are only marked while it is traced. When the program is
bound, it is evaluated again, and the marked contractions go to the handler.
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
  """Computes contractions in place of JAX."""

  def contract(
    self, lhs: jax.Array, rhs: jax.Array, *, kind: str, kernel: int, params: Mapping[str, Any]
  ) -> jax.Array | None:
    """Contracts.

    Args:
      lhs: left operand.
      rhs: right operand.
      kind: the called function, such as ``"jnp.einsum"``.
      kernel: the operand, 0 or 1, that is on the right in that call.
      params: parameters of the primitive ``dot_general``.

    Returns:
      The product, or None to let JAX contract.
    """
    ...

  def repeated(self, program: Any) -> contextlib.AbstractContextManager[Any]:
    """Surrounds one trace of a program that JAX may trace several times."""
    ...

  def bound(self) -> None:
    """Called after a program with contractions is bound. JAX does not trace it again."""
    ...


# Marks an operand of the method's own contractions while JAX traces a program.
_mark: Any = jax.extend.core.Primitive("own_contraction")
_mark.def_impl(lambda x: x)
_mark.def_abstract_eval(lambda x: x)
ad.deflinear2(_mark, lambda cotangent, _: [cotangent])
mlir.register_lowering(_mark, lambda context, x: [x])
batching.primitive_batchers[_mark] = lambda args, axes: (_mark.bind(*args), axes[0])

# Part of the key of JAX's caches: a program with marks must not be reused elsewhere.
_marking: Any = jax.make_user_context(False)


@dataclasses.dataclass(frozen=True)
class _Active:
  """A handler, and the conditions under which a bound contraction belongs to it.

  Attributes:
    handler: the handler of the running method.
    trace: the staging trace in which the method runs. A program traced inside it is handled when
      it is bound.
    depth: number of backward passes around the method. A backward pass inside the method only
      transposes contractions that the handler has already seen.
    in_body: whether a ``shard_map`` is being bound. It traces its body once, at this point.
    marks: while a program is evaluated, one entry for each mark before its contraction. None while
      the method itself runs: all contractions are its own.
    kind: the ``jnp`` function that is being evaluated.
    kernels: for each remaining contraction of that program, the operand on the right in the call.
    disable_jit: the user's ``jax_disable_jit`` setting, restored for modules without a handler.
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
    """Returns whether a primitive bound now belongs to the method of the handler."""
    running = _compat.staging_trace()
    is_body = self.in_body and _compat.is_of_shard_map(running)
    return (running is self.trace or is_body) and _compat.transpositions() == self.depth

  def is_own(self) -> bool:
    """Returns whether a contraction bound now is the method's own."""
    return self.marks is None or bool(self.marks and self.marks.pop())


_active: ContextVar[_Active | None] = ContextVar("active", default=None)
_lock = threading.Lock()
_users = 0


@contextlib.contextmanager
def handed_to(handler: Handler | None) -> Generator[None]:
  """Redirects the contractions that this thread binds to ``handler``. None means JAX."""
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
  # The name of its jit identifies a jnp function, so jit must be enabled.
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
  """Lets JAX bind. Primitives that JAX binds meanwhile, as under vmap, are not the method's."""
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


# Public names of jnp functions, by the name of the function that JAX jits.
_FUNCTIONS = {
  name: f"jnp.{name.lstrip('_')}"
  for name in ("_einsum", "matmul", "dot", "inner", "vdot", "vecdot", "matvec", "vecmat")
}


def _kernels(jaxpr: Any) -> list[int]:
  """For each contraction of a program, returns the operand that depends on the later argument."""
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
  """Returns a function that evaluates a program and hands its contractions to the handler."""

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
  """Returns whether a program, or a program inside it, binds a primitive."""
  return any(
    equation.primitive is primitive
    or any(_has(primitive, inner) for inner in subprograms(equation.params))
    for equation in jaxpr.eqns
  )


_is_marked = functools.partial(_has, _mark)
_contracts = functools.partial(_has, primitives.dot_general_p)
