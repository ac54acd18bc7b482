"""The exponential moving average of a network's weights (EMA): Polyak and Juditsky 1992, "Acceleration of
Stochastic Approximation by Averaging", in the form of Tarvainen and Valpola 2017, arXiv 1703.01780."""

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def average_of(network: nn.Module, decay: float | None) -> AveragedModel | None:
    """A copy in evaluation mode that follows the network at each call of `update_parameters`: its weights and
    the running statistics of batch norm become decay * own + (1 - decay) * new; those of the first call are
    taken over. None without a decay."""
    if decay is None:
        return None
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    return average.requires_grad_(False).eval()
