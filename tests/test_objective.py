"""The mathematics: noise, targets, weights, dropout, EMA, the widened UNet."""

import contextlib
import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel, compute_snr

from instruct_pix2pix.data.order import SampleOrder, stream, window_positions
from instruct_pix2pix.models.sd import widen_conv_in
from instruct_pix2pix.training.conditioning import drop_conditioning, dropout_masks, word_noise
from instruct_pix2pix.training.ema import EMA, ema_decay
from instruct_pix2pix.training.loss import add_noise, min_snr_weights, prediction_target, sample_losses

SCHEDULER = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 6, 4, 8, 8, generator=generator)
    timesteps = torch.tensor([0, 1, 200, 500, 998, 999])
    return latents, noise, timesteps


def test_noising_and_targets_agree_with_diffusers(batch):
    latents, noise, timesteps = batch
    alphas = SCHEDULER.alphas_cumprod
    torch.testing.assert_close(
        add_noise(latents, noise, timesteps, alphas), SCHEDULER.add_noise(latents, noise, timesteps)
    )
    assert prediction_target(latents, noise, timesteps, alphas, "epsilon") is noise
    torch.testing.assert_close(
        prediction_target(latents, noise, timesteps, alphas, "v_prediction"),
        SCHEDULER.get_velocity(latents, noise, timesteps),
    )


def test_min_snr_weights_agree_with_diffusers_snr(batch):
    _, _, timesteps = batch
    snr = compute_snr(SCHEDULER, timesteps)
    clipped = torch.clamp(snr, max=5.0)
    weights = min_snr_weights(timesteps, SCHEDULER.alphas_cumprod, 5.0, "epsilon")
    torch.testing.assert_close(weights, clipped / snr)
    weights = min_snr_weights(timesteps, SCHEDULER.alphas_cumprod, 5.0, "v_prediction")
    torch.testing.assert_close(weights, clipped / (snr + 1))


def test_loss_is_float32_and_weighted_per_sample(batch):
    latents, noise, _ = batch
    assert sample_losses(latents.half(), noise.half()).dtype == torch.float32
    torch.testing.assert_close(sample_losses(latents, noise).mean(), torch.nn.functional.mse_loss(latents, noise))
    only_first = torch.tensor([6.0, 0, 0, 0, 0, 0])
    torch.testing.assert_close(
        sample_losses(latents, noise, only_first).mean(), torch.nn.functional.mse_loss(latents[:1], noise[:1])
    )


def test_dropout_events_are_exclusive_and_have_the_papers_proportions():
    uniform = torch.from_numpy(np.array([stream(3, "dropout", i).random() for i in range(20_000)]))
    keep_text, keep_image = dropout_masks(uniform, 0.05)
    text_only = (~keep_text & keep_image).double().mean().item()
    image_only = (keep_text & ~keep_image).double().mean().item()
    both = (~keep_text & ~keep_image).double().mean().item()
    for share in (text_only, image_only, both):
        assert share == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / 20_000))
    keep_text, keep_image = dropout_masks(uniform, 0.0)
    assert keep_text.all() and keep_image.all()
    keep_text, keep_image = dropout_masks(uniform, 1 / 3)
    assert not (keep_text & keep_image).any()


def test_dropped_conditions_become_the_null_prompt_and_zero_latents():
    text, null = torch.randn(3, 5, 2), torch.randn(1, 5, 2)
    image = torch.randn(3, 4, 2, 2)
    uniform = torch.tensor([0.01, 0.06, 0.12])  # text only, both, image only, at p = 0.05
    new_text, new_image = drop_conditioning(text, image, null, uniform, 0.05)
    assert torch.equal(new_text[0], null[0]) and torch.equal(new_image[0], image[0])
    assert torch.equal(new_text[1], null[0]) and not new_image[1].any()
    assert torch.equal(new_text[2], text[2]) and not new_image[2].any()


def test_noise_goes_to_the_words_alone_as_large_as_the_sample_draws_it():
    end, padding = 90, 0  # Stable Diffusion 2's padding is a word's token
    ids = torch.full((400, 12), padding)
    ids[:, :6] = torch.tensor([89, 5, 6, 7, 8, end])
    table = 3 * torch.randn(100, 32, generator=torch.Generator().manual_seed(0))
    noise = word_noise(table, ids, end, torch.arange(400), 2.0)
    assert noise.shape == (400, 12, 32) and not noise[:, 0].any() and not noise[:, 5:].any()
    sizes = noise[:, 1:5].std((1, 2)) / table.std()
    assert 0 < sizes.min() < 0.1 and 1.8 < sizes.max() < 2.3 and sizes.mean() == pytest.approx(1, abs=0.1)
    assert torch.equal(word_noise(table, ids[:1], end, torch.tensor([7]), 2.0), noise[7:8])
    assert not word_noise(table, torch.tensor([[89, end, end]]), end, torch.tensor([0]), 2.0).any()  # the null prompt


