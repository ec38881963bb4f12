"""What the UNet is asked for, and how far off it is: pure functions of tensors."""

import torch
import torch.nn.functional as F

BANDS = 4  # quarters of the timesteps, from the least noise to the most: loss_q0 to loss_q3 in the logs


def add_noise(
    latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, alphas_cumprod: torch.Tensor
) -> torch.Tensor:
    """q(x_t | x_0) = sqrt(a_t) x_0 + sqrt(1 - a_t) noise (DDPM, equation 4).

    Args:
        latents, noise: (B, C, h, w).
        timesteps: (B,) int in [0, T).
        alphas_cumprod: (T,), the scheduler's.
    """
    alpha = alphas_cumprod.to(latents)[timesteps][:, None, None, None]
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise


def prediction_target(
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    prediction_type: str,
) -> torch.Tensor:
    """epsilon: the noise itself. v_prediction: sqrt(a_t) noise - sqrt(1 - a_t) x_0 (Salimans and Ho 2022, app. D)."""
    if prediction_type == "epsilon":
        return noise
    assert prediction_type == "v_prediction", prediction_type
    alpha = alphas_cumprod.to(latents)[timesteps][:, None, None, None]
    return alpha.sqrt() * noise - (1 - alpha).sqrt() * latents


def min_snr_weights(
    timesteps: torch.Tensor, alphas_cumprod: torch.Tensor, gamma: float, prediction_type: str
) -> torch.Tensor:
    """Min-SNR-gamma (Hang et al. 2023, section 3.4), (B,) float32: min(SNR, gamma) over SNR, or over SNR + 1 for v."""
    alpha = alphas_cumprod.float()[timesteps]
    clipped = torch.clamp(alpha / (1 - alpha), max=gamma)
    # SNR + 1 = 1 / (1 - a_t). Written with a_t, a schedule that ends at SNR = 0 divides 0 by 0 only for epsilon,
    # which is undefined there anyway.
    return clipped * (1 - alpha) if prediction_type == "v_prediction" else clipped * (1 - alpha) / alpha


def debiased_weights(timesteps: torch.Tensor, alphas_cumprod: torch.Tensor, prediction_type: str) -> torch.Tensor:
    """Debiased estimation (Yu et al. 2023, arXiv:2310.08442), (B,) float32: 1 / sqrt(SNR) on the error of the noise.

    The error of v is that of the noise times (SNR + 1) / SNR, so that for v the same loss has sqrt(SNR) / (SNR + 1).
    """
    alpha = alphas_cumprod.float()[timesteps]
    weights = (alpha * (1 - alpha)).sqrt()  # sqrt(SNR) / (SNR + 1), which stays finite where SNR is 0: it is 0 there
    return weights if prediction_type == "v_prediction" else weights / alpha


def sample_losses(
    prediction: torch.Tensor,
    target: torch.Tensor,
    weights: torch.Tensor | None = None,
    huber_delta: float | None = None,
) -> torch.Tensor:
    """Mean squared error of each of the B samples, (B,) float32, multiplied by the `weights` (B,). With `huber_delta`
    twice Huber's function in place of the square (Huber 1964): error^2 up to delta, and 2 delta |error| - delta^2
    beyond it."""
    pair = (prediction.float(), target.float())
    if huber_delta is None:
        error = F.mse_loss(*pair, reduction="none")
    else:
        error = 2 * F.huber_loss(*pair, reduction="none", delta=huber_delta)
    error = error.mean(dim=(1, 2, 3))
    return error if weights is None else error * weights


def sums_by_band(losses: torch.Tensor, timesteps: torch.Tensor, num_timesteps: int) -> torch.Tensor:
    """Losses (..., B) summed over each quarter of the timesteps, and how many there were: (..., 2, BANDS)."""
    return sums_by_group(losses, timesteps * BANDS // num_timesteps, BANDS)


def sums_by_group(losses: torch.Tensor, groups: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Losses (..., B) summed over each of the `groups`, (..., B) from 0, and how many there were: (..., 2, G)."""
    member = F.one_hot(groups, num_groups).to(losses.dtype)
    return torch.stack([(losses[..., None] * member).sum(-2), member.sum(-2)], dim=-2)
