"""From the sample stream to accumulation windows, and from a window to what the UNet sees and has to predict."""

import torch

from instruct_pix2pix.cli import UserError
from instruct_pix2pix.data import latent_cache
from instruct_pix2pix.data.order import window_positions
from instruct_pix2pix.data.triples import TripleDataset, collate, to_unit_range
from instruct_pix2pix.models import sd
from instruct_pix2pix.training.conditioning import drop_conditioning, word_noise
from instruct_pix2pix.training.loss import add_noise, debiased_weights, min_snr_weights, prediction_target
from instruct_pix2pix.training.stopping import leave_stopping_to_the_trainer


class WindowLoader:
    """What this process does in each update still to do, one accumulation window at a time."""

    def __init__(self, plan, cache, latent_shape: tuple[int, int, int], num_timesteps: int):
        config, accelerator = plan.config, plan.accelerator
        if cache is not None:
            dataset = latent_cache.CachedTriples(cache, plan.triples, config, latent_shape, num_timesteps)
        else:
            dataset = TripleDataset(plan.triples, config, latent_shape, num_timesteps)
        process = (accelerator.process_index, accelerator.num_processes)
        window = (config.train_batch_size, config.gradient_accumulation_steps)
        self.triples = plan.triples
        self.loader = iter(
            torch.utils.data.DataLoader(
                dataset,
                batch_sampler=(
                    window_positions(plan.first_position, step, *window, *process)
                    for step in range(config.max_train_steps - plan.first_step)
                ),
                collate_fn=collate,
                num_workers=config.dataloader_num_workers,
                worker_init_fn=leave_stopping_to_the_trainer,
                pin_memory=accelerator.device.type == "cuda",
            )
        )

    def __next__(self) -> dict:
        """The next window. Rows that cannot be used are noted, or raise RowError where they are an error."""
        window = next(self.loader)
        if isinstance(window, UserError):
            raise window
        self.triples.leave_out(window.pop("skipped"))
        return window

    def close(self) -> None:
        """End the loader's processes."""
        self.loader = iter(())