def test_widened_unet_predicts_what_stable_diffusion_did(base_models):
    """New weights zero, old weights and bias kept: step 0 is the base model's own prediction, whatever the image."""
    unet = UNet2DConditionModel.from_pretrained(base_models["train"], subfolder="unet")
    with torch.no_grad():
        unet.conv_in.bias.uniform_(-1, 1, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(0)
    noisy, image = torch.randn(2, 2, 4, 16, 16, generator=generator)
    text = torch.randn(2, 77, unet.config.cross_attention_dim, generator=generator)
    timesteps = torch.tensor([3, 700])
    with torch.no_grad():
        before = unet(noisy, timesteps, text).sample
        bias = unet.conv_in.bias.clone()
        widen_conv_in(unet)
        after = unet(torch.cat([noisy, image], dim=1), timesteps, text).sample
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert unet.config.in_channels == 8 and unet.conv_in.weight.shape[1] == 8
    assert not unet.conv_in.weight[:, 4:].any() and torch.equal(unet.conv_in.bias, bias)


def test_ema_agrees_with_diffusers_and_swaps_out_again():
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(5, 3, generator=generator)) for _ in range(4)]
    ours, theirs = EMA(parameters, decay=0.98), EMAModel(parameters, decay=0.98)
    for _ in range(30):
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(torch.randn(5, 3, generator=generator))
        ours.update()
        theirs.step(parameters)
    for mine, reference in zip(ours.shadow, theirs.shadow_params, strict=True):
        torch.testing.assert_close(mine, reference)
    own = [p.detach().clone() for p in parameters]
    with pytest.raises(KeyError), ours.swapped_in():
        assert all(torch.equal(p, s) for p, s in zip(parameters, ours.shadow, strict=True))
        raise KeyError
    assert all(torch.equal(p, o) for p, o in zip(parameters, own, strict=True))


def test_ema_decay_warms_up_to_its_limit():
    assert [ema_decay(t, 0.9999) for t in (0, 1, 8)] == [0.0, 2 / 11, 9 / 18]
    assert ema_decay(10**6, 0.9999) == 0.9999


def test_offloaded_ema_lives_in_cpu_memory_and_gives_the_same_average():
    parameter = torch.nn.Parameter(torch.ones(3))
    plain, offloaded = EMA([parameter], 0.9), EMA([parameter], 0.9, offload=True)
    with torch.no_grad():
        parameter.mul_(3)
    for ema in (plain, offloaded):
        ema.update(), ema.update()
    assert torch.equal(plain.shadow[0], offloaded.shadow[0]) and offloaded.shadow[0].device.type == "cpu"


def train_and_average(ema, updates=12):
    """Steps of SGD, as a training loop runs them; returns the average after each third one, and at the end."""
    optimizer = torch.optim.SGD(ema.live, lr=0.1)
    seen = []
    for number in range(1, updates + 1):
        for parameter in ema.live:
            parameter.grad = torch.full_like(parameter, number)
        ema.finish_update()
        optimizer.step()
        ema.update()
        if number % 3 == 0:
            seen += [s.clone() for s in ema.shadow]
    with ema.swapped_in():
        return seen + [p.detach().cpu() for p in ema.live]


class LateCopies:
    """A stream and an event of a GPU that copies at the last moment: when someone waits for it."""

    def __init__(self):
        self.queue = []

    def wait_stream(self, stream):
        pass

    def record(self):
        pass

    def synchronize(self):
        while self.queue:
            self.queue.pop(0)()


def test_offloaded_ema_waits_for_its_copy_of_the_weights(monkeypatch):
    """Where the copy runs beside the next update it holds the weights of its own, however late it is."""
    plain, offloaded = (EMA([torch.nn.Parameter(torch.ones(3))], 0.9, offload=True) for _ in range(2))
    expected = train_and_average(plain)
    late, copy = LateCopies(), torch.no_grad()(torch._foreach_copy_)
    offloaded._landing, offloaded._stream, offloaded._copied = [torch.full((3,), torch.nan)], late, late
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *lists, **_: late.queue.append(lambda: copy(*lists)))
    torch.testing.assert_close(train_and_average(offloaded), expected, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offloaded_ema_of_weights_on_a_gpu_is_the_same_average():
    def model():
        torch.manual_seed(0)
        layers = (torch.nn.Conv2d(64, 256, 3), torch.nn.Linear(2048, 2048))
        return torch.nn.Sequential(*layers).cuda().to(memory_format=torch.channels_last).parameters()

    expected, averages = (train_and_average(EMA(model(), 0.9, offload)) for offload in (False, True))
    torch.testing.assert_close(averages, [average.cpu() for average in expected])


def test_sample_order_visits_every_row_once_an_epoch_and_anew_each_epoch():
    order = SampleOrder(num_rows=7, seed=1)
    epochs = [[order.locate(7 * epoch + i) for i in range(7)] for epoch in range(3)]
    for number, epoch in enumerate(epochs):
        assert {e for e, _ in epoch} == {number} and sorted(row for _, row in epoch) == list(range(7))
    assert epochs[0] != epochs[1] and [r for _, r in epochs[0]] != [r for _, r in epochs[1]]


def test_ranks_and_windows_share_out_every_position_exactly_once():
    windows = [
        window_positions(100, step, batch_size=5, accumulation=2, rank=rank, world_size=4)
        for step in range(3)
        for rank in range(4)
    ]
    assert all(len(window) == 10 for window in windows)
    assert sorted(sum(windows, [])) == list(range(100, 100 + 3 * 2 * 4 * 5))
    # By the micro-batch: rank 1's second starts after all ranks' first.
    assert windows[1] == [*range(105, 110), *range(125, 130)]


def test_streams_are_independent_and_repeatable():
    draws = {(name, i): stream(5, name, i).random() for name in ("dropout", "diffusion") for i in range(3)}
    assert len(set(draws.values())) == 6
    assert stream(5, "dropout", 1).random() == draws["dropout", 1] != stream(6, "dropout", 1).random()
