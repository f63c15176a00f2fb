"""Random scenes of overlapping objects, with what is visible of each of them."""

import colorsys
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import cv2
import numpy as np

from .outlines import OUTLINES, person

SHAPES = ("circle", "square", "triangle", "star", "cross", "crescent")

_EMPTY = 0.03  # share of images without any object
_CROWD = 0.05  # share of images with a crowd
_GRAIN = 5  # standard deviation of the film grain, in grey levels


@dataclass
class Thing:
    """One annotated object, or one crowd of them.

    Attributes:
        category: index into the categories of the layout.
        crowd: whether it is a cluster of objects annotated as one.
        keypoints: (17, 2) x, y in pixel indices for one person, None for all else.
    """

    category: int
    crowd: bool = False
    keypoints: np.ndarray | None = None


@dataclass
class Scene:
    """An image and the objects in it.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        owner: (H, W) uint8; k where `things[k - 1]` is visible and 0 where the background is.
        stuff: (H, W) uint8 indices into `STUFF`, or None where the background is no stuff.
        things: the objects, those at the back first.
    """

    image: np.ndarray
    owner: np.ndarray = field(init=False)
    stuff: np.ndarray | None = None
    things: list[Thing] = field(default_factory=list)

    def __post_init__(self):
        self.owner = np.zeros(self.image.shape[:2], np.uint8)


# ---- fills ---------------------------------------------------------------------------------------


def _hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value))


# Each maps coordinates in the unit frame of the object to where its second colour shows.
PATTERNS = {
    "plain": lambda u, v: np.zeros(u.shape, bool),
    "stripes": lambda u, v: np.sin(9 * u) > 0,
    "checks": lambda u, v: np.sin(7 * u) * np.sin(7 * v) > 0,
    "dots": lambda u, v: np.cos(9 * u) + np.cos(9 * v) > 0.9,
    "rings": lambda u, v: np.cos(13 * np.hypot(u, v)) > 0,
}


