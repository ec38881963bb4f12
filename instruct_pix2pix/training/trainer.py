"""The training loop: for every update fetch, noise, predict, loss, backward, step, EMA."""

import contextlib
import logging
import math
import os
import signal
import time
from pathlib import Path

import datasets
import diffusers
import torch
import transformers
from accelerate import Accelerator
from tqdm.auto import tqdm

from instruct_pix2pix import publishing as hub
from instruct_pix2pix.cli import RowError
from instruct_pix2pix.data.triples import to_unit_range
from instruct_pix2pix.files import write_json
from instruct_pix2pix.models import sd as components
from instruct_pix2pix.training import step as speed
from instruct_pix2pix.training.checkpoint import remove_partial
from instruct_pix2pix.training.conditioning import drop_conditioning
from instruct_pix2pix.training.log import JsonLog, start_trackers
from instruct_pix2pix.training.loss import add_noise, diffusion_loss, min_snr_weights, prediction_target
from instruct_pix2pix.training.options import resolved
from instruct_pix2pix.training.preparation import (
    STOP_SIGNALS,
    Plan,
    Training,
    build,
    check,
    print_dry_run,
    start_accelerator,
)
from instruct_pix2pix.training.validation import validate

logger = logging.getLogger(__name__)

# Updates between two looks at the device: each look waits for it, so the numbers are collected there meanwhile.
LOG_EVERY = 10


def train(args, expected_in_channels: int) -> None:
    """Train as the flags say and leave a pipeline in --output_dir.

    `expected_in_channels` of the base model's UNet is 4 for the scratch script and 8 for the fine-tuning one.
    """
    vars(args).update({"guidance_scale": 7.0, "image_guidance_scale": 1.5} | vars(args))
    _set_up_logging()
    accelerator = start_accelerator(args)
    plan = check(args, accelerator, expected_in_channels)
    if args.dry_run:
        if accelerator.is_main_process:
            print_dry_run(args, plan)
        return
    try:
        training = build(args, accelerator, plan)
        if accelerator.is_main_process:
            remove_partial(Path(args.output_dir))
            hub.begin(args.output_dir, resolved(args))
        start_trackers(accelerator, args)
        summary = run_updates(args, accelerator, plan, training)
        finish(args, accelerator, plan, training, summary)
    except RuntimeError as error:
        if speed.is_out_of_memory(error):
            raise speed.out_of_memory(args) from error
        raise


