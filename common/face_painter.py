"""Paints one synthetic face from back to front: the scene, the body, and the layers of `face_head` and its fellows."""

from __future__ import annotations

import math

import numpy as np

from .face_canvas import Canvas, Draws, Layer, ellipse, mix, noise_1d, noise_2d, rgb, smoothstep
from .face_features import paint_eyes, paint_glasses, paint_mouth, paint_nostrils
from .face_hair import paint_back_hair, paint_front_hair, paint_head_cover
from .face_head import paint_ears, paint_head
from .face_looks import COVERED, LONG, Look

WHITE = rgb(255, 255, 255)
WARM = np.array([1, 0, -1], np.float32).reshape(3, 1, 1)


def paint_face(look: Look, side: int) -> Layer:
    """Paint a face on ``side`` x ``side`` pixels: float ``[3, side, side]``, about [0, 1]."""
    canvas = Canvas.blank(side, look.center, look.scale, look.roll)
    draws = Draws("texture", look.texture_seed)
    _paint_scene(canvas, look, draws)
    if look.style == LONG:
        paint_back_hair(canvas, look, draws)
    _paint_body(canvas, look, draws)
    paint_ears(canvas, look)
    paint_head(canvas, look, draws)
    paint_nostrils(canvas, look)
    paint_mouth(canvas, look)
    paint_eyes(canvas, look)
    paint_front_hair(canvas, look, draws)
    if look.style == COVERED:
        paint_head_cover(canvas, look, draws)
    paint_glasses(canvas, look)
    _grade(canvas, look)
    return canvas.pixels


def _paint_scene(canvas: Canvas, look: Look, draws: Draws) -> None:
    """Paint the background."""
    x, y = canvas.image_x, canvas.image_y
    first, second, third = look.scene_colors
    angle = draws.uniform(-0.8, 0.8)
    ramp = np.clip(0.5 + 0.5 * (y * math.cos(angle) + x * math.sin(angle)), 0, 1)
    canvas.pixels[...] = first + ramp * (second - first) * np.float32(0.7)
    table = draws.table(32, 32)
    if look.scene == 1:  # lights out of focus
        for _ in range(9):
            center, radius = (draws.uniform(-1, 1), draws.uniform(-1, 0.8)), draws.uniform(0.08, 0.3)
            disc = canvas.cover(ellipse(x, y, center, (radius, radius)), 0.03)
            canvas.paint(disc * np.float32(draws.uniform(0.15, 0.55)), mix(third, WHITE, draws.uniform(0, 0.6)))
    elif look.scene == 2:  # a curtain
        folds = noise_1d(draws.table(64), (x + 0.06 * np.sin(y * 2.5)) * 9 + 100)
        canvas.shade(0.62 + 0.55 * folds)
    elif look.scene == 3:  # foliage, or plaster
        bend = 0.8 * noise_2d(table, y * 3 + 5, x * 3 + 5)
        leaves = 0.6 * noise_2d(table, x * 3 + bend, y * 3 - bend) + 0.4 * noise_2d(table, x * 7 + y * 4, y * 7 - x * 4)
        canvas.paint(smoothstep(0.30, 0.70, leaves), third)
        canvas.shade(0.82 + 0.36 * noise_2d(table, x * 9 - y * 8, y * 9 + x * 8))
    elif look.scene == 4:  # bricks
        height = draws.uniform(0.16, 0.3)
        row = np.floor(y / height)
        along = x / (2.2 * height) + 0.5 * (row % 2)
        brick = np.floor(along)
        joint = np.minimum(
            np.abs(along - np.round(along)) * 2.2 * height, np.abs(y / height - np.round(y / height)) * height
        )
        tint = noise_2d(table, row * 3.7 + 50, brick * 5.3 + 50)
        canvas.paint(canvas.cover(0.018 - joint, 0.01), mix(third, first, 0.5))
        canvas.shade(0.72 + 0.36 * tint + 0.14 * noise_2d(table, x * 16, y * 16))
    elif look.scene == 5:  # a horizon with blocks of a town
        tops = 0.1 - 0.75 * noise_1d(draws.table(16), np.floor(x * 4.5 + 20))
        canvas.paint(canvas.cover(tops - y, 0.02) * 0.85, third)
        windows = (np.sin(x * 55) > 0.2) & (np.sin(y * 48) > 0.3) & (y > tops + 0.05)
        canvas.paint(windows * np.float32(0.35), mix(first, WHITE, 0.5))


def _paint_body(canvas: Canvas, look: Look, draws: Draws) -> None:
    """Paint neck, shoulders and what is worn on them."""
    x, y = canvas.x, canvas.y
    lean = x - np.float32(0.06 * look.sin_yaw)
    neck_width = 0.62 * look.width
    flare = 0.5 * np.maximum(y - 0.62, 0) ** 2
    neck = canvas.cover(np.maximum(np.abs(lean) - neck_width - flare, 0.2 - y))
    turned = np.clip(0.82 + 0.25 * look.light[0] * lean / neck_width, 0.4, 1.1)
    under_chin = 1 - 0.45 * smoothstep(0.30, 0.0, y - look.chin + 0.02)
    canvas.paint(neck, look.skin * rgb(255, 240, 235) * (turned * under_chin))

    shoulder = 0.74 + 0.30 * np.abs(lean) ** 1.7 - 0.05 * np.exp(-((lean / 0.5) ** 2))
    neckline = [0.80, 0.90, 0.74, 1.05][look.garment]
    opening = neckline - np.abs(lean) * [0.25, 1.9, 0.05, 2.6][look.garment]
    cloth_edge = np.maximum(shoulder - y, (opening - y) * 0.6)
    color, trim = look.garment_colors
    cloth = np.broadcast_to(color, canvas.pixels.shape).copy()
    if look.garment == 0:
        stripes = smoothstep(-0.2, 0.2, np.sin(y * 38 + 3 * x * x))
        cloth += stripes * np.float32(0.8 if draws.chance(0.5) else 0.0) * (trim - color)
    elif look.garment == 2:
        weave = noise_1d(draws.table(64), x * 42 + 70) * noise_1d(draws.table(64), y * 42 + 70)
        cloth *= 0.7 + 0.9 * weave
    elif look.garment == 3:
        lapel = canvas.cover(np.abs(np.abs(lean) - 0.16 - 0.5 * np.maximum(1.0 - y, 0)) - 0.015)
        cloth += lapel * (trim - color)
    folds = noise_2d(draws.table(32, 32), x * 3 + 5, y * 1.2 + 5)
    cloth *= 0.70 + 0.35 * folds + 0.18 * look.light[0] * np.clip(x, -1, 1)
    canvas.paint(canvas.cover(cloth_edge), cloth)


def _grade(canvas: Canvas, look: Look) -> None:
    """Tint the picture by the colour of the light and darken its corners."""
    warmth = np.float32(look.warmth)
    canvas.pixels[...] *= 1 + warmth * WARM
    corner = canvas.image_x**2 + canvas.image_y**2
    canvas.shade(1.03 - 0.09 * corner)
