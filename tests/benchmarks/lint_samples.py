"""Good and damaged maps to measure the lint with: pictures, scenes, rooms, poses, and what goes wrong.

Everything follows from a split's name and a seed. The lint's thresholds were chosen on the split "tune",
three of them again after a look at "report", which has other photographs, scenes and random draws and
gives the published figures.
"""

import math
from collections.abc import Callable
from functools import cache

import cv2
import numpy as np
from skimage import data

from controlkit.figures import render
from controlkit.preprocessors import draw_poses, lint
from controlkit.preprocessors.skeleton import COLOURS, LIMBS

Random = np.random.Generator
PHOTOGRAPHS = {
    "tune": ("astronaut", "rocket", "camera", "brick", "coins", "hubble_deep_field", "page", "retina"),
    "report": ("coffee", "cat", "moon", "text", "grass", "gravel", "immunohistochemistry", "motorcycle"),
}


# --- pictures ---


@cache
def _photograph(name: str) -> np.ndarray:
    picture = data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)()
    return picture if picture.ndim == 3 else cv2.cvtColor(picture, cv2.COLOR_GRAY2RGB)


def size(rng: Random) -> tuple[int, int]:
    """Width and height: anything from 64 to 1536, mostly around 512."""
    side = int(rng.choice([64, 128, 256, 384, 512, 512, 512, 640, 768, 1024]))
    width, height = (round(side * rng.uniform(0.65, 1.5)) for _ in range(2))
    return max(64, width), max(64, height)


def photograph(split: str, rng: Random) -> np.ndarray:
    """A part of a photograph, mirrored, brightened, at a random size."""
    picture = _photograph(str(rng.choice(PHOTOGRAPHS[split])))
    height, width = picture.shape[:2]
    part = rng.uniform(0.45, 1.0)
    h, w = max(48, int(height * part)), max(48, int(width * part))
    top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
    picture = picture[top : top + h, left : left + w]
    scale = max(64 / min(h, w), rng.uniform(0.4, 1.4))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    picture = cv2.resize(picture, (round(w * scale), round(h * scale)), interpolation=method)
    if rng.random() < 0.5:
        picture = picture[:, ::-1]
    gamma = rng.uniform(0.7, 1.4)
    return np.ascontiguousarray((255 * (picture / 255.0) ** gamma).astype(np.uint8))


@cache
def _scene(split: str, seed: int, pixels: int):
    return render(seed, size=pixels, split="train" if split == "tune" else "validation")


def scene(split: str, rng: Random):
    """A scene of the bundled world."""
    return _scene(split, int(rng.integers(120)), int(rng.choice([128, 256])))


# --- good maps ---


def canny(split: str, rng: Random) -> np.ndarray:
    """Edges of a photograph or a scene; pictures that have none are passed over."""
    while True:
        picture = photograph(split, rng) if rng.random() < 0.85 else scene(split, rng).picture
        low = rng.uniform(40, 150)
        if rng.random() < 0.1:  # hardly any texture
            picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(2, 5))
        edges = cv2.Canny(np.ascontiguousarray(picture), low, low * rng.uniform(1.3, 2.5))
        if np.count_nonzero(edges) >= 0.0015 * edges.size:
            return cv2.merge([edges] * 3)


_TEMPLATE = np.array(
    [(0, -4.2), (0, -3), (-1, -3), (-1.3, -1.6), (-1.4, -0.2), (1, -3), (1.3, -1.6), (1.4, -0.2), (-0.6, 0),
     (-0.7, 2), (-0.7, 4), (0.6, 0), (0.7, 2), (0.7, 4),
     (-0.25, -4.5), (0.25, -4.5), (-0.6, -4.4), (0.6, -4.4)]
)  # fmt: skip


