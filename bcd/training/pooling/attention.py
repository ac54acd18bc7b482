"""Gated attention over the tiles of a slide: which of them count is learned from the labels of slides alone.

Ilse, Tomczak, Welling 2018, "Attention-based Deep Multiple Instance Learning", arXiv 1802.04712, equation 9.
"""

import copy
import logging
import math
import time
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from bcd import schema
from bcd.errors import BundleError, DivergedError
from bcd.model import weights
from bcd.taxonomy import TRAIN, TUMOR_CLASSES, VALIDATION
from bcd.training.pooling.bags import Bags
from bcd.training.pooling.model import Fitted

logger = logging.getLogger(__name__)

# Width of the reduced embeddings, and of the attention; share of reduced features that a step leaves out.
HIDDEN, GATE, DROPOUT = 512, 64, 0.25
# Share of a slide's tiles that a step sees: others each time, so that no slide is learned by heart.
SEEN = 0.5
WEIGHT_DECAY = 1e-2
# Slides per optimiser step.
BATCH = 4
# Between two lines of the log.
PROGRESS_S = 30


class GatedAttention(nn.Module):
    """Logits of a slide from the embeddings of its tiles."""

    mean: Tensor
    spread: Tensor
    between: Tensor

    def __init__(self, embedding: int) -> None:
        super().__init__()
        # Of each feature over the training tiles: features differ in size by orders of magnitude.
        self.register_buffer("mean", torch.zeros(embedding))
        self.register_buffer("spread", torch.ones(embedding))
        # Of each feature, the standard deviation between the means of slides; for training only.
        self.register_buffer("between", torch.zeros(embedding), persistent=False)
        self.reduce = nn.Linear(embedding, HIDDEN)
        self.value, self.gate = nn.Linear(HIDDEN, GATE), nn.Linear(HIDDEN, GATE)
        self.score = nn.Linear(GATE, 1)
        self.head = nn.Linear(HIDDEN, len(TUMOR_CLASSES))
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (classes,), and attention (n,) that adds up to 1, of n tiles (n, embedding)."""
        shift = torch.zeros(1)
        if self.training:
            # As if it were stained in another way: no slide is learned by heart from the mean of its tiles.
            shift = self.between * torch.randn(len(self.between))
        features = (tiles.float() + shift - self.mean) / self.spread
        reduced = self.dropout(torch.relu(self.reduce(features)))
        gated = torch.tanh(self.value(reduced)) * torch.sigmoid(self.gate(reduced))
        attention = self.score(gated).squeeze(1).softmax(0)
        return self.head(attention @ reduced), attention


def fit_network(bags: Bags, slides: pa.Table, seed: int, epochs: int, learning_rate: float) -> Fitted:
    """Train on the slides of the training part; the epoch with the least loss on validation is kept.

    Args:
        bags: of the slides of both parts.
        slides: rows of `schema.SPLIT`, one per slide; those of other parts are not read.
        seed: of weights, order, and the tiles that each step sees.
        epochs: passes over the training slides.
        learning_rate: of AdamW.

    Raises:
        DivergedError: the loss is no finite number.
    """
    torch.manual_seed(seed)
    train, validation = (_labelled(slides, part) for part in (TRAIN, VALIDATION))
    network = GatedAttention(bags.embeddings.shape[1])
    network.mean, network.spread, network.between = _statistics(bags, [name for name, _ in train])
    weight = _class_weights([target for _, target in train])
    optimizer = torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=WEIGHT_DECAY)
    best, least, chosen = copy.deepcopy(network.state_dict()), math.inf, 0
    history: list[dict[str, float]] = []
    said = time.monotonic()
    for epoch in range(1, epochs + 1):
        train_loss = _train_epoch(network, optimizer, bags, train, weight)
        validation_loss = _validation_loss(network, bags, validation, weight)
        if not math.isfinite(train_loss + validation_loss):
            raise DivergedError(f"epoch {epoch}: the loss is no finite number; lower --learning-rate")
        history.append({schema.EPOCH: epoch, "train_loss": train_loss, "validation_loss": validation_loss})
        if validation_loss < least:
            best, least, chosen = copy.deepcopy(network.state_dict()), validation_loss, epoch
        if time.monotonic() - said > PROGRESS_S:
            said = time.monotonic()
            logger.info(
                f"epoch {epoch} of {epochs}: loss {train_loss:.3f}, on validation {validation_loss:.3f}"
            )
    return Fitted(save(best), history, chosen)


def _labelled(slides: pa.Table, part: str) -> list[tuple[str, int]]:
    """Name and class of each slide of a part."""
    rows = [row for row in slides.to_pylist() if row[schema.PART] == part]
    return [(row[schema.IMAGE_ID], TUMOR_CLASSES.index(row[schema.TUMOR_CLASS])) for row in rows]


def _statistics(bags: Bags, names: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and standard deviation (1 for a constant one) of each feature over the tiles of these slides, and
    its standard deviation between the means of slides."""
    n, total, squares, means = 0, torch.zeros(1), torch.zeros(1), []
    for name in names:
        tiles = torch.from_numpy(bags[name]).double()
        n, total, squares = n + len(tiles), total + tiles.sum(0), squares + (tiles**2).sum(0)
        means.append(tiles.mean(0))
    mean = total / n
    spread = (squares / n - mean**2).clamp(min=0).sqrt()
    between = torch.stack(means).std(0, correction=0)
    return mean.float(), torch.where(spread > 0, spread, 1.0).float(), between.float()


