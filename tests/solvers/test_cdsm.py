"""Covering direct search and the model trust region: what the conformance suite does not ask."""

import jax.numpy as jnp
import pytest

from tolerax import CDSM, ModelTrustRegion


@pytest.mark.parametrize("make", [CDSM, ModelTrustRegion])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"radius": -1.0}, "radius is -1.0: its entries must be positive"),
        ({"radius": 0.0}, "radius is 0.0"),
        ({"radius": float("nan")}, "radius is nan"),
        ({"radius": jnp.array([1.0, -1.0])}, "radius is "),
        ({"tol": 2.0}, "tol is 2.0: it is the last radius in units of the first"),
        ({"tol": 0.0}, "tol is 0.0"),
        ({"batch": True}, "batch is True: give an integer"),
        ({"batch": 0}, "batch is 0"),
    ],
)
def test_bad_fields_are_named(make, fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"feasible_within": -1.0}, "feasible_within is -1.0"),
        ({"covering": 0.0}, "covering is 0.0"),
        ({"memory": 0}, "memory is 0"),
    ],
)
def test_bad_fields_of_cdsm_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        CDSM(**fields)
