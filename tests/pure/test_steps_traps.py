"""What goes wrong silently when requests share steps: each trap is set here, and seen to be avoided (or to be seen)."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref

import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    FirstBlockCacheConfig,
    FluxPipeline,
    HeunDiscreteScheduler,
    QwenImagePipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from step_kit import CLOSE, WORDS, Desk, alone, compare, of, picture, spied, stock

from core.errors import Cancelled, OutOfMemory
from models.stepping import columns, merge
from models.stepping.contract import Lane
from models.stepping.merge import MergedNetwork
from models.stepping.rendezvous import Networks, SharedPipeline
from tests import tiny_models

SMALL = {"width": 64, "height": 64}
STEPS = 3


def three(**more):
    return [of(StableDiffusionPipeline, prompt=WORDS[n], num_inference_steps=STEPS, guidance_scale=3.0 + n, seed=n,
               **(SMALL | more)) for n in range(3)]


# --- mistakes in merging that raise nothing -------------------------------------------------------------------------


def test_one_timestep_for_the_whole_batch_would_be_seen(monkeypatch):
    def first(self, values, rows, device):
        return self._spread(values[0], sum(rows), device)

    requests = [request.but(num_inference_steps=STEPS + n) for n, request in enumerate(three())]
    assert compare("sd15", requests).equal()
    plain = columns.OnePerSample.join
    for spoilt in (first, lambda *given: plain(*given) + 1):  # or a timestep that is off by one
        monkeypatch.setattr(columns.OnePerSample, "join", spoilt)
        assert not compare("sd15", requests).equal()


def test_text_padded_without_its_mask_would_be_seen(monkeypatch):
    requests = [of(QwenImagePipeline, prompt=prompt, num_inference_steps=2, true_cfg_scale=1.0, seed=0, **SMALL)
                for prompt in ("a cat", WORDS[1] * 4)]
    assert compare("qwen-image", requests).equal()
    level = merge._pad_text

    def without_mask(calls, rows, multiple):
        level(calls, rows, multiple)
        for call in calls:
            call["encoder_hidden_states_mask"] = torch.ones_like(call["encoder_hidden_states_mask"])

    key = "QwenImageTransformer2DModel", "forward"
    table = dataclasses.replace(merge.TABLES[key], level=without_mask)
    monkeypatch.setitem(merge.TABLES, key, table)
    assert not compare("qwen-image", requests).equal()


@pytest.mark.parametrize(
    ("model", "kind", "column"),
    [("flux", FluxPipeline, columns.Shared), ("qwen-image", QwenImagePipeline, columns.OneShape)],
)
def test_merged_by_the_number_of_tokens_alone_would_be_seen(monkeypatch, model, kind, column):
    requests = [of(kind, prompt="a cat", num_inference_steps=2, seed=n, width=64 + 64 * n, height=128 - 64 * n)
                for n in range(2)]
    monkeypatch.setattr(column, "key", lambda *_: None)
    assert not compare(model, requests).equal()


def test_one_scheduler_for_two_requests_would_be_seen(monkeypatch):
    desk = Desk("sd15")
    euler = EulerDiscreteScheduler.from_config(stock("sd15").scheduler.config)
    requests = [request.but() for request in three()]
    for n, request in enumerate(requests):
        request.scheduler, request.turn = euler, n
    monkeypatch.setattr("models.stepping.rendezvous.copy.deepcopy", lambda scheduler: scheduler)
    told = desk.until_done(requests)
    monkeypatch.undo()
    spoilt = [isinstance(told.ends[n], Exception) or float((told.image(n) - alone("sd15", one)).abs().max()) > CLOSE
              for n, one in enumerate(requests)]
    assert any(spoilt)
    assert compare("sd15", requests).equal()


def test_a_step_cache_is_refused():
    pipeline = tiny_models.qwen_image()
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="transformer has a step cache"):
        SharedPipeline(pipeline, Networks())
    pipeline.transformer.disable_cache()
    SharedPipeline(pipeline, Networks())


def test_networks_in_training_mode_are_put_right():
    pipeline = tiny_models.sd15()
    for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        network.train()
    SharedPipeline(pipeline, Networks())
    assert not any(module.training for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder)
                   for module in network.modules())


def test_a_class_without_a_table_runs_alone_and_says_so_once(capsys):
    class OtherUNet(type(stock("sd15").unet)):
        pass

    pipeline = copy.copy(stock("sd15", StableDiffusionPipeline))
    network = copy.copy(pipeline.unet)
    network.__class__ = OtherUNet
    pipeline.__dict__["unet"] = network
    desk = Desk("sd15")
    desk._shared[StableDiffusionPipeline] = SharedPipeline(pipeline, desk.networks)
    SharedPipeline(pipeline, desk.networks)
    assert capsys.readouterr().err.count("OtherUNet has no merge table") == 1
    rows: list[int] = []
    hook = network.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    told = desk.until_done(three())
    hook.remove()
    assert rows == [2] * 3 * STEPS
    assert all(float((told.image(n) - alone("sd15", one)).abs().max()) <= CLOSE for n, one in enumerate(three()))


def test_a_tensor_that_no_table_knows_keeps_its_call_alone():
    class Counting(torch.nn.Module):
        def forward(self, sample, timestep, class_labels=None, cross_attention_kwargs=None, **more):
            forwards.append(len(sample))
            return (sample,)

    def answered(**more):
        forwards.clear()
        calls = [network.call((torch.full((2, 3), float(n)), torch.tensor(5)), more) for n in range(2)]
        assert calls[0].key == calls[1].key
        assert [float(one[0][0, 0]) for one in network.forward(calls)] == [0, 1]
        return list(forwards)

    Counting.__name__, forwards = "UNet2DConditionModel", []
    network = MergedNetwork("unet", Counting(), Lane.DENOISE)
    region = torch.ones(1)
    assert answered() == answered(cross_attention_kwargs={"scale": 1.0}) == answered(class_labels=torch.ones(2)) == [4]
    assert answered(mystery=region) == answered(cross_attention_kwargs={"region": region}) == [2, 2]
    assert answered(class_labels=torch.ones(1)) == [2, 2]  # not one for each of two samples
    assert network.call((), {"embedded": region}).rows == 1  # no samples where they are expected


def test_flags_must_be_equal_and_of_one_type():
    network = MergedNetwork("unet", stock("sd15").unet, Lane.DENOISE)

    def key(**more):
        return network.call((torch.zeros(2, 4, 8, 8), torch.tensor(5)), more).key

    assert key() == key(return_dict=None) == key(timestep_cond=None)
    assert len({key(), key(return_dict=False), key(return_dict=True), key(cross_attention_kwargs={"scale": 1.0}),
                key(cross_attention_kwargs={"scale": 1}), key(cross_attention_kwargs={"scale": True})}) == 6


def test_a_vae_that_must_be_upcast_is_so_once_for_all_runs():
    """SDXL's pipeline brings it to float32 for a decode and back: another run would find it in the wrong precision."""
    def half():
        return tiny_models.load("sdxl").__class__.from_pretrained(tiny_models.folder("sdxl"), torch_dtype=torch.float16)

    requests = [of(StableDiffusionXLPipeline, prompt=WORDS[n], num_inference_steps=2 + n, seed=n, **SMALL)
                for n in range(2)]
    pipeline = half()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.register_to_config(force_upcast=True)
    wanted = [copy.copy(pipeline)(**request.call()).images for request in requests]
    assert pipeline.vae.dtype == torch.float16
    desk = Desk("sdxl")
    desk._shared[StableDiffusionXLPipeline] = SharedPipeline(pipeline, desk.networks)
    assert pipeline.vae.dtype == torch.float32
    told = desk.until_done(requests)
    assert max(float((told.image(n) - image).abs().max()) for n, image in enumerate(wanted)) < 0.02


