"""Hair and head covers of the synthetic faces, drawn strand by strand from one-dimensional noise."""

from __future__ import annotations

import math

import numpy as np

from .face_canvas import Canvas, Color, Draws, Field, Layer, ellipse, noise_1d, noise_2d, smoothstep
from .face_head import head_distance
from .face_looks import BALD, COVERED, CURLY, LONG, SHORT, UPDO, Look


def paint_back_hair(canvas: Canvas, look: Look, draws: Draws) -> None:
    """Paint the hair that falls behind the neck."""
    x, y = canvas.x, canvas.y
    ends = look.length
    jagged = ends + 0.08 * noise_1d(draws.table(64), x * 22 + 40)
    canvas.paint(
        canvas.cover(np.maximum(_mane(look, x, y), y - jagged)),
        _strands(look, x, y, draws, falling=True) * np.float32(0.72),
    )


def _mane(look: Look, x: Field, y: Field) -> Field:
    """Return the distance to the outline of long hair: the head's above the eyes, hanging down below them."""
    grow = 0.06 + 0.06 * look.volume
    below = np.maximum(y, 0)
    waves = 0.035 * look.wave * np.sin(y * 13 + np.sign(x) * 1.3) * np.minimum(below * 6, 1)
    hanging = np.abs(x) - (look.width + grow + 0.12 * np.minimum(below, 1) + waves)
    return np.where(y < 0, head_distance(look, x, y, grow), hanging)


def paint_front_hair(canvas: Canvas, look: Look, draws: Draws) -> None:
    """Paint the hair in front of the head, and its shadow on the forehead."""
    x, y = canvas.x, canvas.y
    if look.style == BALD:
        _paint_stubble(canvas, look, draws)
        return
    over_skin = _hairline(look, x, y, draws)
    outer = _outline(look, x, y, draws)
    strands = _curls(look, x, y, draws) if look.style == CURLY else _strands(look, x, y, draws)
    if look.style == UPDO:
        knot = ellipse(x, y, (0.12 * look.part, -look.crown - 0.09), (0.17, 0.14))
        canvas.paint(canvas.cover(knot), _strands(look, x, y + look.crown, draws) * np.float32(0.9))
    inside_head = head_distance(look, x, y)
    beside = np.maximum(-inside_head, y - 0.08)  # next to the head hair goes down to the ears
    canvas.shade(1 - 0.32 * smoothstep(0.11, 0.0, over_skin) * canvas.cover(inside_head) * (over_skin > 0))
    canvas.paint(canvas.cover(np.maximum(outer, np.minimum(over_skin, beside))), strands)
    if look.style == LONG:
        _paint_side_locks(canvas, look, strands)


def _outline(look: Look, x: Field, y: Field, draws: Draws) -> Field:
    """Return the distance to the outer edge of the hair on top of the head."""
    if look.style == LONG:
        return _mane(look, x, y)
    if look.style == CURLY:
        lumps = noise_2d(draws.table(32, 32), x * 9 + 10, y * 9 + 10)
        return head_distance(look, x, y, 0.14 + 0.14 * look.volume) - 0.08 * (lumps - 0.5)
    tufts = 0.03 * (noise_1d(draws.table(64), np.arctan2(x, -y) * 11 + 40) - 0.5)
    height = 0.05 + 0.06 * look.volume + tufts if look.style == SHORT else 0.025
    return head_distance(look, x, y, 0.014) - height * smoothstep(0.16, -0.30, y)  # close to the head at the sides


def paint_head_cover(canvas: Canvas, look: Look, draws: Draws) -> None:
    """Paint a knitted cap or a headscarf."""
    x, y = canvas.x, canvas.y
    color, trim = look.cover_colors
    light = 0.85 - 0.25 * y + 0.22 * look.light[0] * x
    if look.cover_kind == 1:
        opening = ellipse(x - 0.12 * look.sin_yaw, y, (0, 0.10), (look.width * 0.88, look.chin - 0.085))
        hanging = np.abs(x) - look.width - 0.07 - 0.25 * np.clip(y - 0.1, 0, 1)
        outer = np.where(y < 0.1, head_distance(look, x, y, 0.09), hanging)
        radius = np.hypot(x, y - 0.1)
        folds = 0.78 + 0.34 * noise_1d(draws.table(64), radius * 16 + np.arctan2(x, -y) * 1.5 + 20)
        cloth = color * (light * folds)
        canvas.shade(1 - 0.35 * smoothstep(-0.09, 0.0, opening) * (opening < 0))
        canvas.paint(canvas.cover(np.maximum(outer, -opening)), cloth)
        return
    edge = look.hairline + 0.10 + 0.12 * (x / look.width) ** 2
    outer = head_distance(look, x, y, 0.075)
    ribs = 0.80 + 0.25 * np.sin(np.arcsin(np.clip(x / 0.75, -1, 1)) * 62)
    rows = 0.92 + 0.12 * np.sin(y * 90)
    canvas.shade(1 - 0.35 * smoothstep(0.09, 0.0, y - edge) * (y > edge) * canvas.cover(head_distance(look, x, y)))
    canvas.paint(canvas.cover(np.maximum(outer, y - edge)), color * (light * ribs * rows))
    band = np.maximum(np.maximum(outer - 0.015, y - edge), edge - 0.15 - y)
    canvas.paint(canvas.cover(band), trim * (light * ribs))


