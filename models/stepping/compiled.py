"""A network's forward, compiled ahead for a few shapes. What it was not compiled for runs as it is written.

Nothing is compiled while requests are under way: a compiler takes seconds to minutes, in which nobody's step would be
made. `prepare` compiles, before the first request; afterwards arguments of those shapes take the compiled way and all
others the plain one.

What is compiled is a twin of the module: the same weights in other module objects. So LoRAs, which change or hook the
module's layers, never touch what was compiled, and forwards with LoRAs run on the module itself.
"""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.calls import lacks_memory
from models.stepping.merge import Arguments, each_tensor

MODES = ("default", "reduce-overhead", "max-autotune")
GRAPHS = ("reduce-overhead", "max-autotune")  # on a GPU they replay CUDA graphs
GRAPH_CALLS = 3  # the first warms up, the second records, the third replays
FLOAT_TIMESTEPS = ("UNet2DConditionModel", "ControlNetModel")  # they make theirs float32 before anything else
NEAR = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the largest value: how far a compiled answer may be off
NEAR_HALF = 0.1

HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)  # fmt: skip

Compiler = Callable[..., Callable[..., Any]]


class CompiledForward:
    """One module's forward. `mode`: one of `MODES`. `compiler`: called like `torch.compile`.

    With CUDA graphs the next replay overwrites the last answer, and weights must stay where they were: answers are
    copied, and a module whose weights have moved runs uncompiled.
    """

    def __init__(self, name: str, module: nn.Module, mode: str, compiler: Compiler = torch.compile) -> None:
        self._name, self._module, self._mode, self._compiler = name, module, mode, compiler
        self._float_timesteps = type(module).__name__ in FLOAT_TIMESTEPS
        self._compiled: Callable[..., Any] | None = None
        self._shapes: set[Hashable] = set()
        self._address = 0
        self._failed = False

    @property
    def shapes(self) -> int:
        """For how many shapes it is compiled."""
        return len(self._shapes)

    def prepare(self, arguments: Arguments) -> bool:
        """Compile for arguments of these shapes; whether that worked. A network that cannot be compiled, or whose
        compiled answer is not its own, runs uncompiled from then on, which one line in the log says."""
        even = self._even(arguments)
        shape = _shape(even)
        if self._failed or shape in self._shapes:
            return not self._failed
        try:
            self._compile(even, shape)
        except Exception as fault:
            if lacks_memory(fault):  # fewer rows may fit
                self._say(f"not compiled for {_rows(even)} rows, which do not fit the memory")
            else:
                self._give_up(fault)
            return False
        return True

    def __call__(self, arguments: Arguments) -> Any:
        """The network's answer."""
        even = self._even(arguments) if self._shapes else arguments
        if self._compiled is None or _shape(even) not in self._shapes or self._has_moved():
            return self._module(**arguments)
        try:
            with torch.compiler.set_stance("eager_on_recompile"):
                return self._run(even)
        except Exception as fault:
            if lacks_memory(fault):
                raise
            answer = self._module(**arguments)  # a fault of the arguments is raised again here
            self._give_up(fault)
            return answer

    def _compile(self, arguments: Arguments, shape: Hashable) -> None:
        with torch.inference_mode(False), torch.no_grad():  # as steps are made, or it would not count for them
            expected = self._module(**arguments)
            if self._compiled is None:
                mode = None if self._mode == "default" else self._mode
                self._compiled = self._compiler(_twin(self._module), mode=mode, dynamic=False)
            most = 2 + len(self._shapes) * 2
            with torch._dynamo.config.patch(  # type: ignore[attr-defined]
                recompile_limit=max(64, most), accumulated_recompile_limit=max(1024, most)
            ):
                for _ in range(GRAPH_CALLS if self._mode in GRAPHS else 1):
                    answer = self._run(arguments)
        _refuse_other(expected, answer)
        self._shapes.add(shape)
        self._address = _address(self._module)

    def _run(self, arguments: Arguments) -> Any:
        assert self._compiled is not None
        if self._mode not in GRAPHS:
            return self._compiled(**arguments)
        torch.compiler.cudagraph_mark_step_begin()
        return each_tensor(self._compiled(**arguments), torch.clone)

    def _give_up(self, fault: Exception) -> None:
        line = (str(fault).strip().splitlines() or [""])[0][:200]
        self._say(f"runs uncompiled, since the compiler failed: {type(fault).__name__}: {line}")
        self._failed, self._compiled = True, None
        self._shapes.clear()
        gc.collect()  # recorded graphs hold memory of the device

    def _say(self, what: str) -> None:
        print(f"{self._name}: {what}", file=sys.stderr)

    def _has_moved(self) -> bool:
        if self._mode not in GRAPHS or _address(self._module) == self._address:
            return False
        if self._address:
            self._say(
                "the weights have left their place for another model's, so the CUDA graphs are not used any more; "
                "choose compile = \"default\" where models share a device's memory by turns"
            )
            self._address = 0
        return True

    def _even(self, arguments: Arguments) -> Arguments:
        """The arguments in one layout and, where the network makes no difference, in one type: each would be a shape of
        its own. Copies nothing that has it already."""
        even = {name: each_tensor(value, Tensor.contiguous) for name, value in arguments.items()}
        timestep = even.get("timestep")
        if self._float_timesteps and isinstance(timestep, Tensor):
            even["timestep"] = timestep.float()
        return even