# --- leaving --------------------------------------------------------------------------------------------------------


def test_the_stock_way_of_interrupting_still_decodes():
    """Why runs are ended by an exception instead of the pipeline's own flag."""
    pipeline, decoded = copy.copy(stock("sd15", StableDiffusionPipeline)), []
    plain = pipeline.vae.decode
    pipeline.vae.decode = lambda *args, **kwargs: decoded.append(1) or plain(*args, **kwargs)
    try:
        def interrupt(pipe, index, timestep, tensors):
            pipe._interrupt = True
            return {}

        pipeline(prompt="a cat", num_inference_steps=3, callback_on_step_end=interrupt, **SMALL)
    finally:
        del pipeline.vae.decode
    assert decoded == [1]


@pytest.mark.parametrize("turn", range(1, STEPS + 3))
def test_cancelled_at_any_step_nothing_is_decoded_and_the_others_are_as_they_were(turn):
    desk, requests = Desk("sd15"), three()[:2]

    def cancel(now):
        if now == turn:
            desk.cancelled.add(1)

    with spied() as seen:
        told = desk.until_done(requests, cancel)
    assert isinstance(told.ends[1], Cancelled)
    assert [calls for name, _, calls in seen if name == "vae.decode"] == [1]
    assert float((told.image(0) - alone("sd15", requests[0])).abs().max()) <= CLOSE


