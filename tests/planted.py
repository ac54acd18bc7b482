"""Data sets whose truth is known: what a leak adds to them, and what not."""

from pathlib import Path

import numpy as np

from tests import pictures

N_PATIENTS, N_IMAGES = 24, 24


def tree(root: Path, signal: bool, n_images: int = N_IMAGES, seed: int = 0) -> str:
    """A folder per class and patient; every patient has a pattern of colours of its own.

    Args:
        root: is filled.
        signal: malignant pictures have dark dots, whatever the patient's look. Without, the class is drawn
            for each patient and stands in no picture: only who knows the patient knows it.
        n_images: of each patient.
        seed: of the drawing.
    """
    generator = np.random.default_rng(seed)
    malignant = generator.permutation(N_PATIENTS) < N_PATIENTS // 2
    looks = generator.uniform(60, 240, (N_PATIENTS, 4, 6, 3))
    for patient in range(N_PATIENTS):
        tumor_class = "malignant" if malignant[patient] else "benign"
        folder = root / tumor_class / f"p{patient:02}"
        folder.mkdir(parents=True)
        for number in range(n_images):
            pixels = _picture(generator, looks[patient], dots=signal and bool(malignant[patient]))
            (folder / f"{number}.png").write_bytes(pictures.encode(pixels))
    return str(root)


def _picture(generator: np.random.Generator, look: np.ndarray, dots: bool) -> np.ndarray:
    pixels = (
        look.repeat(12, 0).repeat(12, 1) + generator.normal(0, 12, (48, 72, 1)) + generator.normal(0, 6, 3)
    )
    if dots:
        for y, x in zip(generator.integers(4, 44, 12), generator.integers(4, 68, 12), strict=True):
            pixels[y - 3 : y + 4, x - 3 : x + 4] = generator.integers(10, 50)
    return np.clip(pixels, 0, 255).astype(np.uint8)
