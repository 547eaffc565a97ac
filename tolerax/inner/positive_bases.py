"""Directions of which one always descends: positive bases, turned at random.

A set of vectors spans positively if every vector is a sum of them with nonnegative weights. Then
for every v there is a direction d in the set with <d, v> > 0, and the cosine measure

    min over unit v of max over d of <d, v> / |d|

says how much: a poll whose steps all fail bounds the gradient by a multiple of its length divided
by this. Set against a kink or a constraint, fixed directions may all be bad; turned at random
(uniformly, that is by a Haar matrix) some are good with a probability that does not depend on it.
"""

import itertools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

SUBSETS = 200_000


def rotation(key: PRNGKeyArray, n: int, dtype: Any = None) -> Float[Array, "n n"]:
    """An orthogonal matrix of size n, uniform in the sense of Haar: that of Gaussian columns made
    orthogonal, with the signs that make it unique.

    Source: Mezzadri (*Notices of the AMS* 54, 2007), section 5.

    >>> import jax, jax.numpy as jnp
    >>> q = rotation(jax.random.key(0), 4)
    >>> bool(jnp.allclose(q @ q.T, jnp.eye(4)))
    True
    """
    dtype = jnp.result_type(float) if dtype is None else dtype
    q, r = jnp.linalg.qr(jax.random.normal(key, (n, n), dtype))
    return q * jnp.where(jnp.diagonal(r) < 0, -1, 1).astype(dtype)[None]


def positive_basis(
    key: PRNGKeyArray,
    n: int,
    kind: Literal["maximal", "minimal"] | str = "maximal",
    dtype: Any = None,
) -> Float[Array, "k n"]:
    """The unit vectors of a random positive basis of R^n, as rows.

    - `"maximal"`: 2n of them, the columns of a random rotation and their negatives; in the order
      of the columns first, so that row i + n is minus row i. Cosine measure 1 / sqrt(n).
    - `"minimal"`: n + 1 of them, the corners of a regular simplex. Cosine measure 1 / n, the best
      for so few.

    Source: Conn, Scheinberg, Vicente (*Introduction to Derivative-Free Optimization*, SIAM 2009),
    section 2.1 and corollary 2.6.

    >>> import jax
    >>> positive_basis(jax.random.key(0), 3).shape
    (6, 3)
    >>> round(cosine_measure(positive_basis(jax.random.key(0), 3, "minimal")), 12)
    0.333333333333
    """
    if n < 1:
        raise ValueError(f"n is {n}: give at least 1 dimension.")
    if kind not in ("maximal", "minimal"):
        raise ValueError(f'kind is {kind!r}: use "maximal" (2n) or "minimal" (n + 1).')
    q = rotation(key, n, dtype)
    if kind == "maximal":
        return jnp.concatenate([q.T, -q.T])
    return jnp.asarray(_simplex(n), q.dtype) @ q.T


def _simplex(n: int) -> np.ndarray:
    """The n + 1 corners of a regular simplex with unit vectors, whose products are all -1/n.

    Rows of a Helmert matrix are an orthonormal basis of the vectors whose entries sum to 0; there
    the unit vectors of R^(n+1) are such corners.
    """
    helmert = np.tril(np.ones((n, n + 1)))
    k = np.arange(1, n + 1)
    helmert[k - 1, k] = -k
    helmert /= np.sqrt(k * (k + 1.0))[:, None]
    return math.sqrt((n + 1) / n) * helmert.T


def cosine_measure(directions: Float[ArrayLike, "k n"]) -> float:
    """The cosine measure of a set that spans positively (rows, of any length), exactly.

    At its worst v the nearest directions contain a basis of R^n, with which v makes equal angles.
    So the least of the maxima over all n-subsets is it; there must be at most 200,000 subsets.
    Computed by NumPy: this is for tests and reports, not for a loop.

    Source: Hare and Jarry-Bolduc (arXiv 2004.03507).

    >>> import numpy as np
    >>> cosine_measure(np.array([[1.0, 0.0], [0.0, 2.0], [-1.0, -1.0]]))  # cos(135 degrees / 2)
    0.382683432365
    """
    d = np.asarray(directions, float)
    if d.ndim != 2 or not np.isfinite(d).all():
        raise ValueError("directions must be a matrix of finite numbers, one direction a row.")
    lengths = np.linalg.norm(d, axis=1, keepdims=True)
    if not np.all(lengths > 0):
        raise ValueError("directions has a zero row, which is no direction: remove it.")
    d = d / lengths
    k, n = d.shape
    count = math.comb(k, n)
    if count > SUBSETS:
        raise ValueError(
            f"{k} directions in {n} dimensions have {count} subsets of {n}: more than {SUBSETS} "
            "are not tried. Use the known value of the kind of basis."
        )
    if not _spans_positively(d):
        raise ValueError(
            "the directions do not span positively: their cosine measure is not positive."
        )
    subsets = d[np.array(list(itertools.combinations(range(k), n)))]
    # Dependent subsets have no such v; nearly dependent ones can only be too large.
    regular = np.linalg.cond(subsets) < 1e12
    v = np.linalg.solve(subsets[regular], np.ones((regular.sum(), n, 1)))[..., 0]
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    return float(np.min(np.max(v @ d.T, axis=1)))


def _spans_positively(d: np.ndarray) -> bool:
    """Whether the rows span R^n, and minus their sum is a nonnegative sum of them."""
    from scipy.optimize import nnls

    if np.linalg.matrix_rank(d) < d.shape[1]:
        return False
    total = -d.sum(axis=0)
    _, residual = nnls(d.T, total)
    return bool(residual <= 1e-10 * (1 + np.linalg.norm(total)))
