"""The head of a synthetic face: its outline, where a turn moves the points on it, its skin in the light.

The head is an ellipsoid with a height map of bumps (nose, cheeks, brow, lips) lit by one light, and the features are
placed on it in projection, so that turning the head moves and narrows them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .face_canvas import Canvas, Draws, Field, Layer, bump, ellipse, noise_2d, rgb, smoothstep
from .face_looks import Look

BLUSH = np.array([0.08, -0.38, -0.42], np.float32).reshape(3, 1, 1)
FRECKLE = np.array([0.2, 0.42, 0.5], np.float32).reshape(3, 1, 1)


@dataclass(frozen=True)
class Placed:
    """A point of the face as seen: where it lies in the frame of the head and how much narrower the turn makes it."""

    x: float
    y: float
    narrowing: float


def place(look: Look, across: float, down: float, outward: float = 0.0) -> Placed:
    """Project the point at (across, down) of the face, ``outward`` above the ellipsoid, as the head is turned."""
    inside = max(0.08, 1 - (across / 0.52) ** 2 - (down / 0.68) ** 2)
    depth = 0.42 * math.sqrt(inside) + outward
    slope = -0.42 * across / 0.52**2 / math.sqrt(inside)
    cos, sin = look.cos_yaw, look.sin_yaw
    return Placed(
        x=across * cos + depth * sin,
        y=down + depth * math.sin(look.pitch) * 0.5,
        narrowing=min(1.15, max(0.45, cos + slope * sin)),
    )


def head_distance(look: Look, x: Field, y: Field, grow: float = 0.0) -> Field:
    """Return the distance to the outline of the head, made larger by ``grow``."""
    down = np.maximum(y, 0) / np.float32(look.chin + grow)
    height = np.where(y < 0, np.float32(look.crown + grow), np.float32(look.chin + grow))
    t = np.minimum(down, 1)
    width = (look.width + grow) * (1 + look.jaw * t * t + 0.35 * t * t * (1 - t))
    lean = x - np.float32(0.10 * look.sin_yaw) * (t - 0.2)
    u, v = lean / width, y / height
    return (np.sqrt(u * u + v * v) - 1) * np.float32(look.width)


def paint_ears(canvas: Canvas, look: Look) -> None:
    """Paint the ears; the one on the far side of a turned head goes out of sight."""
    for side in (-1, 1):
        center = (side * (look.width - 0.005) - 0.10 * look.sin_yaw, 0.06)
        part = canvas.window(center, 0.2)
        hidden = max(0.0, side * look.sin_yaw) * 0.12
        center = (center[0] - side * hidden, center[1])
        lit = 0.80 + 0.16 * side * look.light[0]
        part.paint(part.cover(ellipse(part.x, part.y, center, (0.065, 0.13))), look.skin * np.float32(lit))
        inner = ellipse(part.x, part.y, (center[0] + side * 0.008, center[1] - 0.01), (0.034, 0.085))
        part.paint(part.cover(inner, 0.03) * 0.5, look.skin * rgb(168, 128, 118))
        if look.earrings:
            ring = ellipse(part.x, part.y, (center[0], center[1] + 0.14), (0.026, 0.026))
            part.paint(part.cover(ring), rgb(240, 206, 110))


def paint_head(canvas: Canvas, look: Look, draws: Draws) -> None:
    """Paint the head itself, lit, with blush, freckles, lines of age and a beard's shadow."""
    x, y = canvas.x, canvas.y
    tip = place(look, 0, look.nose_y, 0.10)
    bridge = place(look, 0, look.eye_y, 0.02)
    relief = _relief(look, x, y, tip, bridge)
    slope_y, slope_x = np.gradient(relief, np.float32(canvas.pixel))
    u, v = x / (look.width * 1.04), y / np.where(y < 0, np.float32(look.crown * 1.04), np.float32(look.chin * 1.04))
    normal_z = np.sqrt(np.maximum(1 - u * u - v * v, 0.04))
    nx, ny = 0.85 * u - slope_x, 0.75 * v - slope_y
    length = np.sqrt(nx * nx + ny * ny + normal_z * normal_z)
    light = [part / math.hypot(*look.light) for part in look.light]
    facing = (nx * light[0] + ny * light[1] + normal_z * light[2]) / length
    shade = look.ambient + (1.06 - look.ambient) * smoothstep(-0.15, 1.0, facing)
    skin = look.skin * np.stack([shade * (1.12 - 0.12 * shade), shade, shade * (0.92 + 0.08 * shade)])  # warm shadows

    rosy = np.zeros_like(x)
    for side in (-1, 1):
        cheek = place(look, side * 0.25, 0.17)
        rosy += bump(x, y, (cheek.x, cheek.y), (0.13 * cheek.narrowing, 0.09))
    rosy += 0.6 * bump(x, y, (tip.x, tip.y), (0.06, 0.05))
    skin *= 1 + rosy * np.float32(0.32 * look.blush) * BLUSH
    table = draws.table(64, 64)
    pores = noise_2d(table, x * 26 + 40, y * 26 + 40) - 0.5
    skin *= 1 + (0.05 + 0.08 * look.age) * pores
    if look.freckles:
        spots = smoothstep(0.68, 0.85, noise_2d(table, x * 44 + 7, y * 44 + 11))
        spots *= bump(x, y, (tip.x, 0.12), (0.36, 0.16))
        skin *= 1 - spots * np.float32(look.freckles) * FRECKLE
    if look.age > 0.45:
        lines = bump(x, y, (bridge.x, -0.24), (0.22, 0.07)) * np.sin(y * 75 + 2 * np.cos(x * 6))
        skin *= 1 - 0.16 * (look.age - 0.3) * np.clip(lines, 0, 1)
    if look.beard or look.moustache:
        _add_beard(look, skin, x, y, draws)
    gloss = np.clip(facing, 0, 1) ** 24 * (1.05 - skin[1]) * np.float32(0.26)
    skin += gloss
    canvas.paint(canvas.cover(head_distance(look, x, y)), skin)


