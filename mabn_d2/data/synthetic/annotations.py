"""COCO-format annotations of a scene (https://cocodataset.org/#format-data)."""

import cv2
import numpy as np

from .scenes import STUFF, Scene

MIN_AREA = 10  # visible pixels; what shows less of itself is not annotated
VOID = 255  # Detectron2's ignore label of semantic segmentation

_FINE = 4  # contours are followed on a grid this much finer than the pixels
_TOLERANCE = 0.4  # how far, in pixels, polygons may depart from the contour
_UNLABELLED = 0.05  # share of keypoints in the image that have no label, as in COCO


def mask_to_polygons(mask: np.ndarray) -> list[list[float]]:
    """Outlines of a binary mask, in COCO's coordinates (pixel i spans i..i+1).

    Polygons cannot express holes, so a mask with a hole is cut in two through the hole.

    Args:
        mask: (H, W) uint8, non-zero inside.

    Returns:
        One [x0, y0, x1, y1, ...] per connected part, in pixels, of at least 3 points; parts
        smaller than a pixel are left out.
    """
    x, y, width, height = cv2.boundingRect(mask)
    binary = (mask[y : y + height, x : x + width] > 0).astype(np.uint8)
    return _trace(binary, x, y) if width else []


def _trace(mask: np.ndarray, x: int, y: int) -> list[list[float]]:
    # Contours run through pixel centres, half a pixel inside the border. On an interpolated finer
    # grid the loss is 1/8 of a pixel, and slanted borders come out straight, not as stairs.
    padded = cv2.copyMakeBorder(mask * 255, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    fine = cv2.resize(padded, None, fx=_FINE, fy=_FINE, interpolation=cv2.INTER_LINEAR)
    inside = (fine > 127).astype(np.uint8)
    contours, links = cv2.findContours(inside, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    parents: list[int] = links[0, :, 3].tolist() if len(contours) else []
    holes = [contour for contour, parent in zip(contours, parents) if parent >= 0]
    if holes:
        left, _, width, _ = cv2.boundingRect(max(holes, key=cv2.contourArea))
        cut = int(np.clip(round((left + width / 2) / _FINE) - 1, 1, mask.shape[1] - 1))
        return _trace(mask[:, :cut], x, y) + _trace(mask[:, cut:], x + cut, y)
    polygons = []
    for contour in contours:
        corners = cv2.approxPolyDP(contour, _TOLERANCE * _FINE, closed=True)[:, 0]
        if len(corners) >= 3 and cv2.contourArea(corners) >= _FINE**2:
            points = (corners + 0.5) / _FINE - 1 + (x, y)
            polygons.append(np.round(points, 2).ravel().tolist())
    return polygons


def uncompressed_rle(mask: np.ndarray) -> dict:
    """COCO's run lengths of a binary (H, W) mask: columns first, starting with a run of zeros."""
    pixels = (mask > 0).ravel(order="F")
    borders = np.flatnonzero(np.diff(pixels)) + 1
    counts = np.diff([0, *borders, pixels.size]).tolist()
    return {"counts": [0, *counts] if pixels[0] else counts, "size": list(mask.shape)}


def _keypoint_fields(rng, scene: Scene, number: int) -> dict:
    """`keypoints` and `num_keypoints`: visibility is 0 without label, 1 hidden, 2 visible."""
    points = scene.things[number - 1].keypoints
    height, width = scene.owner.shape
    triples = np.zeros((17, 3), int)
    if points is not None:  # a crowd has none
        x, y = np.rint(points).astype(int).T
        labelled = (0 <= x) & (x < width) & (0 <= y) & (y < height)
        labelled &= rng.random(17) >= _UNLABELLED
        x, y = x[labelled], y[labelled]
        triples[labelled] = np.stack([x, y, 1 + (scene.owner[y, x] == number)], axis=1)
    return {
        "keypoints": triples.ravel().tolist(),
        "num_keypoints": int(np.count_nonzero(triples[:, 2])),
    }


def annotate(
    scene: Scene, category_ids: list[int], person_id: int | None, rng: np.random.Generator
) -> dict[int, dict]:
    """Annotations of what is visible in `scene`.

    Args:
        scene: a drawn scene.
        category_ids: COCO id of every category index.
        person_id: the category that carries keypoints; None for none.
        rng: chooses the keypoints that go without label.

    Returns:
        From number in `scene.owner` to annotation, without `id` and `image_id`. `area` is in
        pixels, `bbox` is [x, y, width, height] in pixels; crowds are uncompressed run lengths.
    """
    annotations = {}
    for number, thing in enumerate(scene.things, start=1):
        mask = (scene.owner == number).astype(np.uint8)
        area = int(np.count_nonzero(mask))
        segmentation = uncompressed_rle(mask) if thing.crowd else mask_to_polygons(mask)
        if area < MIN_AREA or not segmentation:
            continue
        annotations[number] = {
            "category_id": category_ids[thing.category],
            "iscrowd": int(thing.crowd),
            "area": area,
            "bbox": [float(value) for value in cv2.boundingRect(mask)],
            "segmentation": segmentation,
        }
        if category_ids[thing.category] == person_id:
            annotations[number].update(_keypoint_fields(rng, scene, number))
    return annotations


def panoptic(
    scene: Scene, annotations: dict[int, dict], stuff_ids: list[int], stuff_labels: list[int]
) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """Panoptic and semantic ground truth of a scene with stuff.

    Args:
        scene: a scene with `stuff`.
        annotations: those of `annotate`; objects without one are void.
        stuff_ids: panoptic category id of every index into `STUFF`.
        stuff_labels: semantic label of every index into `STUFF`; label 0 is all things.

    Returns:
        (H, W) uint8 segment ids with 0 for void; (H, W) uint8 semantic labels with 255 for void;
        and COCO's `segments_info`.
    """
    segments = np.zeros_like(scene.owner)
    labels = np.full_like(scene.owner, VOID)
    info = []

    def add(region: np.ndarray, segment: int, label: int, category_id: int, iscrowd: int) -> None:
        segments[region], labels[region] = segment, label
        info.append(
            {
                "id": segment,
                "category_id": category_id,
                "area": int(np.count_nonzero(region)),
                "bbox": list(cv2.boundingRect(region.astype(np.uint8))),
                "iscrowd": iscrowd,
            }
        )

    for number, annotation in annotations.items():
        region = scene.owner == number
        add(region, number, 0, annotation["category_id"], annotation["iscrowd"])
    for index in range(len(STUFF)):
        region = (scene.stuff == index) & (scene.owner == 0)
        if region.any():
            add(region, 100 + index, stuff_labels[index], stuff_ids[index], 0)
    return segments, labels, info
