"""Compiled forwards: the same answers, compiled ahead and never while requests wait, and plain ones where they fail."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusion_kit import build, example_spec, folder_of, images, item, model, picture, same
from step_kit import Fifo, spied
from test_diffusion_lora import kohya
from test_diffusion_memory import pretended
from torch import nn

from core.errors import ModelFailed
from core.model import ModelSpec, read_spec
from models.base import Item
from models.diffusion import adapter
from models.diffusion.adapter import Diffusion
from models.diffusion.memory import HostedModule, sizes_of
from models.stepping import compiled
from models.stepping.compiled import CompiledForward, Compilers
from models.stepping.contract import Lane
from models.stepping.merge import MergedNetwork, each_tensor
from workers.messages import Boot
from workers.session_models import Models
from workers.session_steps import Steps

torch.set_num_threads(1)
EXAMPLES = {"flux": "flux-dev"}
TOKENS = """
adapter = "a:B"
task = "stub"
[params.max_sequence_length]
type = "int"
default = 32
"""


class UNet2DConditionModel(nn.Module):
    """Merged like the real one, by its name, and compiled in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        return (self.last(torch.nn.functional.silu(self.first(sample)) * timestep.float()[:, None]),)


class Replayed:
    """Compiled as CUDA graphs would be: every answer lies in the same buffer, which the next call overwrites."""

    def __init__(self, module: nn.Module, mode: str | None, dynamic: bool) -> None:
        self.module = module
        self.buffers: dict[Any, torch.Tensor] = {}

    def __call__(self, **arguments: Any) -> Any:
        numbers = count()

        def kept(answer: torch.Tensor) -> torch.Tensor:
            return self.buffers.setdefault((next(numbers), answer.shape), torch.empty_like(answer)).copy_(answer)

        return each_tensor(self.module(**arguments), kept)


def traced(module: nn.Module, mode: str | None, dynamic: bool) -> Any:
    """The compiler without its slowest part: the graph is taken, and run by torch's own kernels."""
    return torch.compile(module, backend="aot_eager", dynamic=dynamic)


def network(module: nn.Module, mode: str = "default", compiler: Any = torch.compile) -> MergedNetwork:
    forward = CompiledForward("unet", module, mode, compiler)
    return MergedNetwork("unet", module, Lane.DENOISE, "forward", (1, 2, 4), forward)


def call(made: MergedNetwork, seed: int, rows: int = 1, timestep: Any = 3) -> Any:
    sample = torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))
    return made.call((sample, torch.tensor(timestep)), {"return_dict": False})


