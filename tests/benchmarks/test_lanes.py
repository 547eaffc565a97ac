"""The problems of the least-squares benchmark are what their descriptions say."""

import numpy as np

from benchmarks import lanes


def test_the_known_derivative_is_that_of_a_dense_solver():
    A, b, derivative = map(np.asarray, lanes.conditioned(0, 1e2))

    def total(b):
        """The sum of w, where w + w^3 / 10 is the least-squares solution."""
        v = np.linalg.lstsq(A, b)[0]
        roots = [np.roots([0.1, 0, 1, -x]) for x in v]
        return sum(float(r[np.abs(r.imag) < 1e-9].real[0]) for r in roots)

    step = 1e-5 * np.cos(np.arange(len(b)))
    change = (total(b + step) - total(b - step)) / 2
    np.testing.assert_allclose(change, derivative @ step, rtol=1e-6)


def test_starts_are_near_coefficients_that_make_the_residuals_vanish():
    Phi, f, start = lanes.experts(0, 0.0)
    assert Phi.shape == (lanes.LANES, 3, lanes.M, lanes.N)
    rows = np.asarray(lanes.equation(np.einsum("kcmn,kn->ckm", Phi, start), f))
    assert 0.01 < np.sqrt(np.mean(rows**2)) < 0.5
