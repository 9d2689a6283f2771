"""The features of a synthetic face: eyes, brows, nostrils, mouth, glasses."""

from __future__ import annotations

import math

import numpy as np

from .face_canvas import Canvas, Field, bump, ellipse, mix, rgb, smoothstep
from .face_head import Placed, head_distance, place
from .face_looks import Look

WHITE = rgb(255, 255, 255)
DARK = rgb(30, 20, 20)


def paint_eyes(canvas: Canvas, look: Look) -> None:
    """Paint eyes, lids, lashes and brows."""
    for side in (-1, 1):
        eye = place(look, side * look.eye_spread, look.eye_y)
        part = canvas.window((eye.x, eye.y - 0.05), 0.26)
        width = look.eye_size * eye.narrowing
        across = (part.x - eye.x) / width
        outward = across * side
        v = (part.y - eye.y) / look.eye_size + look.eye_slant * outward
        _paint_brow(part, look, across, outward, eye, side)
        _paint_eye(part, look, across, v, outward, side)


def _paint_eye(part: Canvas, look: Look, across: Field, v: Field, outward: Field, side: int) -> None:
    to_length = np.float32(look.eye_size)
    arch = np.maximum(1 - across * across, 0)
    upper = -look.eye_open * arch**0.75
    lower = 0.5 * look.eye_open * arch**0.9
    beyond = (np.abs(across) - 1) * 0.6
    opening = np.maximum(np.maximum(upper - v, v - lower), beyond) * to_length
    if look.shadow_makeup:
        lid = bump(across, v, (0.1 * side, -look.eye_open), (0.95, 0.45))
        part.paint(lid * np.float32(0.6 * look.shadow_makeup), mix(look.garment_colors[0], DARK, 0.4))
    crease = np.abs(v - upper * 1.0 + 0.34 - 0.06 * arch) * to_length - 0.004
    part.paint(part.cover(crease, 0.012) * (arch > 0) * np.float32(0.4), look.skin * np.float32(0.45))
    white = rgb(240, 236, 232) * (0.72 + 0.28 * smoothstep(-0.5, 0.25, v))
    eye = part.cover(opening)
    part.paint(eye, white)
    squash = 1 / max(0.6, look.cos_yaw)
    iris_x, iris_y = (across - look.gaze[0]) / squash, v - look.gaze[1] + 0.03
    radius = np.sqrt(iris_x**2 + iris_y**2)
    spokes = 0.85 + 0.25 * np.sin(np.arctan2(iris_y, iris_x) * 17 + side)
    color = look.iris * (spokes * (1.25 - 0.9 * smoothstep(0.30, 0.47, radius)))
    part.paint(eye * part.cover((radius - 0.46) * to_length), color)
    part.paint(eye * part.cover((radius - 0.20) * to_length), DARK * np.float32(0.4))
    glint = np.sqrt((iris_x - 0.16 * math.copysign(1, look.light[0])) ** 2 + (iris_y + 0.17) ** 2)
    part.paint(eye * part.cover((glint - 0.11) * to_length), WHITE)
    thickness = 0.006 + 0.010 * look.lashes
    lashes = np.abs(v - upper + 0.03) * to_length - thickness * (0.55 + 0.45 * np.clip(outward, -1, 1))
    wing = np.maximum(lashes, (np.abs(across) - 1.0 - np.float32(0.16 * look.lashes) * (outward > 0)) * to_length)
    part.paint(part.cover(wing), DARK * np.float32(0.9))
    rim = np.maximum(np.abs(v - lower) * to_length - 0.004, beyond * to_length)
    part.paint(part.cover(rim, 0.006) * 0.55, look.skin * np.float32(0.42))


def _paint_brow(part: Canvas, look: Look, across: Field, outward: Field, eye: Placed, side: int) -> None:
    arc = look.brow_arch * (1 - (outward - 0.25) ** 2)
    middle = eye.y - look.brow_lift - arc + 0.028 * look.brow_slant * outward * 4 * -1
    reach = np.clip((outward + 1.15) / 2.5, 0, 1)
    taper = look.brow_weight * np.sqrt(np.clip(1.15 - reach, 0, 1)) * smoothstep(0.0, 0.10, reach)
    distance = np.maximum(np.abs(part.y - middle) - taper, (np.abs(outward - 0.1) - 1.18) * look.eye_size)
    hairs = 0.86 + 0.14 * np.sin((part.x * side * 1.2 + (part.y - middle) * 1.3) * 150)
    part.paint(part.cover(distance, 0.014) * hairs * np.float32(0.88), look.brow_color)


