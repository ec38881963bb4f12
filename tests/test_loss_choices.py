"""Losses and noise schedules to choose from: Huber, debiased estimation, zero terminal SNR."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler, StableDiffusionInstructPix2PixPipeline

from instruct_pix2pix.cli import UserError
from instruct_pix2pix.data.triples import diffusion_draws
from instruct_pix2pix.models.trained import load_pipeline
from instruct_pix2pix.training.loss import (
    add_noise,
    debiased_weights,
    min_snr_weights,
    prediction_target,
    sample_losses,
)
from instruct_pix2pix.training.options import parse_args
from tests.conftest import assert_same_tensors, copy_tree, losses, small_photo

UNET = "unet/diffusion_pytorch_model.safetensors"


def with_scheduler(base: Path, folder: Path, **changed) -> Path:
    """A copy of a base model with another scheduler configuration."""
    copy_tree(base, folder)
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    return folder


def test_a_schedule_without_signal_is_refused_with_epsilon_before_weights_load(base_models, small_run, tmp_path):
    """Its first step divides by zero: the edits would be no numbers at all."""
    kind = {"prediction_type": "epsilon", "rescale_betas_zero_snr": True}
    base = with_scheduler(base_models["finetune"], tmp_path / "base", **kind)
    (base / UNET).write_bytes(b"unread")
    with pytest.raises(UserError, match="predicts epsilon.* with rescale_betas_zero_snr") as caught:
        small_run(pretrained_model_name_or_path=base)
    assert "\n" not in str(caught.value)


# ---- timesteps


@pytest.mark.parametrize(("multiplier", "portion", "share"), [(1, 0.1, 0.1), (9, 0.1, 0.5), (0.25, 0.5, 0.2)])
def test_the_noisiest_timesteps_are_drawn_so_many_times_as_often(multiplier, portion, share):
    args = Namespace(seed=3, timestep_bias_multiplier=multiplier, timestep_bias_portion=portion, embedding_noise=0.0)
    drawn = np.array([diffusion_draws(args, position, (1, 1, 1), 1000)["timestep"] for position in range(4000)])
    assert np.mean(drawn >= 1000 * (1 - portion)) == pytest.approx(share, abs=0.03)
    # Within either part all are alike, from end to end.
    for part in (drawn[drawn >= 1000 * (1 - portion)], drawn[drawn < 1000 * (1 - portion)]):
        assert np.mean(part) == pytest.approx((part.min() + part.max()) / 2, rel=0.05)
    assert drawn.min() < 10 and drawn.max() > 990


def test_biased_timesteps_train_another_model(small_run):
    plain, biased = small_run(name="plain"), small_run(name="biased", timestep_bias_multiplier=9.0)
    assert losses(plain) != losses(biased)
    with pytest.raises(UserError, match="^--timestep_bias_portion: 1.0 is no share"):
        small_run(name="wrong", timestep_bias_multiplier=9.0, timestep_bias_portion=1.0)


# ---- zero terminal SNR


def test_zero_terminal_snr_by_flag_or_by_the_base_is_one(base_models, small_run, tmp_path):
    """The same training, and an export and checkpoints that sample by that schedule from its very end."""
    flags = {"snr_gamma": 5.0, "max_train_steps": 2}
    flagged = small_run(name="flagged", zero_terminal_snr=True, **flags)
    changed = {"rescale_betas_zero_snr": True, "timestep_spacing": "leading"}
    base = with_scheduler(base_models["finetune"], tmp_path / "base", **changed)
    inherited = small_run(name="inherited", pretrained_model_name_or_path=base, **flags)
    plain = small_run(name="plain", **flags)
    assert losses(flagged) == losses(inherited) != losses(plain)
    assert_same_tensors(flagged / UNET, inherited / UNET)

    for run in (flagged, inherited):
        pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(run)
        assert type(pipeline.scheduler) is DDPMScheduler
        assert pipeline.scheduler.alphas_cumprod[-1] == 0
        pipeline.scheduler.set_timesteps(4)
        assert pipeline.scheduler.timesteps[0] == 999
        assert load_pipeline(run / "checkpoint-2", torch.float32).scheduler.config == pipeline.scheduler.config
        pipeline.set_progress_bar_config(disable=True)
        latents = pipeline("", image=small_photo(), num_inference_steps=2, output_type="latent").images
        assert latents.isfinite().all()
    assert json.loads((plain / "scheduler/scheduler_config.json").read_text())["rescale_betas_zero_snr"] is False


def test_a_scheduler_that_has_no_such_schedule_gives_way_to_ddim(base_models, small_run, tmp_path):
    base = copy_tree(base_models["finetune"], tmp_path / "base")
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    PNDMScheduler(**betas, prediction_type="v_prediction", skip_prk_steps=True).save_pretrained(base / "scheduler")
    run = small_run(pretrained_model_name_or_path=base, zero_terminal_snr=True, max_train_steps=1)
    scheduler = StableDiffusionInstructPix2PixPipeline.from_pretrained(run).scheduler
    assert type(scheduler) is DDIMScheduler and not scheduler.config.clip_sample
    assert scheduler.alphas_cumprod[-1] == 0 and scheduler.config.prediction_type == "v_prediction"


# ---- losses


def without_signal() -> torch.Tensor:
    """alphas_cumprod (1000,), the last of them 0."""
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDPMScheduler(**schedule, rescale_betas_zero_snr=True).alphas_cumprod


def test_huber_is_the_square_up_to_delta_and_linear_beyond():
    """By hand with delta 0.1: 0.05^2 = 0.0025, 2 * 0.1 * 1 - 0.1^2 = 0.19."""
    prediction = torch.tensor([[0.05, -0.05], [1.0, -1.0], [0.05, 1.0]])[:, None, None]
    found = sample_losses(prediction, torch.zeros_like(prediction), huber_delta=0.1)
    torch.testing.assert_close(found, torch.tensor([0.0025, 0.19, 0.09625]))
    weighted = sample_losses(prediction, torch.zeros_like(prediction), torch.tensor([0.0, 1.0, 2.0]), huber_delta=0.1)
    torch.testing.assert_close(weighted, torch.tensor([0.0, 0.19, 0.1925]))


def test_debiased_weights_by_hand():
    """SNR 4, 1 and 1/4: 1 / sqrt(SNR) on the noise, sqrt(SNR) / (SNR + 1) on v."""
    alphas, timesteps = torch.tensor([0.8, 0.5, 0.2]), torch.arange(3)
    torch.testing.assert_close(debiased_weights(timesteps, alphas, "epsilon"), torch.tensor([0.5, 1.0, 2.0]))
    torch.testing.assert_close(debiased_weights(timesteps, alphas, "v_prediction"), torch.tensor([0.4, 0.5, 0.4]))


@pytest.mark.parametrize("weighting", [debiased_weights, lambda t, a, kind: min_snr_weights(t, a, 5.0, kind)])
def test_a_weighted_loss_is_the_same_for_noise_and_v(weighting):
    """One guess of the clean latents is one guess of the noise and one of v."""
    generator = torch.Generator().manual_seed(0)
    latents, noise, guess = torch.randn(3, 5, 4, 8, 8, generator=generator).double()
    alphas, timesteps = (
        DDPMScheduler(beta_schedule="scaled_linear").alphas_cumprod,
        torch.tensor([1, 100, 400, 700, 999]),
    )
    noisy, alpha = add_noise(latents, noise, timesteps, alphas), alphas[timesteps][:, None, None, None].double()
    guessed_noise = (noisy - alpha.sqrt() * guess) / (1 - alpha).sqrt()
    found = []
    for kind in ("epsilon", "v_prediction"):
        prediction = prediction_target(guess, guessed_noise, timesteps, alphas, kind)
        target = prediction_target(latents, noise, timesteps, alphas, kind)
        found.append(sample_losses(prediction, target, weighting(timesteps, alphas, kind)))
    torch.testing.assert_close(*found, rtol=2e-3, atol=1e-6)


def test_weights_of_v_stay_finite_where_there_is_no_signal():
    alphas, timesteps = without_signal(), torch.tensor([0, 500, 998, 999])
    assert alphas[-1] == 0
    for weights in (
        debiased_weights(timesteps, alphas, "v_prediction"),
        min_snr_weights(timesteps, alphas, 5.0, "v_prediction"),
    ):
        assert weights.isfinite().all() and (weights[:3] > 0).all() and weights[3] == 0
    latents, noise = torch.randn(2, 4, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(add_noise(latents, noise, timesteps, alphas)[3], noise[3])
    assert torch.equal(prediction_target(latents, noise, timesteps, alphas, "v_prediction")[3], -latents[3])


def numbers(run: Path) -> list[dict]:
    """Each update's loss and its bands, from the log."""
    lines = map(json.loads, (run / "training_log.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name.startswith("loss")} for line in lines]


def test_the_log_shows_the_loss_that_is_trained_whole_and_by_band(small_run):
    """Huber's function with a huge delta is the square; with a small one it is less, in every band. Debiased weights
    are below 1 for v."""
    flags = {"max_train_steps": 1, "train_batch_size": 8, "gradient_accumulation_steps": 1}
    square = numbers(small_run(name="square", **flags))
    wide = numbers(small_run(name="wide", loss_type="huber", huber_delta=1e4, **flags))
    for one, other in zip(square, wide, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    for name, choice in {"huber": {"loss_type": "huber"}, "debiased": {"debiased_estimation_loss": True}}.items():
        first = numbers(small_run(name=name, **choice, **flags))[0]
        assert first.keys() == square[0].keys() and len(first) > 2
        assert all(0 < first[part] < 0.6 * square[0][part] for part in first)


def test_two_weightings_at_once_are_refused():
    needed = ["--pretrained_model_name_or_path=model", "--dataset_name=data"]
    with pytest.raises(UserError, match="--debiased_estimation_loss: not allowed with argument --snr_gamma"):
        parse_args("", [*needed, "--snr_gamma=5", "--debiased_estimation_loss"])
    with pytest.raises(UserError, match="--huber_delta: 0 is out of range"):
        parse_args("", [*needed, "--huber_delta=0"])
