"""What a synthetic face looks like: every choice about face ``index``, made before anything is drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from .face_canvas import Color, Draws, mix, palette, rgb

CLASS_NAMES = ["bald", "short hair", "long hair", "curly hair", "updo", "head covered"]
BALD, SHORT, LONG, CURLY, UPDO, COVERED = range(len(CLASS_NAMES))
STYLE_WEIGHTS = {"feminine": [0.02, 0.16, 0.42, 0.18, 0.12, 0.10], "masculine": [0.16, 0.50, 0.06, 0.16, 0.02, 0.10]}

SKINS = [
    rgb(255, 226, 206), rgb(247, 208, 182), rgb(236, 188, 156), rgb(222, 168, 130), rgb(200, 144, 104),
    rgb(172, 117, 80), rgb(141, 93, 62), rgb(109, 70, 47), rgb(82, 52, 37),
]  # fmt: skip
DARK_HAIR = [rgb(22, 18, 18), rgb(46, 31, 25), rgb(74, 48, 34)]
FAIR_HAIR = [rgb(104, 62, 38), rgb(150, 92, 52), rgb(196, 148, 88), rgb(226, 190, 128)]
RED_HAIR = [rgb(122, 48, 24), rgb(178, 82, 40)]
GREY_HAIR = [rgb(132, 130, 130), rgb(214, 212, 208)]
DYED_HAIR = [rgb(40, 110, 150), rgb(150, 60, 140), rgb(214, 90, 130)]
DARK_EYES = [rgb(52, 30, 18), rgb(96, 58, 30)]
FAIR_EYES = [rgb(120, 96, 48), rgb(88, 116, 72), rgb(84, 128, 148), rgb(96, 140, 186)]
CLOTHES = [
    rgb(34, 44, 70), rgb(150, 40, 46), rgb(232, 228, 218), rgb(60, 104, 84), rgb(214, 160, 64),
    rgb(62, 62, 66), rgb(108, 150, 186), rgb(190, 120, 140), rgb(96, 72, 120), rgb(120, 92, 68),
]  # fmt: skip
SCENES = [
    rgb(206, 216, 222), rgb(122, 154, 176), rgb(190, 170, 146), rgb(112, 134, 112), rgb(66, 74, 92),
    rgb(214, 190, 184), rgb(150, 120, 110), rgb(230, 222, 204), rgb(88, 104, 124), rgb(170, 188, 160),
]  # fmt: skip


@dataclass(frozen=True)
class Look:
    """The choices for one face. Lengths are in half picture sides, angles in radians, colours in [0, 1]."""

    # pose and frame
    center: tuple[float, float]
    scale: float
    roll: float
    yaw: float
    pitch: float
    # head
    width: float
    crown: float
    chin: float
    jaw: float
    skin: Color
    blush: float
    freckles: float
    age: float
    # eyes and brows
    eye_spread: float
    eye_size: float
    eye_open: float
    eye_slant: float
    gaze: tuple[float, float]
    iris: Color
    shadow_makeup: float
    lashes: float
    brow_lift: float
    brow_arch: float
    brow_slant: float
    brow_weight: float
    # nose and mouth
    nose_width: float
    nose_length: float
    mouth_width: float
    lip_upper: float
    lip_lower: float
    smile: float
    mouth_open: float
    lip_color: Color
    # hair
    style: int
    hair: Color
    volume: float
    hairline: float
    part: float
    fringe: float
    wave: float
    length: float
    beard: float
    moustache: float
    brow_color: Color
    # what is worn
    glasses: int
    glasses_color: Color
    sunglasses: bool
    earrings: bool
    garment: int
    garment_colors: tuple[Color, Color]
    cover_kind: int
    cover_colors: tuple[Color, Color]
    # light and background
    light: tuple[float, float, float]
    ambient: float
    warmth: float
    scene: int
    scene_colors: tuple[Color, Color, Color]
    texture_seed: int

    @cached_property
    def sin_yaw(self) -> float:
        """Sine of the turn to the side."""
        return math.sin(self.yaw)

    @cached_property
    def cos_yaw(self) -> float:
        """Cosine of the turn to the side."""
        return math.cos(self.yaw)

    @cached_property
    def eye_y(self) -> float:
        """Height of the eyes in the frame of the head."""
        return -0.03

    @cached_property
    def mouth_y(self) -> float:
        """Height of the mouth."""
        return self.chin * 0.60

    @cached_property
    def nose_y(self) -> float:
        """Height of the tip of the nose."""
        return self.eye_y + self.nose_length


def draw_look(index: int) -> Look:
    """Return the look of face ``index``: a pure function of it."""
    d = Draws("face", index)
    feminine = d.chance(0.5)
    style = d.choice(STYLE_WEIGHTS["feminine" if feminine else "masculine"])
    tone = d.uniform()
    skin = mix(palette(SKINS, tone), rgb(226, 150, 120), d.uniform(0, 0.16))
    age = d.uniform() ** 2
    natural = _hair_color(d, tone, age)
    hair = palette(DYED_HAIR, d.uniform()) if d.chance(0.05) else natural
    smile = d.uniform(-0.15, 1.0)
    made_up = feminine and d.chance(0.6)
    bare_lips = mix(skin * 0.82, rgb(190, 78, 80), 0.5)
    lipstick = palette([rgb(150, 24, 44), rgb(206, 62, 84), rgb(196, 104, 100), rgb(120, 40, 66)], d.uniform())
    bearded = not feminine and d.chance(0.45)
    sun = d.bell(0.9)
    return Look(
        center=(d.bell(0.10), 0.02 + d.bell(0.07)),
        scale=d.uniform(1.10, 1.36),
        roll=d.bell(0.16),
        yaw=d.bell(0.42),
        pitch=d.bell(0.18),
        width=d.uniform(0.415, 0.465) + (0.0 if feminine else 0.012),
        crown=d.uniform(0.56, 0.62),
        chin=d.uniform(0.57, 0.65),
        jaw=d.uniform(-0.34, -0.16) if feminine else d.uniform(-0.24, -0.02),
        skin=skin,
        blush=d.uniform(0.1, 0.5) + (0.25 if made_up else 0.0),
        freckles=d.uniform(0.3, 0.7) if tone < 0.4 and d.chance(0.25) else 0.0,
        age=age,
        eye_spread=d.uniform(0.185, 0.215),
        eye_size=d.uniform(0.098, 0.122) + (0.008 if feminine else 0.0),
        eye_open=d.uniform(0.40, 0.62) - 0.10 * max(smile, 0.0),
        eye_slant=d.bell(0.14),
        gaze=(d.bell(0.35), d.bell(0.12)),
        iris=palette(FAIR_EYES if tone < 0.5 and d.chance(0.65) else DARK_EYES, d.uniform()),
        shadow_makeup=d.uniform(0.2, 0.7) if made_up else 0.0,
        lashes=d.uniform(0.5, 1.0) if feminine else d.uniform(0.1, 0.4),
        brow_lift=d.uniform(0.105, 0.15),
        brow_arch=d.uniform(0.01, 0.05),
        brow_slant=d.bell(0.16),
        brow_weight=d.uniform(0.014, 0.024) if feminine else d.uniform(0.018, 0.029),
        nose_width=d.uniform(0.070, 0.105) + 0.02 * tone,
        nose_length=d.uniform(0.21, 0.27),
        mouth_width=d.uniform(0.130, 0.165) + 0.035 * max(smile, 0.0),
        lip_upper=d.uniform(0.030, 0.048) + 0.012 * tone,
        lip_lower=d.uniform(0.042, 0.064) + 0.012 * tone,
        smile=smile,
        mouth_open=d.uniform(0.25, 1.0) if smile > 0.35 and d.chance(0.65) else (0.4 if d.chance(0.08) else 0.0),
        lip_color=mix(bare_lips, lipstick, d.uniform(0.5, 0.9)) if made_up else bare_lips,
        style=style,
        hair=hair,
        volume=d.uniform(0.5, 1.0),
        hairline=-d.uniform(0.30, 0.42),
        part=d.uniform(-0.75, 0.75),
        fringe=d.uniform(0.6, 1.0) if d.chance(0.35) else 0.0,
        wave=d.uniform(0.4, 1.0) if d.chance(0.5) else 0.0,
        length=d.uniform(0.55, 1.15),
        beard=d.uniform(0.35, 1.0) if bearded else 0.0,
        moustache=d.uniform(0.5, 1.0) if bearded or (not feminine and d.chance(0.1)) else 0.0,
        brow_color=mix(natural, rgb(40, 28, 22), 0.4 if age < 0.7 else 0.2),
        glasses=1 + d.choice([0.4, 0.4, 0.2]) if d.chance(0.3) else 0,
        glasses_color=palette([rgb(20, 20, 24), rgb(70, 40, 24), rgb(150, 120, 70), rgb(140, 30, 40)], d.uniform()),
        sunglasses=d.chance(0.14),
        earrings=feminine and d.chance(0.45),
        garment=d.choice([0.4, 0.25, 0.2, 0.15]),
        garment_colors=(palette(CLOTHES, d.uniform()), palette(CLOTHES, d.uniform())),
        cover_kind=1 if feminine and d.chance(0.6) else 0,
        cover_colors=(palette(CLOTHES, d.uniform()), palette(CLOTHES, d.uniform())),
        light=(sun, -d.uniform(0.2, 0.6), 1.0),
        ambient=d.uniform(0.50, 0.72),
        warmth=d.bell(0.10),
        scene=d.choice([0.15, 0.2, 0.15, 0.2, 0.15, 0.15]),
        scene_colors=(palette(SCENES, d.uniform()), palette(SCENES, d.uniform()), palette(SCENES, d.uniform())),
        texture_seed=index,
    )


def _hair_color(d: Draws, tone: float, age: float) -> Color:
    if age > 0.7 and d.chance(0.8):
        return palette(GREY_HAIR, d.uniform())
    if tone > 0.5 or d.chance(0.35):
        return palette(DARK_HAIR, d.uniform())
    return palette(RED_HAIR if d.chance(0.15) else FAIR_HAIR, d.uniform())
