"""The exponential moving average of a network's weights (EMA): Polyak and Juditsky 1992, "Acceleration of
Stochastic Approximation by Averaging", in the form of Tarvainen and Valpola 2017, arXiv 1703.01780."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def average_of(network: nn.Module, decay: float | None) -> AveragedModel | None:
    """A copy in evaluation mode that follows the network at each call of `update_parameters`: its weights and
    the running statistics of batch norm become share * own + (1 - share) * new, with the share of
    `share_after`; those of the first call are taken over. None without a decay."""
    if decay is None:
        return None

    def update(own: Sequence[Tensor], new: Sequence[Tensor], n_before: Tensor | int) -> None:
        get_ema_multi_avg_fn(share_after(int(n_before), decay))(own, new, n_before)

    return AveragedModel(network, multi_avg_fn=update, use_buffers=True).requires_grad_(False).eval()


def share_after(n_steps: int, decay: float) -> float:
    """The share of an average that stays at the next step: `decay`, but less before (10 decay - 1) /
    (1 - decay) steps, as in TensorFlow's `ExponentialMovingAverage(num_updates)`.

    Without this, the average of a training of 42 steps with a decay of 0.99 would contain two thirds of the
    initial weights.
    """
    return min(decay, (1 + n_steps) / (10 + n_steps))
