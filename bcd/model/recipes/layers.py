"""What a recipe changes in a network: rates by depth, frozen batch norms, dropout before the head."""

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

# In a group of parameters: factor of the learning rate.
SCALE = "scale"


def parameter_groups(
    network: nn.Module, weight_decay: float, layer_decay: float | None
) -> list[dict[str, Any]]:
    """Groups of those parameters that are not frozen, for an optimiser; biases and norms are not decayed.

    With a `layer_decay`, those of each depth have their own factor of the learning rate: 1 in the head, and
    `layer_decay` times as much at each depth before it (Howard and Ruder 2018, arXiv 1801.06146; Clark et al.
    2020, arXiv 2003.10555). The head comes first.
    """
    depths = [list(network.parameters())] if layer_decay is None else _by_depth(network)
    found = []
    for steps, parameters in enumerate(reversed(depths)):
        scale = {} if layer_decay is None else {SCALE: layer_decay**steps}
        trained = [p for p in parameters if p.requires_grad]
        decayed, kept = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
        found.append({"params": decayed, "weight_decay": weight_decay} | scale)
        found.append({"params": kept, "weight_decay": 0.0} | scale)
    return [group for group in found if group["params"]] if layer_decay is not None else found


def _by_depth(network: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters of each child, in order; layers before the first block are one depth, the stem."""
    depths: list[list[nn.Parameter]] = [[]]
    is_stem = True
    for child in network.children():
        parameters = list(child.parameters())
        is_stem = is_stem and not list(child.children())
        if is_stem:
            depths[0] += parameters
        elif parameters:
            depths.append(parameters)
    return [depth for depth in depths if depth]


def freeze_batch_norm(network: nn.Module) -> None:
    """Keep statistics, weights and biases of all batch norms as they are, in place; call it after every
    `train()`, which would let the statistics follow the batches again."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.eval().requires_grad_(False)


def drop_features(head: nn.Module, rate: float) -> None:
    """Apply dropout of this rate to the input of a network's last layer, in training only (Srivastava et al.
    2014, "Dropout: A Simple Way to Prevent Neural Networks from Overfitting"). Tensors keep their names."""
    if rate:
        head.register_forward_pre_hook(partial(_dropped, rate=rate))


def _dropped(head: nn.Module, inputs: tuple[Tensor, ...], rate: float) -> tuple[Tensor, ...]:
    return (functional.dropout(inputs[0], rate, head.training), *inputs[1:])
