"""One hop of consensus hopping on a quadratic, beside the implicit gradient step that it estimates.

A Gaussian density about x times exp(-alpha E) is a Gaussian again for `E = c |x|^2 / 2`, with mean
`x / (1 + c alpha s^2)`: exact for any alpha, so only Monte-Carlo error may remain.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

import tolerax
from benchmarks.frame import Bar, Group, Measured, Settings
from tolerax.solvers import ConsensusHopping, SoftConsensus

PARTICLES = 1_000_000
S, C = 0.7, 1.0
CASES = ((10, 1.0), (2, 100.0))  # dimension, alpha


@eqx.filter_jit
def sigmas(key: PRNGKeyArray, d: int, alpha: float, particles: int) -> Float[Array, ""]:
    """The distance of the hop from the implicit step, in standard errors of the weighted mean: the
    root mean square over the coordinates."""
    start, run = jax.random.split(key)
    x0 = jax.random.normal(start, (d,))
    solver = ConsensusHopping(
        particles=particles,
        consensus=SoftConsensus(alpha, standardized=False),
        spread=S,
        shrink=1.0,
    )
    energy = lambda x: 0.5 * C * jnp.sum(x**2)  # noqa: E731
    solution = tolerax.solve(tolerax.Objective(energy), solver, x0, key=run, max_steps=1)
    hop = solution.state.solver_state.x
    expected = x0 / (1 + C * alpha * S**2)
    # Of N weighted particles, sum w_i^2 (x_i - m)^2 / (sum w_i)^2 is the variance of the mean. The
    # squared weights belong to 2 alpha: the integrals are those of Gaussians.
    once, twice = 1 / S**2 + C * alpha, 1 / S**2 + 2 * C * alpha
    moved = x0 / S**2 / twice - expected
    size = jnp.sum(x0**2) / (2 * S**4) * (1 / twice - 2 / once) + jnp.sum(x0**2) / (2 * S**2)
    log_ratio = size + d * jnp.log(once * S / jnp.sqrt(twice))
    variance = jnp.exp(log_ratio) * (1 / twice + moved**2) / (particles - 1)
    return jnp.sqrt(jnp.mean((hop - expected) ** 2 / variance))


def measure(settings: Settings) -> dict[str, Measured]:
    found, detail = [], {}
    for d, alpha in CASES:
        each = [float(sigmas(jax.random.key(s), d, alpha, PARTICLES)) for s in settings.seeds]
        detail[f"d = {d}, alpha = {alpha:g}"] = each
        settings.tell(f"   d = {d}, alpha = {alpha:g}: {', '.join(f'{z:.2f}' for z in each)}")
        found.extend(each)
    return {"hopping_sigmas": Measured(found, value=max(found), detail=detail)}


GROUP = Group(
    "hopping",
    (Bar("hopping_sigmas", "<=", 3, "consensus hopping from the implicit step, standard errors"),),
    measure,
)
