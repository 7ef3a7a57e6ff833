"""Ray casting of a few solid shapes over a floor, with exact depth.

View space: the camera sits at the origin and looks along +z; x points right, y up; lengths are metres.
A ray is `(x, y, 1)`, so the ray parameter of a hit *is* the depth along the view axis.

Only `+ - * /`, `sqrt` and comparisons touch pixel arrays. IEEE 754 rounds each of them correctly, so the
same scene gives the same bytes on every machine (matrix products and `sin` would not: their rounding is the
library's).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Vector = tuple[float, float, float]

SKY = -1
FLOOR = -2


def dot(a: Vector, b: Vector) -> float:
    """a · b."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def add(a: Vector, b: Vector, scale: float = 1.0) -> Vector:
    """a + scale * b."""
    return (a[0] + scale * b[0], a[1] + scale * b[1], a[2] + scale * b[2])


def unit(a: Vector) -> Vector:
    """a / |a|."""
    length = float(np.sqrt(dot(a, a)))
    return (a[0] / length, a[1] / length, a[2] / length)


@dataclass(frozen=True)
class Rays:
    """Directions (x, y, 1) of a block of pixels; x and y have the block's shape H×W."""

    x: Array
    y: Array

    def dot(self, v: Vector) -> Array:
        """direction · v."""
        return self.x * v[0] + self.y * v[1] + v[2]

    def squared(self) -> Array:
        """direction · direction."""
        return self.x * self.x + self.y * self.y + 1.0


@dataclass(frozen=True)
class Hits:
    """Depth (H×W, inf where missed) and outward surface normal, unscaled, as three H×W arrays."""

    z: Array
    normal: tuple[Array, Array, Array]


class Shape(Protocol):
    """A solid that knows a sphere around it and where rays from the origin first enter it."""

    def bounds(self) -> tuple[Vector, float]:
        """Centre and radius of a sphere that holds the solid."""

    def hit(self, rays: Rays) -> Hits:
        """Where each ray first enters the solid."""


def _first_root(a: Array, b: Array, c: Array | float) -> Array:
    """Smaller root of a t² - 2 b t + c = 0 for a > 0; inf where there is none or it lies behind the
    camera.
    """
    discriminant = b * b - a * c
    t = (b - np.sqrt(np.maximum(discriminant, 0.0))) / a
    return np.where((discriminant > 0.0) & (t > 0.0), t, np.inf)


def _sphere_root(rays: Rays, centre: Vector, radius: float) -> Array:
    return _first_root(rays.squared(), rays.dot(centre), dot(centre, centre) - radius * radius)


def _points(rays: Rays, z: Array) -> tuple[Array, Array, Array]:
    """Positions on the rays at depth z (0 where z is inf, so that arithmetic stays finite)."""
    z = np.where(np.isfinite(z), z, 0.0)
    return z * rays.x, z * rays.y, z


@dataclass(frozen=True)
class Sphere:
    """A ball."""

    centre: Vector
    radius: float

    def bounds(self) -> tuple[Vector, float]:
        return self.centre, self.radius

    def hit(self, rays: Rays) -> Hits:
        z = _sphere_root(rays, self.centre, self.radius)
        px, py, pz = _points(rays, z)
        return Hits(z, (px - self.centre[0], py - self.centre[1], pz - self.centre[2]))


@dataclass(frozen=True)
class Capsule:
    """All points within `radius` of the segment from `start` to `end`."""

    start: Vector
    end: Vector
    radius: float

    def bounds(self) -> tuple[Vector, float]:
        axis = add(self.end, self.start, -1.0)
        return add(self.start, axis, 0.5), 0.5 * float(np.sqrt(dot(axis, axis))) + self.radius

    def hit(self, rays: Rays) -> Hits:
        axis, start = add(self.end, self.start, -1.0), self.start
        along = rays.dot(axis)
        axis2, axis_start = dot(axis, axis), dot(axis, start)
        a = axis2 * rays.squared() - along * along
        b = axis2 * rays.dot(start) - axis_start * along
        c = axis2 * dot(start, start) - axis_start * axis_start - self.radius * self.radius * axis2
        side = _first_root(np.maximum(a, 1e-12), b, c)
        height = np.where(np.isfinite(side), side, 0.0) * along - axis_start
        z = np.where((height > 0.0) & (height < axis2), side, np.inf)
        for cap in (start, self.end):
            z = np.minimum(z, _sphere_root(rays, cap, self.radius))
        px, py, pz = _points(rays, z)
        s = np.clip((px * axis[0] + py * axis[1] + pz * axis[2] - axis_start) / axis2, 0.0, 1.0)
        return Hits(
            z, (px - start[0] - s * axis[0], py - start[1] - s * axis[1], pz - start[2] - s * axis[2])
        )