def _hairline(look: Look, x: Field, y: Field, draws: Draws) -> Field:
    """Return how far below the hairline a point lies; negative is hair."""
    turned = x - np.float32(0.18 * look.sin_yaw)
    side = np.clip(np.abs(turned) / look.width, 0, 1.3)
    ear = {SHORT: 0.10, LONG: 0.30, CURLY: 0.18, UPDO: 0.06, COVERED: 0.16}[look.style]
    top = look.hairline - 0.05 * look.age
    temple = smoothstep(0.62, 1.0, side)
    line = top + (ear - top) * temple * temple
    swept = 0.16 * np.exp(-((np.abs(turned - look.part * 0.25) / 0.05) ** 0.9)) * (look.fringe == 0)
    line = (
        line + 0.07 * (turned / look.width) * math.copysign(1, -look.part) * (1 - temple) - 0.6 * swept * (1 - temple)
    )
    if look.fringe:
        strands = noise_1d(draws.table(64), turned * 19 + 60)
        line = np.maximum(line, (-0.20 + 0.07 * look.fringe + 0.07 * (strands - 0.5)) * (1 - 0.2 * temple))
    else:
        line = line + 0.03 * (noise_1d(draws.table(64), turned * 26 + 60) - 0.5)
    return y - line


def _strands(look: Look, x: Field, y: Field, draws: Draws, falling: bool = False) -> Layer:
    """Return the colours of combed hair: strands run from the parting, or straight down where they are ``falling``."""
    if falling:
        position = x + 0.03 * look.wave * np.sin(y * 13)
        across = position * 34
        along = y
    else:
        origin_x = look.part * 0.3
        dx, dy = x - origin_x, y + look.crown + 0.05
        reach = np.sqrt(dx * dx + dy * dy)
        across = np.arctan2(dx, dy + 0.02) * 17 + 3.0 * look.wave * np.sin(reach * 9)
        along = reach - 0.3
    fine = noise_1d(draws.table(256), across * 2.4 + 300)
    coarse = noise_1d(draws.table(256), across * 0.7 + 300)
    tone = 0.55 + 0.35 * fine + 0.35 * coarse
    ring = np.exp(-(((along - 0.12 + 0.08 * (coarse - 0.5)) / 0.13) ** 2)) * (0.35 + 0.65 * fine)
    return _lit(look, x, y, tone, ring)


def _curls(look: Look, x: Field, y: Field, draws: Draws) -> Layer:
    """Return the colours of curly hair: small coils on lumps."""
    table = draws.table(32, 32)
    coils = np.sin(noise_2d(table, x * 8 + y * 3 + 5, y * 8 - x * 3 + 5) * 42)
    lumps = noise_2d(table, x * 11 + 17, y * 11 + 13)
    return _lit(look, x, y, 0.56 + 0.16 * coils + 0.50 * lumps, np.clip(coils, 0, 1) * lumps * 0.5)


def _lit(look: Look, x: Field, y: Field, tone: Field, gloss: Field) -> Layer:
    light = np.clip(0.92 - 0.30 * y + 0.25 * look.light[0] * x, 0.4, 1.4)
    shine: Color = 0.35 * look.hair + 0.17
    return look.hair * (tone * light) + shine * (gloss * light)


def _paint_side_locks(canvas: Canvas, look: Look, strands: Layer) -> None:
    """Paint the locks that fall in front of the ears and shoulders."""
    x, y = canvas.x, canvas.y
    inner = look.width * (0.90 + 0.10 * np.clip(y, 0, 1)) + 0.02 * look.wave * np.sin(y * 14)
    lock = np.maximum(inner - np.abs(x), _mane(look, x, y))
    lock = np.maximum(lock, np.maximum(-0.15 - y, y - look.length + 0.1))
    canvas.paint(canvas.cover(lock, 0.01), strands)


def _paint_stubble(canvas: Canvas, look: Look, draws: Draws) -> None:
    """Paint a shaved scalp's shadow, none to dense."""
    x, y = canvas.x, canvas.y
    scalp = smoothstep(0.06, -0.05, y - look.hairline - 0.5 * (x / look.width) ** 4 * 0.6)
    density = max(0.0, look.volume * 1.4 - 0.75)
    grain = 0.7 + 0.5 * noise_2d(draws.table(64, 64), x * 50 + 40, y * 50 + 40)
    amount = canvas.cover(head_distance(look, x, y, 0.004)) * scalp * np.float32(density) * grain
    canvas.paint(np.clip(amount, 0, 0.9), look.brow_color)