def paint_nostrils(canvas: Canvas, look: Look) -> None:
    """Paint the nostrils and the shadow under the nose; the nose itself is relief."""
    for side in (-1, 1):
        at = place(look, side * look.nose_width * 0.5, look.nose_y + 0.035, 0.06)
        part = canvas.window((at.x, at.y), 0.12)
        hole = ellipse(part.x, part.y, (at.x, at.y), (0.030 * at.narrowing, 0.015))
        part.paint(part.cover(hole, 0.018) * np.float32(0.75), look.skin * rgb(86, 56, 50))
        wing = place(look, side * look.nose_width * 0.98, look.nose_y + 0.01, 0.04)
        edge = np.abs(ellipse(part.x, part.y, (wing.x - side * 0.03, wing.y), (0.035, 0.036))) - 0.003
        outside = smoothstep(0.0, 0.02, (part.x - wing.x) * side + 0.02)
        part.paint(part.cover(edge, 0.018) * outside * np.float32(0.35), look.skin * np.float32(0.45))


def paint_mouth(canvas: Canvas, look: Look) -> None:
    """Paint lips, teeth and the dark between them."""
    mouth = place(look, 0, look.mouth_y, 0.05)
    part = canvas.window((mouth.x, mouth.y), look.mouth_width + 0.1)
    across = (part.x - mouth.x) / (look.mouth_width * mouth.narrowing)
    arch = np.maximum(1 - across * across, 0)
    line = mouth.y + 0.055 * look.smile * (arch - 0.5)
    gape = 0.062 * look.mouth_open * arch
    upper_edge = line - gape * 0.35
    lower_edge = line + gape * 0.65
    bow = 1 - 0.30 * np.exp(-((across / 0.16) ** 2))
    beyond = (np.abs(across) - 1) * look.mouth_width
    above, below = upper_edge - look.lip_upper * arch * bow, lower_edge + look.lip_lower * arch**1.1
    lips = np.maximum(np.maximum(above - part.y, part.y - below), beyond)
    rounded = (part.y - lower_edge) / look.lip_lower
    gloss = 0.86 + 0.22 * np.exp(-(((rounded - 0.45) / 0.3) ** 2)) - np.float32(0.12) * (part.y < line)
    creases = 1 + 0.06 * np.sin(across * 40)
    part.paint(part.cover(lips, 0.006), look.lip_color * (gloss * creases))
    seam = np.maximum(np.abs(part.y - line) - gape / 2 - 0.0045, beyond)
    part.paint(part.cover(seam, 0.005), look.lip_color * np.float32(0.28))
    if look.mouth_open:
        inside = np.maximum(np.maximum(upper_edge - part.y, part.y - lower_edge), beyond + 0.012)
        teeth = part.y - (upper_edge + gape * 0.72)
        gaps = 1 - 0.16 * smoothstep(0.75, 1.0, np.abs(np.sin(across * 9 + 1.57)))
        enamel = rgb(244, 240, 230) * (gaps * (0.75 + 0.25 * arch))
        part.paint(part.cover(np.maximum(inside, teeth)), enamel)


def paint_glasses(canvas: Canvas, look: Look) -> None:
    """Paint glasses or sunglasses."""
    if not look.glasses:
        return
    radii = [(0.150, 0.125), (0.150, 0.105), (0.165, 0.135)][look.glasses - 1]
    weight = [0.009, 0.015, 0.006][look.glasses - 1]
    frame = np.full_like(canvas.x, 1e3)
    for side in (-1, 1):
        eye = place(look, side * (look.eye_spread + 0.008), look.eye_y + 0.015, 0.06)
        width = radii[0] * eye.narrowing
        if look.glasses == 2:
            u, v = np.abs(canvas.x - eye.x) - width + 0.04, np.abs(canvas.y - eye.y) - radii[1] + 0.04
            lens = np.hypot(np.maximum(u, 0), np.maximum(v, 0)) + np.minimum(np.maximum(u, v), 0) - 0.04
        else:
            lens = ellipse(canvas.x, canvas.y, (eye.x, eye.y), (width, radii[1]))
        inside = canvas.cover(lens)
        if look.sunglasses:
            sheen = 0.5 + 0.5 * smoothstep(0.15, -0.15, canvas.y - eye.y)
            canvas.paint(inside * np.float32(0.93), mix(look.glasses_color, DARK, 0.7) * 0.6 + 0.16 * sheen * WHITE)
        glare = np.abs(canvas.x - eye.x + 0.6 * (canvas.y - eye.y) + 0.03) - 0.022
        canvas.paint(inside * canvas.cover(glare, 0.02) * np.float32(0.22), WHITE)
        frame = np.minimum(frame, np.abs(lens) - weight)
        arm = np.maximum(np.abs(canvas.y - eye.y + 0.03) - weight, -((canvas.x - eye.x) * side - width))
        frame = np.minimum(frame, np.maximum(arm, head_distance(look, canvas.x, canvas.y) - 0.01))
    middle = place(look, 0, look.eye_y, 0.10)
    bridge = np.abs(canvas.y - middle.y + 0.012 + 1.2 * (canvas.x - middle.x) ** 2) - weight
    gap = np.abs(canvas.x - middle.x) - (look.eye_spread + 0.008 - radii[0] + 0.03)
    canvas.paint(canvas.cover(np.minimum(frame, np.maximum(bridge, gap))), look.glasses_color)
