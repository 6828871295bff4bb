"""How a scene looks in each modality: CT, MRI, X-ray and microscopy phantoms, 96 pixels a side.

The organ is always of middling brightness, so that bright and dark lesions both stand out; bone, air and fluid give
each modality its look. All other variation comes from the scene's texture seed, never from its lesions.
"""

from __future__ import annotations

import numpy as np

from data_prep.sources.canvas import SIDE, blob, box, edge, ellipse, encode_png, paint, ring, smooth_noise
from data_prep.sources.phantom.scene import RADIUS, Lesion, Scene

_PALE, _STAINED = np.float32([1.0, 0.97, 0.93]), np.float32([0.2, 0.05, 0.3])
_PINK, _NUCLEUS = np.float32([0.80, 0.50, 0.66]), np.float32([0.50, 0.26, 0.58])


def render(scene: Scene) -> np.ndarray:
    """f32[S,S] (microscopy f32[S,S,3]) with values in [0,1]; a pure function of the scene."""
    rng = np.random.default_rng(scene.texture)
    image = _DRAWERS[scene.modality, scene.organ](scene, rng)
    return np.clip(image, 0, 1)


def render_png(scene: Scene) -> bytes:
    return encode_png(render(scene))


class _Body:
    """Shapes placed relative to the body: offsets from its centre, scaled with it."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene

    def ellipse(self, x: float, y: float, rx: float, ry: float, angle: float = 0.0, blur: float = 1.0) -> np.ndarray:
        s = self.scene
        return ellipse(s.x + s.scale * x, s.y + s.scale * y, s.scale * rx, s.scale * ry, angle, blur)

    def ring(self, x: float, y: float, rx: float, ry: float, width: float, blur: float = 1.0) -> np.ndarray:
        s = self.scene
        return ring(s.x + s.scale * x, s.y + s.scale * y, s.scale * rx, s.scale * ry, s.scale * width, blur)

    def box(self, x: float, y: float, w: float, h: float, angle: float = 0.0, blur: float = 1.0) -> np.ndarray:
        s = self.scene
        return box(s.x + s.scale * x, s.y + s.scale * y, s.scale * w, s.scale * h, angle, blur)

    def bean(self, x: float, y: float, rx: float, ry: float, angle: float, blur: float = 1.0) -> np.ndarray:
        """A kidney: an ellipse with a notch on the side of the spine."""
        notch = self.ellipse(x - np.sign(x) * rx * 1.05, y, rx * 0.5, ry * 0.22, angle, blur + 1)
        return self.ellipse(x, y, rx, ry, angle, blur) * (1 - notch)


def lesion_coverage(scene: Scene, lesion: Lesion) -> np.ndarray:
    """f32[S,S] in [0,1]. Area hardly depends on the shape, so that it does not reveal the size."""
    radius = RADIUS[scene.size]
    x, y, angle = lesion.x, lesion.y, lesion.angle
    if scene.shape == "oval":
        return ellipse(x, y, radius * 1.3, radius * 0.62, angle, blur=1.5)
    if scene.shape == "irregular":
        return blob(x, y, radius * 0.92, angle, blur=1.5)
    if scene.shape == "ring-shaped":
        return ring(x, y, radius * 1.15, radius * 1.15, radius * 0.48, blur=1.5)
    return ellipse(x, y, radius, radius, blur=1.5)


def _paint_lesions(image: np.ndarray, scene: Scene, dark: float | np.ndarray, bright: float | np.ndarray) -> None:
    image[:] = 0.22 + 0.5 * np.clip(image, 0, 1)  # anatomy keeps to the middle greys; the ends belong to lesions
    for lesion in scene.lesions:
        paint(image, lesion_coverage(scene, lesion), bright if scene.intensity == "bright" else dark)


def _grain(rng: np.random.Generator, spread: float) -> np.ndarray:
    return np.float32(spread) * rng.standard_normal((SIDE, SIDE), np.float32)


def _blank(value: float) -> np.ndarray:
    return np.full((SIDE, SIDE), value, np.float32)


def _slope(top: float, bottom: float) -> np.ndarray:
    return np.linspace(top, bottom, SIDE, dtype=np.float32)[:, None] * np.ones(SIDE, np.float32)


def _brain_ct(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Axial: a thick white skull, grey brain without relief, thin dark ventricles, the head rest below."""
    body, image = _Body(scene), _blank(0.02)
    paint(image, body.ring(0, 0.0, 0.47, 0.485, 0.012) * (_slope(0, 1) > 0.75), 0.35)  # head rest
    paint(image, body.ellipse(0, 0, 0.385, 0.44), 0.5)  # scalp
    paint(image, body.ellipse(0, 0, 0.37, 0.425), 0.98)
    paint(image, body.ellipse(0, 0, 0.315, 0.37, blur=2), 0.47 + 0.018 * smooth_noise(rng, 10))
    paint(image, body.box(0, 0, 0.004, 0.36), 0.6)  # falx
    for side in (-1, 1):
        paint(image, body.ellipse(side * 0.045, -0.06, 0.022, 0.085, side * 0.3, blur=2), 0.22)
        paint(image, body.ellipse(side * 0.045, 0.09, 0.018, 0.06, -side * 0.4, blur=2), 0.22)
    _paint_lesions(image, scene, 0.0, 1.0)
    return image + _grain(rng, 0.03)