class WindowEncoder:
    """Encodes, noises and drops conditioning (InstructPix2Pix, section 3.2) for the W samples of a window.

    Calling it returns noisy (W, 2C, h, w): the noised latents beside the original's; timesteps (W,); text (W, L, D);
    target (W, C, h, w); weights (W,) of the samples' losses. On a GPU that is launched on a stream of its own, beside
    the update before, which the host is ahead of.
    """

    def __init__(
        self, config, device, tokenizer, text_encoder, vae, cache, alphas_cumprod, prediction_type: str, base=None
    ):
        """`base` is the frozen base model's UNet, where a dataset is replayed."""
        self.base = base
        self.config, self.device, self.prediction_type = config, device, prediction_type
        self.tokenizer, self.text_encoder, self.vae, self.cache = tokenizer, text_encoder, vae, cache
        self.alphas_cumprod = alphas_cumprod.to(device)  # (T,)
        self.null_embedding = self.embed([""])  # (1, L, D)
        self.stream = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream()
            self.stream.wait_stream(torch.cuda.current_stream())  # for what was built so far: models, cache

    def __call__(self, window: dict) -> dict[str, torch.Tensor]:
        if self.stream is None:
            return self._encode(window)
        with torch.cuda.stream(self.stream):
            tensors = self._encode(window)
        current = torch.cuda.current_stream()
        current.wait_stream(self.stream)
        for tensor in tensors.values():
            tensor.record_stream(current)  # its memory is not given away before the update has read it
        return tensors

    @torch.no_grad()
    def _encode(self, window: dict) -> dict[str, torch.Tensor]:
        config = self.config
        if self.cache is not None:
            text, image_latents, latents = self.cache.look_up(window, self.device)
            ids = self.cache.ids[window["text"]]
        else:
            image_latents, latents = self.encode_pairs(window)
            ids = sd.tokenize(self.tokenizer, window["instructions"])
        if config.embedding_noise:
            table, most = self.text_encoder.get_input_embeddings(), config.embedding_noise
            noise = word_noise(table.weight, ids, self.tokenizer.eos_token_id, window["embedding_seed"], most)
            with table.register_forward_hook(lambda module, inputs, vectors: vectors + noise):
                text = self.encode(ids)
        elif self.cache is None:
            text = self.encode(ids)
        moved = {name: window[name].to(self.device, non_blocking=True) for name in ("noise", "timesteps", "dropout")}
        text, image_latents = drop_conditioning(
            text, image_latents, self.null_embedding, moved["dropout"], config.conditioning_dropout_prob
        )
        weights, schedule = torch.ones_like(moved["dropout"]), (moved["timesteps"], self.alphas_cumprod)
        if config.snr_gamma:
            weights = min_snr_weights(*schedule, config.snr_gamma, self.prediction_type)
        elif config.debiased_estimation_loss:
            weights = debiased_weights(*schedule, self.prediction_type)
        inputs = self.add_noise(text, image_latents, latents, moved["noise"], moved["timesteps"])
        if self.base is not None:
            self._replay(inputs, window["replay"].nonzero().flatten())
        return inputs | {"weights": weights}

    def _replay(self, inputs: dict[str, torch.Tensor], places: torch.Tensor) -> None:
        """Put what the base predicts of the same inputs into the target of some samples: a model that learns something
        else beside keeps what the base does of them (learning without forgetting, Li and Hoiem 2016, section 3)."""
        # Of no places at all, split would give one empty part.
        for chosen in places.split(self.config.train_batch_size) if len(places) else ():
            chosen = chosen.to(self.device, non_blocking=True)
            noisy, text = (inputs[name][chosen].to(self.base.dtype) for name in ("noisy", "text"))
            prediction = self.base(noisy, inputs["timesteps"][chosen], text, return_dict=False)[0]
            inputs["target"][chosen] = prediction.to(inputs["target"].dtype)

    def add_noise(self, text, image_latents, latents, noise, timesteps) -> dict[str, torch.Tensor]:
        """What the UNet sees and has to predict of clean latents: all that a call returns but the weights."""
        return {
            "noisy": torch.cat([add_noise(latents, noise, timesteps, self.alphas_cumprod), image_latents], dim=1),
            "timesteps": timesteps,
            "text": text,
            "target": prediction_target(latents, noise, timesteps, self.alphas_cumprod, self.prediction_type),
        }

    def embed(self, instructions: list[str]) -> torch.Tensor:
        """(B, L, D), of the text encoder's precision."""
        return self.encode(sd.tokenize(self.tokenizer, instructions))

    def encode(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, L, D) of tokens (B, L)."""
        return sd.encode_text(self.text_encoder, ids.to(self.text_encoder.device)).to(self.device)

    def encode_pairs(self, window: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents of the originals and of the edited images, (B, C, h, w) float32, see sd.encode_pair."""
        pairs_per_pass = max(1, sd.PIXELS_PER_PASS // self.config.resolution**2)
        columns = (window[name].split(pairs_per_pass) for name in ("original", "edited", "posterior_noise"))
        encoded = []
        for original, edited, noise in zip(*columns, strict=True):
            original, edited = (to_unit_range(side.to(self.device, non_blocking=True)) for side in (original, edited))
            encoded.append(sd.encode_pair(self.vae, original, edited, noise.to(self.device, non_blocking=True)))
        image_latents, latents = (torch.cat(side) for side in zip(*encoded, strict=True))
        return image_latents, latents

    def blank_window(self, latent_side: int) -> dict:
        """A window of black pictures, of the shapes that training will have: to try things on."""
        config = self.config
        size = config.train_batch_size * config.gradient_accumulation_steps
        latents = torch.zeros(size, self.vae.config.latent_channels, latent_side, latent_side)
        zeros = torch.zeros(size, dtype=torch.long)
        window = {"noise": latents, "posterior_noise": latents, "timesteps": zeros, "dropout": torch.ones(size)}
        window |= {"replay": torch.ones(size, dtype=torch.bool), "embedding_seed": zeros}
        if self.cache is not None:
            return window | {"row": zeros, "variant": zeros, "text": zeros}
        pixels = torch.zeros(size, 3, config.resolution, config.resolution, dtype=torch.uint8)
        return window | {"original": pixels, "edited": pixels, "instructions": [""] * size}
