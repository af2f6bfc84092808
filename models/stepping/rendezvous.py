"""A stock pipeline's call as a run: it goes on in a greenlet until it needs a network, and waits there.

The pipeline's own code is not touched. It runs on a shallow copy of the pipeline, whose networks are stand-ins and
whose scheduler is its own; a stand-in that is called hands a `StepCall` out and sleeps until the answer is sent. So
many requests are under way in one thread, each at its own step, and whoever drives them may merge what they wait for.
"""

from __future__ import annotations

import copy
import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial, wraps
from typing import Any

import numpy as np
import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from core.errors import InvalidParameter
from models.base import Output
from models.stepping.contract import Lane, StepCall
from models.stepping.merge import MergedNetwork
from models.stepping.timesteps import HostTimesteps

LANES = {  # by how a component's name begins
    "unet": Lane.DENOISE, "transformer": Lane.DENOISE, "controlnet": Lane.DENOISE,
    "text_encoder": Lane.ENCODE, "image_encoder": Lane.ENCODE,
}
VAE_METHODS = {"encode": Lane.ENCODE, "decode": Lane.DECODE}


Look = Callable[[Any, Tensor, Any, Tensor], np.ndarray | None]
"""Makes a preview of a step, or not: of the scheduler, what was predicted, the timestep, the latents before."""


class Networks:
    """The networks of one device, one for each method of each module: pipelines that share a module share it too, so
    that a text-to-image request meets an inpainting one. `row_sizes`: see `MergedNetwork`."""

    def __init__(self, row_sizes: Sequence[int] = ()) -> None:
        self._row_sizes = row_sizes
        self._known: dict[tuple[int, str], MergedNetwork] = {}

    def of(self, name: str, module: nn.Module, lane: Lane, method: str = "forward") -> MergedNetwork:
        """The module's network. It keeps the module alive."""
        found = self._known.get((id(module), method))
        if found is None:
            found = self._known[id(module), method] = self.make(name, module, lane, method)
        return found

    def make(self, name: str, module: nn.Module, lane: Lane, method: str) -> MergedNetwork:
        """A new one, for `of`; for who has more to do than to merge."""
        return MergedNetwork(name, module, lane, method, self._row_sizes)


class SharedPipeline:
    """A loaded diffusers pipeline whose calls become runs. Nothing of a request is kept in it.

    Its networks are put into evaluation mode, since some come in training mode, where the companions of a sample
    change its answer. A VAE that its pipeline would bring to float32 for each decode, and back, is brought there once:
    another run may be in the middle of it. Raises ValueError for a network with a step cache (`enable_cache`): it
    remembers one request's steps for the whole module.
    """

    def __init__(self, pipeline: Any, networks: Networks) -> None:
        self._pipeline = pipeline
        self._stand_ins: dict[str, Callable[[PipelineRun], Any]] = {}
        for name, module in pipeline.components.items():
            if not isinstance(module, nn.Module):
                continue
            module.eval()
            _refuse_step_cache(name, module)
            if name == "vae":
                _upcast(module)
                methods = {method: networks.of(f"vae.{method}", module, lane, method)
                           for method, lane in VAE_METHODS.items() if hasattr(module, method)}
                self._stand_ins[name] = partial(_Vae, module, methods)
            elif (lane := _lane(name)) is not None:
                network = networks.of(name, module, lane)
                self._stand_ins[name] = partial(_StandIn, module, network)
        self._tells_steps = "callback_on_step_end" in inspect.signature(type(pipeline).__call__).parameters

    def start(
        self, arguments: Mapping[str, Any], finish: Callable[[Any], Output], scheduler: Any = None,
        look: Look | None = None,
    ) -> PipelineRun:
        """A run of `pipeline(**arguments)`, not started. `finish` makes the output of what the pipeline returns.

        `scheduler`: one to use instead of the pipeline's; a copy is made either way. Give a `generator`: without one
        the noise comes from torch's global state, and depends on who else runs. `look` makes the run's previews.
        """
        pipeline = copy.copy(self._pipeline)
        run = PipelineRun(pipeline, dict(arguments), finish)
        # Past `__setattr__`, which would write the change into the configuration that all copies share.
        pipeline.__dict__.update({name: stand_in(run) for name, stand_in in self._stand_ins.items()})
        if "scheduler" in pipeline.components:
            own = pipeline.__dict__["scheduler"] = copy.deepcopy(scheduler or self._pipeline.scheduler)
            run.follow(own, look)
        pipeline.__dict__["_progress_bar_config"] = {"disable": True}
        pipeline.__dict__["maybe_free_model_hooks"] = _leave_the_models  # others are still under way
        if self._tells_steps:
            run.listen()
        return run


