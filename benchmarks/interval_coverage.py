"""How often intervals over patients contain the truth, and how wide they are, in simulated studies.

    python -m benchmarks.interval_coverage [--studies 500] [--of rates auc turned] [--patients 3 10]

A study has some patients (of a class), each with some images. A rate is that of a beta-binomial model with a
known correlation within patients, an AUC that of Gaussian scores with a random effect of each patient, or
(turned) that of patients who are wholly right or wholly look like the other class.
Prints, for each number of patients and method, over all designs: the least and the mean coverage, in how many
it is below 93 and above 98 %, the median width beside that of the bootstrap with Student's t, and the designs
where it exceeds 0.8 (up to 6 patients) or 1.05 of that, beside those of them where the bootstrap itself
contains the truth in 93 %. Where the bootstrap has no interval, its width is 1.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import betaln, expit, logit
from scipy.stats import norm
from scipy.stats import t as student

from bcd.metrics import bootstrap, intervals
from bcd.metrics.intervals import CORRELATIONS

PATIENTS = (2, 3, 4, 6, 10, 20, 60)
UNEQUAL = (2, 100, 10, 50, 1, 30)
WITHIN = (0.0, 0.1, 0.3, 0.5, 0.8)
TRUTHS = (0.6, 0.8, 0.9, 0.97, 0.995)
N_RESAMPLES = 300
TAIL = (1 - bootstrap.LEVEL) / 2


class Design(NamedTuple):
    """Patients (of each class), images of each (0: as in `UNEQUAL`), correlation within patients, truth."""

    n_patients: int
    n_images: int
    within: float
    truth: float

    @property
    def images(self) -> np.ndarray:
        """Number of images of each patient."""
        return np.resize(self.n_images or UNEQUAL, self.n_patients)


Ends = tuple[np.ndarray, np.ndarray]
Method = Callable[[np.ndarray, np.ndarray], Ends]


def counts(design: Design, n_studies: int, generator: np.random.Generator) -> np.ndarray:
    """Images called correctly of each patient, int (n_studies, n_patients)."""
    size = (n_studies, design.n_patients)
    own = np.full(size, design.truth)
    if design.within:
        alike = 1 / design.within - 1
        own = generator.beta(design.truth * alike, (1 - design.truth) * alike, size)
    return generator.binomial(design.images, own)


def log_odds(design: Design, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Scores of the benign and of the malignant images of a study.

    At a correlation of 1 some patients look like the other class: as many of both as lower the AUC so far.
    """
    for sign in (-1, 1):
        if design.within == 1:
            turned = np.where(generator.random(design.n_patients) < 1 - design.truth, -1, 1)
            centre = np.repeat(4 * sign * turned, design.images)
            yield centre + generator.normal(0, 0.5, len(centre))
            continue
        effect = np.repeat(generator.normal(size=design.n_patients), design.images)
        own = generator.normal(size=len(effect))
        centre = sign * norm.ppf(design.truth) / np.sqrt(2)
        yield centre + np.sqrt(design.within) * effect + np.sqrt(1 - design.within) * own


def tallied(design: Design, generator: np.random.Generator) -> bootstrap.Tally:
    """A study of the AUC."""
    benign, malignant = log_odds(design, generator)
    truth = np.arange(2 * len(benign)) >= len(benign)
    patient = np.repeat(np.arange(2 * design.n_patients), np.tile(design.images, 2))
    probability = expit(np.r_[benign, malignant])
    return bootstrap.tally(truth, probability, probability >= 0.5, patient)


# --- methods: images called correctly (s, p) and all images (p,) of the patients of s studies


def by_bootstrap(right: np.ndarray, images: np.ndarray) -> Ends:
    """Student's t on the log-odds scale; 0 to 1 where there is no interval."""
    n, value = len(images), right.sum(1) / images.sum()
    drawn = bootstrap.draws(n, N_RESAMPLES)
    resampled = (drawn @ right.T) / (drawn @ images)[:, None]
    return _students(value, resampled, n - 1, images.sum())


def _students(value: np.ndarray, resampled: np.ndarray, degrees: int, n_images: int) -> Ends:
    edge = np.minimum(0.5 / n_images, np.minimum(value, 1 - value) / 2)
    with np.errstate(all="ignore"):
        spread = np.nanstd(logit(np.clip(resampled, edge, 1 - edge)), axis=0)
        reach = bootstrap.quantile(degrees) * spread
        low, high = expit(logit(value) - reach), expit(logit(value) + reach)
    none = (value <= 0) | (value >= 1) | (spread < bootstrap.ROUNDING) | np.isnan(low)
    return np.where(none, 0, low), np.where(none, 1, high)


