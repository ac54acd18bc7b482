"""Features of ResNets by OpenVINO, compiled for this machine's CPU.

The operations are given to OpenVINO one by one. Its own way from torch sends statistics to its makers
(`convert_model`), and needs what torch has deprecated (`torch.jit.trace`) or takes five seconds to import
(`torch.export`). What loads a bundle compares the features with torch's.
"""

from collections import deque
from importlib import import_module
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bcd.errors import ConfigError
from bcd.model.engines.choice import OPENVINO, TORCH, missing_package

# OpenVINO's names of precisions. Without one it computes in bfloat16 wherever the CPU can.
PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}


class OpenVinoFeatures:
    """What `resnet.features` is in torch: float32 (n, 3, height, width) to float32 (n, channels, h, w).

    One image at a time, as many at once as there are threads; a single one gets all of them. So an image has
    the same numbers alone and in any batch, in an archive and in the service. Threads are those of torch when
    this is made: as many as the worker reserves, see `cluster.use_threads`.

    Args:
        network: a ResNet on the CPU whose batch norms are folded, or an ensemble of such.
        precision: `float32` or `bfloat16`.

    Raises:
        ConfigError: a package is missing, or OpenVINO has no such precision on this CPU.
    """

    def __init__(self, network: nn.Module, precision: str) -> None:
        self._library, self._operations = _library(), import_module("openvino.opset13")
        self._network, self._precision = network, precision
        self._threads = torch.get_num_threads()
        self._requests: dict[tuple[torch.Size, int], list[Any]] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """The features of a batch, for one thread at a time. The first batch of a size is compiled."""
        requests = self._requests_of(images.shape[2:], 1 if len(images) == 1 else self._threads)
        begun: deque[Any] = deque()
        found = []
        # Without `AsyncInferQueue`: its callbacks take the interpreter's lock in threads of OpenVINO, for
        # which a thread with that lock may wait.
        for request, image in zip(cycle(requests), images.split(1), strict=False):
            if len(begun) == len(requests):
                found.append(_result(begun.popleft()))
            request.start_async({0: image.contiguous().numpy()})
            begun.append(request)
        return torch.from_numpy(np.concatenate([*found, *map(_result, begun)]))

    def _requests_of(self, size: torch.Size, streams: int) -> list[Any]:
        """Of the network compiled for images of this size: so many are computed at once."""
        if (size, streams) not in self._requests:
            settings = {
                "INFERENCE_PRECISION_HINT": PRECISIONS[self._precision],
                "NUM_STREAMS": streams,
                "INFERENCE_NUM_THREADS": self._threads,
                # A CPU that is reserved may be half of a core; and workers would all pin the same ones.
                "ENABLE_HYPER_THREADING": True,
                "ENABLE_CPU_PINNING": False,
            }
            compiled = self._library.Core().compile_model(self._model(size), "CPU", settings)
            # As text, because it is a type of OpenVINO's own.
            if self._precision not in str(compiled.get_property("INFERENCE_PRECISION_HINT")):
                raise ConfigError(
                    f"--engine {OPENVINO} has no {self._precision} on this CPU: use --precision float32, or "
                    f"--engine {TORCH}"
                )
            self._requests[size, streams] = [compiled.create_infer_request() for _ in range(streams)]
        return self._requests[size, streams]

    def _model(self, size: torch.Size) -> Any:
        image = self._operations.parameter([1, 3, *size], np.float32)
        members = getattr(self._network, "members", [self._network])
        maps = self._operations.concat([self._trunk(member, image) for member in members], 1)
        return self._library.Model([maps], [image])

    def _trunk(self, network: Any, x: Any) -> Any:
        operations = self._operations
        x = operations.relu(self._convolved(network.conv1, x))
        pool = network.maxpool
        sides = [[value, value] for value in (pool.stride, 1, pool.padding, pool.padding, pool.kernel_size)]
        x = operations.max_pool(x, *sides).output(0)
        for name, stage in network.named_children():
            for block in stage if name.startswith("layer") else ():
                x = self._block(block, x)
        return x

    def _block(self, block: Any, x: Any) -> Any:
        operations, out = self._operations, x
        for number in range(1, block.n + 1):
            out = self._convolved(getattr(block, f"conv{number}"), out)
            if number < block.n:
                out = operations.relu(out)
        shortcut = x if block.downsample is None else self._convolved(block.downsample[0], x)
        return operations.relu(operations.add(out, shortcut))

    def _convolved(self, layer: Any, x: Any) -> Any:
        weight, bias = (
            tensor.contiguous().numpy() for tensor in (layer.weight, layer.bias.view(1, -1, 1, 1))
        )
        pads = list(layer.padding)
        out = self._operations.convolution(x, weight, list(layer.stride), pads, pads, list(layer.dilation))
        return self._operations.add(out, bias)


def _result(request: Any) -> np.ndarray:
    request.wait()
    return request.get_output_tensor().data.copy()


def _library() -> Any:
    try:
        return import_module(OPENVINO)
    except ImportError as error:
        raise missing_package(error.name) from None