class PipelineRun:
    """One call of a pipeline, as a coroutine (`StepRun`).

    `progress`: the fraction of its steps that are done, 0.0 to 1.0, where the pipeline tells. `preview`: the last
    picture of what is becoming of it (uint8 height x width x 3), for whoever takes it; None: nothing new.
    """

    def __init__(self, pipeline: Any, arguments: dict[str, Any], finish: Callable[[Any], Output]) -> None:
        self._pipeline, self._arguments, self._finish = pipeline, arguments, finish
        self._greenlet: greenlet | None = None
        self._closing = False
        self._scheduler: Any = None
        self.progress = 0.0
        self.preview: np.ndarray | None = None

    def send(self, answer: Any, /) -> StepCall:
        """On with the answer (None at first) to the next call. StopIteration holds the output."""
        if self._greenlet is None:
            self._greenlet = greenlet(self._work)
            return self._go_on(self._greenlet.switch)
        return self._go_on(self._greenlet.switch, answer)

    def throw(self, fault: BaseException, /) -> StepCall:
        """The fault is raised where the pipeline waits."""
        if self._greenlet is None:
            self._greenlet = greenlet(self._work)
        return self._go_on(self._greenlet.throw, fault)

    def close(self) -> None:
        """End it where it waits. Networks that it asks for on its way out are refused."""
        self._closing = True
        if self._greenlet is not None and not self._greenlet.dead:
            self._greenlet.parent = getcurrent()
            with suppress(Exception):
                self._greenlet.throw(GreenletExit)
        self._forget()

    def ask(self, call: StepCall) -> Any:
        """The answer to a call, for stand-ins: everybody else goes on meanwhile."""
        if self._closing:
            raise GreenletExit
        assert self._greenlet is not None and self._greenlet.parent is not None
        return self._greenlet.parent.switch(call)

    def listen(self) -> None:
        """Have the pipeline tell of each step. A callback among the arguments is called too."""
        other = self._arguments.get("callback_on_step_end")

        def step(pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            self.progress = min(1.0, (index + 1) / max(1, pipeline.num_timesteps))
            return (other(pipeline, index, timestep, tensors) or {}) if other else {}

        self._arguments["callback_on_step_end"] = step

    def follow(self, scheduler: Any, look: Look | None) -> None:
        """Have the steps of the run's own scheduler take timesteps that lie on the host, and previews made of them. A
        preview that cannot be made is the last that is tried: the image itself does not depend on it."""
        step, timesteps, wanted = scheduler.step, HostTimesteps(scheduler), look is not None

        @wraps(step)  # pipelines ask for its parameters
        def followed(prediction: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal wanted
            with timesteps.during_step(timestep) as near:
                if wanted and look is not None:
                    try:
                        self.preview = look(scheduler, prediction, near, sample)
                    except Exception:
                        wanted = False
                        traceback.print_exc()
                return step(prediction, near, sample, *args, **kwargs)

        scheduler.step = followed
        self._scheduler = scheduler

    def _work(self) -> Output:
        try:
            return self._finish(self._pipeline(**self._arguments))
        except ValueError as fault:
            if not _is_a_refusal(fault):
                raise
            raise InvalidParameter(f"the pipeline refuses this: {str(fault).partition(chr(10))[0][:300]}") from None

    def _go_on(self, enter: Callable[..., Any], *what: Any) -> StepCall:
        """Into the greenlet until it needs a network, ends or fails."""
        assert self._greenlet is not None
        self._greenlet.parent = getcurrent()
        try:
            asked = enter(*what)
        except BaseException as fault:
            self._forget()
            traceback.clear_frames(fault.__traceback__)  # latents, which lie on the device; the lines stay for the log
            raise
        if isinstance(asked, StepCall):
            return asked
        self._forget()
        raise StopIteration(asked)

    def _forget(self) -> None:
        """Pipeline, stand-ins, scheduler, run know each other: nobody should have to wait for the garbage collector."""
        if self._scheduler is not None:
            self._scheduler.__dict__.pop("step", None)
        self._pipeline, self._scheduler, self._arguments, self._finish = None, None, {}, lambda result: Output()


class _StandIn:
    """Stands where a module was. It says that it is of the module's class, and has all that the module has."""

    def __init__(self, module: nn.Module, network: MergedNetwork | None, run: PipelineRun) -> None:
        self._stand_in_module, self._stand_in_run, self._stand_in_network = module, run, network

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # pipelines ask with isinstance what their networks are
        return type(self._stand_in_module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stand_in_module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert self._stand_in_network is not None
        return self._stand_in_run.ask(self._stand_in_network.call(args, kwargs))

    def to(self, *args: Any, **kwargs: Any) -> _StandIn:
        """The weights stay where and what they are: they are everybody's."""
        return self

    def cache_context(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        """It names the call to step caches, which are refused; to walk through all submodules for that takes long."""
        return nullcontext()

    def _reset_stateful_cache(self, *args: Any, **kwargs: Any) -> None:
        pass


class _Vae(_StandIn):
    """Stands where a VAE was; `encode` and `decode` are what is waited for."""

    def __init__(self, module: nn.Module, methods: Mapping[str, MergedNetwork], run: PipelineRun) -> None:
        super().__init__(module, None, run)
        self._stand_in_methods = methods

    def encode(self, picture: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._wait("encode", picture, *args, **kwargs)

    def decode(self, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._wait("decode", z, *args, **kwargs)

    def _wait(self, method: str, first: Tensor, *args: Any, **kwargs: Any) -> Any:
        first = first.to(self.dtype)  # the VAE may have been brought to another precision
        return self._stand_in_run.ask(self._stand_in_methods[method].call((first, *args), kwargs))


def _is_a_refusal(fault: ValueError) -> bool:
    """Whether one of diffusers' own checks of what a pipeline is asked has raised it (`check_inputs` and the like)."""
    frames = [frame for frame, _ in traceback.walk_tb(fault.__traceback__)]
    code, module = frames[-1].f_code, str(frames[-1].f_globals.get("__name__"))
    return module.startswith("diffusers.") and code.co_name.startswith("check_")


def _leave_the_models() -> None:
    pass


def _lane(name: str) -> Lane | None:
    return next((lane for prefix, lane in LANES.items() if name.startswith(prefix)), None)


def _upcast(vae: Any) -> None:
    if vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
        vae.to(torch.float32)


def _refuse_step_cache(name: str, module: nn.Module) -> None:
    if getattr(module, "is_cache_enabled", False):
        raise ValueError(f"{name} has a step cache, which mixes up requests that share steps; disable it")