@pytest.mark.parametrize("step", range(STEPS))
def test_a_fault_in_the_network_at_any_step_is_one_runs(step, monkeypatch):
    """Whoever was merged with it has the same image as without it."""
    desk, requests = Desk("sd15"), three()
    guilty = desk.run(requests[1])
    calls, plain = [], MergedNetwork.forward

    def forward(network, aboard):
        if aboard[0].lane is Lane.DENOISE and any(call in calls for call in aboard):
            raise ZeroDivisionError("of this request")
        return plain(network, aboard)

    send, seen = guilty.send, []

    def watched(answer):
        call = send(answer)
        if call.lane is Lane.DENOISE:
            seen.append(call)
            calls[:] = seen[step:]
        return call

    guilty.send = watched
    monkeypatch.setattr(MergedNetwork, "forward", forward)
    for number, request in enumerate(requests):
        desk.join(number, request, run=guilty if number == 1 else None)
    told = desk.until_done()
    monkeypatch.undo()
    assert isinstance(told.ends[1], ZeroDivisionError)
    for number in (0, 2):
        assert float((told.image(number) - alone("sd15", requests[number])).abs().max()) <= CLOSE


@pytest.mark.parametrize("step", range(STEPS))
def test_out_of_memory_at_any_step_changes_no_image(step, monkeypatch):
    desk, requests, plain, forwards = Desk("sd15"), three(), MergedNetwork.forward, []

    def forward(network, aboard):
        if aboard[0].lane is Lane.DENOISE:
            forwards.append(len(aboard))
            if len(forwards) > step and len(aboard) > 1:
                raise torch.OutOfMemoryError("out of memory")
        return plain(network, aboard)

    monkeypatch.setattr(MergedNetwork, "forward", forward)
    told = desk.until_done(requests)
    monkeypatch.undo()
    assert sum(count > 1 for count in forwards) > step and forwards.count(1) >= 3
    for number, request in enumerate(requests):
        assert float((told.image(number) - alone("sd15", request)).abs().max()) <= CLOSE


def test_a_request_that_does_not_fit_alone_ends_with_words(monkeypatch):
    def forward(network, aboard):
        raise torch.OutOfMemoryError("out of memory")

    desk = Desk("sd15")
    monkeypatch.setattr(MergedNetwork, "forward", forward)
    assert isinstance(desk.until_done(three()[:1]).ends[0], OutOfMemory)


@pytest.mark.parametrize("step", range(STEPS))
def test_waiting_at_any_step_while_an_urgent_request_runs_changes_nothing(step):
    desk, (first, second, _) = Desk("sd15"), three()
    desk.batcher._most_rows = 1  # so that nothing is merged, and the bits can be compared
    desk.join(0, first)
    desk.stepper.advance()  # its words, and words to avoid
    for _ in range(step + 2):
        desk.stepper.advance()
    desk.join(1, second, priority=0)
    told = desk.until_done()
    assert list(told.ends) == [1, 0]
    assert desk.stepper.counters().preemptions == 1
    assert torch.equal(told.image(0), alone("sd15", first)) and torch.equal(told.image(1), alone("sd15", second))


# --- the thread's state ---------------------------------------------------------------------------------------------