def person(rng: Random, width: int, height: int) -> np.ndarray:
    """Joints (18, 3) of somebody in any posture, some of them missing or outside."""
    at = dict(enumerate(_TEMPLATE.copy()))
    children = {2: (3, 4), 3: (4,), 5: (6, 7), 6: (7,), 8: (9, 10), 9: (10,), 11: (12, 13), 12: (13,)}
    for joint, moved in children.items():
        turn = rng.normal(0, 0.7)
        rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        for child in moved:
            at[child] = at[joint] + rotation @ (at[child] - at[joint])
    joints = np.array([at[k] for k in range(18)]) + rng.normal(0, 0.05, (18, 2))
    joints[:, 0] *= rng.choice([-1, 1]) * rng.uniform(0.3, 1.1)  # seen from the front, the back, the side
    scale = rng.uniform(0.03, 0.13) * height
    centre = rng.uniform(0.1, 0.9, 2) * (width, height)
    score = (rng.random(18) > rng.choice([0, 0.1, 0.4])).astype(float)
    return np.concatenate([joints * scale + centre, score[:, None]], axis=1)


def poses(split: str, rng: Random) -> tuple[list[np.ndarray], int, int]:
    """People, and the width and height of their canvas; at least one joint is inside."""
    while True:
        if rng.random() < 0.15:
            found = scene(split, rng)
            factor = rng.uniform(0.7, 6)
            people, width = [found.joints * (factor, factor, 1)], round(found.picture.shape[1] * factor)
            height = width
        else:
            width, height = size(rng)
            people = [person(rng, width, height) for _ in range(rng.choice([1, 1, 1, 2, 3, 8]))]
        if rng.random() < 0.04:  # a single joint
            people = [people[0] * (np.arange(18) == rng.integers(18))[:, None]]
        inside = [
            (p[:, 2] > 0) & (p[:, 0] > 0) & (p[:, 0] < width) & (p[:, 1] > 0) & (p[:, 1] < height)
            for p in people
        ]
        if np.any(inside):
            return people, width, height