def by_percentiles(right: np.ndarray, images: np.ndarray) -> Ends:
    """Percentiles of the bootstrap over patients."""
    drawn = bootstrap.draws(len(images), N_RESAMPLES)
    resampled = (drawn @ right.T) / (drawn @ images)[:, None]
    low, high = np.quantile(resampled, [TAIL, 1 - TAIL], axis=0)
    return low, high


def by_wilson(right: np.ndarray, images: np.ndarray, prior: float = 0.3, weight: float = 2) -> Ends:
    """Wilson's interval of the effective number of images: correlation from the analysis of variance, drawn
    towards `prior` as by so many more patients, and Student's t."""
    n, total = len(images), images.sum()
    value, own = right.sum(1) / total, right / images
    between = (images * (own - value[:, None]) ** 2).sum(1) / (n - 1)
    within = (images * own * (1 - own)).sum(1) / max(total - n, 1)
    typical = (total - (images**2).sum() / total) / (n - 1)
    with np.errstate(all="ignore"):
        found = np.clip((between - within) / (between + (typical - 1) * within), 0, 1)
    found = np.where(np.isnan(found) | (total == n), prior, found)
    r = ((n - 1) * found + weight * prior) / (n - 1 + weight)
    share = (images / total) ** 2
    counting = 1 / (share * (r[:, None] + (1 - r[:, None]) / images)).sum(1)
    z = student.ppf(1 - TAIL, n - 1 + weight)
    centre = (value + z**2 / (2 * counting)) / (1 + z**2 / counting)
    reach = z / (1 + z**2 / counting) * np.sqrt(value * (1 - value) / counting + (z / counting) ** 2 / 4)
    return centre - reach, centre + reach


def by_beta_binomial(right: np.ndarray, images: np.ndarray) -> Ends:
    """Quantiles of the rate in the posterior of the beta-binomial model, with the prior of `intervals`.

    Of the first 100 studies, because it is slow.
    """
    angle = (np.arange(100) + 0.5) / 100 * np.pi / 2
    rate = np.sin(angle) ** 2
    alpha, beta = (p[:, None] * (1 / CORRELATIONS - 1) for p in (rate, 1 - rate))
    found = []
    for own in right[:100]:
        pairs, times = np.unique(np.stack([own, images], axis=1), axis=0, return_counts=True)
        log = sum(
            n * (betaln(alpha + k, beta + total - k) - betaln(alpha, beta))
            for (k, total), n in zip(pairs, times, strict=True)
        )
        mass = np.cumsum(np.exp(log - log.max()).sum(1))
        ends = np.interp([TAIL, 1 - TAIL], mass / mass[-1], rate)
        found.append([0 if own.sum() == 0 else ends[0], 1 if (own == images).all() else ends[1]])
    low, high = np.array(found).T
    return low, high


def by_intervals(right: np.ndarray, images: np.ndarray) -> Ends:
    """`intervals.interval_of_rate`."""
    found = [intervals.interval_of_rate(own, images) for own in right]
    low, high = np.array(found).T
    return low, high


RATES: dict[str, Method] = {
    "bootstrap, Student's t": by_bootstrap,
    "bootstrap, percentiles": by_percentiles,
    "effective Wilson": by_wilson,
    "beta-binomial posterior": by_beta_binomial,
    "intervals": by_intervals,
}


