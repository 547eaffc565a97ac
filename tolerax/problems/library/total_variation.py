"""P2: learn the weight and the smoothing of total-variation denoising."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from tolerax.inner.lines import AlternatingLines
from tolerax.inner.minimizers import LBFGS
from tolerax.problems.bilevel import CrossBounds
from tolerax.problems.constants import proved
from tolerax.problems.library.base import assemble
from tolerax.problems.library.pictures import Denoising, PictureLoss, Pictures, denoising_data

Parameters = Float[Array, "2"]
Gradients = Float[Array, "2 pictures height width"]


def differences(y: Pictures) -> Gradients:
    """Forward differences down and right, 0 at the last row and column.

    As a linear map ∇ it has ‖∇‖² ≤ 8. One pixel's pair of differences is bounded by √3 ‖y‖₂: it
    involves three pixels, and ((−1, 1, 0), (−1, 0, 1)) has the squared norm 3.
    """
    down = jnp.diff(y, axis=1, append=y[:, -1:, :])
    right = jnp.diff(y, axis=2, append=y[:, :, -1:])
    return jnp.stack([down, right])


def divergence(v: Gradients) -> Pictures:
    """∇ᵀv, the transpose of `differences`."""
    (picture,) = jax.linear_transpose(differences, v[0])(v)
    return picture


class SmoothedTV(eqx.Module):
    """½‖y − noisy‖² + w Σ √(|∇y|² + ν²) with w = exp(x₀), ν = exp(x₁), summed over all pictures."""

    noisy: Pictures

    def __call__(self, y: Pictures, x: Parameters) -> Float[Array, ""]:
        weight, nu = jnp.exp(x)
        length = jnp.sqrt(jnp.sum(differences(y) ** 2, axis=0) + nu**2)
        return 0.5 * jnp.sum((y - self.noisy) ** 2) + weight * jnp.sum(length)


def tv_self_concordance(x: Parameters) -> Float[Array, ""]:
    """M = (3√3/2ν) · κ/(1 + κ) with κ = 8w/ν for [`SmoothedTV`][].

    Let φ(v) = √(|v|² + ν²) on R²; by scaling ν = 1. Split u = (α, β) and a unit vector (γ, δ) into
    parts along and across v, and write r = |v|, s = φ(v), A = α/s^{3/2}, B = β/s^{1/2}. Then

        D²φ[u, u] = A² + B²
        D³φ[u, u, (γ, δ)] = −(r/s²) γ (3A² + B²) − 2 (r/s) δ AB.

    With k = 1/s², A = cos t, B = sin t and c = cos 2t the largest square over (γ, δ) is
    (1 − k)(k(2 + c)² + 1 − c²). Its maximum is 9/4, at k = ½, c = 1: the constant of φ is 3/(2ν) in
    the plane as on the line. One pixel has |∇v| ≤ √3‖v‖ (see `differences`). And only the TV part
    of H has third derivatives: it is at most κ/(1 + κ) times H = I + TV part.
    """
    return jnp.sqrt(3.0) * _steepest_change(x)


def tv_self_concordance_along(v: Pictures, x: Parameters) -> Float[Array, ""]:
    """The same for the v at hand: |∇v| where it is largest in place of √3‖v‖."""
    length = jnp.sqrt(jnp.max(jnp.sum(differences(v) ** 2, axis=0)))
    return length * _steepest_change(x)


def _steepest_change(x: Parameters) -> Float[Array, ""]:
    """(3/2ν) · κ/(1 + κ), see `tv_self_concordance`."""
    weight, nu = jnp.exp(x)
    kappa = 8 * weight / nu
    return 1.5 / nu * kappa / (1 + kappa)


def tv_preconditioner(y: Pictures, x: Parameters) -> AlternatingLines:
    """Lines for H = I + w∇ᵀQ∇ of [`SmoothedTV`][] with the diagonal of Q = D²φ at every pixel: what
    Q couples across a corner is left out."""
    weight, nu = jnp.exp(x)
    v = differences(y)
    s = jnp.sqrt(jnp.sum(v**2, axis=0, keepdims=True) + nu**2)
    down, right = weight * (1 - (v / s) ** 2) / s
    return AlternatingLines.of(down[:, :-1], right[:, :, :-1])


def tv_cross(y: Pictures, q: Pictures, x: Parameters) -> CrossBounds:
    """Bounds on the two columns of the cross derivative of [`SmoothedTV`][].

    With n = ∇y/s, k = ν²/s² and Q = D²φ at every pixel, the columns are F₀ = w∇ᵀn, F₁ = −w∇ᵀ(kn)
    and H = I + BᵀB with B = √(wQ)∇. If F_j = a_j + Bᵀz_j, then F_jᵀe = a_jᵀe + z_jᵀBe, and
    |e|² + |Be|² = |e|_H²: the bound is the largest singular value of the two stacked columns
    (a_j; z_j), however F_j is split.

    - `adjoint`: at every pixel the share 4w/(4w + s/k) goes into z. Q⁻¹n = (s/k) n is small in flat
      parts and huge at edges; 4 is the typical gain of ∇∇ᵀ.
    - `state`: d/dy[F₀ᵀq] = BᵀBq and d/dy[F₁ᵀq] = BᵀCBq, where C is 2 − 3k along ∇y and −k across;
      the share 4e/(1 + 4e) goes into z, e being the eigenvalue of wQ: wk/s along and w/s across.
    - `both`: every d/dy F_j is at most 8w/ν in norm, at any y, and I ≤ H.
    - `third`: the columns come from φ and ν ∂φ/∂ν = ν²/s. Third derivatives of φ are at most 3/(2ν)
      times D²φ; of the vector of both they are at most 2.6846/ν times (by search over the one
      length that matters, ν = 1, and both angles): 1.79 of what M is made of.
    """
    weight, nu = jnp.exp(x)
    v, p = differences(y), differences(q)
    r = jnp.sqrt(jnp.sum(v**2, axis=0, keepdims=True))
    s = jnp.sqrt(r**2 + nu**2)
    n, k = v / s, (nu / s) ** 2

    inner = 4 * weight / (4 * weight + s / k)
    outer = (1 - inner) * n
    z = weight * inner**2 * (1 - k) * s / k  # |z₀|² at each pixel, as |n|² = 1 − k; z₁ = −kz₀
    adjoint = _norm_of_two(
        weight * divergence(outer),
        -weight * divergence(k * outer),
        (jnp.sum(z), -jnp.sum(k * z), jnp.sum(k**2 * z)),
    )

    # Where ∇y = 0 there is no "along", and none is needed: k = 1 makes both directions alike.
    unit = v / jnp.where(r > 0, r, 1.0)
    along = unit * jnp.sum(unit * p, axis=0, keepdims=True)
    across = p - along
    e_along, e_across = weight * k / s, weight / s
    outer_along = along * e_along / (1 + 4 * e_along)
    outer_across = across * e_across / (1 + 4 * e_across)
    z_along = e_along * (4 * e_along / (1 + 4 * e_along) * along) ** 2
    z_across = e_across * (4 * e_across / (1 + 4 * e_across) * across) ** 2
    c_along, c_across = 2 - 3 * k, -k
    state = _norm_of_two(
        divergence(outer_along + outer_across),
        divergence(c_along * outer_along + c_across * outer_across),
        (
            jnp.sum(z_along + z_across),
            jnp.sum(c_along * z_along + c_across * z_across),
            jnp.sum(c_along**2 * z_along + c_across**2 * z_across),
        ),
    )
    both = jnp.sqrt(2.0) * 8 * weight / nu
    return CrossBounds(adjoint=adjoint, state=state, both=both, third=jnp.full_like(both, 1.8))


def _norm_of_two(
    a0: Pictures, a1: Pictures, z: tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]
) -> Float[Array, ""]:
    """The largest singular value of the columns (a₀; z₀), (a₁; z₁); z is |z₀|², z₀·z₁, |z₁|²."""
    first, mixed, second = jnp.sum(a0**2) + z[0], jnp.sum(a0 * a1) + z[1], jnp.sum(a1**2) + z[2]
    return jnp.sqrt(0.5 * (first + second) + jnp.hypot(0.5 * (first - second), mixed))


def tv_denoising(
    seed: int = 0,
    size: int = 96,
    pictures: int = 10,
    *,
    sigma: float = 0.1,
    dtype: DTypeLike = float,
    **options: Any,
) -> Denoising:
    """Learn x = (log weight, log smoothing) of smoothed total-variation denoising.

    Lower level: ½‖y − noisy‖² + w Σ √(|∇y|² + ν²) summed over all pixels of all pictures, so that
    strong convexity 1 is honest; upper level: ½‖y − clean‖²/pictures, which is the mean squared
    error times size²/2; start x = (−5, −5). Pictures are crops of ten that come with scikit-image,
    noise is normal of size `sigma`; `seed` draws both, so another seed is a test set. The TV
    experiment of MAID (arXiv 2308.10098) and of Ehrhardt & Roberts (*Inexact derivative-free
    optimization for bilevel learning*, J. Math. Imaging Vis. 2021) with pictures that need no
    download. `options` are passed on to [`tolerax.problems.Bilevel`][]. Every constant is proved.
    Unless `options` say otherwise the lower level is solved by [`LBFGS`][], preconditioned by
    [`AlternatingLines`][].

    >>> p = tv_denoising(size=16, pictures=2)
    >>> p.noisy.shape, float(p.psnr(p.noisy))
    ((2, 16, 16), 20.0...)
    """
    clean, noisy = denoising_data(seed, size, pictures, sigma, dtype)
    levels = assemble(
        PictureLoss(clean),
        SmoothedTV(noisy),
        noisy,
        options,
        strong_convexity=proved(1.0, because="the data term has the Hessian I"),
        self_concordance=proved(
            tv_self_concordance, because="third derivative of sqrt(|v|^2 + nu^2)"
        ),
        self_concordance_along=proved(
            tv_self_concordance_along, because="third derivative of sqrt(|v|^2 + nu^2)"
        ),
        upper_smoothness=proved(1.0 / len(clean), because="the upper Hessian is I/pictures"),
        cross=proved(tv_cross, because="both columns split along H = I + B'B"),
        lower_solver=LBFGS(),
        preconditioner=None if options.get("recycle") else tv_preconditioner,
    )
    return Denoising(
        **levels,
        x0=jnp.full(2, -5.0, dtype),
        description=(
            f"TV denoising: {pictures} pictures of {size} x {size}, noise {sigma:g}, x = (log "
            f"weight, log smoothing), seed {seed}. The upper level is the mean squared error times "
            f"{size**2 / 2:g}. All constants proved."
        ),
        clean=clean,
        noisy=noisy,
    )