def thick_pose(people: list[np.ndarray], width: int, height: int) -> np.ndarray:
    """The "xinsir" style: limbs grow with the canvas, joints do not."""
    side = max(width, height)
    half = 4 * (1 if side < 500 else min(2 + side // 1000, 7))
    return _draw(people, width, height, lambda canvas, limb, colour: cv2.fillConvexPoly(
        canvas, limb, [int(0.6 * c) for c in colour]), half=half)  # fmt: skip


def full_colour_pose(people: list[np.ndarray], width: int, height: int) -> np.ndarray:
    """Limbs in full colour, as simpler tools draw them."""
    return _draw(people, width, height, lambda canvas, limb, colour: cv2.fillConvexPoly(canvas, limb, colour))


def old_pose(people: list[np.ndarray], width: int, height: int) -> np.ndarray:
    """The style of ControlNet 1.0: joints first, then limbs blended over them."""

    def blend(canvas: np.ndarray, limb: np.ndarray, colour: tuple[int, int, int]) -> None:
        over = canvas.copy()
        cv2.fillConvexPoly(over, limb, colour)
        cv2.addWeighted(canvas, 0.4, over, 0.6, 0, dst=canvas)

    return _draw(people, width, height, blend, joints_first=True)


def _draw(
    people: list[np.ndarray],
    width: int,
    height: int,
    draw: Callable[[np.ndarray, np.ndarray, tuple[int, int, int]], object],
    *,
    half: int = 4,
    joints_first: bool = False,
) -> np.ndarray:
    canvas = np.zeros((height, width, 3), np.uint8)

    def dots() -> None:
        for pose in people:
            for (x, y, score), colour in zip(pose, COLOURS, strict=True):
                if score > 0:
                    cv2.circle(canvas, (int(x), int(y)), 4, colour, -1)

    if joints_first:
        dots()
    for pose in people:
        for (a, b), colour in zip(LIMBS, COLOURS, strict=False):
            if pose[a, 2] > 0 and pose[b, 2] > 0:
                middle = (pose[a, :2] + pose[b, :2]) / 2
                dx, dy = pose[a, :2] - pose[b, :2]
                axes = (int(math.hypot(dx, dy) / 2), half)
                angle = int(math.degrees(math.atan2(dy, dx)))
                draw(
                    canvas,
                    cv2.ellipse2Poly((int(middle[0]), int(middle[1])), axes, angle, 0, 360, 1),
                    colour,
                )
    if not joints_first:
        dots()
    return canvas


def _add_hand(canvas: np.ndarray, rng: Random, at: np.ndarray, scale: float) -> None:
    fingers = rng.uniform(-0.6, 0.6) + np.linspace(-0.6, 0.6, 5) + rng.choice([0, math.pi])
    points = [at] + [
        at + scale * (0.4 + 0.2 * k) * np.array([math.cos(f), math.sin(f)]) for f in fingers for k in range(4)
    ]
    edges = [(0 if k == 0 else 4 * f + k, 4 * f + k + 1) for f in range(5) for k in range(4)]
    for i, (a, b) in enumerate(edges):
        hue = cv2.cvtColor(np.array([[[i / 20 * 360, 1, 1]]], np.float32), cv2.COLOR_HSV2RGB)[0, 0] * 255
        ends = [tuple(int(v) for v in points[k]) for k in (a, b)]
        cv2.line(canvas, *ends, tuple(float(int(c + 1e-3)) for c in hue), 2)
    for point in points:
        cv2.circle(canvas, (int(point[0]), int(point[1])), 4, (0, 0, 255), -1)


def _add_face(canvas: np.ndarray, rng: Random, at: np.ndarray, scale: float) -> None:
    for _ in range(68):
        x, y = at + rng.uniform(-1, 1, 2) * (0.8 * scale, scale)
        cv2.circle(canvas, (int(x), int(y)), 3, (255, 255, 255), -1)


def openpose(split: str, rng: Random) -> np.ndarray:
    """People in the v1.1 or the thick style, sometimes with hands and faces."""
    people, width, height = poses(split, rng)
    style = thick_pose if rng.random() < 0.3 else draw_poses
    canvas = style(people, width, height)
    if rng.random() < 0.3:
        for pose in people:
            scale = 0.06 * height
            for wrist in (4, 7):
                if pose[wrist, 2] > 0:
                    _add_hand(canvas, rng, pose[wrist, :2], scale)
            if pose[0, 2] > 0 and rng.random() < 0.7:
                _add_face(canvas, rng, pose[0, :2], scale)
    return canvas if canvas.any() else openpose(split, rng)


# --- depth ---


def room(rng: Random) -> tuple[np.ndarray, np.ndarray]:
    """Metric depth (H, W; inf in the sky) and normals (H, W, 3) of a floor, walls, balls and boards."""
    width, height = (min(side, 640) for side in size(rng))
    focal = rng.uniform(0.6, 1.6) * max(width, height)
    pitch = rng.normal(0.12, 0.15)  # downwards
    x, y = np.meshgrid((np.arange(width) - width / 2) / focal, (np.arange(height) - height / 2) / focal)
    down = y * math.cos(pitch) + math.sin(pitch)
    forward = math.cos(pitch) - y * math.sin(pitch)
    rays = np.stack([x, down, forward], axis=-1)
    depth, normals = np.full((height, width), np.inf), np.zeros((height, width, 3))
    eye = rng.uniform(0.8, 2.2)
    planes = [((0, -1, 0), eye)]
    if rng.random() < 0.7:
        planes.append(((0, 0, -1), rng.uniform(2, 9)))
    if rng.random() < 0.4:
        planes.append(((0, 1, 0), rng.uniform(0.6, 2.0)))  # a ceiling
    for sign in (-1, 1):
        if rng.random() < 0.35:
            planes.append(((-sign, 0, 0), rng.uniform(0.8, 4)))
    yaw = rng.normal(0, 0.4)
    turn = np.array([[math.cos(yaw), 0, math.sin(yaw)], [0, 1, 0], [-math.sin(yaw), 0, math.cos(yaw)]])
    for straight, distance in planes:
        normal = turn @ np.array(straight, float)
        facing = rays @ normal
        with np.errstate(divide="ignore"):
            hit = np.where(facing < -1e-6, -distance / facing, np.inf)
        nearer = hit < depth
        depth[nearer], normals[nearer] = hit[nearer], normal
    for _ in range(rng.integers(0, 5)):
        radius = rng.uniform(0.15, 0.7)
        z = rng.uniform(1.2, 5)
        hanging = rng.random() < 0.12  # lamps, branches
        lift = rng.uniform(0, 0.5) if not hanging else rng.uniform(1.0, 2.0)
        centre = np.array([rng.normal(0, 0.35 * z), eye - radius - lift, z])
        if rng.random() < 0.5:
            _cast_ball(rays, centre, radius, depth, normals)
        else:
            _cast_board(rays, centre, radius * rng.uniform(0.5, 2, 2), depth, normals)
    return depth, normals


def _cast_ball(
    rays: np.ndarray, centre: np.ndarray, radius: float, depth: np.ndarray, normals: np.ndarray
) -> None:
    a, b = (rays**2).sum(-1), rays @ centre
    inside = b**2 - a * (centre @ centre - radius**2)
    hit = np.where(inside > 0, (b - np.sqrt(np.maximum(inside, 0))) / a, np.inf)
    nearer = (hit < depth) & (hit > 0.2)
    depth[nearer] = hit[nearer]
    normals[nearer] = (rays[nearer] * hit[nearer][:, None] - centre) / radius


def _cast_board(
    rays: np.ndarray, centre: np.ndarray, half: np.ndarray, depth: np.ndarray, normals: np.ndarray
) -> None:
    hit = np.where(rays[..., 2] > 1e-6, centre[2] / np.maximum(rays[..., 2], 1e-6), np.inf)
    at = rays * np.where(np.isfinite(hit), hit, 0)[..., None]
    nearer = (np.abs(at[..., 0] - centre[0]) < half[0]) & (np.abs(at[..., 1] - centre[1]) < half[1])
    nearer &= hit < depth
    depth[nearer], normals[nearer] = hit[nearer], (0, 0, -1)


def metric(split: str, rng: Random) -> np.ndarray:
    """Metric depth of a room, a scene or the stereo motorcycle (its left to tune on, its right to report)."""
    choice = rng.random()
    while choice < 0.6:
        far = room(rng)[0]
        if np.isfinite(far).mean() > 0.3:  # not nothing but sky
            return far
    if choice < 0.85:
        return scene(split, rng).depth.astype(np.float64)
    disparity = data.stereo_motorcycle()[2]
    disparity = disparity[:, :370] if split == "tune" else disparity[:, 370:]
    part = rng.uniform(0.6, 1.0)
    h, w = (int(n * part) for n in disparity.shape)
    top, left = (int(rng.integers(0, n - k + 1)) for n, k in zip(disparity.shape, (h, w), strict=True))
    disparity = disparity[top : top + h, left : left + w][:, :: int(rng.choice([-1, 1]))]
    disparity = np.where(np.isfinite(disparity), disparity, 0)
    closed = cv2.morphologyEx(np.ascontiguousarray(disparity), cv2.MORPH_CLOSE, np.ones((25, 25)))
    return 50.0 / np.where(disparity > 0, disparity, np.maximum(closed, 5)).astype(np.float64)


def levels(values: np.ndarray, rng: Random) -> np.ndarray:
    """Any (H, W) values as an 8-bit map, all or between percentiles; sometimes smooth or noisy."""
    values = values.astype(np.float32)
    if rng.random() < 0.4:
        values = cv2.GaussianBlur(values, (0, 0), rng.uniform(0.5, 3))
    if rng.random() < 0.3:
        values = values + rng.normal(0, 0.003 * float(np.ptp(values)), values.shape)
    low, high = np.percentile(values, [2, 98]) if rng.random() < 0.3 else (values.min(), values.max())
    share = np.clip((values - low) / ((high - low) or 1), 0, 1)
    return cv2.merge([np.rint(255 * share).astype(np.uint8)] * 3)


def depth(split: str, rng: Random) -> np.ndarray:
    """Inverse depth as a map, near is white."""
    while True:
        made = levels(1.0 / np.maximum(metric(split, rng), 0.1), rng)
        if np.ptp(made) > 0:
            return made


def far_white_depth(split: str, rng: Random) -> np.ndarray:
    """The inverted map, or metric depth as it is."""
    if rng.random() < 0.5:
        return 255 - depth(split, rng)
    return metric_depth(split, rng)


def metric_depth(split: str, rng: Random) -> np.ndarray:
    """Metric depth as it is, the sky at the far end."""
    far = metric(split, rng)
    near = far[np.isfinite(far)]
    return levels(np.minimum(far, min(1.2 * near.max(), 50 * near.min())), rng)


# --- lines and normals ---


def softedge(split: str, rng: Random) -> np.ndarray:
    """Soft bright ridges along the gradients of a photograph."""
    grey = cv2.cvtColor(photograph(split, rng), cv2.COLOR_RGB2GRAY).astype(np.float32)
    grey = cv2.GaussianBlur(grey, (0, 0), rng.uniform(1.5, 4))
    strength = np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))
    share = np.clip(strength / np.percentile(strength, 99), 0, 1) ** rng.uniform(1.0, 2.0)
    return cv2.merge([(255 * share).astype(np.uint8)] * 3)