def by_obuchowski(counted: bootstrap.Tally) -> tuple[float, float]:
    """DeLong's variance by patients (Obuchowski 1997) on the log-odds scale, Student's t with Satterthwaite's
    degrees of freedom; 0 to 1 where there is no interval."""
    auc, parts = counted.values()["auc"], []
    for images, (total, _) in zip((counted.benign, counted.malignant), counted.places, strict=True):
        own = (total - auc * images)[images > 0] / images.sum()
        parts.append(len(own) / (len(own) - 1) * (own**2).sum())
    if not 0 < auc < 1 or not sum(parts):
        return 0.0, 1.0
    degrees = sum(parts) ** 2 / sum(part**2 / ((len(counted.benign) // 2) - 1) for part in parts)
    reach = student.ppf(1 - TAIL, degrees) * np.sqrt(sum(parts)) / (auc * (1 - auc))
    return float(expit(logit(auc) - reach)), float(expit(logit(auc) + reach))


def _auc_by_bootstrap(counted: bootstrap.Tally) -> tuple[float, float]:
    n = len(counted.benign)
    resampled = counted.metrics(bootstrap.draws(n, N_RESAMPLES))["auc"]
    if np.isnan(resampled).mean() > bootstrap.MAX_UNDEFINED:
        return 0.0, 1.0
    value = np.array([counted.values()["auc"]])
    pairs = int(counted.benign.sum() * counted.malignant.sum())
    low, high = _students(value, resampled[:, None], n // 2 - 1, pairs)
    return float(low[0]), float(high[0])


def _auc_by_intervals(counted: bootstrap.Tally) -> tuple[float, float]:
    low, high = intervals.interval_of_auc(counted) or (0.0, 1.0)
    return low, high


AUCS: dict[str, Callable[[bootstrap.Tally], tuple[float, float]]] = {
    "bootstrap, Student's t": _auc_by_bootstrap,
    "clustered DeLong": by_obuchowski,
    "intervals": _auc_by_intervals,
}


def designs(of: str, n_patients: int) -> Iterator[Design]:
    """All designs of a number of patients; those of the AUC with fewer images, as each is ranked."""
    many = 200 if of == "rates" else 100 if n_patients <= 6 else 30 if n_patients <= 20 else 10
    within = {"rates": WITHIN, "auc": WITHIN[::2], "turned": (1.0,)}[of]
    for n_images, r, truth in itertools.product(
        sorted({1, 5, 0, 30, many} if of == "rates" else {1, 0, many}), within, TRUTHS
    ):
        yield Design(n_patients, n_images, r, truth)


def tried(of: str, design: Design, n_studies: int, only: str = "", seed: int = 0) -> dict[str, Ends]:
    """The intervals of every method, or one, in the same studies."""
    generator = np.random.Generator(np.random.PCG64(seed))
    if of == "rates":
        right = counts(design, n_studies, generator)
        return {name: RATES[name](right, design.images) for name in ([only] if only else RATES)}
    studies = [tallied(design, generator) for _ in range(n_studies)]
    names = [only] if only else list(AUCS)
    found = {name: np.array([AUCS[name](one) for one in studies]).T for name in names}
    return {name: (low, high) for name, (low, high) in found.items()}


def rows(of: str, n_patients: int, n_studies: int) -> Iterator[dict[str, Any]]:
    """Coverage and median width of each method at each design."""
    for design in designs(of, n_patients):
        found = tried(of, design, n_studies)
        today = np.median(np.subtract(*found["bootstrap, Student's t"][::-1]))
        for name, (low, high) in found.items():
            width = np.median(high - low)
            yield design._asdict() | {
                "method": name,
                "coverage": np.mean((low <= design.truth) & (design.truth <= high)),
                "width": width,
                "ratio": width / today,
                "widest": np.max(high - low),
            }


def table(found: pd.DataFrame) -> pd.DataFrame:
    """Of each number of patients and method: the figures that this module prints."""
    key = ["n_patients", "n_images", "within", "truth"]
    today = found[found["method"] == "bootstrap, Student's t"].set_index(key)["coverage"]
    found = found.join((today >= 0.93).rename("holds"), on=key)
    most = np.where(found["n_patients"] <= 6, 0.8, 1.05)
    found = found.assign(wide=found["ratio"] > most)
    groups = found.groupby(["n_patients", "method"])
    return pd.DataFrame(
        {
            "designs": groups.size(),
            "least": groups["coverage"].min(),
            "mean": groups["coverage"].mean(),
            "below 93 %": groups["coverage"].agg(lambda c: (c < 0.93).sum()),
            "above 98 %": groups["coverage"].agg(lambda c: (c > 0.98).sum()),
            "median width": groups["width"].median(),
            "beside the bootstrap": groups["ratio"].median(),
            "wider": groups["wide"].sum(),
            "of them where it holds": groups.apply(lambda g: (g["wide"] & g["holds"]).sum()),
            "widest": groups["widest"].max(),
        }
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=500)
    parser.add_argument("--of", nargs="+", default=["rates", "auc"], choices=["rates", "auc", "turned"])
    parser.add_argument("--patients", nargs="+", type=int, default=list(PATIENTS))
    parser.add_argument("--keep", help="write the figures of each design to this CSV file")
    options = parser.parse_args()
    every = []
    for of, n_patients in itertools.product(options.of, options.patients):
        found = pd.DataFrame(rows(of, n_patients, options.studies))
        every.append(found.assign(of=of))
        print(
            f"\n{of}, {options.studies:,} studies of each design\n{table(found).round(3).to_string()}",
            flush=True,
        )
        if options.keep:
            pd.concat(every).to_csv(options.keep, index=False)


if __name__ == "__main__":
    main()
