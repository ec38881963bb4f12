"""Before the first update: check all that can be checked without a weight, then load and build.

`check` and `build` fill the two records that the loop in trainer.py works with.
"""

import json
import logging
import math
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import ProjectConfiguration, broadcast_object_list
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from PIL import Image

from instruct_pix2pix import publishing as hub
from instruct_pix2pix.cli import UserError
from instruct_pix2pix.data import latent_cache
from instruct_pix2pix.data.order import window_positions
from instruct_pix2pix.data.triples import TripleDataset, Triples, collate, load_triples
from instruct_pix2pix.models import sd as components
from instruct_pix2pix.training import checkpoint as checkpoints
from instruct_pix2pix.training import step as speed
from instruct_pix2pix.training.ema import EMA
from instruct_pix2pix.training.options import resolved, trackers
from instruct_pix2pix.training.validation import load_validation_image

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # a terminal and a cluster send them to loader processes too


@dataclass
class Plan:
    """What is known before any weight is loaded."""

    configs: dict  # the base model's configurations: unet, vae, scheduler
    prediction_type: str  # epsilon or v_prediction
    latent_side: int
    triples: Triples
    checkpoint: Path | None  # to resume from
    first_step: int  # updates already done
    first_position: int  # samples already seen
    effective_batch: int  # samples per update, over all processes
    validation_image: Image.Image | None = None
    repo_id: str | None = None

    def samples_seen(self, step: int) -> int:
        """Samples seen after update `step`: also the position at which the next update starts."""
        return self.first_position + (step - self.first_step) * self.effective_batch

    def epoch(self, step: int) -> float:
        return self.samples_seen(step) / len(self.triples)


@dataclass
class Training:
    """Everything an update touches. The UNet is trained, the rest is frozen."""

    unet: torch.nn.Module  # as accelerate wrapped it
    bare_unet: torch.nn.Module  # the same weights, to save and to sample with
    predict: object  # the same again, to train: compiled with --compile
    micro_batch_size: int  # samples in one forward pass
    one_pass: object | None  # with --compile on one GPU: a one_pass.OnePass instead of clipping, AdamW and average
    graph: speed.UpdateGraph | None  # the whole update as a CUDA graph, likewise
    stream: torch.cuda.Stream | None  # on a GPU: where the next window is prepared while an update runs
    vae: torch.nn.Module
    text_encoder: torch.nn.Module
    tokenizer: object
    null_embedding: torch.Tensor  # (1, L, D): the empty prompt, encoded once
    alphas_cumprod: torch.Tensor  # (T,)
    optimizer: torch.optim.Optimizer
    learning_rate: object  # update number -> learning rate
    ema: EMA | None
    cache: latent_cache.LatentCache | None  # with --cache_latents; the frozen models then rest on the CPU
    windows: object  # iterator over what this process does in an update: all samples of its accumulation window
    checkpoints: checkpoints.Writer

    @property
    def eager(self) -> torch.nn.Module:
        """What `predict` is without the compiler; its parameters are where gradients gather."""
        return self.unet if self.one_pass is None else self.one_pass.unet

    def drop_gradients(self) -> None:
        for parameter in self.eager.parameters():
            parameter.grad = None


# ---- without weights


def start_accelerator(args) -> Accelerator:
    """The accelerator, after checking that the machine can do the precision asked for."""
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") or not torch.accelerator.is_available()
    if precision == "fp16" and on_cpu:
        raise UserError("--mixed_precision: fp16 needs a GPU and none is in use; use bf16 or no")
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=trackers(args) or None,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=str(Path(args.output_dir) / args.logging_dir)
        ),
    )
    args.mixed_precision = accelerator.mixed_precision
    plain = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    if accelerator.distributed_type not in plain:
        raise UserError(
            f"accelerate's distributed type {accelerator.distributed_type.value} is not supported; use plain data"
            " parallelism (accelerate config, or accelerate launch --multi_gpu)"
        )
    return accelerator


