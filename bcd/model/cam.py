"""Evidence maps: where in the picture the log-odds come from, in closed form.

For a network that ends in global average pooling and one linear layer, Grad-CAM on the last convolution
equals CAM up to a positive factor (Selvaraju et al., arXiv 1610.02391). So one product over the features
of the forward pass gives the map, without a backward pass. Maps are kept raw and signed: their mean plus
the bias is the log-odds, which makes every row check itself.

Every other method and layer goes through pytorch-grad-cam, which costs a backward pass or many forward ones.
"""

from functools import partial

import torch
from torch import Tensor

from bcd.model.network import ResNet

# Name for `--cam` -> class of pytorch_grad_cam. Signed are gradcam, hirescam, xgradcam and ablationcam.
# gradcam++, layercam and scorecam show only what speaks for the explained class (of two: malignant), and
# eigencam the strongest pattern of the features, whatever it speaks for and with a sign by chance.
METHODS = {
    "gradcam": "GradCAM",
    "gradcam++": "GradCAMPlusPlus",
    "layercam": "LayerCAM",
    "eigencam": "EigenCAM",
    "xgradcam": "XGradCAM",
    "hirescam": "HiResCAM",
    "scorecam": "ScoreCAM",
    "ablationcam": "AblationCAM",
}
# The name of our own method, `evidence`, in `--cam`.
CLOSED_FORM = "evidence"
LAYERS = ("layer1", "layer2", "layer3", "layer4")


def evidence(features: Tensor, weight: Tensor, bias: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
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


def explain(network: ResNet, images: Tensor, method: str, layer: str, predicted: Tensor) -> Tensor:
    """Maps of a batch by a method of pytorch-grad-cam, for the same target as `evidence`.

    Raw: before ReLU, min-max scaling and enlarging. `gradcam` on `layer4` is `evidence` over h * w.

    Args:
        network: from `bcd.model.resnet.build`, in evaluation mode; is left as it was.
        images: (n, 3, height, width), normalised.
        method: one of `METHODS`.
        layer: one of `LAYERS`.
        predicted: (n,) index of the predicted class; used with more than two classes.

    Returns:
        float32 (n, h, w) on the CPU, as large as the features of the layer.
    """
    # Score-CAM holds a masked copy of the picture for every channel: 2 GB for one field.
    size = 1 if method == "scorecam" else len(images)
    parts = zip(images.split(size), predicted.split(size), strict=True)
    return torch.cat([_explain(network, part, method, layer, chosen) for part, chosen in parts])


def _explain(network: ResNet, images: Tensor, method: str, layer: str, predicted: Tensor) -> Tensor:
    # Imported here: it takes seconds.
    import pytorch_grad_cam

    target_layer = network.get_submodule(layer)
    tool = getattr(pytorch_grad_cam, METHODS[method])(network, [target_layer])
    hooks = tool.activations_and_grads
    hooks.detach = False
    try:
        with torch.inference_mode(False), torch.enable_grad():
            # The features need a graph even below frozen weights; autograd goes back to them and no further,
            # and leaves no gradients in the weights.
            images = images.clone().requires_grad_()
            logit = hooks(images)
            features = hooks.activations[0]
            targets = [partial(_score, predicted=index) for index in predicted.tolist()]
            scores = torch.stack([target(row) for target, row in zip(targets, logit, strict=True)])
            (gradient,) = torch.autograd.grad(scores.sum(), features)
            activations, gradients = (t.detach().float().cpu().numpy() for t in (features, gradient))
    finally:
        hooks.release()
    found = tool.get_cam_image(images.detach(), target_layer, targets, activations, gradients, False)
    maps = torch.from_numpy(found).float()
    if method == "ablationcam":
        # It weighs by the lost share of the score; times the score, the sign is that of the evidence.
        maps *= scores.detach().cpu()[:, None, None]
    return maps


def _score(logit: Tensor, predicted: int) -> Tensor:
    """What a map explains, from the logits (classes,) of one image: see `evidence`."""
    return logit[1] - logit[0] if len(logit) == 2 else logit[predicted] - logit.mean()
