"""Evidence maps: where in the picture the log-odds come from, in closed form.

For a network that ends in global average pooling and one linear layer, Grad-CAM on the last convolution
equals CAM up to a positive factor (Selvaraju et al., arXiv 1610.02391). So one product over the features
of the forward pass gives the map, without a backward pass. Maps are kept raw and signed: their mean plus
the bias is the log-odds, which makes every row check itself.
"""

import torch


def evidence(
    features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, predicted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Evidence maps of a batch.

    Two classes: the map of `w_1 - w_0`, so that mean + bias is the log-odds of class 1 (malignant).
    More classes: the map of the predicted class with centred weights, so that mean + bias is its logit
    minus the mean logit.

    Args:
        features: (n, channels, h, w), the output of the last convolution.
        weight: (classes, channels) of the linear layer.
        bias: (classes,) of the linear layer.
        predicted: (n,) index of the predicted class; used with more than two classes.

    Returns:
        maps (n, h, w) in units of log-odds, and biases (n,).
    """
    if len(weight) == 2:
        contrast, offset = (weight[1] - weight[0])[None], (bias[1] - bias[0])[None]
        contrast, offset = contrast.expand(len(features), -1), offset.expand(len(features))
    else:
        contrast = weight[predicted] - weight.mean(0)
        offset = bias[predicted] - bias.mean()
    return torch.einsum("nkhw,nk->nhw", features, contrast), offset
