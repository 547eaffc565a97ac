"""P3: learn the filters, weights and smoothings of a convex Field of Experts."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, DTypeLike, Float

from tolerax.problems.bilevel import CrossBounds
from tolerax.problems.constants import proved
from tolerax.problems.library.base import assemble, check_count
from tolerax.problems.library.pictures import Denoising, PictureLoss, Pictures, denoising_data

Experts = dict[str, Array]
Filters = Float[Array, "filters taps taps"]
Responses = Float[Array, "pictures filters rows columns"]


def responses(y: Pictures, filters: Filters) -> Responses:
    """(C_k y) = Σ_j c_kj S_j y: every filter at every place where it lies inside the picture.

    No padding, so that |(C_k y)| ≤ ‖c_k‖₂‖y‖₂ at each place and ‖C_k‖ ≤ ‖c_k‖₁.
    """
    # Accelerators would otherwise multiply in less than the precision of the arrays.
    return lax.conv_general_dilated(
        y[:, None], filters[:, None], (1, 1), "VALID", precision=lax.Precision.HIGHEST
    )


def _parts(x: Experts) -> tuple[Array, Array, Array]:
    """Filters, weights w_k (with the global one) and smoothings ν_k of shape (filters,)."""
    return x["filters"], jnp.exp(x["log_weight"] + x["log_weights"]), jnp.exp(x["log_smoothings"])


def _each(values: Float[Array, " filters"]) -> Float[Array, "1 filters 1 1"]:
    """One value a filter, in the shape of responses."""
    return values.reshape(1, -1, 1, 1)


class FieldOfExperts(eqx.Module):
    """½‖y − noisy‖² + Σ_k w_k Σ √((C_k y)² + ν_k²), summed over all pictures."""

    noisy: Pictures

    def __call__(self, y: Pictures, x: Experts) -> Float[Array, ""]:
        filters, weights, nu = _parts(x)
        potential = jnp.sqrt(responses(y, filters) ** 2 + _each(nu) ** 2)
        return 0.5 * jnp.sum((y - self.noisy) ** 2) + jnp.sum(_each(weights) * potential)


def _gain(x: Experts) -> Float[Array, " filters"]:
    """w_k ‖c_k‖₁²/ν_k: bounds the Hessian of expert k in norm, at every y."""
    filters, weights, nu = _parts(x)
    return weights * jnp.sum(jnp.abs(filters), axis=(1, 2)) ** 2 / nu


def expert_self_concordance(x: Experts) -> Float[Array, ""]:
    """M = max_k (3/2ν_k) ‖c_k‖₂ · κ/(1 + κ) with κ = Σ_k w_k‖c_k‖₁²/ν_k.

    φ(t) = √(t² + ν²) has |φ'''|/φ'' = 3|t|/(t² + ν²) ≤ 3/(2ν), and |C_k v| ≤ ‖c_k‖₂‖v‖ at each
    place. Only the experts have third derivatives: they are at most κ/(1 + κ) of H = I + experts.
    """
    filters, _, nu = _parts(x)
    kappa = jnp.sum(_gain(x))
    steepest = jnp.max(jnp.sqrt(jnp.sum(filters**2, axis=(1, 2))) / nu)
    return 1.5 * steepest * kappa / (1 + kappa)


def expert_self_concordance_along(v: Pictures, x: Experts) -> Float[Array, ""]:
    """The same for the v at hand: |C_k v| where it is largest in place of ‖c_k‖₂‖v‖."""
    filters, _, nu = _parts(x)
    kappa = jnp.sum(_gain(x))
    steepest = jnp.max(jnp.abs(responses(v, filters)) / _each(nu))
    return 1.5 * steepest * kappa / (1 + kappa)


def expert_cross(y: Pictures, q: Pictures, x: Experts) -> CrossBounds:
    """Bounds on the cross derivative of [`FieldOfExperts`][], parameter by parameter.

    At every place t = C_k y, s = √(t² + ν²), n = φ' = t/s, k = ν²/s², φ'' = k/s, φ''' = −3kn/s²,
    and B_k = √(w_k φ'') C_k, so that H = I + Σ B_kᵀB_k. The rows F_xᵀe are, with e the direction,

        log w_k       w_k n·C_k e                         (their sum for the global weight)
        log ν_k       −w_k (kn)·C_k e
        c_kj          w_k n·S_j e + w_k (φ'' S_j y)·C_k e

    - `adjoint`: the 2·filters + 1 rows of the first two kinds are split between |e| and |B_k e| as
      in [`tolerax.problems.library.tv_denoising`][], in the Frobenius norm; the last kind is at
      most width (Σ w_k²|n|²)^½ |e| + max_k ‖√(w_kφ'') P(y)‖_F |Be|, P(y) the patches of y, and
      α|e| + β|Be| ≤ √(α² + β²) |e|_H.
    - `state`: rows of d/dy[F_xᵀq] e: (B_k q)·(B_k e) for log w_k; the same with 2 − 3k between for
      log ν_k; w_k (φ'' C_k q)·S_j e + w_k (φ'' S_j q + φ''' (C_k q) S_j y)·C_k e for c_kj.
    - `both`: φ'' ≤ 1/ν and |φ'''| ≤ (3/2)(4/5)^{5/2}/ν² everywhere, then I ≤ H.
    - `third`: see `_third`.
    """
    filters, weights, nu = _parts(x)
    w, width = _each(weights), filters.shape[-1]
    t, p = responses(y, filters), responses(q, filters)
    s = jnp.sqrt(t**2 + _each(nu) ** 2)
    n, k = t / s, (_each(nu) / s) ** 2
    curvature = w * k / s  # w_k φ''

    def patches(picture: Pictures) -> Responses:
        """|P|² at each place: the sum of squares over the patch under a filter."""
        return responses(picture**2, jnp.ones_like(filters[:1]))

    def largest(field: Responses) -> Float[Array, ""]:
        """The largest over filters of the square root of a sum over pictures and places."""
        return jnp.sqrt(jnp.max(jnp.sum(field, axis=(0, 2, 3))))

    def columns(field: Responses) -> Float[Array, "filters pictures height width"]:
        """C_kᵀ of the responses of filter k, for each k."""

        def one(pair: tuple[Array, Array]) -> Pictures:
            c, r = pair
            (picture,) = jax.linear_transpose(lambda y: responses(y, c[None]), y)(r[:, None])
            return picture

        # One after the other: batched, this is a grouped convolution, 15 times slower on a CPU.
        return lax.map(one, (filters, jnp.moveaxis(field, 1, 0)))

    squares = _each(jnp.sum(filters**2, axis=(1, 2)))
    inner = curvature * squares / (1 + curvature * squares)
    a = columns(w * (1 - inner) * n)
    b = columns(w * (1 - inner) * k * n)
    z = w * inner**2 * (1 - k) * s / k
    scalars = jnp.sum(jnp.sum(a, axis=0) ** 2) + jnp.sum(a**2) + jnp.sum(b**2)
    scalars = scalars + jnp.sum((2 + k**2) * z)
    shifts = width**2 * jnp.sum((w * n) ** 2) + largest(curvature * patches(y)) ** 2

    energy = curvature * p**2
    state = jnp.sum(energy) + largest(energy) ** 2 + largest((2 - 3 * k) ** 2 * energy) ** 2
    turned = largest(9 * w * k * (1 - k) * p**2 / s**3 * patches(y))
    moved = width**2 * jnp.sum((curvature * p) ** 2)
    moved = moved + (largest(curvature * patches(q)) + turned) ** 2

    gain = _gain(x)
    patch = jnp.sqrt(jnp.max(patches(y)))
    steep = 2 * width * weights / nu * jnp.sum(jnp.abs(filters), axis=(1, 2))
    steep = steep + 1.5 * 0.8**2.5 * patch * gain / nu
    both = jnp.sum(gain) ** 2 + 2 * jnp.max(gain) ** 2 + jnp.sum(steep**2)
    return CrossBounds(
        adjoint=jnp.sqrt(scalars + shifts),
        state=jnp.sqrt(state + moved),
        both=jnp.sqrt(both),
        third=_third(x, patch),
    )


def _third(x: Experts, patch: Float[Array, ""]) -> Float[Array, ""]:
    """B3 of [`expert_cross`][]: third derivatives of ∂h/∂x along q, e and v, in units of M|v|.

    M = κ/(1 + κ) max m_k with m_k = 3‖c_k‖₂/2ν_k, and |e|_B² = Σ |B_k e|² is at most
    κ/(1 + κ) |e|_H². With |φ'''| ≤ (3/2ν) φ'', |φ''''| ≤ (3/ν²) φ'' and |C_k v| ≤ ‖c_k‖₂|v|:

        log w_k, all of them, and the global one    m |v| |q|_B |e|_B, once each
        log ν_k, as ν ∂φ/∂ν = ν²/s                  2.4229/1.5 of that: (9r − 6r³)/s⁴ for ν = 1
        c_kj: φ'''' S_j y' along q, e, v            (3/ν²) ‖c‖ |P(y')| |v| |q|_B |e|_B
              φ''' S_j v along q, e                 (3/2ν) |v| |q|_B |e|_B
              φ''' S_j e along q, v and the like     m √(w/ν) width |v| |q|_B |e|₂, twice

    where a patch of y' is at most one of y and |y' − y|₂ ≤ 1/M.
    """
    filters, weights, nu = _parts(x)
    size = jnp.sqrt(jnp.sum(filters**2, axis=(1, 2)))
    steepest, kappa = jnp.max(1.5 * size / nu), jnp.sum(_gain(x))
    patch = patch + (1 + kappa) / (kappa * steepest)
    fourth = 3 * jnp.max(size / nu**2) / steepest * patch
    direct = jnp.max(1.5 / nu) / steepest
    mixed = jnp.max(1.5 * size / nu * jnp.sqrt(weights / nu)) / steepest
    mixed = filters.shape[-1] * mixed * jnp.sqrt((1 + kappa) / kappa)
    return jnp.sqrt(2 + (2.4229 / 1.5) ** 2 + (fourth + direct + 2 * mixed) ** 2)


def cosine_filters(filters: int, width: int) -> np.ndarray:
    """The smoothest non-constant atoms of the orthonormal cosine basis of width × width patches."""
    i = np.arange(width)
    atoms = np.cos(np.pi * (i[None] + 0.5) * i[:, None] / width)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    order = sorted(np.ndindex(width, width), key=lambda f: (f[0] ** 2 + f[1] ** 2, f))
    return np.stack([np.outer(atoms[f], atoms[g]) for f, g in order[1 : filters + 1]])


def field_of_experts(
    seed: int = 0,
    size: int = 64,
    pictures: int = 10,
    filters: int = 8,
    width: int = 5,
    *,
    sigma: float = 0.1,
    dtype: DTypeLike = float,
    **options: Any,
) -> Denoising:
    """Learn the regularizer Σ_k w_k Σ √((C_k y)² + ν_k²) of a denoiser: a convex Field of Experts.

    Parameters x: `filters` (8, 5, 5), `log_weights` (8,), `log_smoothings` (8,) and the global
    `log_weight`, 217 numbers, with w_k = exp(log_weight + log_weights[k]). Lower level: the data
    term ½‖y − noisy‖² plus the regularizer, summed over all pictures, so that strong convexity 1
    is honest; upper level: ½‖y − clean‖²/pictures, the mean squared error times size²/2. The start
    has cosine filters of norm 1, log weights 0, log smoothings and global log weight −5. Data as in
    [`tolerax.problems.library.tv_denoising`][]. The Field of Experts is from Roth & Black (*Fields
    of experts*, IJCV 2009), this convex form and its bilevel training from Chen, Ranftl & Pock
    (*Insights into analysis operator learning*, IEEE Trans. Image Process. 2014) and MAID (arXiv
    2308.10098). `options` are passed on to [`tolerax.problems.Bilevel`][]. Every constant is
    proved.

    >>> p = field_of_experts(size=16, pictures=2)
    >>> sum(leaf.size for leaf in jax.tree.leaves(p.x0))
    217
    """
    width = check_count("width", width, 2, 15)
    filters = check_count("filters", filters, 1, width**2 - 1)
    check_count("size", size, width)
    clean, noisy = denoising_data(seed, size, pictures, sigma, dtype)
    levels = assemble(
        PictureLoss(clean),
        FieldOfExperts(noisy),
        noisy,
        options,
        strong_convexity=proved(1.0, because="the data term has the Hessian I"),
        self_concordance=proved(
            expert_self_concordance, because="third derivative of sqrt(t^2 + nu^2)"
        ),
        self_concordance_along=proved(
            expert_self_concordance_along, because="third derivative of sqrt(t^2 + nu^2)"
        ),
        upper_smoothness=proved(1.0 / len(clean), because="the upper Hessian is I/pictures"),
        cross=proved(expert_cross, because="rows of F_x split along H = I + sum B_k'B_k"),
    )
    return Denoising(
        **levels,
        x0={
            "filters": jnp.asarray(cosine_filters(filters, width), dtype),
            "log_smoothings": jnp.full(filters, -5.0, dtype),
            "log_weight": jnp.asarray(-5.0, dtype),
            "log_weights": jnp.zeros(filters, dtype),
        },
        description=(
            f"Field of Experts: {filters} filters {width} x {width} with weights and smoothings, "
            f"{pictures} pictures of {size} x {size}, noise {sigma:g}, seed {seed}. The upper "
            f"level is the mean squared error times {size**2 / 2:g}. All constants proved."
        ),
        clean=clean,
        noisy=noisy,
    )