def scribble(split: str, rng: Random) -> np.ndarray:
    """Few, thick, white strokes."""
    while True:
        picture = cv2.GaussianBlur(photograph(split, rng), (0, 0), rng.uniform(3, 6))
        strokes = cv2.Canny(picture, 20, 50)
        strokes = cv2.dilate(strokes, np.ones((2, 2), np.uint8), iterations=int(rng.integers(1, 6)))
        if rng.random() < 0.5:
            strokes = cv2.GaussianBlur(strokes, (0, 0), 1)
        if np.count_nonzero(strokes) >= 0.0015 * strokes.size:
            return cv2.merge([strokes] * 3)


def normal(split: str, rng: Random) -> np.ndarray:
    """Normals of a room: red left, green up, blue to the viewer."""
    while True:
        far, normals = room(rng)
        if np.isfinite(far).mean() > 0.3 and np.ptp(normals, axis=(0, 1)).any():  # more than one wall
            break
    normals[~np.isfinite(far)] = (0, 0, -1)
    colours = np.stack([-normals[..., 0], -normals[..., 1], -normals[..., 2]], axis=-1)
    return np.ascontiguousarray(np.rint((colours + 1) * 127.5).astype(np.uint8))


GOOD = {
    "canny": canny,
    "openpose": openpose,
    "depth": depth,
    "softedge": softedge,
    "scribble": scribble,
    "normal": normal,
}


