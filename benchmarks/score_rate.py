"""Scoring rate: the archive pipeline beside hand-written loops, in one run.

    python -m benchmarks.score_rate --model MODEL --images FOLDER [--n 600] [--rounds 3]

All score the same images with the same weights in bfloat16 (one loop: float32, as named). The plain loop is
what people write without Ray: a DataLoader that decodes (into pinned memory for a GPU), the network of
torchvision with its batch norms, logits and closed-form maps. It takes a turn between any two others, because
the speed of a machine drifts: the figure of a turn is its rate over the mean of the plain ones right before
and after it, the result the median over the rounds. What pytorch-grad-cam takes follows from two of them.

Rates are steady ones: times are those at which batches of rows are finished (in the pipeline: committed),
the first third of them is start-up and does not count. What the maps cost is measured in this process, batch
by batch in turns.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pyarrow as pa
import pytorch_grad_cam
import torch
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from safetensors.torch import load as load_safetensors
from torch.utils.data import DataLoader, Dataset
from torchvision.models import ResNet

from bcd import schema, storage
from bcd.data import archive
from bcd.imaging import image
from bcd.model import bundle, predictor, resnet
from bcd.model.card import Card
from bcd.model.resnet import normalise
from bcd.runtime import cluster, datasets, predict
from bcd.scoring import ledger
from bcd.scoring.score import ROWS_PER_BLOCK

BATCH_SIZE = 32
PRECISION = "bfloat16"
# A turn of pytorch-grad-cam, several times slower, takes this share of the images.
GRADCAM_SHARE = 0.25
MAP_PAIRS_PER_ROUND = 10
PIPELINE, COMPILED = "pipeline", "pipeline, compiled"
GRADCAM, GRADCAM_FAST = "pytorch-grad-cam, float32", f"pytorch-grad-cam, {PRECISION}"


class Pictures(Dataset):
    """A folder's images as a map-style dataset: read, decode, fit."""

    def __init__(self, uris: list[str], card: Card) -> None:
        self.uris, self.size = uris, card.input_size_px

    def __len__(self) -> int:
        return len(self.uris)

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.from_numpy(image.fit(image.decode(storage.read_bytes(self.uris[i])), *self.size))