def check(args, accelerator: Accelerator, expected_in_channels: int) -> Plan:
    """Everything that can go wrong before weights load, and the numbers that follow from flags and data."""
    output_dir = Path(args.output_dir)
    checkpoint = checkpoints.find_checkpoint(args.resume_from_checkpoint, output_dir)
    state = checkpoints.read_state(checkpoint) if checkpoint else {"step": 0, "samples_seen": 0}
    if checkpoint is None:
        _refuse_to_overwrite(output_dir)
    else:
        _refuse_to_branch(output_dir, checkpoint)
    _settle_seed(args, state)

    configs = components.read_base_configs(args)
    components.check_channels(configs, expected_in_channels, args.pretrained_model_name_or_path)
    latent_side = components.check_resolution(configs, args.resolution)
    with accelerator.local_main_process_first():
        triples = load_triples(args, show_progress=accelerator.is_local_main_process)
    if args.conditioning_dropout_prob == 0:
        logger.warning("--conditioning_dropout_prob 0: the model never learns to be guided, guidance will not work")

    effective_batch = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    if args.max_train_steps is None:
        args.max_train_steps = math.ceil(args.num_train_epochs * len(triples) / effective_batch)
    if args.scale_lr:
        args.learning_rate *= effective_batch
        args.scale_lr = False  # written down as resolved: a resumed run must not multiply twice
    latent_cache.settle(args, len(triples), samples=args.max_train_steps * effective_batch)
    if args.dataloader_num_workers is None:
        args.dataloader_num_workers = _default_workers(args, accelerator)
    plan = Plan(
        configs=configs,
        prediction_type=components.prediction_type(configs),
        latent_side=latent_side,
        triples=triples,
        checkpoint=checkpoint,
        first_step=state["step"],
        first_position=state["samples_seen"],
        effective_batch=effective_batch,
    )
    if checkpoint is not None:
        _say_what_changed(args, state)
    if not args.dry_run and accelerator.is_main_process:
        plan.validation_image = load_validation_image(args, multiple=components.resolution_multiple(configs))
        if args.push_to_hub:
            plan.repo_id = hub.prepare_repo(args)
    return plan


def describe(args, plan: Plan) -> dict:
    """What --dry_run prints: the resolved flags and what follows from them."""
    return {
        "flags": resolved(args),
        "dataset": {
            "rows": len(plan.triples),
            "original_image_column": plan.triples.original_image,
            "edit_prompt_column": plan.triples.edit_prompt,
            "edited_image_column": plan.triples.edited_image,
        },
        "images_per_update": plan.effective_batch,
        "updates": args.max_train_steps,
        "updates_already_done": plan.first_step,
        "epochs": round(plan.epoch(args.max_train_steps), 3),
        "prediction_type": plan.prediction_type,
    }


