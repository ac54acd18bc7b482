"""Early stopping: Prechelt 1998, "Early Stopping - But When?"."""

from collections.abc import Sequence


def is_over(scores: Sequence[float], patience: int) -> bool:
    """Whether none of the last `patience` epochs is better than the best before them, from the scores of all
    epochs so far; never with a patience of 0. A resumed run has the scores of its checkpoint."""
    if not patience or len(scores) <= patience:
        return False
    return max(scores[-patience:]) <= max(scores[:-patience])
