"""From the probabilities of a slide's tiles to answers for the slide, each with an interval over its tissue.

Both answers are of the `TOP` tiles with the highest probability, since a carcinoma may fill few of a slide's
tiles, which a mean over all of them hides:

- the mean of their probabilities. Not of their log-odds, where one tile that is far too certain decides.
- the noisy-or 1 - (1 - p1)(1 - p2)...: the probability that any of them is malignant, if each were right
  independently of the others. They are not, so it ranks slides and is no probability; over all tiles it would
  be 1 for every large slide.

Intervals resample the tissue in squares, because neighbouring tiles show the same glands: value ± t · s on
the log-odds scale, where s is the root mean square distance of the resamples from the value, times
sqrt(m / (m - 1)), t has m - 1 degrees of freedom, and m squares have any of the top tiles. The highest tiles
of few squares are hard to resample: the intervals are too narrow where tissue resembles itself over more than
half a square (docs/explanation/slide-answers.md has what was measured).
"""

from typing import Any

import numpy as np
from scipy.special import expit

from bcd import schema
from bcd.metrics import aggregate, bootstrap

# As many as the recurrent network of Campanella et al. 2019 (Nature Medicine 25:1301) sees of a slide.
TOP = 10
# Side of the squares that are resampled.
BLOCK_MM = 2.0
# Squares, the best first, in which a resample looks for its top tiles: on average it contains as many of
# them, and with fewer than `TOP` in less than one of 10^8.
DEPTH = 4 * TOP
LIMITS = (schema.TOP_PROBABILITY_LOW, schema.TOP_PROBABILITY_HIGH, schema.NOISY_OR_LOW, schema.NOISY_OR_HIGH)
ANSWERS = (schema.TOP_TILES, schema.TOP_PROBABILITY, schema.NOISY_OR, *LIMITS)


def squares(boxes: np.ndarray, mpp: tuple[float, float]) -> np.ndarray:
    """Number of the square of the slide that the centre of each tile is in, int (n,).

    Args:
        boxes: float (n, 4): x, y, width and height in pixels of level 0.
        mpp: µm per pixel of level 0, across and down.
    """
    place = ((boxes[:, :2] + boxes[:, 2:] / 2) * mpp // (1_000 * BLOCK_MM)).astype(np.int64)
    return place[:, 0] + place[:, 1] * (1 + place[:, 0].max(initial=0))


def top_answers(
    probability: np.ndarray, square: np.ndarray, n_resamples: int = bootstrap.N_RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """`ANSWERS` by column, for float (n,) of all scored tiles and the `squares` (n,) that they are in.

    Without a tile there is no answer (None, of 0 tiles), and no interval where all top tiles are in one
    square: nothing shows how much other tissue would change.
    """
    order = np.argsort(-probability, kind="stable")
    top = min(TOP, len(order))
    answers: dict[str, Any] = dict.fromkeys(ANSWERS) | {schema.TOP_TILES: top}
    if not top:
        return answers
    certain = probability[order].clip(aggregate.CERTAINTY, 1 - aggregate.CERTAINTY).astype(float)
    owner = square[order]
    values = _log_odds(np.ones((1, top)), certain[:top]).ravel()
    answers |= dict(zip((schema.TOP_PROBABILITY, schema.NOISY_OR), expit(values).tolist(), strict=True))
    n_owners = len(np.unique(owner[:top]))
    if n_owners < 2:
        return answers
    resampled = _log_odds(*_resamples(certain, owner, top, n_resamples, seed))
    distance = np.sqrt(((resampled - values[:, None]) ** 2).mean(1) * n_owners / (n_owners - 1))
    reach = bootstrap.quantile(n_owners - 1) * distance
    low, value, high = (expit(values + side * reach).tolist() for side in (-1, 0, 1))
    for i, names in enumerate((LIMITS[:2], LIMITS[2:])):
        # Not where all resamples agree, or round to 1.
        if distance[i] > bootstrap.ROUNDING and low[i] < value[i] < high[i]:
            answers |= dict(zip(names, (low[i], high[i]), strict=True))
    return answers


def _resamples(
    certain: np.ndarray, owner: np.ndarray, top: int, n_resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """How often some tiles are among the `top` of each resample of the squares, int (r, m), and their
    probabilities (m,). The tiles are given in descending order."""
    names, first, number = np.unique(owner, return_index=True, return_inverse=True)
    # A square that is drawn can fill the top with its own best tiles: no others are needed.
    by_square = np.argsort(number, kind="stable")
    starts = np.searchsorted(number[by_square], np.arange(len(names)))
    rank = np.empty(len(number), np.int64)
    rank[by_square] = np.arange(len(number)) - starts[number[by_square]]
    end = np.sort(first)[DEPTH] if len(names) > DEPTH else len(number)
    kept = np.flatnonzero(rank[:end] < top)
    seen, number = np.unique(number[kept], return_inverse=True)
    share = [1 / len(names)] * len(seen) + [1 - len(seen) / len(names)] * (len(seen) < len(names))
    generator = np.random.Generator(np.random.PCG64(seed))
    times = generator.multinomial(len(names), share, n_resamples)[:, number]
    above = np.cumsum(times, 1) - times
    return np.clip(top - above, 0, times), certain[kept]


def _log_odds(taken: np.ndarray, certain: np.ndarray) -> np.ndarray:
    """Log-odds of the mean and of the noisy-or (2, r) of tiles that are taken so often (r, m)."""
    clear = taken @ -np.log1p(-certain) * (taken.sum(1).max() / taken.sum(1))
    return np.stack([np.log(taken @ certain / (taken @ (1 - certain))), np.log(np.expm1(clear))])