# --- damages ---


def jpeg(image: np.ndarray, rng: Random, lowest: int = 30, highest: int = 95) -> np.ndarray:
    """The map after JPEG of a random quality."""
    quality = int(rng.integers(lowest, highest + 1))
    data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1]


def resized(image: np.ndarray, rng: Random) -> np.ndarray:
    """The map after linear, cubic or area resizing."""
    factor = float(rng.choice([rng.uniform(0.5, 0.9), rng.uniform(1.1, 2)]))
    methods = [cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_AREA]
    return cv2.resize(image, None, fx=factor, fy=factor, interpolation=int(rng.choice(methods)))


def blurred(image: np.ndarray, rng: Random) -> np.ndarray:
    """The map after a Gaussian."""
    return cv2.GaussianBlur(image, (0, 0), rng.uniform(0.6, 2))


def thickened(image: np.ndarray, rng: Random) -> np.ndarray:
    """Lines of two to five pixels."""
    side = int(rng.integers(2, 6))
    return cv2.dilate(image, np.ones((side, side), np.uint8))


def darker(image: np.ndarray, rng: Random) -> np.ndarray:
    """Less bright by a quarter to two thirds."""
    return (image * rng.uniform(0.33, 0.75)).astype(np.uint8)


def steps(image: np.ndarray, rng: Random) -> np.ndarray:
    """Only every 8th to 24th level."""
    step = int(rng.choice([8, 12, 16, 24]))
    return image // step * np.uint8(step)