def _default_workers(args, accelerator: Accelerator) -> int:
    """A GPU should not wait for pictures, nor for the drawing of noise; a CPU has no time to spare for it."""
    if accelerator.device.type == "cpu":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return 1 if args.cache_latents else max(1, min(8, cores // accelerator.num_processes - 1))


def _refuse_to_overwrite(output_dir: Path) -> None:
    if checkpoints.list_checkpoints(output_dir):
        newest = checkpoints.list_checkpoints(output_dir)[-1].name
        raise UserError(
            f"--output_dir: {output_dir} holds {newest} of an earlier run; go on with --resume_from_checkpoint latest,"
            " or name another folder"
        )
    if (output_dir / "model_index.json").exists():
        raise UserError(f"--output_dir: {output_dir} holds a trained pipeline already; name another folder")
    in_the_way = [name for name in hub.EXPORTED if (output_dir / name).exists()]
    if in_the_way and not (output_dir / hub.CONFIG_FILE).exists():
        raise UserError(f"--output_dir: {output_dir} holds {in_the_way[0]}, which is not a run's; name another folder")


def _refuse_to_branch(output_dir: Path, checkpoint: Path) -> None:
    """Two courses of training in one folder could not be told apart afterwards."""
    kept = checkpoints.list_checkpoints(output_dir)
    if kept and checkpoint.resolve().parent == output_dir.resolve() and checkpoint.name != kept[-1].name:
        raise UserError(
            f"--resume_from_checkpoint: {checkpoint.name} is not the newest of {output_dir}; move {kept[-1].name} and"
            " others after it away, or name another --output_dir"
        )


def _settle_seed(args, state: dict) -> None:
    """One seed for all processes: the flag's, else the checkpoint's, else the one that rank 0 drew."""
    if args.seed_was_given:
        if state.get("seed", args.seed) != args.seed:
            logger.warning("--seed %d is not the checkpoint's %d: the random streams change", args.seed, state["seed"])
        return
    seed = [state.get("seed", args.seed)]
    broadcast_object_list(seed)
    args.seed = seed[0]
    logger.info("seed %d", args.seed)


def _say_what_changed(args, state: dict) -> None:
    """A resumed run may change flags, on purpose or not; those that change the course of training are named."""
    harmless = {"output_dir", "resume_from_checkpoint", "report_to", "max_train_steps", "num_train_epochs"}
    now, then = resolved(args), state["flags"]
    changed = [f"{name} {then[name]} -> {now[name]}" for name in sorted(now) if now[name] != then.get(name, now[name])]
    changed = [text for text in changed if text.split()[0] not in harmless]
    if changed:
        logger.warning("flags differ from the checkpoint's: %s", "; ".join(changed))


# ---- with weights


def build(args, accelerator: Accelerator, plan: Plan) -> Training:
    """Load the models on every process, restore a checkpoint if there is one, and line up the batches."""
    if args.allow_tf32:
        torch.set_float32_matmul_precision("high")
    frozen_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    tokenizer, text_encoder, vae = components.load_frozen(args)
    vae.to(accelerator.device, frozen_dtype)
    text_encoder.to(accelerator.device, frozen_dtype)
    null_ids = components.tokenize(tokenizer, [""]).to(accelerator.device)
    null_embedding = components.encode_text(text_encoder, null_ids)
    cache = None
    if args.cache_latents:
        cache = latent_cache.open_cache(args, accelerator, plan.triples, tokenizer, text_encoder, vae)
        vae.to("cpu")
        text_encoder.to("cpu")

    unet = components.load_unet(args, plan.checkpoint)
    if args.compile and args.enable_xformers_memory_efficient_attention:
        logger.info("--compile: PyTorch's attention, as lean as xformers', which the compiler cannot look into")
    elif args.enable_xformers_memory_efficient_attention:
        components.enable_memory_efficient_attention(unet)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    if args.compile and accelerator.device.type == "cuda":
        unet.to(memory_format=torch.channels_last)  # slower on a CPU
        torch.backends.cudnn.benchmark = True  # shapes never change
    optimizer = _build_optimizer(args, unet)
    learning_rate = _learning_rate_schedule(args, optimizer)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    bare_unet = accelerator.unwrap_model(unet)
    ema = EMA(bare_unet.parameters(), args.ema_decay, args.offload_ema) if args.use_ema else None
    if plan.checkpoint is not None:
        state = checkpoints.load_training_state(plan.checkpoint, bare_unet, optimizer.optimizer, ema)
        if accelerator.scaler is not None and state["loss_scaler"]:
            accelerator.scaler.load_state_dict(state["loss_scaler"])

    alphas_cumprod = DDPMScheduler.from_config(plan.configs["scheduler"]).alphas_cumprod.to(accelerator.device)
    latent_shape = (vae.config.latent_channels, plan.latent_side, plan.latent_side)
    return Training(
        unet=unet,
        bare_unet=bare_unet,
        predict=unet,
        micro_batch_size=speed.micro_batch_sizes(args)[0],
        one_pass=None,
        graph=None,
        stream=_stream(accelerator),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        null_embedding=null_embedding,
        alphas_cumprod=alphas_cumprod,
        optimizer=optimizer,
        learning_rate=learning_rate,
        ema=ema,
        cache=cache,
        windows=_windows(args, accelerator, plan, cache, latent_shape, num_timesteps=len(alphas_cumprod)),
        checkpoints=checkpoints.Writer(),
    )


def _stream(accelerator: Accelerator) -> torch.cuda.Stream | None:
    if accelerator.device.type != "cuda":
        return None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # for what was built so far: models, cache
    return stream


def _build_optimizer(args, unet) -> torch.optim.Optimizer:
    settings = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.use_8bit_adam:
        try:
            import bitsandbytes
        except ImportError as error:
            raise UserError("--use_8bit_adam: bitsandbytes is missing; pip install -r requirements-gpu.txt") from error
        return bitsandbytes.optim.AdamW8bit(unet.parameters(), **settings)
    return torch.optim.AdamW(unet.parameters(), fused=True, **settings)


def _learning_rate_schedule(args, optimizer):
    """The learning rate as a function of the update's number: nothing to step, nothing to save, nothing to get out
    of step with skipped updates or the number of processes."""
    schedule = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    return lambda step: args.learning_rate * schedule.lr_lambdas[0](step)


def _windows(args, accelerator, plan: Plan, cache, latent_shape, num_timesteps: int):
    """What this process does in each update still to do, one accumulation window at a time."""
    if cache is not None:
        dataset = latent_cache.CachedTriples(cache, plan.triples, args, latent_shape, num_timesteps)
    else:
        dataset = TripleDataset(plan.triples, args, latent_shape, num_timesteps)
    process = (accelerator.process_index, accelerator.num_processes)
    window = (args.train_batch_size, args.gradient_accumulation_steps)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=(
            window_positions(plan.first_position, step, *window, *process)
            for step in range(args.max_train_steps - plan.first_step)
        ),
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        worker_init_fn=_leave_stopping_to_the_trainer,
        pin_memory=accelerator.device.type == "cuda",
    )
    return iter(loader)


def _leave_stopping_to_the_trainer(worker: int) -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def print_dry_run(args, plan: Plan) -> None:
    json.dump(describe(args, plan), sys.stdout, indent=2)
    print()
