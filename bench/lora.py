"""What it costs that requests with different LoRAs share a forward.

    python -m bench.lora [--runs 7] [--rows 6] [--quick]

A network of Stable Diffusion 1.5's shape with a quarter of its channels and random weights runs rows of 128 x 128
pixels: bare, all rows with one LoRA (of rank 16, on every attention), with two, three and five different ones mixed,
and the same rows one forward after the other, a forward for each LoRA, as they would have to go without mixing. One
thread; every round measures all of these in turn, so that a slower minute hits them alike. Writes
bench/results/lora.json and lora.png.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from bench.common import machine_facts, write_result
from bench.runs import goal, parser, plot, print_tables, save, show, spread, table
from models.diffusion.lora_mix import Adapters, LoraMix, tuner_layers

COUNTS = (2, 3, 5)  # different LoRAs among the rows
RANK = 16
SIDE = 16  # of the latents: an eighth of the picture's
WORDS, WIDTH = 77, 768
MOST = 1.15  # of the time with one LoRA, with five


def network() -> torch.nn.Module:
    """With as many LoRAs attached as are ever worn."""
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    torch.manual_seed(0)
    made = UNet2DConditionModel(
        sample_size=SIDE, block_out_channels=(80, 160, 320, 320), cross_attention_dim=WIDTH, norm_num_groups=16,
    )
    for number in range(max(COUNTS)):
        made.add_adapter(LoraConfig(
            r=RANK, lora_alpha=RANK, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"],
        ), adapter_name=name(number))
    return made.eval()


def name(number: int) -> str:
    return f"lora{number}"


def worn(number: int) -> Adapters:
    return ((name(number), 0.8),)


class Bench:
    """A network and the rows it is given."""

    def __init__(self, rows: int) -> None:
        self._network, self._rows = network(), rows
        self._mix = LoraMix(self._network)
        chance = torch.Generator().manual_seed(1)
        self._latents = torch.randn(rows, 4, SIDE, SIDE, generator=chance)
        self._words = torch.randn(rows, WORDS, WIDTH, generator=chance)
        self._times = torch.arange(rows) * 100 + 20

    def bare(self) -> None:
        self._forward([()])

    def one(self) -> None:
        self._forward([worn(0)])

    def by_peft(self) -> None:
        """The same as `one` by peft's own code."""
        self._mix.release()
        for layer in tuner_layers(self._network):
            layer.set_adapter([name(0)], inference_mode=True)
            layer.set_scale(name(0), 0.8)
        self._run(slice(None))

    def mixed(self, count: int) -> None:
        self._forward([worn(row % count) for row in range(self._rows)])

    def grouped(self, count: int) -> None:
        for number in range(count):
            self._forward([worn(number)], slice(number, None, count))

    def _forward(self, rows: Sequence[Adapters], part: slice = slice(None)) -> None:
        self._mix.wear(rows)
        self._run(part)

    def _run(self, part: slice) -> None:
        self._network(self._latents[part], self._times[part], self._words[part], return_dict=False)

    def cases(self) -> dict[str, Callable[[], None]]:
        found: dict[str, Callable[[], None]] = {"bare": self.bare, "one, peft's own code": self.by_peft,
                                                "one": self.one}
        for count in COUNTS:
            found[f"{count} mixed"] = lambda count=count: self.mixed(count)  # type: ignore[misc]
            found[f"{count} grouped"] = lambda count=count: self.grouped(count)  # type: ignore[misc]
        return found


def measure(bench: Bench, runs: int) -> dict[str, list[float]]:
    """Milliseconds by case, round by round. Each runs once more just before, since what changes from one forward to
    the next happens when a request joins or leaves, not at each step."""
    cases = bench.cases()
    found: dict[str, list[float]] = {case: [] for case in cases}
    for _ in range(runs):
        for case, run in cases.items():
            run()
            began = time.process_time()
            run()
            found[case].append((time.process_time() - began) * 1e3)
    return found


def against(found: dict[str, list[float]], case: str, other: str) -> dict[str, float]:
    """One case's time in the other's, round by round."""
    return spread(mine / theirs for mine, theirs in zip(found[case], found[other], strict=True))


def draw(found: dict[str, list[float]]) -> None:
    figure, axis = plot().subplots(figsize=(5, 3.2), layout="constrained")
    middle = {case: spread(times)["median"] for case, times in found.items()}
    axis.bar([-2, -1], [middle["bare"], middle["one"]], 0.5, color="#9fb4c7")
    places = range(len(COUNTS))
    for way, shift, colour in (("mixed", -0.2, "#d1495b"), ("grouped", 0.2, "#30638e")):
        axis.bar([place + shift for place in places], [middle[f"{count} {way}"] for count in COUNTS], 0.38,
                 color=colour, label={"mixed": "in one forward", "grouped": "a forward for each"}[way])
    axis.set_xticks([-2, -1, *places], ["none", "one", *(f"{count} different" for count in COUNTS)])
    axis.set_ylabel("ms", fontsize=8)
    axis.legend(fontsize=8)
    figure.suptitle("A step of six requests, by their LoRAs", fontsize=10)
    save(figure, "lora")


def main() -> None:
    arguments = parser(__doc__, runs=7)
    arguments.add_argument("--rows", type=int, default=6)
    given = arguments.parse_args()
    runs = 2 if given.quick else given.runs
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    facts = machine_facts(("torch", "diffusers", "peft"))
    found = measure(Bench(given.rows), runs)
    shown = [table(f"A forward of {given.rows} rows", ["LoRAs", "ms", "of one LoRA's time"], (
        [case, show(spread(times), "{:.0f}"), show(against(found, case, "one"))] for case, times in found.items()
    ))]
    most = against(found, f"{max(COUNTS)} mixed", "one")
    reached = [goal(f"time with {max(COUNTS)} LoRAs mixed in that with one", f"≤ {MOST}", most, most["median"] <= MOST)]
    print_tables(shown, reached)
    write_result("lora", facts, {
        "about": "what it costs that requests with different LoRAs share a forward",
        "runs": runs, "rows": given.rows, "goals": reached, "tables": shown, "milliseconds": found,
        "ratios": {case: against(found, case, "one") for case in found},
    })  # fmt: skip
    draw(found)


if __name__ == "__main__":
    main()
