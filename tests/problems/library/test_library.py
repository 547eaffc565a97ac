"""What holds for every ready-made problem: shapes, seeds, types, no network, clear errors."""

import socket

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tolerax.contracts import Accuracy, Query
from tolerax.problems import library
from tolerax.problems.constants import Proved

SMALL = {
    "quadratic": {"n": 40, "d": 3},
    "digits_penalties": {},
    "tv_denoising": {"size": 10, "pictures": 3},
    "field_of_experts": {"size": 10, "pictures": 3},
    "hyper_cleaning": {},
}


def small(name: str, seed: int = 0, **options):
    return getattr(library, name)(seed=seed, **SMALL[name], **options)


def arrays(problem: library.LibraryProblem) -> list:
    return [leaf for leaf in jax.tree.leaves(problem) if eqx.is_array(leaf)]


@pytest.mark.parametrize("name", SMALL)
def test_one_seed_gives_the_same_bits_and_another_seed_other_data(name):
    first, again, other = (arrays(small(name, seed)) for seed in (5, 5, 6))
    for a, b in zip(first, again, strict=True):
        assert a.dtype in (jnp.float64, bool)
        np.testing.assert_array_equal(a, b)
    assert any(
        a.shape != b.shape or not np.array_equal(a, b) for a, b in zip(first, other, strict=True)
    )


@pytest.mark.parametrize("name", SMALL)
def test_every_array_and_every_constant_has_the_dtype_asked_for(name):
    dtype = jnp.float32
    p = small(name, dtype=dtype)
    for leaf in arrays(p):
        assert leaf.dtype in (dtype, bool)
    y, x = p.y0, p.x0
    q = jax.grad(p.upper)(y, x)
    assert q.dtype == dtype
    assert jnp.result_type(p.lower(y, x)) == jnp.result_type(p.upper(y, x)) == dtype
    for key, constant in p.constants.items():
        if not isinstance(constant, Proved) or not callable(constant.value):
            continue
        points = {"cross": (y, q, x), "self_concordance_along": (q, x)}
        answer = constant.value(*points.get(key, (x,)))
        for leaf in jax.tree.leaves(answer):
            assert leaf.dtype == dtype, key


@pytest.mark.parametrize("name", SMALL)
def test_data_come_without_network(name, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"network: {args}")

    for attribute in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, attribute, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    sizes = SMALL[name] | ({"pictures": 10} if "pictures" in SMALL[name] else {})
    assert arrays(getattr(library, name)(**sizes))


@pytest.mark.parametrize("name", SMALL)
def test_data_are_arguments_of_compiled_code(name):
    p = small(name)
    data = max(arrays(p), key=lambda leaf: leaf.size)
    # Traced with the problem as an argument, no large array is left inside as a constant.
    dynamic, static = eqx.partition((p.upper, p.lower), eqx.is_array)

    def levels(dynamic, y, x):
        upper, lower = eqx.combine(dynamic, static)
        return upper(y, x) + lower(y, x)

    jaxpr = jax.make_jaxpr(levels)(dynamic, p.y0, p.x0)
    assert data.size > 20
    assert all(np.size(const) < 20 for const in jaxpr.consts)


@pytest.mark.parametrize("name", SMALL)
def test_the_problem_answers_with_bounds_that_hold(name):
    p = small(name)

    @eqx.filter_jit
    def evaluate(problem, tolerance):
        accuracy = Accuracy(tolerance, tolerance)
        return problem.evaluate(Query(p.x0, accuracy, problem.cold_start()))

    rough, fine = evaluate(p.problem, 1e-3), evaluate(p.problem, 1e-8)
    difference = jax.tree.map(jnp.subtract, rough.gradient, fine.gradient)
    distance = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(difference)))
    assert abs(rough.value - fine.value) <= rough.value_error + fine.value_error
    assert distance <= rough.gradient_error + fine.gradient_error
    assert rough.gradient_error > 0
    proved = {key for key, origin in rough.provenance.constants if origin == "proved"}
    expected = {"strong_convexity", "self_concordance", "cross"}
    expected |= {"upper_smoothness"} if name != "digits_penalties" else set()
    expected |= {"relative_smoothness" if name == "quadratic" else "self_concordance_along"}
    assert proved == expected


def test_options_are_passed_on_and_win_over_the_constants():
    p = small("quadratic", bounds=(-2.0, 2.0), strong_convexity=None)
    assert p.problem.bounds is not None
    assert dict(p.problem.provenance.constants)["strong_convexity"] == "estimated"
    assert isinstance(p.constants["strong_convexity"], Proved)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        ("quadratic", {"n": 3, "d": 4}, "n is 3"),
        ("quadratic", {"d": 0}, "d is 0"),
        ("quadratic", {"noise": -1.0}, r"noise is -1\.0"),
        ("quadratic", {"seed": -1}, "seed is -1"),
        ("tv_denoising", {"size": 301}, "size is 301: give an integer from 8 to 300"),
        ("tv_denoising", {"size": 16, "pictures": 11}, "pictures is 11"),
        ("tv_denoising", {"size": 16, "sigma": np.nan}, "sigma is nan"),
        ("field_of_experts", {"filters": 25}, "filters is 25: give an integer from 1 to 24"),
        ("field_of_experts", {"size": 8, "width": 9}, "size is 8"),
        ("hyper_cleaning", {"flipped": 1.5}, r"flipped is 1\.5: give a number from 0 to 1"),
        ("hyper_cleaning", {"ridge": 0.0}, r"ridge is 0\.0"),
    ],
)
def test_bad_arguments_are_named(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(library, make)(**arguments)