@torch.no_grad()
def test_what_the_compiler_makes_gives_the_network_s_answers(tmp_path, monkeypatch):
    """The real compiler, of which nothing is pretended."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    module = UNet2DConditionModel().eval()
    made, plain = network(module), network(module)
    told: list[str] = []
    made.prepare(call(made, 0), told.append)
    assert made._compiled.shapes == 3, told
    assert told == [f"compiling unet for {rows} rows" for rows in (1, 2, 4)]
    calls = [call(made, 1), call(made, 2, rows=2, timestep=7.5)]
    for one, other in zip(made.forward(calls), plain.forward(calls), strict=True):
        assert one[0].shape == other[0].shape and torch.allclose(one[0], other[0], atol=1e-6)


@torch.no_grad()
def test_nothing_is_compiled_while_requests_are_under_way(monkeypatch):
    module = UNet2DConditionModel().eval()
    frames: list[Any] = []
    made = network(module, compiler=lambda twin, **_: torch.compile(
        twin, backend=lambda graph, inputs: frames.append(graph) or graph.forward, dynamic=False))
    made.prepare(call(made, 0), lambda _: None)
    assert len(frames) == 3
    answers = [made.forward([call(made, seed, rows)])[0][0] for seed, rows in ((1, 1), (2, 3), (3, 9))]  # 9: beyond all
    assert [len(answer) for answer in answers] == [1, 3, 9] and len(frames) == 3
    monkeypatch.setattr(made._compiled, "_shapes", _Everything())  # as if it had been prepared for all
    assert len(made.forward([call(made, 4, 9)])[0][0]) == 9 and len(frames) == 3
    with torch.inference_mode():  # another mode than that of steps
        assert len(made.forward([call(made, 5, 2)])[0][0]) == 2 and len(frames) == 3


def counted(monkeypatch: Any) -> list[int]:
    """Gets an entry for each compiled forward from now on."""
    used: list[int] = []
    run = CompiledForward._run
    monkeypatch.setattr(CompiledForward, "_run", lambda self, arguments: used.append(1) or run(self, arguments))
    return used


class _Everything(set):
    def __contains__(self, _: object) -> bool:
        return True

    def __bool__(self) -> bool:
        return True


@torch.no_grad()
@pytest.mark.parametrize("mode", compiled.GRAPHS)
def test_an_answer_outlives_the_next_replay(mode):
    module = UNet2DConditionModel().eval()
    made = network(module, mode, Replayed)
    made.prepare(call(made, 0), lambda _: None)
    first = made.forward([call(made, 1), call(made, 2)])
    kept = [answer[0].clone() for answer in first]
    made.forward([call(made, 3), call(made, 4)])
    assert all(torch.equal(answer[0], copy) for answer, copy in zip(first, kept, strict=True))


@torch.no_grad()
def test_the_test_sees_an_answer_that_is_overwritten():
    module = UNet2DConditionModel().eval()
    made = network(module, "default", Replayed)
    made.prepare(call(made, 0), lambda _: None)
    first = made.forward([call(made, 1)])[0][0]
    kept = first.clone()
    made.forward([call(made, 2)])
    assert not torch.equal(first, kept)


@torch.no_grad()
def test_weights_that_move_take_graphs_with_them_and_nothing_else(monkeypatch, capsys):
    for mode, uses in (("default", True), ("reduce-overhead", False)):
        module = UNet2DConditionModel().eval()
        made, plain = network(module, mode, Replayed), network(module)
        made.prepare(call(made, 0), lambda _: None)
        runs = counted(monkeypatch)
        for weight in module.parameters():
            weight.data = weight.data * 2  # elsewhere, and another: the twin must see it
        for _ in range(2):
            assert torch.equal(made.forward([call(made, 1)])[0][0], plain.forward([call(made, 1)])[0][0])
        assert bool(runs) is uses
    assert capsys.readouterr().err.count("CUDA graphs are not used") == 1


@torch.no_grad()
def test_a_hook_on_the_network_is_not_compiled():
    class Uncopied:
        def __deepcopy__(self, known: Any) -> Any:
            raise AssertionError("what a hook holds is copied")

    module, twins, held = UNet2DConditionModel().eval(), [], Uncopied()
    answers: list[Any] = []
    module.first.register_forward_hook(lambda *_, held=held: answers.append(held))
    module.last.register_forward_pre_hook(partial(lambda held, *_: None, held))
    made = network(module, compiler=lambda twin, **_: twins.append(twin) or twin)
    made.prepare(call(made, 0), lambda _: None)
    (twin,) = twins
    assert made._compiled.shapes == 3 and not twin.first._forward_hooks and module.first._forward_hooks
    assert twin.first.weight is module.first.weight and twin.first is not module.first
    answers.clear()
    made.forward([call(made, 1)])
    assert not answers


@torch.no_grad()
def test_a_compiler_that_fails_is_told_of_once_and_the_network_runs(capsys):
    def broken(module: nn.Module, **_: Any) -> Any:
        raise RuntimeError("no compiler here\nand a long trace")

    module = UNet2DConditionModel().eval()
    made, plain = network(module, compiler=broken), network(module)
    for seed in (0, 1):
        made.prepare(call(made, seed), lambda _: None)
    assert torch.equal(made.forward([call(made, 1)])[0][0], plain.forward([call(made, 1)])[0][0])
    told = capsys.readouterr().err
    assert told == "unet: runs uncompiled, since the compiler failed: RuntimeError: no compiler here\n"


@torch.no_grad()
def test_a_compiled_network_that_fails_or_lies_is_not_used(capsys):
    module = UNet2DConditionModel().eval()
    plain = network(module)
    made = network(module, compiler=lambda twin, **_: lambda **arguments: (twin(**arguments)[0] + 1,))
    made.prepare(call(made, 0), lambda _: None)
    assert "the compiled network's answer is another" in capsys.readouterr().err and not made._compiled.shapes

    def later(twin: nn.Module, **_: Any) -> Any:
        calls: list[int] = []

        def run(**arguments: Any) -> Any:
            calls.append(1)
            if len(calls) > 3:
                raise RuntimeError("a graph cannot be replayed")
            return twin(**arguments)

        return run

    made = network(module, compiler=later)
    made.prepare(call(made, 0), lambda _: None)
    for _ in range(2):
        assert torch.equal(made.forward([call(made, 1)])[0][0], plain.forward([call(made, 1)])[0][0])
    assert capsys.readouterr().err.count("a graph cannot be replayed") == 1


@torch.no_grad()
def test_rows_that_do_not_fit_the_memory_are_left_out(capsys):
    def small(twin: nn.Module, **_: Any) -> Any:
        def run(**arguments: Any) -> Any:
            if len(arguments["sample"]) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return twin(**arguments)

        return run

    made = network(UNet2DConditionModel().eval(), compiler=small)
    made.prepare(call(made, 0), lambda _: None)
    assert made._compiled.shapes == 2 and "4 rows" in capsys.readouterr().err


# --- models -----------------------------------------------------------------------------------------------------------


def compiling(
    monkeypatch: Any, compiler: Any, kind: str = "sd15", spec: ModelSpec | None = None, **options: Any
) -> Any:  # fmt: skip
    """A tiny model, compiled for requests of its example's spec at 64 x 64, or for those of another spec."""
    monkeypatch.setattr(adapter, "Compilers", lambda mode: Compilers(mode, compiler))
    sizes = {} if spec else {"compile_sizes": ["64x64"]}
    made = build(kind, compile="default", **sizes, **options)
    made.told = []
    made.compile(spec or example_spec(EXAMPLES.get(kind, kind)), made.told.append)
    return made


