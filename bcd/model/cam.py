"""Evidence maps: the contribution of each place to the log-odds, in closed form.

For a network that ends in global average pooling and one linear layer, Grad-CAM on the last convolution
equals CAM up to a positive factor (Selvaraju et al., arXiv 1610.02391). So one product over the features of
the forward pass gives the map, without a backward pass. Maps are raw and signed: their mean plus the bias is
the log-odds, so that every row can be checked by itself.

Other methods and layers use pytorch-grad-cam, which requires a backward pass or many forward passes.
"""

from functools import partial

import torch
from torch import Tensor, nn

# Name for `--cam` -> class of pytorch_grad_cam. Signed are gradcam, hirescam, xgradcam and ablationcam.
# gradcam++, layercam and scorecam show only evidence for the explained class (of two: malignant), eigencam
# the strongest pattern of the features, unrelated to a class and of arbitrary sign.
METHODS = {"gradcam": "GradCAM", "gradcam++": "GradCAMPlusPlus", "layercam": "LayerCAM"}
METHODS |= {"eigencam": "EigenCAM", "xgradcam": "XGradCAM", "hirescam": "HiResCAM"}
METHODS |= {"scorecam": "ScoreCAM", "ablationcam": "AblationCAM"}
LAYERS = ("layer1", "layer2", "layer3", "layer4")


def evidence(features: Tensor, weight: Tensor, bias: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
    """Evidence maps (n, h, w), in log-odds, of features (n, channels, h, w), and their biases (n,).

    Two classes: the map of `w_1 - w_0`, so that mean + bias is the log-odds of class 1 (malignant).
    More classes: the map of the predicted class (n,) with centred weights, so that mean + bias is its logit
    minus the mean logit. `weight` (classes, channels) and `bias` (classes,) are those of the linear layer.
    """
    if len(weight) == 2:
        n = features.shape[0]  # not its length, which is no variable of an exported network
        contrast = (weight[1] - weight[0]).expand(n, -1)
        offset = (bias[1] - bias[0]).expand(n)
    else:
        contrast = weight[predicted] - weight.mean(0)
        offset = bias[predicted] - bias.mean()
    return torch.einsum("nkhw,nk->nhw", features, contrast), offset


def explain(network: nn.Module, images: Tensor, method: str, layer: str, predicted: Tensor) -> Tensor:
    """Maps by a method of pytorch-grad-cam, for the target of `evidence`: float32 (n, h, w) on the CPU.

    Raw: before ReLU, min-max scaling and enlarging. `gradcam` on `layer4` is `evidence` over h * w. The
    images (n, 3, height, width) are normalised, h and w are those of the layer's features, which `spatial` of
    the network, if it has one, lays out, and the network, in evaluation mode, remains unchanged. `predicted`
    (n,) is used with more than two classes.
    """
    # Score-CAM has a masked copy of the image for every channel: 2 GB for one field.
    size = 1 if method == "scorecam" else len(images)
    parts = zip(images.split(size), predicted.split(size), strict=True)
    return torch.cat([_explain(network, part, method, layer, chosen) for part, chosen in parts])


def _explain(network: nn.Module, images: Tensor, method: str, layer: str, predicted: Tensor) -> Tensor:
    # Imported here: it takes seconds.
    import pytorch_grad_cam

    target_layer = network.get_submodule(layer)
    tool = getattr(pytorch_grad_cam, METHODS[method])(network, [target_layer])
    hooks = tool.activations_and_grads
    hooks.detach = False
    try:
        with torch.inference_mode(False), torch.enable_grad():
            # The features need a graph even with frozen weights. Autograd stops at them and leaves no
            # gradients in the weights.
            images = images.clone().requires_grad_()
            logit = hooks(images)
            features = hooks.activations[0]
            targets = [partial(quantity, predicted=index) for index in predicted.tolist()]
            scores = torch.stack([target(row) for target, row in zip(targets, logit, strict=True)])
            (gradient,) = torch.autograd.grad(scores.sum(), features)
            laid_out = getattr(network, "spatial", lambda maps: maps)
            activations, gradients = (
                laid_out(t.detach()).float().cpu().numpy() for t in (features, gradient)
            )
    finally:
        # `release` detaches them in place, which views, as transformers have them, do not permit.
        hooks.activations.clear()
        hooks.gradients.clear()
        hooks.release()
    found = tool.get_cam_image(images.detach(), target_layer, targets, activations, gradients, False)
    maps = torch.from_numpy(found).float()
    if method == "ablationcam":
        # Its weights are relative losses of the score; times the score, the sign is that of the evidence.
        maps *= scores.detach().cpu()[:, None, None]
    return maps


def quantity(logit: Tensor, predicted: int) -> Tensor:
    """What a map explains, from the logits (classes,) of one image: see `evidence`."""
    return logit[1] - logit[0] if len(logit) == 2 else logit[predicted] - logit.mean()
