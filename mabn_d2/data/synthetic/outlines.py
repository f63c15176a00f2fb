"""Outlines of the synthetic objects, as polygons in a unit frame.

Every outline fits in [-1, 1] x [-1, 1] with x to the right and y down, like image coordinates.
"""

import numpy as np


def _polar(radius, steps: int = 48) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, steps, endpoint=False)
    return (radius(angle) * np.stack([np.cos(angle), np.sin(angle)])).T


def _regular(corners: int) -> np.ndarray:
    angle = 2 * np.pi * np.arange(corners) / corners - np.pi / 2
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _star(points: int = 5, inner: float = 0.42) -> np.ndarray:
    outline = _regular(2 * points)
    outline[1::2] *= inner
    return outline


def _crescent() -> np.ndarray:
    """The unit disc less a disc of radius 0.8 around (0.5, 0)."""
    tip = np.arccos(0.61)  # where the two circles meet
    inner_tip = np.arctan2(np.sin(tip), np.cos(tip) - 0.5)
    outer = np.linspace(tip, 2 * np.pi - tip, 32)
    inner = np.linspace(2 * np.pi - inner_tip, inner_tip, 24)[1:-1]
    x = np.concatenate([np.cos(outer), 0.5 + 0.8 * np.cos(inner)])
    y = np.concatenate([np.sin(outer), 0.8 * np.sin(inner)])
    return np.stack([x, y], axis=1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y], axis=1) / 17


def _drop() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    return np.stack([np.sin(t) * np.sin(t / 2) ** 1.5, -np.cos(t)], axis=1)


def _polygon(*corners: tuple[float, float]) -> np.ndarray:
    return np.array(corners, dtype=float)


def _square(half_width: float, half_height: float) -> np.ndarray:
    w, h = half_width, half_height
    return _polygon((-w, -h), (w, -h), (w, h), (-w, h))


def _cross(arm: float = 0.32) -> np.ndarray:
    quarter = _polygon((-arm, -1), (arm, -1), (arm, -arm))
    turns = [np.array([[c, s], [-s, c]]) for c, s in [(1, 0), (0, 1), (-1, 0), (0, -1)]]
    return np.concatenate([quarter @ turn for turn in turns])


OUTLINES = {
    "circle": _polar(lambda a: np.ones_like(a)),
    "square": _square(0.8, 0.8),
    "triangle": _regular(3),
    "star": _star(),
    "cross": _cross(),
    "crescent": _crescent(),
    "heart": _heart(),
    "arrow": _polygon(
        (-1, -0.3), (0.1, -0.3), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3)
    ),
    "hexagon": _regular(6),
    "drop": _drop(),
    "bar": _square(1, 0.3),
    "ellipse": _polar(lambda a: np.ones_like(a)) * (1, 0.5),
    "chevron": _polygon((-1, 0.5), (0, -0.7), (1, 0.5), (0.55, 0.8), (0, 0.05), (-0.55, 0.8)),
    "half disc": np.clip(_polar(lambda a: np.ones_like(a)), (-1, -1), (1, 0)) + (0, 0.5),
    "flower": _polar(lambda a: 0.72 + 0.28 * np.cos(5 * a), steps=80),
    "hourglass": _polygon(
        (-0.8, -0.9), (0.8, -0.9), (0.15, 0), (0.8, 0.9), (-0.8, 0.9), (-0.15, 0)
    ),
}

KEYPOINTS = (
    *("nose", "left_eye", "right_eye", "left_ear", "right_ear"),
    *("left_shoulder", "right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist"),
    *("left_hip", "right_hip", "left_knee", "right_knee", "left_ankle", "right_ankle"),
)
# One-based pairs of keypoints, as in the `skeleton` field of COCO's person category.
SKELETON = (
    *((16, 14), (14, 12), (17, 15), (15, 13), (12, 13), (6, 12), (7, 13), (6, 7), (6, 8), (7, 9)),
    *((8, 10), (9, 11), (2, 3), (1, 2), (1, 3), (2, 4), (3, 5), (4, 6), (5, 7)),
)


def _capsule(start: np.ndarray, end: np.ndarray, radius: float, steps: int = 8) -> np.ndarray:
    """The outline of all points within `radius` of the segment from `start` to `end`."""
    heading = np.arctan2(*(end - start)[::-1])
    half_turn = np.linspace(-np.pi / 2, np.pi / 2, steps)
    angle = heading + np.concatenate([half_turn, half_turn + np.pi])
    centre = np.repeat([end, start], steps, axis=0)
    return centre + radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _limb(root: np.ndarray, lengths: tuple[float, float], angles) -> tuple[np.ndarray, np.ndarray]:
    """Middle joint and end of a limb; angles in radians from straight down, towards +x."""
    joints = [root]
    for length, angle in zip(lengths, angles):
        joints.append(joints[-1] + length * np.array([np.sin(angle), np.cos(angle)]))
    return joints[1], joints[2]


def person(rng: np.random.Generator) -> tuple[list[tuple[np.ndarray, str]], np.ndarray]:
    """A figure facing the viewer, its limbs in a random pose.

    Returns:
        The parts to draw, first one at the back, each a (K, 2) polygon and one of the materials
        "skin", "shirt", "trousers" and "eye"; and the (17, 2) positions of COCO's keypoints in
        the order of `KEYPOINTS`. The person's left is on the viewer's right.
    """
    joint = {"nose": np.array([0.0, -0.76])}
    sides = {"left": 1, "right": -1}
    for side, sign in sides.items():
        joint[f"{side}_eye"] = np.array([sign * 0.07, -0.83])
        joint[f"{side}_ear"] = np.array([sign * 0.135, -0.79])
        shoulder = joint[f"{side}_shoulder"] = np.array([sign * 0.2, -0.5])
        hip = joint[f"{side}_hip"] = np.array([sign * 0.12, 0.06])
        upper = rng.uniform(0.1, 2.4)
        arm = sign * np.array([upper, upper + rng.uniform(-0.3, 1.2)])
        joint[f"{side}_elbow"], joint[f"{side}_wrist"] = _limb(shoulder, (0.27, 0.25), arm)
        thigh = rng.uniform(-0.05, 0.5)
        leg = sign * np.array([thigh, thigh - rng.uniform(0, 0.5)])
        joint[f"{side}_knee"], joint[f"{side}_ankle"] = _limb(hip, (0.43, 0.41), leg)

    def limb(side: str, names: tuple[str, str, str], radius: float, material: str):
        chain = [joint[f"{side}_{name}"] for name in names]
        return [(_capsule(a, b, radius), material) for a, b in zip(chain, chain[1:])]

    parts = []
    for side in sides:
        parts += limb(side, ("hip", "knee", "ankle"), 0.09, "trousers")
    parts.append((_capsule(np.array([0, -0.42]), np.array([0, 0.0]), 0.21), "shirt"))
    for side in sides:
        parts += limb(side, ("shoulder", "elbow", "wrist"), 0.07, "skin")
    parts.append((OUTLINES["circle"] * (0.16, 0.2) + (0, -0.8), "skin"))
    for side in sides:
        parts.append((OUTLINES["circle"] * 0.035 + joint[f"{side}_eye"], "eye"))
    return parts, np.array([joint[name] for name in KEYPOINTS])
