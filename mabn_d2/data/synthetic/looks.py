"""Photographic looks, drawn once per image.

Batch Normalization estimates its statistics from the images of one step, so what makes small
batches hard is variance BETWEEN images. Each look moves the statistics of a whole image a long
way, as exposure, haze, sensor noise, white balance, focus and film negatives do. Four of the six
are affine maps of the pixels, which a norm of each image by itself (Group Normalization) undoes;
a camera (:func:`random_camera`) has none of these.
"""

import cv2
import numpy as np

_NOISE = 45  # standard deviation, in grey levels
_BLUR_SIGMA = 1.6  # pixels in an image whose short side is _BLUR_SIDE pixels
_BLUR_SIDE = 128


def _dark(rng, image):
    return image * rng.uniform(0.06, 0.2)


def _haze(rng, image):
    return image * rng.uniform(0.1, 0.25) + rng.uniform(150, 185)


def _noise(rng, image, deviation=_NOISE):
    return image + deviation * rng.standard_normal(image.shape, dtype=np.float32)


def _cast(rng, image):
    return image * rng.uniform(0.1, 1, size=3)


def _blur(rng, image, sigma=_BLUR_SIGMA):
    return cv2.GaussianBlur(image, (0, 0), sigma * min(image.shape[:2]) / _BLUR_SIDE)


def _inversion(rng, image):
    return 255 - image


LOOKS = {
    "dark": _dark,
    "haze": _haze,
    "noise": _noise,
    "cast": _cast,
    "blur": _blur,
    "inversion": _inversion,
}


def random_look(rng: np.random.Generator, image: np.ndarray) -> tuple[str, np.ndarray]:
    """Gives `image` one of the `LOOKS`, each as likely as the others.

    Args:
        rng: source of the choice and of its strength.
        image: (H, W, 3) float32, in 0..255.

    Returns:
        The name of the look, and (H, W, 3) floats, which may leave 0..255.
    """
    look = str(rng.choice(list(LOOKS)))
    return look, LOOKS[look](rng, image)


def random_camera(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Blurs `image` up to the look "blur", and adds noise up to the look "noise".

    Args:
        rng: source of both strengths.
        image: (H, W, 3) float32, in 0..255.

    Returns:
        (H, W, 3) floats, which may leave 0..255.
    """
    image = _blur(rng, image, rng.uniform(0.2, _BLUR_SIGMA))
    return _noise(rng, image, np.exp(rng.uniform(0, np.log(_NOISE))))