def with_holes(image: np.ndarray, rng: Random) -> np.ndarray:
    """A map with 2 to 15 % of black specks, one to a few pixels wide, as sensors leave them."""
    noise = cv2.GaussianBlur(rng.standard_normal(image.shape[:2]), (0, 0), rng.uniform(0.3, 1.2))
    holes = noise < np.quantile(noise, rng.uniform(0.02, 0.15))
    return np.where(holes[..., None], np.uint8(0), image)


def in_colours(image: np.ndarray, rng: Random) -> np.ndarray:
    """Depth in one of the usual colour maps."""
    names = ("INFERNO", "MAGMA", "VIRIDIS", "JET", "TURBO", "PLASMA")
    return cv2.applyColorMap(image[..., 0].copy(), getattr(cv2, f"COLORMAP_{rng.choice(names)}"))[..., ::-1]


def on_colour(image: np.ndarray, rng: Random) -> np.ndarray:
    """A pose on white or grey."""
    drawn = image.max(axis=2, keepdims=True) > 0
    return np.where(drawn, image, np.uint8(rng.choice([255, 128, 60])))


def recoloured(image: np.ndarray, rng: Random) -> np.ndarray:
    """A pose in other colours: 3, as in COCO's drawings, or many at random."""
    colours = [(51, 153, 255), (0, 255, 0), (255, 128, 0)]
    if rng.random() < 0.7:
        colours = [tuple(rng.permutation([rng.integers(150, 256), rng.integers(256), 0])) for _ in range(18)]
    codes = image.astype(np.int32) @ np.array([65536, 256, 1])
    made = np.zeros_like(image)
    for i, code in enumerate(np.unique(codes[codes > 0])):
        made[codes == code] = colours[i % len(colours)]
    return made


def edges_by_channel(split: str, rng: Random) -> np.ndarray:
    """Canny of each channel of a colour photograph."""
    while True:
        picture = photograph(split, rng)
        if np.mean(picture[..., 0] != picture[..., 1]) > 0.5:
            edges = [cv2.Canny(np.ascontiguousarray(picture[..., c]), 80, 160) for c in range(3)]
            if np.count_nonzero(edges) > 0.01 * picture.size:
                return cv2.merge(edges)


def almost_empty(split: str, rng: Random) -> np.ndarray:
    """A few stray pixels."""
    width, height = size(rng)
    image = np.zeros((height, width, 3), np.uint8)
    for _ in range(int(rng.integers(0, 4))):
        image[rng.integers(height), rng.integers(width)] = 255
    return image


def constant(split: str, rng: Random) -> np.ndarray:
    """One level everywhere."""
    width, height = size(rng)
    return np.full((height, width, 3), rng.integers(1, 256), np.uint8)


Make = Callable[[str, Random], np.ndarray]


def damaged(make: Make, damage: Callable[[np.ndarray, Random], np.ndarray]) -> Make:
    """What makes a good map and damages it."""
    return lambda split, rng: np.ascontiguousarray(damage(make(split, rng), rng))


def inverted(make: Make) -> Make:
    """What makes the inverse of a map."""
    return damaged(make, lambda image, _: 255 - image)