def _class_weights(targets: Sequence[int]) -> Tensor:
    """Both classes weigh as much, however many slides they have."""
    counts = torch.bincount(torch.tensor(targets), minlength=len(TUMOR_CLASSES))
    return len(targets) / (len(counts) * counts.float())


def _train_epoch(
    network: GatedAttention,
    optimizer: torch.optim.Optimizer,
    bags: Bags,
    slides: Sequence[tuple[str, int]],
    weight: Tensor,
) -> float:
    """Mean loss of one pass in random order."""
    network.train()
    total = 0.0
    for batch in torch.randperm(len(slides)).split(BATCH):
        losses = []
        for name, target in (slides[i] for i in batch.tolist()):
            tiles = torch.from_numpy(bags[name])
            seen = torch.randperm(len(tiles))[: max(1, round(SEEN * len(tiles)))]
            losses.append(_loss(network(tiles[seen])[0], target, weight))
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(batch)
    return total / len(slides)


@torch.inference_mode()
def _validation_loss(
    network: GatedAttention, bags: Bags, slides: Sequence[tuple[str, int]], weight: Tensor
) -> float:
    network.eval()
    losses = [_loss(network(torch.from_numpy(bags[name]))[0], target, weight) for name, target in slides]
    return torch.stack(losses).mean().item()


def _loss(logit: Tensor, target: int, weight: Tensor) -> Tensor:
    """Weighted cross-entropy of one slide."""
    return weight[target] * functional.cross_entropy(logit, torch.tensor(target))


@torch.inference_mode()
def answer_bags(content: bytes, bags: Bags) -> tuple[dict[str, np.ndarray], pa.Table]:
    """Logits (classes,) by slide, and the attention of every tile (`schema.TILE_ATTENTION`).

    Args:
        content: of a file of weights, from `fit_network`.
        bags: of the slides.

    Raises:
        BundleError: these are not the weights of a network for such embeddings.
    """
    network = GatedAttention(bags.embeddings.shape[1])
    try:
        network.load_state_dict(weights.read_weights(content, "the model"))
    except RuntimeError as error:
        raise BundleError(
            f"the model is not one for embeddings of {bags.embeddings.shape[1]}: {error}"
        ) from error
    network.eval()
    logits: dict[str, np.ndarray] = {}
    attention = [np.zeros(0, np.float32)]
    for name, tiles in bags.items():
        logit, weighed = network(torch.from_numpy(tiles))
        logits[name] = logit.numpy()
        attention.append(weighed.numpy())
    column = pa.array(np.concatenate(attention), pa.float32())
    return logits, schema.fill(bags.tiles.append_column(schema.ATTENTION, column), schema.TILE_ATTENTION)