def run_updates(args, accelerator: Accelerator, plan: Plan, training: Training) -> dict:
    """All updates still to do, with logging, checkpoints and validation in between; returns the summary."""
    if plan.first_step < args.max_train_steps:
        speed.settle(args, accelerator, plan, training, forward_backward)
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # of the updates, not of what was tried before them
    log = Log(args, accelerator, plan)
    started = time.perf_counter()
    stop = Stop()
    try:
        for step in range(plan.first_step + 1, args.max_train_steps + 1):
            loss, grad_norm = update(args, accelerator, plan, training, step)
            log.add(step, loss, grad_norm, training.learning_rate(step - 1))
            stopping = step < args.max_train_steps and stop.agreed(accelerator, step)
            # The last update too: what comes after it may fail for want of disk, network or memory.
            saving = stopping or step % args.checkpointing_steps == 0 or step == args.max_train_steps
            validating = _validation_is_due(args, plan, step) and not stopping
            if step % LOG_EVERY == 0 or step == args.max_train_steps or saving or validating:
                log.flush()
                training.checkpoints.raise_if_failed()
            if saving:
                save(args, accelerator, plan, training, step)
            if validating:
                run_validation(args, accelerator, plan, training, step)
            if stopping:
                training.checkpoints.wait()
                raise KeyboardInterrupt
            if saving or validating:
                log.restart_clock()
    except (RowError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not speed.is_out_of_memory(error):
            raise
        # The updates so far are worth keeping; the row, or the flags, are for the user to mend.
        done = log.last_step
        if accelerator.is_main_process and done > plan.first_step:
            log.flush(gather=False)
            write_checkpoint(args, accelerator, plan, training, done)
            training.checkpoints.wait()
            what = "a row that cannot be used" if isinstance(error, RowError) else "an update that needs more memory"
            logger.error("stopped at %s; checkpoint-%d keeps the updates so far", what, done)
        raise
    finally:
        stop.forget()
        training.windows = None  # ends the loader's processes
        log.progress.close()
        training.checkpoints.close()
    training.checkpoints.raise_if_failed()
    return {
        "steps": args.max_train_steps,
        "train_seconds": round(time.perf_counter() - started, 1),
        "images_per_update": plan.effective_batch,
        "epochs": round(plan.epoch(args.max_train_steps), 2),
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type,
        "peak_memory_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2)
        if accelerator.device.type == "cuda"
        else None,
    }


def update(args, accelerator: Accelerator, plan: Plan, training: Training, step: int):
    """One update: all samples of the accumulation window; returns loss and gradient norm, left on the device."""
    window = next(training.windows)
    if isinstance(window, RowError):
        raise window
    learning_rate = training.learning_rate(step - 1)
    inputs = speed.beside_the_update(training.stream, lambda: prepare(args, accelerator, plan, training, window))
    if training.graph is not None:
        return training.graph.replay(inputs, learning_rate)
    loss = forward_backward(accelerator, training, inputs)
    if training.one_pass is not None:
        training.one_pass.set_rate(learning_rate)
        grad_norm = training.one_pass.step()
    else:
        grad_norm = clip_gradients(args, accelerator, training)
        for group in training.optimizer.param_groups:
            group["lr"] = learning_rate
        training.optimizer.step()
        if training.ema is not None:
            training.ema.update()
    training.drop_gradients()
    return loss, grad_norm


@torch.no_grad()
def prepare(args, accelerator: Accelerator, plan: Plan, training: Training, window: dict) -> dict[str, torch.Tensor]:
    """What the UNet is to see and to predict (InstructPix2Pix, section 3.2), for the W samples of a window.

    Returns noisy (W, 2C, h, w): the noised latents beside the original's; timesteps (W,); text (W, L, D);
    target (W, C, h, w); weights (W,) of the samples' losses.
    """
    device = accelerator.device
    if training.cache is not None:
        text, image_latents, latents = training.cache.look_up(window, device)
    else:
        ids = components.tokenize(training.tokenizer, window["instructions"]).to(device)
        text = components.encode_text(training.text_encoder, ids)
        pairs_per_pass = max(1, components.PIXELS_PER_PASS // args.resolution**2)
        columns = (window[name].split(pairs_per_pass) for name in ("original", "edited", "posterior_noise"))
        encoded = []
        for original, edited, posterior_noise in zip(*columns, strict=True):
            original, edited = (to_unit_range(side.to(device, non_blocking=True)) for side in (original, edited))
            noise = posterior_noise.to(device, non_blocking=True)
            encoded.append(components.encode_pair(training.vae, original, edited, noise))
        image_latents, latents = (torch.cat(side) for side in zip(*encoded, strict=True))
    moved = {name: window[name].to(device, non_blocking=True) for name in ("noise", "timesteps", "dropout")}
    text, image_latents = drop_conditioning(
        text, image_latents, training.null_embedding, moved["dropout"], args.conditioning_dropout_prob
    )
    schedule = (moved["timesteps"], training.alphas_cumprod)
    if args.snr_gamma:
        weights = min_snr_weights(*schedule, args.snr_gamma, plan.prediction_type)
    else:
        weights = torch.ones_like(moved["dropout"])
    return {
        "noisy": torch.cat([add_noise(latents, moved["noise"], *schedule), image_latents], dim=1),
        "timesteps": moved["timesteps"],
        "text": text,
        "target": prediction_target(latents, moved["noise"], *schedule, plan.prediction_type),
        "weights": weights,
    }


def forward_backward(
    accelerator: Accelerator, training: Training, inputs: dict[str, torch.Tensor], synchronise: bool = True
) -> torch.Tensor:
    """Predict, compare, and add up gradients, one micro-batch after another; returns the window's mean loss.

    Processes exchange gradients in the last backward pass, unless `synchronise` is off.
    """
    micro_batches = list(zip(*(tensor.split(training.micro_batch_size) for tensor in inputs.values()), strict=True))
    window_loss = torch.zeros((), device=accelerator.device)
    for number, micro_batch in enumerate(micro_batches, start=1):
        noisy, timesteps, text, target, weights = micro_batch
        exchange = synchronise and number == len(micro_batches)
        with contextlib.nullcontext() if exchange else accelerator.no_sync(training.unet):
            prediction = training.predict(noisy, timesteps, text, return_dict=False)[0]
            loss = diffusion_loss(prediction, target, weights) / len(micro_batches)
            accelerator.backward(loss)
        window_loss += loss.detach()
    return window_loss


def clip_gradients(args, accelerator: Accelerator, training: Training) -> torch.Tensor:
    """Clip to --max_grad_norm; returns the norm before. PyTorch's fused AdamW divides by `grad_scale` while it reads
    the gradients, which saves a pass over them."""
    optimizer = training.optimizer.optimizer
    accelerator.unscale_gradients(training.optimizer)
    gradients = [p.grad for p in training.bare_unet.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.grad_scale = ((norm + 1e-6) / args.max_grad_norm).clamp(min=1.0)
    else:
        torch.nn.utils.clip_grads_with_norm_(training.bare_unet.parameters(), args.max_grad_norm, norm)
    return norm


# ---- between updates


def save(args, accelerator: Accelerator, plan: Plan, training: Training, step: int) -> None:
    """A checkpoint, with every process at the same update: replicas are equal, so the main one keeps a copy and writes
    it in the background."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_checkpoint(args, accelerator, plan, training, step)
    accelerator.wait_for_everyone()


def write_checkpoint(args, accelerator: Accelerator, plan: Plan, training: Training, step: int) -> None:
    state = {
        "step": step,
        "samples_seen": plan.samples_seen(step),
        "seed": args.seed,
        "loss_scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        "flags": resolved(args),
    }
    parts = (training.bare_unet, training.optimizer.optimizer, training.ema)
    training.checkpoints.save(Path(args.output_dir), state, *parts, args.checkpoints_total_limit)


def _validation_is_due(args, plan: Plan, step: int) -> bool:
    """By updates where --validation_steps is given, else whenever so many epochs are complete; not at the end,
    where the exported weights are validated anyway."""
    if args.val_image_url is None or step == args.max_train_steps:
        return False
    if args.validation_steps is not None:
        return step % args.validation_steps == 0
    return int(plan.epoch(step)) // args.validation_epochs > int(plan.epoch(step - 1)) // args.validation_epochs


def run_validation(args, accelerator: Accelerator, plan: Plan, training: Training, step: int) -> None:
    """Validate with the weights that would be exported now."""
    if plan.validation_image is not None:  # on the main process only
        with training.ema.swapped_in() if training.ema is not None else contextlib.nullcontext():
            _validate(args, accelerator, plan, training, step)
    accelerator.wait_for_everyone()


def _validate(args, accelerator, plan, training, step) -> None:
    frozen = (training.text_encoder, training.vae)
    for model in frozen:
        model.to(accelerator.device)
    parts = (training.tokenizer, *frozen, training.bare_unet)
    try:
        validate(accelerator, args, plan.configs, *parts, plan.validation_image, step)
    except RuntimeError as error:
        if not speed.is_out_of_memory(error):
            raise
        count = args.num_validation_images
        logger.warning(
            "no validation: editing %d images at a time needs more memory; lower --num_validation_images", count
        )
    if training.cache is not None:
        for model in frozen:
            model.to("cpu")


def finish(args, accelerator: Accelerator, plan: Plan, training: Training, summary: dict) -> None:
    """Export the pipeline, validate it once more, publish it."""
    accelerator.wait_for_everyone()
    pushed = True
    if accelerator.is_main_process:
        with training.ema.swapped_in() if training.ema is not None else contextlib.nullcontext():
            instruction = args.validation_prompt or plan.triples.first_instruction()
            hub.export(args, resolved(args), training.bare_unet, summary, plan.repo_id, instruction)
            if plan.validation_image is not None:
                _validate(args, accelerator, plan, training, args.max_train_steps)
        write_json(Path(args.output_dir) / "training_summary.json", summary)
        logger.info("the pipeline is in %s", args.output_dir)
        if plan.repo_id is not None:
            pushed = hub.push(args, plan.repo_id)
    accelerator.end_training()
    if not pushed:
        raise SystemExit(1)


class Stop:
    """Ctrl-C, and the SIGTERM of a cluster that wants its machine back, wait for the end of an update, so that it can
    be kept in a checkpoint. A second one does not wait."""

    def __init__(self):
        self.asked = False
        self.before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}

    def _note(self, number, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        logger.info("stopping when this update is done and kept in a checkpoint; once more stops at once")

    def agreed(self, accelerator: Accelerator, step: int) -> bool:
        """Whether to stop after this update. Several processes ask each other where they meet for the log anyway."""
        if accelerator.num_processes == 1:
            return self.asked
        if step % LOG_EVERY:
            return False
        return bool(accelerator.reduce(torch.tensor(float(self.asked), device=accelerator.device), "sum"))

    def forget(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Log:
    """Collects each update's numbers on the device and writes them every LOG_EVERY updates."""

    def __init__(self, args, accelerator: Accelerator, plan: Plan):
        self.accelerator, self.plan = accelerator, plan
        self.json = JsonLog(Path(args.output_dir), plan.first_step) if accelerator.is_main_process else None
        self.progress = tqdm(
            total=args.max_train_steps,
            initial=plan.first_step,
            desc="Training",
            unit="update",
            disable=not accelerator.is_local_main_process,
        )
        self.pending, self.last_step, self.warned = [], plan.first_step, False
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out what was not training: a checkpoint or a validation just written."""
        self.clock = time.perf_counter()

    def add(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor, learning_rate: float) -> None:
        self.pending.append((step, loss, grad_norm, learning_rate))
        self.last_step = step
        self.progress.update(1)

    def flush(self, gather: bool = True) -> None:
        """Wait for the device once, average the losses over processes, and write. Called by all processes, unless
        `gather` is off."""
        if not self.pending:
            return
        numbers = torch.stack([torch.stack([loss, norm.float()]) for _, loss, norm, _ in self.pending])
        numbers = (self.accelerator.reduce(numbers, "mean") if gather else numbers).tolist()
        seconds = time.perf_counter() - self.clock
        images_per_second = len(self.pending) * self.plan.effective_batch / seconds
        entries = []
        for (step, _, _, learning_rate), (loss, norm) in zip(self.pending, numbers, strict=True):
            entries.append(
                {
                    "step": step,
                    "loss": loss,
                    "learning_rate": learning_rate,
                    "grad_norm": norm,
                    "images_per_second": round(images_per_second, 2),
                }
            )
        self.pending = []
        self.restart_clock()
        if self.json is not None:
            self.json.write(entries)
            for entry in entries:
                self.accelerator.log({key: value for key, value in entry.items() if key != "step"}, entry["step"])
            if not self.warned and not math.isfinite(entries[-1]["loss"]):
                self.warned = True
                logger.warning(
                    "the loss of update %d is not finite; lower --learning_rate, or train with bf16", self.last_step
                )
            self.progress.set_postfix(loss=f"{entries[-1]['loss']:.4f}", images_s=f"{images_per_second:.1f}")


def _set_up_logging() -> None:
    """Our own messages on the main process, errors everywhere; one progress bar, ours."""
    main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING if main else logging.ERROR)
    logging.getLogger("instruct_pix2pix").setLevel(logging.INFO if main else logging.ERROR)
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
