"""How often conformal sets of classes contain the truth, in simulated studies of few patients.

    python -m benchmarks.conformal_coverage [--studies 300] [--patients 6 9 12]

Calibration patients, each with some images, whose log-odds towards the true class are Gaussian with a random
effect of each patient (correlation 0 to 0.8 within patients). The set of an image has every class whose
log-odds are at least a cut-off, and always the predicted class; 90 % of the sets should contain the truth.

`epochs` models of equal quality are tried, whose log-odds differ in the share `apart` of their variance; the
one with most images of the calibration patients right is used, as when these also choose the epoch.

Prints, for each number of patients and method, over all designs: the least and the mean coverage of an image
of a new patient, in how many designs it is below 90 % (by more than three standard errors), the coverage that
nine of ten studies exceed in the worst design, and the mean share of images with both classes.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import norm

LEVEL = 0.9
PATIENTS = (6, 9, 12, 20, 40)
IMAGES = (1, 10, 0)  # of each patient; 0: as in `UNEQUAL`
UNEQUAL = (2, 60, 10, 30, 1, 20)
WITHIN = (0.0, 0.1, 0.3, 0.5, 0.8)
TRUTHS = (0.75, 0.9)
# Models tried, and how far they are apart.
CHOICES = ((1, 0.0), (10, 0.1), (10, 0.5))
MOST = 10**7


class Design(NamedTuple):
    """Patients, images of each, correlation within patients, accuracy of the model, models tried."""

    n_patients: int
    n_images: int
    within: float
    truth: float
    epochs: int
    apart: float

    @property
    def images(self) -> np.ndarray:
        """Number of images of each patient."""
        return np.resize(self.n_images or UNEQUAL, self.n_patients)


def log_odds(design: Design, n_studies: int, generator: np.random.Generator) -> np.ndarray:
    """Log-odds towards the true class (n_studies, images), with variance 1, of the model that is chosen."""
    n = int(design.images.sum())
    patient = np.repeat(np.arange(design.n_patients), design.images)

    def varied(*size: int) -> np.ndarray:
        own = generator.normal(size=(*size, n))
        shared = generator.normal(size=(*size, design.n_patients))[..., patient]
        return np.sqrt(design.within) * shared + np.sqrt(1 - design.within) * own

    found = varied(n_studies)
    if design.epochs > 1:
        apart = varied(n_studies, design.epochs)
        every = np.sqrt(1 - design.apart) * found[:, None] + np.sqrt(design.apart) * apart
        right = (every > -norm.ppf(design.truth)).sum(axis=2)
        found = every[np.arange(n_studies), right.argmax(axis=1)]
    return found + norm.ppf(design.truth)


Method = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _quantile(score: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Smallest score at which the weights reach the level, infinite if they do not."""
    order = np.argsort(score, axis=1)
    reached = np.cumsum(weight[order], axis=1) >= LEVEL - 1e-9
    at = np.take_along_axis(order, reached.argmax(axis=1)[:, None], axis=1)
    return np.where(reached[:, -1], np.take_along_axis(score, at, axis=1)[:, 0], np.inf)


def by_images(score: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Split conformal prediction as if all images were independent."""
    n = score.shape[1]
    return _quantile(score, np.full(n, 1 / (n + 1)))


def by_patients(score: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Hierarchical conformal prediction (Lee, Barber and Willett 2023): patients weigh alike, and one more
    than there are."""
    return _quantile(score, np.repeat(1 / ((len(images) + 1) * images), images))


def by_one_image(score: np.ndarray, images: np.ndarray) -> np.ndarray:
    """One image of each patient (Dunn, Wasserman and Ramdas 2022): the first, which is as good as any."""
    first = np.r_[0, np.cumsum(images)[:-1]]
    return _quantile(score[:, first], np.full(len(images), 1 / (len(images) + 1)))


def by_quantiles(score: np.ndarray, images: np.ndarray) -> np.ndarray:
    """The quantile of each patient, and of these the quantile: in 90 % of patients 90 % of images."""
    ends = np.cumsum(images)
    own = [
        np.sort(score[:, end - n : end], axis=1)[:, int(np.ceil(LEVEL * n)) - 1]
        for n, end in zip(images, ends, strict=True)
    ]
    return _quantile(np.stack(own, axis=1), np.full(len(images), 1 / (len(images) + 1)))


METHODS: dict[str, Method] = {
    "images": by_images,
    "patients, weighted": by_patients,
    "one image of each patient": by_one_image,
    "quantile of each patient": by_quantiles,
}


def designs(n_patients: int) -> Iterator[Design]:
    """All designs of a number of patients."""
    for n_images, within, truth, chosen in itertools.product(IMAGES, WITHIN, TRUTHS, CHOICES):
        yield Design(n_patients, n_images, within, truth, *chosen)


def rows(n_patients: int, n_studies: int) -> Iterator[dict[str, float | str]]:
    """Coverage of each method at each design, exact for the cut-off of each study."""
    for design in designs(n_patients):
        generator = np.random.Generator(np.random.PCG64(0))
        at_once = max(1, MOST // (int(design.images.sum()) * design.epochs))
        sizes = [min(at_once, n_studies - start) for start in range(0, n_studies, at_once)]
        found: dict[str, list[np.ndarray]] = {name: [] for name in METHODS}
        for size in sizes:
            score = -log_odds(design, size, generator)
            for name, method in METHODS.items():
                found[name].append(np.maximum(method(score, design.images), 0))
        centre = norm.ppf(design.truth)
        for name, parts in found.items():
            reach = np.concatenate(parts)
            coverage = norm.cdf(reach + centre)
            yield design._asdict() | {
                "method": name,
                "coverage": coverage.mean(),
                "error": coverage.std() / np.sqrt(n_studies),
                "tenth": np.quantile(coverage, 0.1),
                "both": (norm.cdf(reach - centre) - norm.cdf(-reach - centre)).mean(),
            }


def table(found: pd.DataFrame) -> pd.DataFrame:
    """Of each choice of models, number of patients and method: the figures that this module prints."""
    found = found.assign(below=found["coverage"] < LEVEL - 3 * found["error"])
    groups = found.groupby(["epochs", "apart", "n_patients", "method"])
    return pd.DataFrame(
        {
            "designs": groups.size(),
            "least": groups["coverage"].min(),
            "mean": groups["coverage"].mean(),
            "below": groups["below"].sum(),
            "nine of ten": groups["tenth"].min(),
            "both": groups["both"].mean(),
        }
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=300)
    parser.add_argument("--patients", nargs="+", type=int, default=list(PATIENTS))
    parser.add_argument("--keep", help="write the figures of each design to this CSV file")
    options = parser.parse_args()
    found = pd.DataFrame(itertools.chain(*(rows(n, options.studies) for n in options.patients)))
    print(f"{options.studies:,} studies of each design\n{table(found).round(3).to_string()}")
    if options.keep:
        found.to_csv(options.keep, index=False)


if __name__ == "__main__":
    main()
