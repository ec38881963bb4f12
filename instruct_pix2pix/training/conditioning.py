"""What training does to the conditioning: the three-way dropout that makes two-scale guidance possible
(InstructPix2Pix, section 3.2.1), and noise on the words of instructions."""

import torch


def dropout_masks(uniform: torch.Tensor, probability: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Which samples keep their instruction and which keep their image.

    One uniform draw decides between three exclusive events of equal probability p: instruction only (u < p), both
    (p <= u < 2p), image only (2p <= u < 3p).

    Args:
        uniform: (B,) float in [0, 1).
        probability: p, 0 to 1/3; 0.05 in the paper.

    Returns:
        keep_text (B,) bool, keep_image (B,) bool.
    """
    keep_text = uniform >= 2 * probability
    keep_image = (uniform < probability) | (uniform >= 3 * probability)
    return keep_text, keep_image


def drop_conditioning(
    text_embeddings: torch.Tensor,
    image_latents: torch.Tensor,
    null_embedding: torch.Tensor,
    uniform: torch.Tensor,
    probability: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace dropped instructions by the null prompt's embedding and dropped images by zero latents.

    Args:
        text_embeddings: (B, L, D).
        image_latents: (B, C, h, w), unscaled mode of the VAE's posterior.
        null_embedding: (1, L, D), the empty prompt.
        uniform: (B,) float in [0, 1).
        probability: of each of the three events.
    """
    keep_text, keep_image = dropout_masks(uniform, probability)
    text_embeddings = torch.where(keep_text[:, None, None], text_embeddings, null_embedding)
    image_latents = image_latents * keep_image[:, None, None, None]
    return text_embeddings, image_latents


def word_noise(table: torch.Tensor, ids: torch.Tensor, end: int, seeds: torch.Tensor, most: float) -> torch.Tensor:
    """Noise for the vectors of the words of instructions, (B, L, D) as what the table has for `ids`.

    It teaches that words near the known ones mean the same, and to look at the image where words mean nothing. As in
    NEFTune (Jain et al. 2023, section 2) it goes to the vectors, before the encoder's layers. Unlike there it is
    normal, and of each sample as large as a draw from [0, most] says, in standard deviations of the table.

    Args:
        table: (V, D), the vectors of all words.
        ids: (B, L) tokens. Those of start and end, and the padding, get none.
        end: the token of the end.
        seeds: (B,) int64, of the samples' draws.
        most: 0 or more.
    """
    words = (ids != end).cumprod(dim=1)
    words[:, 0] = 0
    noise = []
    for seed in seeds.tolist():
        generator = torch.Generator().manual_seed(seed)
        size = most * torch.rand((), generator=generator)
        noise.append(size * torch.randn(ids.shape[1], table.shape[1], generator=generator))
    noise = (torch.stack(noise) * words[..., None]).to(table.device)
    return (noise * table.float().std()).to(table.dtype)