def forwards(made: Any) -> list[CompiledForward]:
    return list(made._compilers._known.values())


def test_a_compiled_model_makes_the_same_pictures(monkeypatch):
    """The graph of the whole network, with requests that share it, one of another size, and weights that travel."""
    made = compiling(monkeypatch, traced, row_sizes=[4])
    assert [one.shapes for one in forwards(made)] == [1] and made.told == ["compiling unet for 4 rows"]
    used = counted(monkeypatch)
    frames = torch._dynamo.utils.counters["frames"]["total"]
    wanted = [item(seed=1), item(seed=2, scheduler="Euler", prompt="a dog"), item(seed=3, size=(64, 128)),
              item(picture(1), strength=0.7)]
    for one, other in zip(images(made, *wanted), images(model("sd15"), *wanted), strict=True):
        assert same(one, other)
    assert len(used) >= 4
    hosted = HostedModule(made._base.unet, torch.device("cpu"))
    for weight in hosted._tensors():
        weight.data = weight.data.clone()
    used.clear()
    assert same(images(made, wanted[0])[0], images(model("sd15"), wanted[0])[0]) and used
    assert torch._dynamo.utils.counters["frames"]["total"] == frames, "nothing was compiled while requests ran"


def test_requests_with_loras_run_beside_compiled_ones(monkeypatch, tmp_path):
    kohya(tmp_path / "ink.safetensors", 0)
    plain = build("sd15", lora_folder=str(tmp_path))
    made = compiling(monkeypatch, Replayed, lora_folder=str(tmp_path))
    used = counted(monkeypatch)
    wanted = [item(), item(lora_name="ink"), item(seed=5)]
    pictures = images(made, *wanted)
    assert used
    for one, other in zip(pictures, images(plain, *wanted), strict=True):
        assert same(one, other)
    assert not same(pictures[0], pictures[1])
    used.clear()
    assert same(images(made, item(lora_name="ink"))[0], pictures[1]) and not used
    assert same(images(made, item())[0], pictures[0]) and used, "without LoRA it is compiled still"


def test_what_was_compiled_is_still_used_when_a_lora_has_been_attached(monkeypatch, tmp_path):
    """By torch's own guards: what attaching changes of the weights must not be among them."""
    kohya(tmp_path / "ink.safetensors", 0)
    ran: list[int] = []

    def watched(graph: Any, _: Any) -> Any:
        return lambda *inputs: ran.append(1) or graph.forward(*inputs)

    made = compiling(
        monkeypatch, lambda twin, **_: torch.compile(twin, backend=watched, dynamic=False), row_sizes=[4],
        lora_folder=str(tmp_path),
    )
    ran.clear()
    before = images(made, item())[0]
    used = len(ran)
    assert used and not same(images(made, item(lora_name="ink"))[0], before)
    ran.clear()
    assert same(images(made, item())[0], before) and len(ran) == used


def test_different_loras_share_forwards_that_are_filled_up(monkeypatch, tmp_path):
    """Guided, so three requests are six rows, of eight that are compiled for."""
    for seed, name in enumerate(("ink", "oil")):
        kohya(tmp_path / f"{name}.safetensors", seed)
    plain = build("sd15", lora_folder=str(tmp_path))
    made = compiling(monkeypatch, Replayed, lora_folder=str(tmp_path))
    wanted = [item(lora_name="ink"), item(lora_name="oil", seed=2), item(seed=5)]
    monkeypatch.setattr("models.stepping.stepper.StepBatcher", lambda costs: Fifo())  # as wide as it can be
    with spied() as seen:
        pictures = images(made, *wanted)
    assert ("unet", Lane.DENOISE, 3) in seen
    assert made._rack.mixes(made._base.unet, (("lora1", 1.0),)), "they went by themselves after all"
    for one, picture_alone in zip(pictures, (images(plain, other)[0] for other in wanted), strict=True):
        assert same(one, picture_alone)


