"""Ways of running an update: predict, loss, backward, clip, AdamW, average. One is chosen before the first update.

All have `run(inputs, learning_rate) -> (loss, gradient norm, sample losses)` and compute the same but for rounding.
`inputs` are those of inputs.WindowEncoder.
"""

import contextlib
import logging
import warnings

import torch

from instruct_pix2pix.cli import MemoryShortage, first_line
from instruct_pix2pix.devices import is_out_of_memory
from instruct_pix2pix.models import adapters
from instruct_pix2pix.training import optimizers, sharding
from instruct_pix2pix.training.loss import sample_losses

logger = logging.getLogger(__name__)

ROOM_BESIDE = 0.1  # of a GPU's memory, left free by a micro-batch that fits: for validation and fragments


class Update:
    """An update as accelerate and PyTorch's fused AdamW run it."""

    def __init__(self, config, accelerator, model, optimizer, ema, micro_batch_size: int):
        """`model` is the UNet as accelerate prepared it, `optimizer` over its parameters likewise, `ema` an EMA or
        None; `micro_batch_size` samples go through in one forward pass."""
        self.accelerator, self.model, self.optimizer, self.ema = accelerator, model, optimizer, ema
        self.micro_batch_size, self.max_grad_norm = micro_batch_size, config.max_grad_norm
        self.parameters = list(adapters.trained_parameters(model).values())
        self.huber_delta = config.huber_delta if config.loss_type == "huber" else None
        self.state_bytes = optimizers.STATE_BYTES.get(config.optimizer, 8)  # of the optimizer, for each trained number
        self.sharded = sharding.is_sharded(model)

    def run(self, inputs: dict[str, torch.Tensor], learning_rate: float) -> tuple[torch.Tensor, ...]:
        """One update; returns the mean loss of the window, the gradient's norm before clipping, and the losses (W,) of
        the window's samples, left on the device."""
        loss, losses = self.forward_backward(inputs)
        norm = self.clip_and_step(learning_rate)
        self.drop_gradients()
        return loss, norm, losses

    def forward_backward(
        self, inputs: dict[str, torch.Tensor], synchronise: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict, compare, and add up gradients, one micro-batch after another; returns the window's mean loss and the
        losses of its samples.

        Processes exchange gradients in the last backward pass, unless `synchronise` is off. Of a sharded UNet they do
        in every pass: whole gradients would take the memory that sharding saves.
        """
        micro_batches = list(zip(*(tensor.split(self.micro_batch_size) for tensor in inputs.values()), strict=True))
        window_loss, window_losses = torch.zeros((), device=self.accelerator.device), []
        for number, (noisy, timesteps, text, target, weights) in enumerate(micro_batches, start=1):
            exchange = synchronise and (self.sharded or number == len(micro_batches))
            with contextlib.nullcontext() if exchange else self.accelerator.no_sync(self.model):
                prediction = self.model(noisy, timesteps, text, return_dict=False)[0]
                losses = sample_losses(prediction, target, weights, self.huber_delta)
                loss = losses.mean() / len(micro_batches)
                self.accelerator.backward(loss)
            window_loss += loss.detach()
            window_losses.append(losses.detach())
        return window_loss, torch.cat(window_losses)

    def clip_and_step(self, learning_rate: float) -> torch.Tensor:
        """Clip to --max_grad_norm, step, move the average; returns the norm before clipping."""
        self.accelerator.unscale_gradients(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.sharded:
            norm = norm.full_tensor()
        inner = self.optimizer.optimizer
        if type(inner) is torch.optim.AdamW and not self.sharded:
            # Fused AdamW divides by `grad_scale` while it reads the gradients, which saves a pass over them.
            inner.grad_scale = ((norm + 1e-6) / self.max_grad_norm).clamp(min=1.0)
        else:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.ema is not None:
            self.ema.finish_update()  # before the weights change again
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update()
        return norm

    def drop_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def rehearse(self, inputs: dict[str, torch.Tensor], reserve: int = 0) -> None:
        """Run the passes for nothing, beside `reserve` bytes. Processes exchange nothing: none waits."""
        held = torch.empty(reserve, dtype=torch.uint8, device=self.accelerator.device)
        try:
            self.forward_backward(inputs, synchronise=False)
        finally:
            del held
            self.drop_gradients()


# ---- choosing


def choose_update(config, accelerator, model, optimizer, ema, make_inputs) -> Update:
    """The way of running updates that the flags ask for and the machine can do.

    `make_inputs()` gives the inputs of a blank window, made the way that training makes them, so that what the encoders
    need is tried too. What a machine cannot do is said in one line and left out.
    """
    sizes, parts = micro_batch_sizes(config), (config, accelerator, model, optimizer, ema)
    size = sizes[0]
    if accelerator.device.type == "cuda" and len(sizes) > 1:
        size = largest_that_fits(sizes, lambda size: Update(*parts, size), make_inputs)
        logger.info("--max_micro_batch_size auto: %d images in a forward pass", size)
    if not config.compile:
        return Update(*parts, size)
    on_cpu = accelerator.device.type == "cpu"
    logger.info("compiling the UNet%s", ": on a CPU that takes minutes and gains nothing" if on_cpu else "")
    try:
        compiled = Update(config, accelerator, torch.compile(model), optimizer, ema, size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's remarks about the libraries' code
            compiled.rehearse(make_inputs())
        return compiled
    except Exception as error:  # a compiler that is missing or fails raises something of its own at every stage
        if is_out_of_memory(error):
            raise
        logger.warning("--compile: the compiler failed (%s); going on without it", first_line(error))
        return Update(*parts, size)


def micro_batch_sizes(config) -> list[int]:
    """Images a forward pass may have, the largest first: they divide what a process does in an update."""
    window = config.train_batch_size * config.gradient_accumulation_steps
    if config.max_micro_batch_size is None:
        return [config.train_batch_size]
    divisors = [size for size in range(window, 0, -1) if window % size == 0]
    if config.max_micro_batch_size == "auto":
        return divisors
    return [size for size in divisors if size <= config.max_micro_batch_size][:1]


def largest_that_fits(sizes: list[int], make_update, make_inputs) -> int:
    """The first of `sizes` for which the passes run on every process, with room left for the optimizer's state."""
    for size in sizes:
        update = make_update(size)
        accelerator = update.accelerator
        fits = torch.ones((), device=accelerator.device)
        try:
            update.rehearse(make_inputs(), _reserve(update))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            fits.zero_()
        torch.cuda.empty_cache()
        if accelerator.gather(fits).min():
            return size
    raise torch.OutOfMemoryError("not even one image fits")


def _reserve(update: Update) -> int:
    """Bytes that a rehearsal must leave free on a GPU: a share of the memory, and the optimizer's state to come."""
    reserve = 0
    if update.accelerator.device.type == "cuda":
        reserve = int(ROOM_BESIDE * torch.cuda.get_device_properties(update.accelerator.device).total_memory)
    if not update.optimizer.optimizer.state:
        reserve += int(update.state_bytes * sum(p.numel() for p in update.parameters))
    return reserve


# ---- memory


def memory_shortage(config) -> MemoryShortage:
    """The error for a GPU that is too small for a run's flags: it names the flags that help and are not used yet."""
    helps = {
        f"--train_batch_size below {config.train_batch_size}, with more --gradient_accumulation_steps": (
            config.train_batch_size > 1 and config.max_micro_batch_size is None
        ),
        "--max_micro_batch_size auto": config.max_micro_batch_size not in (None, "auto"),
        "--gradient_checkpointing": not config.gradient_checkpointing,
        "--mixed_precision bf16": config.mixed_precision == "no",
        "--cache_latents": not config.cache_latents and not config.streaming,
        "--offload_ema": config.use_ema and not config.offload_ema,
        "--use_8bit_adam": config.optimizer == "adamw",
    }
    remedies = [flag for flag, unused in helps.items() if unused] or ["a smaller --resolution"]
    return MemoryShortage(
        f"--resolution: {config.resolution} pixels with these flags do not fit into the GPU's memory; what helps:"
        f" {', '.join(remedies)}"
    )
