"""Any diffusers pipeline as a model of the server, whose requests share their steps."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from core import loras
from core.errors import ModelFailed
from core.model import ModelSpec
from models.base import Item, Output
from models.diffusion import loading, quantizing, requests, samplers, sources, tasks, warming
from models.diffusion.lora import LoraRack, LoraSet
from models.diffusion.memory import available, memory_of, refuse_too_large, refuse_without_room, sizes_of
from models.diffusion.networks import COMPILED_ROWS, HostedNetwork, HostedNetworks
from models.diffusion.preview import LatentColours, Look
from models.stepping.compiled import Compilers
from models.stepping.contract import StepAdapter
from models.stepping.rendezvous import PipelineRun, SharedPipeline

MOST_PIPELINES = 64  # kept ready: classes times sets of LoRAs


class Diffusion(StepAdapter):
    """One set of weights; what is done with it follows from what a request brings (see `tasks.choose`).

    Options: `source` (a folder in diffusers' layout, a .safetensors file, a hub id, "modelscope:owner/name") with
    `variant`, `revision`, `offline`, `trust_pickle`, and `config` for a single file; `pipeline`, a class of diffusers,
    where the source does not tell the right one ("auto"); `dtype` float32, float16, bfloat16 or auto; `controlnets`, by
    control type their sources; `lora_folder`, `max_loras`; `offload`, one network at a time on the device; `memory_gb`,
    what all models together may use of the device for weights; `vae_tiling`, `vae_slicing`, `channels_last`;
    `safety_checker`; `max_side`; `row_sizes`, see `MergedNetwork`; `warm_up`, see `models/stepping/warm_up.py`;
    `compile`, one of `compiled.MODES`, with `compile_sizes` and `compile_tokens`, see `warming`; `quantize`, see
    `quantizing`.

    Params are the pipeline's own arguments, some under shorter names, and ours: see `requests.ask`.
    """

    def load(self) -> None:
        """Raises `ModelFailed` with a sentence: what is missing or refused, and what to do; `DoesNotFit` when it is too
        large for the device, and `OutOfMemory` when other models have left too little of the host's memory."""
        self._entered: list[nn.Module] = []  # looked after by the device's memory
        self._compilers = Compilers(warming.compile_mode(self.options))
        if self._compilers.mode and not self.options.get("row_sizes"):
            rows = ", ".join(map(str, COMPILED_ROWS))
            print(f"compile: forwards are filled up to {rows} rows; the option 'row_sizes' has others", file=sys.stderr)
        quantize = quantizing.kind_of(self.options)
        source = sources.find(self.options)
        if not self.options.get("trust_pickle"):
            source.refuse_pickles()
        self._memory = memory_of(self.device)
        if gigabytes := float(self.options.get("memory_gb") or 0):
            self._memory.bound(self, int(gigabytes * 1e9))
        dtype = loading.dtype_of(self.options, self.device)
        quantizing.refuse_half(quantize, dtype)
        sizes = source.sizes(dtype.itemsize, quantizing.NETWORKS if quantize else ())
        self._refuse_too_large(sizes)
        refuse_without_room(sizes, available())
        pipeline = loading.load_pipeline(source, self.options, dtype)
        self._control_nets = tasks.control_nets(pipeline, loading.load_control_nets(self.options, dtype))
        self._kind = type(pipeline)
        self._base = tasks.build(self._kind, pipeline, self.device)
        self._scheduler = getattr(pipeline, "scheduler", None)
        self._multiple = loading.multiple_of(pipeline, self.options)
        self._only_masks = loading.only_masks(pipeline)
        folder = str(self.options.get("lora_folder") or "")
        self._rack = LoraRack(
            self._base, loras.LoraFolder(loading.as_path(folder)) if folder else None, self._memory,
            int(self.options.get("max_loras", 8)),
        )
        self._shared: dict[tuple[type, str, tuple[Any, ...]], SharedPipeline] = {}
        vae = getattr(pipeline, "vae", None)
        self._colours = LatentColours(vae, self._memory.bring) if hasattr(vae, "decode") else None
        networks = {**pipeline.components, **{f"ControlNet {kind}": net for kind, net in self._control_nets.items()}}
        quantizing.quantize(quantize, networks)
        self._refuse_too_large(sizes_of(networks))
        for network in networks.values():
            if isinstance(network, nn.Module):
                network.requires_grad_(False)  # attaching a LoRA does, which compiled forwards would take for a change
                self._memory.enter(network)
                self._entered.append(network)

    def _refuse_too_large(self, sizes: dict[str, int]) -> None:
        refuse_too_large(sizes, self._memory.residency.budget, bool(self.options.get("offload")))

    def close(self) -> None:
        """The device's memory lets go of its weights."""
        for module in self.__dict__.pop("_entered", []):
            self._memory.leave(module)
        if "_memory" in self.__dict__:
            self._memory.bound(self, None)
        self.__dict__.pop("_shared", {}).clear()

    def owns(self, part: object) -> bool:
        """Whether it is a network of one of its modules."""
        return isinstance(part, HostedNetwork) and part.module in self.__dict__.get("_entered", ())

    def prepare(self, item: Item) -> None:
        """Read the LoRAs' files, so that only their attaching is left for `start`. Raises `InvalidParameter`."""
        self._rack.read(_loras_of(item))

    def compile(self, spec: ModelSpec, tell: Callable[[str], None]) -> None:
        """The denoisers, for the rows and sizes that the options name."""
        if not self._compilers.mode:
            return
        kinds = [kind for kind in self._control_nets if not self._only_masks]
        try:
            for item in warming.test_items(spec, warming.sizes_of(self.options), kinds):
                warming.prepare(self.start(item), tell, warming.tokens_of(self.options))
        finally:
            self._compilers.done()

    def start(self, item: Item) -> PipelineRun:
        """The item's run. Raises `InvalidParameter` for what this model cannot do."""
        control = requests.control_of(item, list(self._control_nets))
        kind = tasks.choose(self._kind, requests.brings(item, control), self._only_masks)
        asked = requests.ask(kind, item, control, self._multiple, self.options)
        name = str(item.params.get("scheduler") or item.params.get("sampler") or "")
        scheduler = samplers.make(name, self._scheduler)
        worn = self._rack.take(_loras_of(item))
        shared = self._pipeline(kind, control.kind if control else "", worn)
        look = Look(self._colours, asked.size) if item.previews and self._colours else None
        return shared.start(asked.arguments, _finishing(asked, worn), scheduler, look)

    def remaining(self, item: Item) -> float:
        """About how many forwards of the denoiser the item will need."""
        params: Mapping[str, Any] = item.params
        steps = samplers.forwards(int(params.get("steps") or 50), self._scheduler)
        partial = item.image is not None and not tasks.edits(self._kind)
        share = float(params.get("strength") or 1.0) if partial else 1.0
        twice = float(params.get("true_cfg_scale") or 1.0) > 1.0
        return max(1.0, steps * share * (2 if twice else 1))

    def _pipeline(self, kind: type, control: str, worn: LoraSet) -> SharedPipeline:
        """The pipeline of that class around the model's weights, its networks running with these LoRAs."""
        key = kind, control, worn.adapters
        found = self._shared.pop(key, None)
        if found is None:
            more = {"controlnet": self._control_net(control)} if "ControlNet" in kind.__name__ else {}
            built = tasks.build(kind, self._base, self.device, **more)
            found = SharedPipeline(built, HostedNetworks(
                self._memory, self._rack, worn.adapters, self.options.get("row_sizes", ()), self._compilers
            ))
        self._shared[key] = found  # the last used is the last to go
        while len(self._shared) > MOST_PIPELINES:
            del self._shared[next(iter(self._shared))]
        return found

    def _control_net(self, kind: str) -> Any:
        found = self._control_nets.get(kind) or self._control_nets.get("")
        if found is None:
            raise ModelFailed("this task needs a ControlNet, and the model has none")
        return found


def _loras_of(item: Item) -> list[tuple[str, float]]:
    """Names and weights. Raises `InvalidParameter`."""
    return loras.wanted(item.params.get("lora_name"), item.params.get("lora_weight"))


def _finishing(asked: requests.Asked, worn: LoraSet) -> Callable[[Any], Output]:
    """What makes the output, and keeps the request's LoRAs attached until then."""

    def finish(result: Any) -> Output:
        _ = worn
        return asked.finish(result)

    return finish