class Compilers:
    """The compiled forwards of one model's networks, one for each module. `mode`: empty: none. `done()` when all is
    compiled: the processes that torch has started for it hold memory."""

    def __init__(self, mode: str = "", compiler: Compiler = torch.compile) -> None:
        self.mode, self._compiler = mode, compiler
        self._known: dict[int, CompiledForward] = {}

    def of(self, name: str, module: nn.Module) -> CompiledForward | None:
        """The module's; None: nothing is compiled here."""
        if not self.mode:
            return None
        if id(module) not in self._known:
            self._known[id(module)] = CompiledForward(name, module, self.mode, self._compiler)
        return self._known[id(module)]

    def done(self) -> None:
        """End the processes that compile."""
        from torch._inductor.async_compile import shutdown_compile_workers  # it brings the whole compiler

        shutdown_compile_workers()


def _twin(module: nn.Module) -> nn.Module:
    """The module once more around the very same weights, wherever they will move, and without hooks, which may hold
    whatever others do with the module."""
    known: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    for part in module.modules():
        known |= {id(vars(part)[name]): type(vars(part)[name])() for name in HOOKS}
    twin = copy.deepcopy(module, known)
    for part, other in zip(module.modules(), twin.modules(), strict=True):
        other._parameters, other._buffers = part._parameters, part._buffers
    return twin


def _address(module: nn.Module) -> int:
    """Where its weights begin: they move all together."""
    plain = (weight for weight in module.parameters() if type(weight.data) is Tensor)
    first = next(plain, None)
    return 0 if first is None else first.data_ptr()


def _shape(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, Mapping):
        return tuple((name, _shape(part)) for name, part in sorted(value.items()))
    if isinstance(value, (list, tuple)):
        return type(value), *map(_shape, value)
    return type(value), value if isinstance(value, Hashable) else id(value)


def _rows(arguments: Arguments) -> int:
    return next((len(value) for value in arguments.values() if isinstance(value, Tensor) and value.ndim), 1)


def _refuse_other(expected: Any, answer: Any) -> None:
    """Raises ValueError when an answer is not the expected one, but for rounding."""
    pairs = zip(_tensors(expected), _tensors(answer), strict=True)
    for one, other in pairs:
        if one.is_floating_point() and one.numel():
            bound = NEAR.get(one.dtype, NEAR_HALF) * float(one.abs().max())
            if one.shape != other.shape or not float((one - other).abs().max()) <= bound:
                raise ValueError("the compiled network's answer is another")


def _tensors(value: Any) -> Sequence[Tensor]:
    found: list[Tensor] = []
    each_tensor(value, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found