def test_a_controlnet_is_compiled_with_what_it_changes(monkeypatch):
    net = {"canny": str(folder_of("sd15-controlnet") / "controlnet")}
    made = compiling(monkeypatch, Replayed, controlnets=net, row_sizes=[2])
    by_rows = sorted(one.shapes for one in forwards(made))
    assert by_rows == [1, 2], "the map's network for one kind of call, the denoiser with and without its residuals"
    guided = item(picture(1), control_type="canny")
    assert same(images(made, guided)[0], images(build("sd15", controlnets=net), guided)[0])


@pytest.mark.parametrize("kind", ["sdxl", "flux", "qwen-image", "sd15-inpaint", "flux-kontext"])
def test_every_kind_is_compiled_by_its_own_calls(monkeypatch, kind):
    made = compiling(monkeypatch, Replayed, kind, row_sizes=[2])
    assert sum(one.shapes for one in forwards(made)) >= 1


def test_prompts_of_other_lengths_are_compiled_where_they_are_named(monkeypatch):
    made = compiling(monkeypatch, Replayed, "qwen-image", row_sizes=[2], compile_tokens=[64, 128])
    assert [one.shapes for one in forwards(made)] == [2]
    used, wanted = counted(monkeypatch), [item(prompt="a cat " * count) for count in (1, 45, 100)]
    for wide, one in zip((True, True, False), wanted, strict=True):
        used.clear()
        assert same(images(made, one)[0], images(model("qwen-image"), one)[0]) and bool(used) is wide


def test_compiled_networks_travel_one_at_a_time(monkeypatch):
    memory = pretended(monkeypatch, max(sizes_of(model("sd15")._base.components).values()) + 1)
    made = compiling(monkeypatch, Replayed, offload=True, row_sizes=[2])
    used, moves = counted(monkeypatch), memory.residency.moves
    for one, other in zip(images(made, item(), item(seed=1)), images(model("sd15"), item(), item(seed=1)), strict=True):
        assert same(one, other)
    assert used and memory.residency.moves > moves + 1


def test_rows_are_chosen_where_the_operator_has_not(monkeypatch, capsys):
    made = compiling(monkeypatch, Replayed)
    assert "filled up to 1, 2, 4, 8 rows" in capsys.readouterr().err
    assert [one.shapes for one in forwards(made)] == [4]
    assert made.told == [f"compiling unet for {rows} rows" for rows in (1, 2, 4, 8)]


@pytest.mark.parametrize(("options", "sentence"), [
    ({"compile": "fast"}, "'compile' is 'fast'; it must be empty or one of default"),
    ({"compile": "default", "compile_sizes": ["big"]}, r"list of sizes .*\[\"1024x768\"\]"),
    ({"compile": "default", "compile_sizes": 512}, r"list of sizes .*\[\"1024x768\"\]"),
    ({"compile": "default", "compile_tokens": [100]}, "list of multiples of 64"),
    ({"compile": "reduce-overhead", "offload": True}, "needs weights that stay"),
])
def test_options_that_cannot_be_are_refused(options, sentence):
    with pytest.raises(ModelFailed, match=sentence):
        build("sd15", **options)


def test_what_is_compiled_is_what_requests_ask_for_by_default(monkeypatch):
    """Their size, and how long their text is: not what the pipeline would do by itself."""
    spec = example_spec("flux-dev")
    length = read_spec(TOKENS, "flux-dev").params
    spec = replace(spec, side=64, params={**spec.params, **length}, options={})
    made = compiling(monkeypatch, Replayed, "flux", spec, row_sizes=[2])
    used = counted(monkeypatch)
    asked = Item(spec.check_params({"prompt": "a cat", "steps": 2, "seed": 1}), size=spec.canvas(None, {}))
    assert images(made, asked)[0].shape == (64, 64, 3) and len(used) == 2


def test_a_size_that_cannot_be_compiled_for_costs_speed_and_nothing_else(monkeypatch, capsys):
    class Full(Diffusion):
        def start(self, item):
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("models.diffusion.adapter.Diffusion", Full)
    spec = replace(example_spec("sd15"), options={"source": str(folder_of("sd15")), "compile": "default"})
    steps = Steps(torch.device("cpu"), None, None, None)
    boot = Boot("cpu:0", 1, "cpu", "", 1, 1, (), (spec,), ".", 0)
    models = Models(boot, torch.device("cpu"), SimpleNamespace(send=lambda _: None), steps)
    models.preload()
    assert models.ready("sd15") is not None and not models.refused
    assert "'sd15' could not be compiled" in capsys.readouterr().err
