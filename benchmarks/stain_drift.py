"""How often the test of an archive's stain finds drift that was planted, and drift that is not there.

    BCD_REAL_DATA=... python -m benchmarks.stain_drift [--draws 200]

Real: the patients of a data set (of BreaKHis cases; or, to have more, single fields) are divided at random
into training and archive. In the archive none, half or all of the images are stained otherwise, by factors of
haematoxylin and eosin (`bcd.model.recipes.stain.jitter`), before they are fitted into the network's input.
Synthetic: four numbers of each image, with a random effect of each patient.
Prints the share of the draws in which drift was found.
"""

import argparse
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from bcd.imaging import appearance, image
from bcd.metrics.drift import stain as drift
from bcd.model.recipes import stain

# Height and width of the network's input, and what the amounts of haematoxylin and eosin are multiplied by.
SIZE_PX = 224, 336
FACTORS = ((1.3, 0.7), (1.5, 0.5), (2.0, 0.4), (0.6, 1.0), (1.6, 1.6))
SHARES = ("all", "half")
# Of the patients, those in the archive.
ARCHIVE = 0.4


class Design(NamedTuple):
    """Patients of training and archive, mean number of images of each, correlation within patients."""

    training: int
    archive: int
    images: int
    within: float


PATIENTS = ((10, 3), (10, 10), (10, 60), (50, 3), (50, 20), (50, 200))
DESIGNS = [Design(*both, *of) for both in PATIENTS for of in ((1, 0.5), (20, 0.2), (20, 0.8))]
SHIFTS = (0.0, 0.5, 1.0, 2.0)


def restained(pixels: np.ndarray, factors: Sequence[float]) -> np.ndarray:
    """An image, uint8 (h, w, 3), with other amounts of haematoxylin and eosin."""
    given = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float()
    changed = stain.jitter(given, torch.tensor([[*factors, 1.0]]))
    return changed.round().clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0).contiguous().numpy()


def measured(path: Path) -> np.ndarray:
    """The stain of a field (1 + factors, 4): as it is, and with each of `FACTORS`."""
    # Not larger than a field of BreaKHis: a quarter of the time.
    pixels = image.shrink(image.decode(path.read_bytes()), 700, 700)
    made = [pixels, *(restained(pixels, factors) for factors in FACTORS)]
    return np.array([appearance.measure_stain(image.fit(one, *SIZE_PX)) for one in made])


def sets(root: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Owners (n,) and stains (n, 1 + factors, 4) of the fields of each data set."""
    manifest = pd.read_csv(root / "glas/manifest.csv")
    fields = sorted((root / "breakhis").rglob("SOB_*.png"))
    cases = [re.sub(r"\D+$", "", path.name.split("-")[2]) for path in fields]
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, owners, paths in (
        ("GlaS by patient", manifest.patient.to_numpy(object), [root / "glas" / uri for uri in manifest.uri]),
        ("BreaKHis by case", np.array(cases, object), fields),
    ):
        stains = np.stack([measured(path) for path in paths])
        found[name] = owners, stains
        found[f"{name.split()[0]} by field"] = np.arange(len(paths)).astype(str), stains
    return found


def is_found(
    owners: np.ndarray, stains: np.ndarray, which: int, share: str, generator: np.random.Generator
) -> bool:
    """Whether drift is found in one draw of an archive, stained by the factors of this number (0: none)."""
    names = generator.permutation(np.unique(owners))
    in_archive = np.isin(owners, names[: round(ARCHIVE * len(names))])
    changed = in_archive & ((generator.random(len(owners)) < 0.5) | (share == "all"))
    rows = np.where(changed[:, None], stains[:, which], stains[:, 0])
    training = drift.statistics_of(owners[~in_archive].tolist(), rows[~in_archive])
    return bool(drift.measure_drift(owners[in_archive].tolist(), rows[in_archive], training)["is_found"])


def planted(design: Design, shift: float, generator: np.random.Generator) -> bool:
    """Whether a shift, in standard deviations of patients, of half of the images is found in a made study."""

    def study(n_patients: int, moved: float) -> tuple[list[str], np.ndarray]:
        images = 1 + generator.poisson(design.images - 1, n_patients)
        names = np.repeat(np.arange(n_patients).astype(str), images)
        effect = np.repeat(generator.standard_t(5, (n_patients, 4)), images, axis=0)
        own = generator.standard_t(5, effect.shape)
        stained = (generator.random(len(names)) < 0.5)[:, None] * np.array([1, 1, -1, -1]) * moved
        return names.tolist(), np.sqrt(design.within) * effect + np.sqrt(1 - design.within) * own + stained

    training = drift.statistics_of(*study(design.training, 0))
    return bool(drift.measure_drift(*study(design.archive, shift), training)["is_found"])


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=200)
    n_draws = parser.parse_args().draws
    generator = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for name, (owners, stains) in sets(Path(os.environ["BCD_REAL_DATA"])).items():
        for which, factors in enumerate(("none", *FACTORS)):
            for share in SHARES if which else SHARES[:1]:
                n = sum(is_found(owners, stains, which, share, generator) for _ in range(n_draws))
                rows.append({"data": name, "factors": factors, "share": share, "found": n / n_draws})
    real = pd.DataFrame(rows).pivot_table(
        index=["factors", "share"], columns="data", values="found", sort=False
    )
    print(real.to_string(), flush=True)
    made: list[dict[str, float]] = []
    for design, shift in itertools.product(DESIGNS, SHIFTS):
        n = sum(planted(design, shift, generator) for _ in range(n_draws))
        made.append(design._asdict() | {"shift": shift, "found": n / n_draws})
    index = list(Design._fields)
    print(
        pd.DataFrame(made).pivot_table(index=index, columns="shift", values="found", sort=False).to_string()
    )


if __name__ == "__main__":
    main()