@dataclass
class _Pose:
    """Places the unit frame in the image: turned, stretched, scaled and moved."""

    centre: np.ndarray
    matrix: np.ndarray

    @classmethod
    def random(cls, rng, centre, radius: float, tilt: float) -> "_Pose":
        angle = rng.uniform(-tilt, tilt)
        cos, sin = np.cos(angle), np.sin(angle)
        stretch = np.sqrt(rng.uniform(0.8, 1.25))
        matrix = radius * np.array([[cos, -sin], [sin, cos]]) * (stretch, 1 / stretch)
        return cls(np.asarray(centre), matrix)

    def to_image(self, points: np.ndarray) -> np.ndarray:
        return points @ self.matrix.T + self.centre

    def to_unit(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        (a, b), (c, d) = np.linalg.inv(self.matrix)
        x, y = x - self.centre[0], y - self.centre[1]
        return a * x + b * y, c * x + d * y


def _patterned(pose: _Pose, pattern: str, colours) -> Callable:
    """A fill: pixel coordinates to (h, w, 3) colours, shaded as if lit from one side."""

    def fill(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        u, v = pose.to_unit(x, y)
        first, second = np.asarray(colours, np.float32)
        colour = np.where(PATTERNS[pattern](u, v)[..., None], second, first)
        return np.clip(colour * (1 + 0.15 * (u - v))[..., None], 0, 255)

    return fill


def _paint(scene: Scene, polygon: np.ndarray, fill: Callable, edge) -> None:
    """Draws a (K, 2) polygon with an outline inside its border, for the last thing of `scene`."""
    height, width = scene.owner.shape
    x0, y0 = np.maximum(np.floor(polygon.min(0)).astype(int) - 1, 0)
    x1, y1 = np.minimum(np.ceil(polygon.max(0)).astype(int) + 2, (width, height))
    if x0 >= x1 or y0 >= y1:
        return
    shift = 4  # polygons keep 1/16 of a pixel, or small objects would all look square
    corners = np.rint((polygon - (x0, y0)) * 2**shift).astype(np.int32)
    cover = np.zeros((y1 - y0, x1 - x0), np.uint8)
    cv2.fillPoly(cover, [corners], 255, cv2.LINE_AA, shift)
    x, y = np.meshgrid(np.arange(x0, x1, dtype=np.float32), np.arange(y0, y1, dtype=np.float32))
    colour = fill(x, y).astype(np.uint8)
    thickness = max(1, min(height, width) // 120)
    cv2.polylines(colour, [corners], True, edge, thickness, cv2.LINE_AA, shift)
    window = scene.image[y0:y1, x0:x1]
    opacity = (cover / np.float32(255))[..., None]
    window[:] = np.rint(window + (colour - window.astype(np.float32)) * opacity)
    scene.owner[y0:y1, x0:x1][cover > 127] = len(scene.things)


def _draw_outline(rng, scene: Scene, name: str, pattern: str, colours, centre, radius) -> None:
    pose = _Pose.random(rng, centre, radius, tilt=np.pi)
    edge = [int(level) for level in 0.35 * np.asarray(colours[0])]
    _paint(scene, pose.to_image(OUTLINES[name]), _patterned(pose, pattern, colours), edge)


# ---- composition ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Content:
    """What there is to see in an image.

    Attributes:
        most: objects; there are 2..`most`, or none at all.
        smallest, largest: bounds of an object's radius, relative to the short side.
        patterns: names of the patterns that its objects may have.
        texture: name of the background's pattern.
        contrast: of that pattern, in grey levels.
        cells: how fine that pattern is: about the number of its periods along a side.
    """

    most: int = 7
    smallest: float = 0.07
    largest: float = 0.3
    patterns: tuple[str, ...] = tuple(PATTERNS)
    texture: str = "plain"
    contrast: float = 0.0
    cells: float = 1.0

    @classmethod
    def random(cls, rng: np.random.Generator) -> "Content":
        """Few or many objects, of similar size in one image and of very different ones in two."""
        smallest = np.exp(rng.uniform(np.log(0.06), np.log(0.16)))
        patterns = [tuple(PATTERNS), *((name,) for name in PATTERNS)]
        return cls(
            most=int(rng.integers(2, 15)),
            smallest=smallest,
            largest=smallest * rng.uniform(1.3, 2.2),
            patterns=patterns[rng.integers(len(patterns))],
            texture=str(rng.choice(list(PATTERNS))),
            contrast=rng.uniform(5, 35),
            cells=np.exp(rng.uniform(np.log(3), np.log(24))),
        )


def _populate(rng, scene: Scene, pick: Callable, draw: Callable, content: Content) -> None:
    """Adds the objects, the large ones rather at the back, and now and then a crowd.

    Args:
        pick: rng -> category of an object.
        draw: rng, scene, category, centre, radius -> keypoints or None; draws one object.
        content: of the objects, number and radii.
    """
    if rng.random() < _EMPTY:
        return
    height, width = scene.owner.shape
    side = min(height, width)
    bounds = np.log(content.smallest), np.log(content.largest)
    radii = side * np.exp(rng.uniform(*bounds, rng.integers(2, content.most + 1)))
    radii = radii[np.argsort(-radii * rng.uniform(0.5, 1.5, len(radii)))]
    crowd_at = rng.integers(len(radii)) if rng.random() < _CROWD else None
    for k, radius in enumerate(radii):
        if k == crowd_at:
            _add_crowd(rng, scene, pick, draw)
        thing = Thing(pick(rng))
        scene.things.append(thing)
        centre = rng.uniform(0.04, 0.96, 2) * (width, height)
        thing.keypoints = draw(rng, scene, thing.category, centre, radius)


def _add_crowd(rng, scene: Scene, pick: Callable, draw: Callable) -> None:
    height, width = scene.owner.shape
    side = min(height, width)
    thing = Thing(pick(rng), crowd=True)
    scene.things.append(thing)
    middle = rng.uniform(0.25, 0.75, 2) * (width, height)
    for _ in range(rng.integers(8, 17)):
        centre = middle + side * rng.uniform(-0.2, 0.2, 2)
        draw(rng, scene, thing.category, centre, side * rng.uniform(0.035, 0.06))


def _smooth_noise(rng, height: int, width: int, cells: int) -> np.ndarray:
    """(height, width) float32 noise of about unit variance that varies over 1/cells of a side."""
    grid = rng.standard_normal((cells, cells), dtype=np.float32)
    return cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)


def _add_grain(rng, scene: Scene) -> None:
    grain = rng.standard_normal(scene.owner.shape, dtype=np.float32)[..., None] * _GRAIN
    scene.image = np.clip(np.rint(scene.image + grain), 0, 255).astype(np.uint8)


# ---- layout "shapes" -----------------------------------------------------------------------------


def shapes_scene(rng: np.random.Generator, size: int, content: Content | None = None) -> Scene:
    """A `size` x `size` scene of `SHAPES` in random colours and patterns on a blurry background."""
    content = content or Content()
    scene = Scene(_gradient(rng, size, content))
    pick = lambda rng: int(rng.integers(len(SHAPES)))  # noqa: E731
    _populate(rng, scene, pick, functools.partial(_draw_shape, content.patterns), content)
    _add_grain(rng, scene)
    return scene


def _gradient(rng, size: int, content: Content) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:size, :size] / size - 0.5
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    ramp = along[..., None] * rng.uniform(-50, 50, 3)
    clouds = 14 * _smooth_noise(rng, size, size, 5) + 8 * _smooth_noise(rng, size, size, 16)
    base = rng.uniform(100, 140, 3)  # much alike in all images: differences are left to the looks
    pattern = PATTERNS[content.texture](content.cells * along, content.cells * across)
    texture = content.contrast * (2 * pattern - 1.0)
    return np.clip(base + ramp + (clouds + texture)[..., None], 0, 255).astype(np.uint8)


def _draw_shape(patterns, rng, scene: Scene, category: int, centre, radius: float) -> None:
    hue = rng.random()
    bright = rng.uniform(0.55, 1)
    colours = _hsv(hue, rng.uniform(0.4, 1), bright), _hsv(hue + rng.normal(0, 0.1), 0.6, 0.45)
    _draw_outline(rng, scene, SHAPES[category], rng.choice(patterns), colours, centre, radius)


# ---- layout "coco2017" ---------------------------------------------------------------------------

# COCO stuff that fills the background, with its hue, saturation, value and roughness: sky-like
# and wall-like stuff at the top, then what stands on the horizon, then ground.
_TOP = {
    "sky-other-merged": (0.58, 0.4, 0.85, 6),
    "wall-other-merged": (0.1, 0.2, 0.75, 4),
    "ceiling-merged": (0.0, 0.02, 0.85, 3),
}
_MIDDLE = {
    "tree-merged": (0.3, 0.6, 0.35, 26),
    "building-other-merged": (0.05, 0.35, 0.5, 16),
    "mountain-merged": (0.65, 0.2, 0.5, 14),
    "sea": (0.53, 0.6, 0.5, 10),
}
_BOTTOM = {
    "grass-merged": (0.24, 0.55, 0.55, 18),
    "road": (0.6, 0.05, 0.4, 8),
    "sand": (0.12, 0.4, 0.8, 8),
    "snow": (0.6, 0.05, 0.92, 5),
    "floor-wood": (0.07, 0.6, 0.5, 10),
}
STUFF = (*_TOP, *_MIDDLE, *_BOTTOM)

_PERSON = 0  # index of "person" among COCO's categories
_PERSON_SHARE = 0.25  # much of COCO is people, and keypoints need them


def coco_scene(rng: np.random.Generator, size: int) -> Scene:
    """A photograph-shaped scene of COCO's 80 categories on a background of `STUFF`.

    The short side is within 15% of `size`; most images are landscapes, some are portraits.
    A category is told by its outline, pattern and colour; "person" is a jointed figure.
    """
    short = int(size * rng.uniform(0.85, 1.15))
    long = int(short * rng.choice([1, 1.25, 4 / 3, 4 / 3, 1.5]))
    height, width = (long, short) if rng.random() < 0.3 else (short, long)
    scene = _landscape(rng, height, width)
    content = Content(most=12, smallest=0.03)
    _populate(rng, scene, _pick_category, _draw_category, content)
    _add_grain(rng, scene)
    return scene


def _landscape(rng, height: int, width: int) -> Scene:
    """Bands of stuff with wavy borders."""
    image = np.zeros((height, width, 3), np.float32)
    stuff = np.zeros((height, width), np.uint8)
    row = np.arange(height, dtype=np.float32)[:, None]
    x = np.linspace(0, 2 * np.pi, width, dtype=np.float32)
    fine, coarse = _smooth_noise(rng, height, width, 60), _smooth_noise(rng, height, width, 6)
    horizon = rng.uniform(0.25, 0.45), rng.uniform(0.5, 0.75)
    for kinds, top in zip((_TOP, _MIDDLE, _BOTTOM), (-1.0, *horizon)):
        name = rng.choice(list(kinds))
        wave = 0.04 * np.sin(rng.uniform(1, 4) * x + rng.uniform(0, 6))
        below = row >= height * (top + wave)
        hue, saturation, value, roughness = kinds[name]
        texture = roughness * (fine + 0.5 * coarse) + 20 * (row / height - 0.5)
        colour = _hsv(hue + rng.normal(0, 0.02), saturation, value) + rng.normal(0, 8)
        image[below] = (colour + texture[..., None])[below]
        stuff[below] = STUFF.index(name)
    return Scene(np.clip(image, 0, 255).astype(np.uint8), stuff=stuff)


def _pick_category(rng) -> int:
    if rng.random() < _PERSON_SHARE:
        return _PERSON
    return int(rng.integers(len(PATTERNS) * len(OUTLINES)))


def _draw_category(rng, scene: Scene, category: int, centre, radius) -> np.ndarray | None:
    if category == _PERSON:
        return _draw_person(rng, scene, centre, radius)
    pattern, name = divmod(category, len(OUTLINES))  # 5 patterns x 16 outlines = 80 categories
    hue = category * 0.618 + rng.normal(0, 0.01)  # golden ratio: neighbours differ much
    colours = _hsv(hue, 0.85, rng.uniform(0.85, 1)), _hsv(hue + 0.12, 0.5, 0.35)
    _draw_outline(
        rng, scene, list(OUTLINES)[name], list(PATTERNS)[pattern], colours, centre, radius
    )
    return None


def _draw_person(rng, scene: Scene, centre, radius: float) -> np.ndarray:
    pose = _Pose.random(rng, centre, radius, tilt=0.25)
    parts, keypoints = person(rng)
    skin = _hsv(rng.uniform(0.04, 0.09), 0.45, rng.uniform(0.45, 0.95))
    colours = {
        "skin": (skin, skin),
        "shirt": (_hsv(rng.random(), 0.7, 0.8), _hsv(rng.random(), 0.3, 0.5)),
        "trousers": [_hsv(rng.uniform(0.55, 0.7), 0.5, rng.uniform(0.3, 0.6))] * 2,
        "eye": [np.full(3, 20.0)] * 2,
    }
    pattern = rng.choice(list(PATTERNS))
    for polygon, material in parts:
        fill = _patterned(pose, pattern if material == "shirt" else "plain", colours[material])
        edge = [int(level) for level in 0.5 * colours[material][0]]
        _paint(scene, pose.to_image(polygon), fill, edge)
    return pose.to_image(keypoints)