@dataclass(frozen=True)
class Box:
    """A cuboid: centre, three orthonormal axes, and the half lengths along them."""

    centre: Vector
    axes: tuple[Vector, Vector, Vector]
    half: Vector

    def bounds(self) -> tuple[Vector, float]:
        return self.centre, float(np.sqrt(dot(self.half, self.half)))

    def hit(self, rays: Rays) -> Hits:
        near = np.full(rays.x.shape, -np.inf)
        far = np.full(rays.x.shape, np.inf)
        normal = [np.zeros(rays.x.shape) for _ in range(3)]
        for axis, half in zip(self.axes, self.half, strict=True):
            slope = rays.dot(axis)
            slope = np.where(np.abs(slope) < 1e-12, 1e-12, slope)
            offset = dot(axis, self.centre)
            enter = np.minimum((offset - half) / slope, (offset + half) / slope)
            leave = np.maximum((offset - half) / slope, (offset + half) / slope)
            newer = enter > near
            sign = np.where(slope > 0.0, -1.0, 1.0)
            for k in range(3):
                normal[k] = np.where(newer, sign * axis[k], normal[k])
            near, far = np.maximum(near, enter), np.minimum(far, leave)
        z = np.where((near < far) & (near > 0.0), near, np.inf)
        return Hits(z, (normal[0], normal[1], normal[2]))


def _column_bounds(base: Vector, axis: Vector, height: float, radius: float) -> tuple[Vector, float]:
    """The sphere around a cylinder, which holds the cone of the same base and height, too."""
    return add(base, axis, 0.5 * height), float(np.sqrt(0.25 * height * height + radius * radius))


@dataclass(frozen=True)
class Cylinder:
    """A solid cylinder on `base` along the unit vector `axis`; its underside, on the floor, is never met."""

    base: Vector
    axis: Vector
    height: float
    radius: float

    def bounds(self) -> tuple[Vector, float]:
        return _column_bounds(self.base, self.axis, self.height, self.radius)

    def hit(self, rays: Rays) -> Hits:
        along, base_along = rays.dot(self.axis), dot(self.base, self.axis)
        a = np.maximum(rays.squared() - along * along, 1e-12)
        b = rays.dot(self.base) - along * base_along
        c = dot(self.base, self.base) - base_along * base_along - self.radius * self.radius
        side = _first_root(a, b, c)
        height = np.where(np.isfinite(side), side, 0.0) * along - base_along
        side = np.where((height >= 0.0) & (height <= self.height), side, np.inf)
        top = (base_along + self.height) / np.where(np.abs(along) < 1e-12, 1e-12, along)
        tx, ty, tz = (
            p - q for p, q in zip(_points(rays, top), add(self.base, self.axis, self.height), strict=True)
        )
        inside = tx * tx + ty * ty + tz * tz <= self.radius * self.radius
        top = np.where(inside & (top > 0.0), top, np.inf)
        z = np.minimum(side, top)
        on_top = top < side
        px, py, pz = _points(rays, z)
        s = px * self.axis[0] + py * self.axis[1] + pz * self.axis[2] - base_along
        radial = (p - q - s * u for p, q, u in zip((px, py, pz), self.base, self.axis, strict=True))
        nx, ny, nz = (np.where(on_top, u, r) for r, u in zip(radial, self.axis, strict=True))
        return Hits(z, (nx, ny, nz))