def test_pipelines_left_in_another_order_than_entered_switch_gradients_on():
    """The trap itself, without the stepper: two runs by hand, each under its own `no_grad`."""
    torch.set_grad_enabled(True)
    desk = Desk("sd15")
    first, second = (desk.run(request) for request in three()[:2])
    calls = [first.send(None), second.send(None)]
    assert not torch.is_grad_enabled()
    with pytest.raises(StopIteration):
        while True:
            calls[0] = first.send(calls[0].network.forward([calls[0]])[0])
    assert torch.is_grad_enabled()
    second.close()
    torch.set_grad_enabled(True)


def test_the_stepper_keeps_gradients_off():
    torch.set_grad_enabled(True)
    desk, requests = Desk("sd15"), three()
    requests[0].arguments["num_inference_steps"] = 1
    modes = []
    told = desk.until_done(requests, lambda _: modes.append(torch.is_grad_enabled()))
    torch.set_grad_enabled(True)
    assert not any(modes) and not any(told.image(n).requires_grad for n in range(3))


# --- exactness ------------------------------------------------------------------------------------------------------


def test_with_a_fixed_number_of_rows_the_bits_do_not_depend_on_the_company():
    def images(requests):
        desk = Desk("sd15", row_sizes=(8,))
        told = desk.until_done(requests)
        return [told.image(n) for n in range(len(requests))]

    together = images([*three(), of(StableDiffusionImg2ImgPipeline, prompt=WORDS[3], image=picture(), strength=1.0,
                                    num_inference_steps=2, seed=9, guidance_scale=1.0)])
    for number, request in enumerate(three()):
        (by_itself,) = images([request])
        assert torch.equal(together[number], by_itself)
        assert float((by_itself - alone("sd15", request)).abs().max()) <= CLOSE


def test_with_a_fixed_number_of_rows_texts_of_any_length_are_exact_too():
    def images(*prompts):
        desk = Desk("qwen-image", row_sizes=(4,))
        told = desk.until_done([of(QwenImagePipeline, prompt=prompt, true_cfg_scale=1.0, num_inference_steps=2, seed=3,
                                   **SMALL) for prompt in prompts])
        return [told.image(n) for n in range(len(prompts))]

    prompts = ("a cat", WORDS[1], WORDS[1] * 6)
    assert all(torch.equal(image, images(prompt)[0]) for image, prompt in zip(images(*prompts), prompts, strict=True))


# --- what is left behind --------------------------------------------------------------------------------------------


def test_a_run_that_ended_is_gone_without_the_garbage_collector():
    gc.collect()
    gc.disable()
    try:
        desk = Desk("sd15")
        desk.until_done(three()[:1])
        run = desk.run(three()[0])
        pipeline, scheduler = weakref.ref(run._pipeline), weakref.ref(run._pipeline.scheduler)
        desk.join(7, three()[0], run=run)
        del run
        desk.until_done()
        assert pipeline() is None and scheduler() is None
        run = desk.run(three()[0])
        pipeline = weakref.ref(run._pipeline)
        run.send(None)
        run.close()
        assert pipeline() is None
        run = desk.run(three()[0])
        pipeline = weakref.ref(run._pipeline)
        run.send(None)
        with pytest.raises(ZeroDivisionError):
            run.throw(ZeroDivisionError())
        assert pipeline() is None
    finally:
        gc.enable()


def test_nothing_of_a_request_stays_in_the_stock_pipeline():
    pipeline = stock("sd15", StableDiffusionPipeline)
    before, scheduler = dict(vars(pipeline)), copy.deepcopy(vars(pipeline.scheduler))
    desk = Desk("sd15")
    desk.until_done(three())
    assert vars(pipeline) == before and str(vars(pipeline.scheduler)) == str(scheduler)


def test_progress_is_told_step_by_step():
    heun = HeunDiscreteScheduler.from_config(stock("sd15").scheduler.config)
    requests = three()[:1]
    requests.append(of(StableDiffusionPipeline, prompt="a cat", num_inference_steps=3, scheduler=heun, **SMALL))
    told = Desk("sd15").until_done(requests)
    assert told.progress[0] == pytest.approx([1 / 3, 2 / 3, 1])
    assert told.progress[1] == pytest.approx([n / 5 for n in range(1, 6)])  # Heun asks twice a step