def steady(finished: Iterable[int]) -> float:
    """Rows per second of an iterator that gives the number of rows of each batch once it is finished."""
    times, rows = zip(*[(time.monotonic(), n) for n in finished], strict=True)
    first = -(-len(rows) // 3)
    return sum(rows[first:]) / (times[-1] - times[first - 1])


class Loop:
    """What hand-written loops share: the network as torchvision builds it, decoding in workers that stay."""

    def __init__(self, model_uri: str, uris: list[str], batch_size: int, memory_format: torch.memory_format):
        self.card = bundle.read_card(model_uri)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.memory_format = memory_format
        self.network = plain_network(model_uri, self.card).to(self.device, memory_format=memory_format)
        workers = max(1, cluster.cores() - 1)
        pictures = Pictures(uris, self.card)
        self.loader = DataLoader(
            pictures,
            batch_size,
            num_workers=workers,
            persistent_workers=True,
            pin_memory=self.device.type == "cuda",
        )

    def batches(self) -> Iterator[torch.Tensor]:
        """Normalised images on the device."""
        for images in self.loader:
            on_device = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
            batch = normalise(on_device, self.card.mean, self.card.std)
            yield batch.contiguous(memory_format=self.memory_format)


def plain_network(model_uri: str, card: Card) -> ResNet:
    """The bundle's network, its batch norms not folded."""
    weights = load_safetensors(storage.read_bytes(storage.join(model_uri, bundle.WEIGHTS)))
    return weights.build(len(card.classes), weights).eval()


class Plain(Loop):
    """Logits, probabilities and closed-form maps, batch by batch."""

    def __init__(self, model_uri: str, uris: list[str]) -> None:
        super().__init__(model_uri, uris, BATCH_SIZE, torch.channels_last)

    def rate(self) -> float:
        """Images per second."""
        return steady(self._scored())

    @torch.inference_mode()
    def _scored(self) -> Iterator[int]:
        results: list[tuple[np.ndarray, ...]] = []
        for batch in self.batches():
            with resnet.autocast(self.device, PRECISION):
                output = resnet.forward(self.network, batch)
            tensors = (predictor.probabilities(output.logit), output.evidence, output.evidence_bias)
            results.append(tuple(tensor.cpu().numpy() for tensor in (output.logit, *tensors)))
            yield len(batch)


class GradCam(Loop):
    """pytorch-grad-cam's own loop on layer4: float32, a image at a time and NCHW, as its README has it.

    Its bfloat16 form is given more: whole batches, channels_last, and a cast without which it fails there.
    """

    def __init__(self, model_uri: str, uris: list[str], precision: str) -> None:
        self.precision = precision
        simple = precision == "float32"
        formats = (torch.contiguous_format, torch.channels_last)
        super().__init__(model_uri, uris, 1 if simple else BATCH_SIZE, formats[not simple])
        cast = None if simple else torch.Tensor.float
        self.cam = pytorch_grad_cam.GradCAM(self.network, [self.network.layer4[-1]], reshape_transform=cast)

    def rate(self) -> float:
        """Images per second."""
        return steady(self._scored())

    def _scored(self) -> Iterator[int]:
        results: list[np.ndarray] = []
        for batch in self.batches():
            targets = [ClassifierOutputTarget(len(self.card.classes) - 1)] * len(batch)
            with resnet.autocast(self.device, self.precision):
                results.append(self.cam(input_tensor=batch, targets=targets))
            yield len(batch)


def pipeline_rate(model_uri: str, rows: pa.Table, compiled: bool, precision: str = PRECISION) -> float:
    """Rows per second of the archive job: read, score, commit, as `bcd.scoring.score` chains them."""
    settings = predict.Settings(
        model_uri, bundle.identify(model_uri), precision=precision, batch_size=BATCH_SIZE, compile=compiled
    )
    with tempfile.TemporaryDirectory() as work_uri:
        commits = predict.score_rows(datasets.row_dataset(rows, ROWS_PER_BLOCK), settings).map_batches(
            ledger.commit,
            fn_kwargs={"work_uri": work_uri},
            # Smaller segments than the job's: more times to take, if anything more work.
            batch_size=ROWS_PER_BLOCK,
            batch_format="pyarrow",
            num_cpus=0,
        )
        segments = commits.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        return steady(sum(segment["rows"].to_pylist()) for segment in segments)


def map_costs(model_uri: str, uris: list[str], pairs: int) -> list[float]:
    """Time with evidence over time without, for pairs of the same forward pass, folded and not compiled.

    With: `Bundle.predict`, whole. Without: normalising, the network as built, and logits to the host.
    """
    ours = predictor.load(model_uri, precision=PRECISION)
    pictures = Pictures(uris, ours.card)
    images = torch.stack([pictures[i % len(pictures)] for i in range(BATCH_SIZE)])

    @torch.inference_mode()
    def without() -> None:
        batch = images.to(ours.device).permute(0, 3, 1, 2)
        batch = normalise(batch, ours.card.mean, ours.card.std)
        with resnet.autocast(ours.device, PRECISION):
            ours.network(batch.contiguous(memory_format=torch.channels_last)).float().cpu()

    def with_maps() -> None:
        ours.predict(images.numpy())

    _seconds(without), _seconds(with_maps)
    found = []
    for number in range(pairs):
        # The second may find the caches warm.
        order = (without, with_maps) if number % 2 else (with_maps, without)
        taken = {function: _seconds(function) for function in order}
        found.append(taken[with_maps] / taken[without])
    return found


def _seconds(function: Callable[[], None]) -> float:
    started = time.monotonic()
    function()
    return time.monotonic() - started


def in_turns(
    plain: Callable[[], float], others: dict[str, Callable[[], float]], rounds: int
) -> list[dict[str, float]]:
    """For each round the rate of each over the mean of the plain turns before and after it."""
    plain()
    before = plain()
    found: list[dict[str, float]] = []
    for number in range(1, rounds + 1):
        found.append({})
        for name, rate in others.items():
            own, after = rate(), plain()
            found[-1][name] = own / statistics.mean([before, after])
            print(
                f"round {number}: plain {before:.2f} before, {after:.2f} after, {name} {own:.2f} images/s: "
                f"ratio {found[-1][name]:.3f}",
                flush=True,
            )
            before = after
    return found


def can_compile() -> bool:
    """Whether torch.compile has what it needs on this device."""
    return torch.cuda.is_available() or shutil.which(os.environ.get("CXX", "g++")) is not None


def print_table(found: list[dict[str, float]], maps: list[float]) -> None:
    """The medians beside their goals, with the spread of the rounds."""
    against_gradcam = [[turn[PIPELINE] / turn[name] for turn in found] for name in (GRADCAM, GRADCAM_FAST)]
    lines: list[tuple[str, list[float], str]] = [
        (f"rate: {PIPELINE} / plain loop", [turn[PIPELINE] for turn in found], ">= 1"),
        (f"rate: {COMPILED} / plain loop", [turn[COMPILED] for turn in found if COMPILED in turn], ">= 1.2"),
        ("time: with evidence / logits only", maps, "<= 1.05"),
        (f"rate: {PIPELINE} / {GRADCAM}", against_gradcam[0], ">= 6"),
        (f"rate: {PIPELINE} / {GRADCAM_FAST}", against_gradcam[1], ""),
    ]
    print(f"\n{'ratio':<48}{'median':>8}{'from':>8}{'to':>8}  goal")
    for name, ratios, goal in lines:
        if not ratios:
            print(f"{name:<48}  not measured: compiling needs g++")
            continue
        numbers = (statistics.median(ratios), min(ratios), max(ratios))
        print(f"{name:<48}" + "".join(f"{number:8.3f}" for number in numbers) + f"  {goal}")


def repeated(images: str, n: int) -> pa.Table:
    """The images below a folder as `n` rows of `schema.READING`, over and over, each with its own id."""
    found = archive.list_inputs(images).table
    table = found.take(pa.array(np.arange(n) % len(found)))
    ids = [f"{i:06d}/{name}" for i, name in enumerate(table[schema.IMAGE_ID].to_pylist())]
    position = table.schema.get_field_index(schema.IMAGE_ID)
    table = table.set_column(position, schema.INDEX.field(schema.IMAGE_ID), [ids])
    return schema.fill(table, schema.READING)


def main() -> None:
    """Measure and print the ratios."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", required=True, help="URI of a bundle")
    parser.add_argument("--images", required=True, help="folder of images, repeated as often as needed")
    parser.add_argument("--n", type=int, default=600, help="images a turn, rounded up to whole blocks")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    uri = storage.absolute(arguments.model)
    # At least two blocks: the first is start-up.
    n = ROWS_PER_BLOCK * max(2, -(-arguments.n // ROWS_PER_BLOCK))
    rows = repeated(arguments.images, n)
    uris = rows[schema.URI].to_pylist()
    few = uris[: BATCH_SIZE * max(2, round(n * GRADCAM_SHARE / BATCH_SIZE))]
    print(f"{n} images a turn, {cluster.cores()} cores, batches of {BATCH_SIZE}, {PRECISION}", flush=True)
    maps = map_costs(uri, uris, MAP_PAIRS_PER_ROUND * arguments.rounds)
    cluster.connect()
    others = {PIPELINE: lambda: pipeline_rate(uri, rows, False)}
    if can_compile():
        others[COMPILED] = lambda: pipeline_rate(uri, rows, True)
    others[GRADCAM] = GradCam(uri, few, "float32").rate
    others[GRADCAM_FAST] = GradCam(uri, few, PRECISION).rate
    print_table(in_turns(Plain(uri, uris).rate, others, arguments.rounds), maps)


if __name__ == "__main__":
    main()