def _brain_mr(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Axial: a thin bright scalp, a dark gap of bone, folded cortex around lighter white matter, shading."""
    body, image = _Body(scene), _blank(0.02)
    paint(image, body.ellipse(0, 0, 0.4, 0.45, blur=1.5), 0.85)
    paint(image, body.ellipse(0, 0, 0.375, 0.425), 0.06)
    brain = body.ellipse(0, 0, 0.335, 0.385, blur=1.5)
    paint(image, brain, 0.45)
    folds = edge(np.abs(smooth_noise(rng, 15)) / 20 - 0.006, 2)
    core = body.ellipse(0, 0, 0.255, 0.305, blur=10)
    paint(image, brain * folds * (1 - core), 0.16)
    paint(image, core, 0.58 + 0.02 * smooth_noise(rng, 8))
    paint(image, body.box(0, 0, 0.006, 0.385, blur=1.5) * brain, 0.2)
    for side in (-1, 1):
        paint(image, body.ellipse(side * 0.042, -0.05, 0.026, 0.09, side * 0.28, blur=2), 0.2)
        paint(image, body.ellipse(side * 0.045, 0.1, 0.02, 0.065, -side * 0.4, blur=2), 0.2)
        paint(image, body.ellipse(side * 0.09, 0.0, 0.022, 0.04, side * 0.3, blur=3), 0.48)  # deep grey matter
    _paint_lesions(image, scene, 0.0, 1.0)
    return image * (1 + 0.07 * smooth_noise(rng, 2)) + _grain(rng, 0.018)


def _lung_ct(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Axial: an oval chest on the table, two dark lungs with vessels, heart, white spine and ribs."""
    body, image = _Body(scene), _blank(0.02)
    paint(image, body.ring(0, -0.55, 0.8, 1.03, 0.015) * (_slope(0, 1) > 0.85), 0.4)  # table
    paint(image, body.ellipse(0, 0, 0.465, 0.4), 0.55)
    paint(image, body.ellipse(0, 0, 0.445, 0.38, blur=2), 0.68)
    ribs = np.cos(14 * np.arctan2(*_centred(scene)) + rng.uniform(0, 6)) > 0.55
    paint(image, body.ring(0, 0, 0.42, 0.355, 0.03, blur=1.5) * ribs, 0.95)
    for side in (-1, 1):
        lung = body.ellipse(side * 0.205, 0.0, 0.155, 0.28, side * 0.12, blur=1.5)
        paint(image, lung, 0.36 + 0.02 * smooth_noise(rng, 12))
        for _ in range(9):  # vessels, denser towards the middle
            x, y = side * rng.triangular(0.07, 0.08, 0.34), rng.uniform(-0.22, 0.22)
            paint(image, lung * body.ellipse(x, y, 0.008, 0.008, blur=1.5), 0.55)
    paint(image, body.ellipse(0.03, -0.07, 0.085, 0.12, 0.5, blur=2), 0.78)  # heart
    paint(image, body.ellipse(0.01, 0.15, 0.03, 0.03, blur=1.5), 0.8)  # aorta
    paint(image, body.ellipse(0, 0.27, 0.06, 0.055), 0.97)
    paint(image, body.box(0, 0.34, 0.014, 0.04), 0.97)
    paint(image, body.ellipse(0, 0.285, 0.02, 0.018), 0.5)  # spinal canal
    _paint_lesions(image, scene, 0.02, 0.97)
    return image + _grain(rng, 0.03)


def _centred(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    at = (np.arange(SIDE, dtype=np.float32) + 0.5) / SIDE
    return (at - scene.y)[:, None] + 0 * at, (at - scene.x)[None, :] + 0 * at[:, None]


def _lung_xray(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Frontal: soft grey torso over the whole frame, lungs crossed by ribs, heart, diaphragm, collarbones."""
    body, image = _Body(scene), _blank(0.05)
    paint(image, body.box(0, 0.16, 0.46, 0.6, blur=6), _slope(0.62, 0.72))
    paint(image, body.ellipse(0, -0.3, 0.43, 0.16, blur=6), 0.6)  # shoulders
    paint(image, body.box(0, -0.46, 0.1, 0.12, blur=6), 0.6)  # neck
    lungs = np.zeros_like(image)
    for side in (-1, 1):
        lungs = np.maximum(lungs, body.ellipse(side * 0.205, 0.0, 0.165, 0.325, side * 0.1, blur=5))
    lungs *= 1 - body.ellipse(-0.22, 0.44, 0.26, 0.17, blur=3) - body.ellipse(0.22, 0.46, 0.26, 0.17, blur=3)
    lungs = np.clip(lungs, 0, 1)
    paint(image, lungs, 0.36 + 0.02 * smooth_noise(rng, 6))
    paint(image, body.box(0, -0.05, 0.05, 0.5, blur=5), 0.78)  # spine and mediastinum
    paint(image, body.ellipse(0.06, 0.15, 0.115, 0.14, 0.5, blur=5), 0.82)  # heart
    _paint_lesions(image, scene, 0.03, 0.98)
    down, across = _centred(scene)
    ribs = np.sin(2 * np.pi * (down - 1.1 * np.abs(across) ** 1.5 * 1.3) / 0.115 + rng.uniform(0, 6))
    image += 0.045 * lungs * np.clip(2.5 * ribs, -0.4, 1)
    for side in (-1, 1):
        paint(image, 0.6 * body.box(side * 0.2, -0.315, 0.2, 0.013, -side * 0.2, blur=2), 0.9)
    return image + _grain(rng, 0.018)


def _kidney_mr(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Coronal: two grey kidneys in bright fat beside a banded spine, shading over a dark frame."""
    body, image = _Body(scene), _blank(0.03)
    paint(image, body.box(0, 0, 0.43, 0.6, blur=5), 0.7)  # fat under the skin
    paint(image, body.box(0, 0, 0.4, 0.6, blur=3), 0.3 + 0.03 * smooth_noise(rng, 8))
    for side in (-1, 1):
        tilt = side * rng.uniform(0.05, 0.15)
        paint(image, body.bean(side * 0.215, 0, 0.155, 0.29, tilt, blur=3), 0.85)
        paint(image, body.bean(side * 0.215, 0, 0.135, 0.265, tilt, blur=1.5), 0.52)
        for angle in np.linspace(0, 2 * np.pi, 8, endpoint=False):  # pyramids
            x, y = side * 0.215 + 0.075 * np.cos(angle), 0.16 * np.sin(angle)
            paint(image, body.ellipse(x, y, 0.022, 0.032, blur=3), 0.44)
        paint(image, 0.8 * body.ellipse(side * 0.075, 0.02, 0.03, 0.02, -side * 0.5, blur=2), 0.8)
        paint(image, body.box(side * 0.075, 0.3, 0.03, 0.3, -side * 0.12, blur=3), 0.22)  # psoas
    for level in np.arange(-0.55, 0.56, 0.14):
        paint(image, body.box(0, level, 0.045, 0.05, blur=2), 0.6)
        paint(image, body.box(0, level + 0.07, 0.042, 0.014, blur=1.5), 0.12)
    _paint_lesions(image, scene, 0.04, 0.99)
    return image * (1 + 0.07 * smooth_noise(rng, 2)) + _grain(rng, 0.018)


def _kidney_xray(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Frontal abdomen: the grey frame of a radiograph, white vertebrae, last ribs, pelvis, soft shadows of kidneys."""
    body, image = _Body(scene), _blank(0.08)
    paint(image, body.box(0, 0, 0.47, 0.62, blur=8), _slope(0.42, 0.36) + 0.03 * smooth_noise(rng, 4))
    for side in (-1, 1):
        for level in (-0.42, -0.33):
            paint(image, 0.45 * body.ring(side * 0.05, level + 0.2, 0.4, 0.24, 0.025, 2) * (_slope(0, 1) < 0.3), 0.8)
        paint(image, body.bean(side * 0.21, 0, 0.145, 0.275, side * rng.uniform(0.08, 0.18), blur=4), 0.53)
        paint(image, 0.75 * body.ellipse(side * 0.3, 0.47, 0.2, 0.13, side * 0.6, blur=2), 0.82)  # pelvis
    for level in np.arange(-0.55, 0.5, 0.125):
        paint(image, body.box(0, level, 0.05, 0.046, blur=2), 0.84)
        paint(image, 0.7 * body.box(0, level + 0.01, 0.085, 0.012, blur=2), 0.8)
        paint(image, 0.5 * body.ellipse(0, level, 0.012, 0.018, blur=2), 0.6)
    _paint_lesions(image, scene, 0.04, 0.98)
    return image + _grain(rng, 0.018)


def _tissue_microscopy(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A stained section through the microscope's round field: pink stroma, violet nuclei."""
    weave = 0.5 * smooth_noise(rng, 6) + 0.35 * np.sin(9 * smooth_noise(rng, 3))
    image = _PINK + 0.045 * weave[..., None] * np.float32([0.6, 1.2, 0.8])
    nuclei = _blank(0)
    for x, y, angle in rng.random((70, 3)):
        np.maximum(nuclei, ellipse(x, y, 0.017, 0.012, np.pi * angle, blur=1.5), out=nuclei)
    paint(image, 0.85 * nuclei, _NUCLEUS)
    _paint_lesions(image, scene, _STAINED, _PALE)
    image += _grain(rng, 0.015)[..., None]
    paint(image, 1 - ellipse(0.5, 0.5, 0.49, 0.49, blur=2), np.float32([0.03, 0.03, 0.04]))
    return image


_DRAWERS = {
    ("CT", "brain"): _brain_ct,
    ("MRI", "brain"): _brain_mr,
    ("CT", "lung"): _lung_ct,
    ("X-ray", "lung"): _lung_xray,
    ("MRI", "kidney"): _kidney_mr,
    ("X-ray", "kidney"): _kidney_xray,
    ("microscopy", "tissue"): _tissue_microscopy,
}