def swapped(make: Make) -> Make:
    """What makes a map with red and blue exchanged."""
    return damaged(make, lambda image, _: image[..., ::-1])


DAMAGED: list[tuple[str, str, Make, tuple[str, ...]]] = [
    ("canny", "inverted", inverted(canny), ("inverted",)),
    ("canny", "a drawing on white", inverted(scribble), ("inverted",)),
    ("canny", "JPEG 30 to 95", damaged(canny, jpeg), ("jpeg",)),
    ("canny", "resized smoothly", damaged(canny, resized), ("grey",)),
    ("canny", "blurred", damaged(canny, blurred), ("grey",)),
    ("canny", "thickened", damaged(canny, thickened), ("thick", "full")),
    ("canny", "each channel alone", edges_by_channel, ("coloured",)),
    ("canny", "nearly empty", almost_empty, ("empty",)),
    ("canny", "a photograph", photograph, ("photo", "wrong-kind")),
    ("canny", "a depth map", depth, ("wrong-kind",)),
    ("canny", "a pose", openpose, ("wrong-kind",)),
    ("openpose", "BGR", swapped(openpose), ("channels",)),
    ("openpose", "other palette", damaged(openpose, recoloured), ("palette",)),
    ("openpose", "darker", damaged(openpose, darker), ("level",)),
    ("openpose", "inverted", inverted(openpose), ("inverted",)),
    ("openpose", "on white or grey", damaged(openpose, on_colour), ("background",)),
    ("openpose", "JPEG 30 to 95", damaged(openpose, jpeg), ("jpeg",)),
    ("openpose", "resized smoothly", damaged(openpose, resized), ("grey",)),
    ("openpose", "blurred", damaged(openpose, blurred), ("grey",)),
    ("openpose", "style v1.0", lambda split, rng: old_pose(*poses(split, rng)), ("style",)),
    ("openpose", "limbs in full colour", lambda split, rng: full_colour_pose(*poses(split, rng)), ("style",)),
    ("openpose", "a photograph", photograph, ("photo", "wrong-kind")),
    ("openpose", "a canny map", canny, ("wrong-kind",)),
    ("openpose", "a depth map", depth, ("wrong-kind",)),
    ("depth", "inverted", inverted(depth), ("far-white",)),
    ("depth", "metric, far is white", metric_depth, ("far-white",)),
    ("depth", "a colour map", damaged(depth, in_colours), ("colour-map",)),
    ("depth", "every 8th to 24th level", damaged(depth, steps), ("banded",)),
    ("depth", "black specks of a sensor", damaged(depth, with_holes), ("holes",)),
    ("depth", "constant", constant, ("constant",)),
    ("depth", "a photograph", photograph, ("photo", "wrong-kind")),
    ("depth", "a canny map", canny, ("wrong-kind",)),
    ("depth", "a pose", openpose, ("wrong-kind",)),
    ("softedge", "inverted", inverted(softedge), ("inverted",)),
    ("softedge", "a photograph", photograph, ("photo", "wrong-kind")),
    ("scribble", "inverted", inverted(scribble), ("inverted",)),
    ("scribble", "a depth map", depth, ("wrong-kind",)),
    ("normal", "BGR", swapped(normal), ("channels",)),
    ("normal", "a photograph", photograph, ("photo", "wrong-kind")),
    ("normal", "a depth map", depth, ("wrong-kind",)),
]
"""Kind, what is wrong with it, what makes it, and the codes that name it rightly."""


def codes_found(kind: str, make: Make, split: str, count: int, *, first: int = 0) -> list[set[str]]:
    """The codes that the lint finds in each of ``count`` maps, drawn with seeds from ``first`` on."""
    found = []
    for number in range(first, first + count):
        image = make(split, np.random.default_rng([len(split), number]))
        found.append({finding.code for finding in lint(image, kind)})
    return found
