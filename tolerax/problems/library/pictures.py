"""Crops of the pictures that scikit-image carries, noise, and the quality of a denoised picture."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float

from tolerax.problems.library.base import LibraryProblem, check_count, check_real, generator

# All of these lie inside the wheel; other pictures of scikit-image are downloaded on first use.
NAMES = (
    "camera",
    "moon",
    "coins",
    "astronaut",
    "chelsea",
    "coffee",
    "brick",
    "grass",
    "gravel",
    "rocket",
)
SMALLEST_SIDE = 300

Pictures = Float[Array, "pictures height width"]


def crops(seed: int, size: int, pictures: int) -> np.ndarray:
    """Grey crops with values in [0, 1], shape `(pictures, size, size)`; `seed` places them."""
    size = check_count("size", size, 8, SMALLEST_SIDE)
    pictures = check_count("pictures", pictures, 1, len(NAMES))
    try:
        import skimage.data
    except ImportError as error:
        raise ImportError(
            "the pictures come with scikit-image: `pip install 'tolerax[examples]'`."
        ) from error
    rng = generator(seed, "crops")
    # Drawn for all pictures, so that fewer pictures are the first of the same crops.
    corners = rng.uniform(size=(len(NAMES), 2))
    out = []
    for name, corner in zip(NAMES[:pictures], corners[:pictures], strict=True):
        picture = getattr(skimage.data, name)() / 255.0
        if picture.ndim == 3:
            picture = picture @ np.array([0.2125, 0.7154, 0.0721])  # luminance, ITU-R BT.709
        top, left = (corner * (np.array(picture.shape) - size + 1)).astype(int)
        out.append(picture[top : top + size, left : left + size])
    return np.stack(out)


def add_noise(clean: np.ndarray, sigma: float, seed: int) -> np.ndarray:
    """White normal noise of standard deviation `sigma`; values are not clipped."""
    sigma = check_real("sigma", sigma, 0.0)
    return clean + sigma * generator(seed, "noise").normal(size=clean.shape)


def psnr(y: Pictures, clean: Pictures) -> Float[Array, ""]:
    """Peak signal-to-noise ratio in decibels (peak 1), the mean over pictures."""
    return jnp.mean(-10 * jnp.log10(jnp.mean((y - clean) ** 2, axis=(1, 2))))


class PictureLoss(eqx.Module):
    """½ ‖y − clean‖² / pictures: half the squared error of a picture, the mean over pictures.

    It is the mean squared error times ½ height · width. Its gradient has the Lipschitz constant
    1/pictures.
    """

    clean: Pictures

    def __call__(self, y: Pictures, x: object) -> Float[Array, ""]:
        del x
        return 0.5 * jnp.sum((y - self.clean) ** 2) / self.clean.shape[0]


class Denoising(LibraryProblem):
    """A denoising problem with its pictures, each of shape `(pictures, size, size)`."""

    clean: Pictures
    noisy: Pictures

    def mean_squared_error(self, y: Pictures) -> Float[Array, ""]:
        """Mean squared error of all pixels: the upper level times 2/size²."""
        return jnp.mean((y - self.clean) ** 2)

    def psnr(self, y: Pictures) -> Float[Array, ""]:
        """Mean peak signal-to-noise ratio of the pictures y, in decibels."""
        return psnr(y, self.clean)


def denoising_data(
    seed: int, size: int, pictures: int, sigma: float, dtype: DTypeLike
) -> tuple[Pictures, Pictures]:
    """Clean and noisy pictures; `seed` draws both the crops and the noise."""
    clean = crops(seed, size, pictures)
    return jnp.asarray(clean, dtype), jnp.asarray(add_noise(clean, sigma, seed), dtype)
