"""A function with a known minimum, traceable by JAX and not, for the tests of `minimize`."""

import numpy as np

CENTRE = np.array([1.0, -2.0])
START = [4.0, 0.0]


def bowl(x):
    """Traceable by JAX."""
    return (x[0] - 1) ** 2 + (x[1] + 2) ** 2


def python_bowl(x):
    """Not traceable."""
    return float(np.sum((np.asarray(x) - CENTRE) ** 2))


def python_gradient(x):
    return 2 * (np.asarray(x) - CENTRE)