def _relief(look: Look, x: Field, y: Field, tip: Placed, bridge: Placed) -> Field:
    """Return the height of the face above the ellipsoid."""
    t = np.clip((y - bridge.y) / (tip.y - bridge.y), 0, 1)
    ridge_x = bridge.x + (tip.x - bridge.x) * t
    end = smoothstep(0.07, -0.02, y - tip.y) * smoothstep(-0.16, 0.02, y - bridge.y)
    relief = 0.050 * (0.35 + 0.65 * t) * np.exp(-(((x - ridge_x) / (0.045 + 0.025 * t)) ** 2)) * end
    relief += 0.034 * bump(x, y, (tip.x, tip.y - 0.01), (look.nose_width * 0.6, 0.055))
    for side in (-1, 1):
        wing = place(look, side * look.nose_width * 0.75, look.nose_y + 0.01, 0.05)
        relief += 0.022 * bump(x, y, (wing.x, wing.y), (0.032, 0.036))
        socket = place(look, side * look.eye_spread, look.eye_y)
        relief -= 0.032 * bump(x, y, (socket.x, socket.y), (0.13 * socket.narrowing, 0.08))
        cheek = place(look, side * (0.235 + 0.02 * look.smile), 0.16 - 0.03 * look.smile)
        relief += (0.024 + 0.016 * look.smile) * bump(x, y, (cheek.x, cheek.y), (0.13, 0.11))
        fold = place(look, side * (0.16 + 0.03 * look.smile), look.nose_y + 0.10)
        relief -= (0.003 + 0.008 * max(look.smile, 0) + 0.008 * look.age) * bump(x, y, (fold.x, fold.y), (0.032, 0.09))
    mouth = place(look, 0, look.mouth_y, 0.03)
    relief += 0.022 * bump(x, y, (mouth.x, mouth.y), (look.mouth_width * 0.9, 0.09))
    relief -= 0.014 * bump(x, y, (mouth.x, mouth.y + 0.11), (0.09, 0.035))
    chin = place(look, 0, look.chin * 0.88, 0.04)
    return relief + 0.024 * bump(x, y, (chin.x, chin.y), (0.12, 0.08))


def _add_beard(look: Look, skin: Layer, x: Field, y: Field, draws: Draws) -> None:
    """Darken the beard and moustache on ``skin`` in place, hair by hair."""
    mouth = place(look, 0, look.mouth_y, 0.03)
    away = np.abs(x - mouth.x)
    hairs = noise_2d(draws.table(64, 64), x * 64 + 30, y * 22 + 30)
    line = mouth.y - 0.02 - 0.75 * np.maximum(away - 0.17, 0)
    below = smoothstep(-0.04, 0.05, y - line) * smoothstep(
        0.0, 0.08, away + np.maximum(y - mouth.y - 0.075, 0) * 3 - 0.1
    )
    lip = bump(x, y, (mouth.x, (mouth.y + look.nose_y) / 2 + 0.03), (look.mouth_width * 1.1, 0.032))
    amount = np.clip(np.maximum(below * look.beard, lip * look.moustache) * (0.55 + 0.7 * hairs), 0, 0.95)
    skin += amount * (look.brow_color * (0.6 + 0.5 * hairs) - skin)
