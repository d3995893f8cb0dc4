"""The samplers of `jax.random` without their ``key`` argument, and the streams they draw from.

    with jaxstate.rng_stream(jax.random.key(0)):
        x = jaxstate.random.normal((3,))

``stream=`` names the stream to draw from: see `jaxstate.rng_stream`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jaxstate._src.streams.keys import is_a_key
from jaxstate._src.streams.stream import Stream, next_key, no_key_wanted, rng_stream

__all__ = [
    "Stream",
    "ball",
    "bernoulli",
    "beta",
    "binomial",
    "bits",
    "categorical",
    "cauchy",
    "chisquare",
    "choice",
    "dirichlet",
    "double_sided_maxwell",
    "exponential",
    "f",
    "gamma",
    "generalized_normal",
    "geometric",
    "gumbel",
    "laplace",
    "loggamma",
    "logistic",
    "lognormal",
    "maxwell",
    "multinomial",
    "multivariate_normal",
    "next_key",
    "normal",
    "orthogonal",
    "pareto",
    "permutation",
    "poisson",
    "rademacher",
    "randint",
    "rayleigh",
    "rng_stream",
    "t",
    "triangular",
    "truncated_normal",
    "uniform",
    "wald",
    "weibull_min",
]

Shape = Sequence[int]
Sharding = NamedSharding | PartitionSpec
F = TypeVar("F", bound=Callable[..., Any])


def __dir__() -> list[str]:
    return __all__


def _sampler(declared: F) -> F:
    """The function of `jax.random` with the name of ``declared``, keyed from a stream.

    What is declared is what type checkers see. The signature is that of the JAX that is installed,
    whose older versions lack some options.
    """
    name = declared.__name__
    with_key = getattr(jax.random, name)
    declared_signature = inspect.signature(declared)
    first, *_ = declared_signature.parameters

    @functools.wraps(declared)
    def sample(*args: Any, stream: str = "default", **kwargs: Any) -> jax.Array:
        if "key" in kwargs or (args and is_a_key(args[0])):
            raise no_key_wanted(
                f"jaxstate.random.{name}",
                f"jaxstate.random.{name}({first}=...)\n"
                f"    jax.random.{name}(key, {first}=...)      # or with a key of your own",
            )
        return with_key(next_key(stream), *args, **kwargs)

    sample.__signature__ = _without_key(with_key, declared_signature)  # type: ignore[attr-defined]
    sample.__doc__ = (
        f"`jax.random.{name}` with the next key of the random stream called ``stream``.\n\n"
        f"All other arguments, the result and the distribution are those of"
        f" `jax.random.{name}`.\n\n"
        "Raises:\n  MissingStreamError: if no stream of that name is open.\n"
        "  TypeError: if the first argument is a random key. (An array that only looks like one,\n"
        "    of the type of a raw key, has to be passed by name.)\n"
    )
    return cast(F, sample)


def _without_key(with_key: Any, declared: inspect.Signature) -> inspect.Signature:
    """The parameters that the function of JAX has after its key, and ``stream``."""
    _, *installed = inspect.signature(with_key).parameters.values()
    known = declared.parameters
    parameters = [
        p.replace(annotation=known[p.name].annotation if p.name in known else p.empty)
        for p in installed
    ]
    return declared.replace(parameters=[*parameters, known["stream"]])


# fmt: off
@_sampler
def ball(
    d: int, p: ArrayLike = 2, shape: Shape = (), dtype: DTypeLike | None = None, *,
    out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...


@_sampler
def bernoulli(
    p: ArrayLike = 0.5, shape: Shape | None = None, mode: str = "low", *,
    out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...


@_sampler
def beta(
    a: ArrayLike, b: ArrayLike, shape: Shape | None = None, dtype: DTypeLike | None = None, *,
    method: str = "exact", out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...


@_sampler
def binomial(
    n: ArrayLike, p: ArrayLike, shape: Shape | None = None, dtype: DTypeLike | None = None, *,
    stream: str = "default",
) -> jax.Array: ...


@_sampler
def bits(
    shape: Shape = (), dtype: DTypeLike | None = None, *, out_sharding: Sharding | None = None,
    stream: str = "default",
) -> jax.Array: ...


@_sampler
def categorical(
    logits: ArrayLike, axis: int = -1, shape: Shape | None = None, replace: bool = True,
    mode: str | None = None, *, out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...


@_sampler
def cauchy(
    shape: Shape = (), dtype: DTypeLike | None = None, *, out_sharding: Sharding | None = None,
    stream: str = "default",
) -> jax.Array: ...


@_sampler
def chisquare(
    df: ArrayLike, shape: Shape | None = None, dtype: DTypeLike | None = None, *,
    method: str = "exact", out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...


@_sampler
def choice(
    a: ArrayLike, shape: Shape = (), replace: bool = True, p: ArrayLike | None = None,
    axis: int = 0, mode: str | None = None, *, stream: str = "default",
) -> jax.Array: ...


@_sampler
def dirichlet(
    alpha: ArrayLike, shape: Shape | None = None, dtype: DTypeLike | None = None, *,
    out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...


@_sampler
def double_sided_maxwell(
    loc: ArrayLike, scale: ArrayLike, shape: Shape = (), dtype: DTypeLike | None = None, *,
    stream: str = "default",
) -> jax.Array: ...


@_sampler
def exponential(
    shape: Shape = (), dtype: DTypeLike | None = None, *, out_sharding: Sharding | None = None,
    stream: str = "default",
) -> jax.Array: ...


@_sampler
def f(
    dfnum: ArrayLike, dfden: ArrayLike, shape: Shape | None = None, dtype: DTypeLike | None = None,
    *, out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...


@_sampler
def gamma(
    a: ArrayLike, shape: Shape | None = None, dtype: DTypeLike | None = None, *,
    method: str = "exact", out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...


@_sampler
def generalized_normal(
    p: ArrayLike, shape: Shape = (), dtype: DTypeLike | None = None, *,
    out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...


@_sampler
def geometric(
    p: ArrayLike, shape: Shape | None = None, dtype: DTypeLike | None = None, *,
    out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...


@_sampler
def gumbel(
    shape: Shape = (), dtype: DTypeLike | None = None, mode: str | None = None, *,
    out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...


@_sampler
def laplace(
    shape: Shape = (), dtype: DTypeLike | None = None, *, out_sharding: Sharding | None = None,
    stream: str = "default",
) -> jax.Array: ...


@_sampler
def loggamma(
    a: ArrayLike, shape: Shape | None = None, dtype: DTypeLike | None = None, *,
    method: str = "exact", out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...


@_sampler
def logistic(
    shape: Shape = (), dtype: DTypeLike | None = None, *, out_sharding: Sharding | None = None,
    stream: str = "default",
) -> jax.Array: ...


@_sampler
def lognormal(
    sigma: ArrayLike = np.float32(1.0), shape: Shape | None = None, dtype: DTypeLike | None = None,  # noqa: B008
    *, out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...


@_sampler
def maxwell(
    shape: Shape = (), dtype: DTypeLike | None = None, *, out_sharding: Sharding | None = None,
    stream: str = "default",
) -> jax.Array: ...


@_sampler
def multinomial(
    n: ArrayLike, p: ArrayLike, *, shape: Shape | None = None, dtype: DTypeLike | None = None,
    unroll: int | bool = 1, stream: str = "default",
) -> jax.Array: ...


@_sampler
def multivariate_normal(
    mean: ArrayLike, cov: ArrayLike, shape: Shape | None = None, dtype: DTypeLike | None = None,
    method: str = "cholesky", *, out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...


@_sampler
def normal(
    shape: Shape = (), dtype: DTypeLike | None = None, *, out_sharding: Sharding | None = None,
    stream: str = "default",
) -> jax.Array: ...


@_sampler
def orthogonal(
    n: int, shape: Shape = (), dtype: DTypeLike | None = None, m: int | None = None, *,
    out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...


@_sampler
def pareto(
    b: ArrayLike, shape: Shape | None = None, dtype: DTypeLike | None = None, *,
    out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...


@_sampler
def permutation(
    x: ArrayLike, axis: int = 0, independent: bool = False, *, out_sharding: Sharding | None = None,
    stream: str = "default",
) -> jax.Array: ...


@_sampler
def poisson(
    lam: ArrayLike, shape: Shape | None = None, dtype: DTypeLike | None = None, *,
    method: str = "exact", out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...


@_sampler
def rademacher(
    shape: Shape = (), dtype: DTypeLike | None = None, *, out_sharding: Sharding | None = None,
    stream: str = "default",
) -> jax.Array: ...


@_sampler
def randint(
    shape: Shape, minval: ArrayLike, maxval: ArrayLike, dtype: DTypeLike | None = None, *,
    out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...


@_sampler
def rayleigh(
    scale: ArrayLike, shape: Shape | None = None, dtype: DTypeLike | None = None, *,
    out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...


@_sampler
def t(
    df: ArrayLike, shape: Shape | None = None, dtype: DTypeLike | None = None, *,
    out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...


@_sampler
def triangular(
    left: ArrayLike, mode: ArrayLike, right: ArrayLike, shape: Shape | None = None,
    dtype: DTypeLike | None = None, *, out_sharding: Sharding | None = None,
    stream: str = "default",
) -> jax.Array: ...


@_sampler
def truncated_normal(
    lower: ArrayLike, upper: ArrayLike, shape: Shape | None = None, dtype: DTypeLike | None = None,
    *, out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...


@_sampler
def uniform(
    shape: Shape = (), dtype: DTypeLike | None = None, minval: ArrayLike = 0.0,
    maxval: ArrayLike = 1.0, *, out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...


@_sampler
def wald(
    mean: ArrayLike, shape: Shape | None = None, dtype: DTypeLike | None = None, *,
    out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...


@_sampler
def weibull_min(
    scale: ArrayLike, concentration: ArrayLike, shape: Shape = (), dtype: DTypeLike | None = None,
    *, stream: str = "default",
) -> jax.Array: ...
