"""What the GPU benchmark measures runs on a CPU too, at a small size."""

import jax
import pytest

from benchmarks import gpu
from benchmarks.cbo_speed import Size


def test_all_parts_run_on_any_device():
    device = jax.devices("cpu")[0]
    assert gpu.particle_steps(device, Size(3, 100, 5, 5, 1, 1), 5) > 0
    assert gpu.poisson_seconds(device, 7) > 0
    one, batch, parameters = gpu.poll_seconds(device, 8, 4)
    assert one > 0
    assert batch > 0
    # 20 -> 8 -> 8 -> 8 -> 10, with biases.
    assert parameters == 20 * 8 + 8 + 2 * (8 * 8 + 8) + 8 * 10 + 10


def test_without_a_gpu_it_says_so():
    if any(device.platform == "gpu" for device in jax.devices()):
        assert gpu.gpu().platform == "gpu"
        return
    with pytest.raises(RuntimeError, match="no GPU: JAX computes on"):
        gpu.gpu()