@dataclass(frozen=True)
class Cone:
    """A solid cone on `base` whose tip lies `height` along the unit vector `axis`; its underside, on the
    floor, is never met.
    """

    base: Vector
    axis: Vector
    height: float
    radius: float

    def bounds(self) -> tuple[Vector, float]:
        return _column_bounds(self.base, self.axis, self.height, self.radius)

    def hit(self, rays: Rays) -> Hits:
        tip = add(self.base, self.axis, self.height)
        # cos² of the half angle
        k = self.height * self.height / (self.height * self.height + self.radius * self.radius)
        along, tip_along = rays.dot(self.axis), dot(tip, self.axis)
        a = along * along - k * rays.squared()
        b = along * tip_along - k * rays.dot(tip)
        c = tip_along * tip_along - k * dot(tip, tip)
        root = np.sqrt(np.maximum(b * b - a * c, 0.0))
        a = np.where(np.abs(a) < 1e-12, 1e-12, a)
        z = np.full(rays.x.shape, np.inf)
        for t in ((b - root) / a, (b + root) / a):
            below = tip_along - t * along
            good = (b * b - a * c > 0.0) & (t > 0.0) & (below >= 0.0) & (below <= self.height)
            z = np.where(good & (t < z), t, z)
        px, py, pz = (p - q for p, q in zip(_points(rays, z), tip, strict=True))
        s = px * self.axis[0] + py * self.axis[1] + pz * self.axis[2]
        nx, ny, nz = (k * p - s * u for p, u in zip((px, py, pz), self.axis, strict=True))
        return Hits(z, (nx, ny, nz))


@dataclass(frozen=True)
class Frame:
    """What the rays of an H×W picture met: depth, shape index (or SKY, FLOOR) and unit normal."""

    rays: Rays
    z: Array
    index: NDArray[np.int16]
    normal: tuple[Array, Array, Array] = field(repr=False)

    def points(self) -> tuple[Array, Array, Array]:
        """What the rays met, in view space; the origin where they met the sky."""
        return _points(self.rays, self.z)


def pixel_rays(size: int, focal: float) -> Rays:
    """Rays through the pixel centres of a size×size picture; `focal` is in picture heights."""
    centres = ((np.arange(size, dtype=np.float64) + 0.5) / size - 0.5) / focal
    x = np.broadcast_to(centres, (size, size))
    return Rays(x, -x.T)


def trace(shapes: list[Shape], *, size: int, focal: float, up: Vector, camera_height: float) -> Frame:
    """Meet every ray of a size×size picture with the floor and the shapes, nearest first.

    `up` is the floor's normal in view space and `camera_height` the camera's distance above the floor.
    """
    rays = pixel_rays(size, focal)
    slope = rays.dot(up)
    z = np.where(slope < -1e-9, -camera_height / np.minimum(slope, -1e-9), np.inf)
    index = np.where(np.isfinite(z), FLOOR, SKY).astype(np.int16)
    normal = [np.full((size, size), component) for component in up]
    for number, shape in enumerate(shapes):
        rows, columns = _window(shape, size, focal)
        block = (rows, columns)
        hits = shape.hit(Rays(rays.x[block], rays.y[block]))
        nearer = hits.z < z[block]
        z[block] = np.where(nearer, hits.z, z[block])
        index[block] = np.where(nearer, np.int16(number), index[block])
        nx, ny, nz = hits.normal
        length = np.sqrt(np.maximum(nx * nx + ny * ny + nz * nz, 1e-24))
        for k, component in enumerate((nx, ny, nz)):
            normal[k][block] = np.where(nearer, component / length, normal[k][block])
    return Frame(rays, z, index, (normal[0], normal[1], normal[2]))


def _window(shape: Shape, size: int, focal: float) -> tuple[slice, slice]:
    """Rows and columns that the shape's bounding sphere can touch."""
    (x, y, z), radius = shape.bounds()
    if z <= radius * 1.05:
        return slice(0, size), slice(0, size)
    near = z - radius
    reach = radius / near * (1.0 + (abs(x) + abs(y)) / near)  # a generous bound on the projected radius
    spans = []
    for centre in (-y / z, x / z):
        low = ((centre - reach) * focal + 0.5) * size - 1.0
        high = ((centre + reach) * focal + 0.5) * size + 2.0
        spans.append(slice(int(min(max(low, 0.0), size)), int(min(max(high, 0.0), size))))
    return spans[0], spans[1]
