"""Before the first update: check all that can be checked without a weight, then load and build."""

import json
import logging
import math
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs
from accelerate.utils import ProjectConfiguration, broadcast_object_list
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from PIL import Image

from instruct_pix2pix import editing, hub, publishing
from instruct_pix2pix.cli import UserError
from instruct_pix2pix.data import latent_cache
from instruct_pix2pix.data.mixtures import load_mixture
from instruct_pix2pix.data.sources import Source, read_mixture, source_of
from instruct_pix2pix.data.triples import Triples, diffusion_draws, first_usable, load_triples
from instruct_pix2pix.files import check_folder, free_space
from instruct_pix2pix.models import adapters, sd
from instruct_pix2pix.models.trained import damage
from instruct_pix2pix.training import checkpoint as checkpoints
from instruct_pix2pix.training import optimizers, sharding, step
from instruct_pix2pix.training.config import Config, resolve, resolved
from instruct_pix2pix.training.ema import EMA
from instruct_pix2pix.training.inputs import WindowEncoder, WindowLoader
from instruct_pix2pix.training.options import trackers
from instruct_pix2pix.training.validation import HeldOut, load_held_out, load_validation_images

logger = logging.getLogger(__name__)

# While one process downloads, hashes or uploads, the others wait for it; NCCL's own limit is ten minutes.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Plan:
    """What is known before any weight is loaded."""

    config: Config
    accelerator: Accelerator
    configs: dict  # the base model's configurations: unet, vae, text_encoder, scheduler
    prediction_type: str  # epsilon or v_prediction
    latent_side: int
    triples: Triples
    cut_instructions: int  # that are longer than the text encoder reads
    checkpoint: Path | None  # to resume from
    first_step: int  # updates already done
    first_position: int  # samples already seen
    space_needed: int  # bytes in --output_dir
    validation_images: list[tuple[Image.Image, str]]  # with their instructions; these and the next on the main process
    held_out_triples: Triples | None
    recommended: dict | None  # how the base edits best, see editing.recommended_settings
    repo_id: str | None

    @property
    def images_per_update(self) -> int:
        config = self.config
        return config.train_batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes

    def samples_seen(self, step: int) -> int:
        """Samples seen after update `step`: also the position at which the next update starts."""
        return self.first_position + (step - self.first_step) * self.images_per_update

    def epoch(self, step: int) -> float:
        return self.samples_seen(step) / len(self.triples)

    def describe_update(self, step: int) -> str:
        """The rows and timesteps of an update, for a message: the same arithmetic that training goes by."""
        triples, config = self.triples, self.config
        order = triples.order(config.seed)
        start = self.samples_seen(step - 1)
        positions = range(start, start + self.images_per_update)
        rows = [int(triples.indices[first_usable(triples, order, p, triples.known_reason)[1]]) for p in positions]
        steps = DDPMScheduler.from_config(self.configs["scheduler"]).config.num_train_timesteps
        times = [diffusion_draws(config, position, (1, 1, 1), steps)["timestep"] for position in positions]
        return f"rows {_list(rows)}, timesteps {_list(times)}"


def _list(numbers: list[int], most: int = 16) -> str:
    return " ".join(map(str, numbers[:most])) + (" ..." if len(numbers) > most else "")


@dataclass(frozen=True)
class Run(Plan):
    """A training, ready to go: the plan, and everything an update touches. The UNet is trained, the rest is frozen."""

    unet: torch.nn.Module  # float32, to save and to sample with; `update` holds what accelerate made of it
    vae: torch.nn.Module
    text_encoder: torch.nn.Module
    tokenizer: sd.CLIPTokenizer
    optimizer: torch.optim.Optimizer
    ema: EMA | None
    schedule: torch.optim.lr_scheduler.LambdaLR
    windows: WindowLoader
    make_inputs: WindowEncoder
    held_out: HeldOut | None
    update: step.Update
    checkpoints: checkpoints.Writer
    pushes: hub.Pushes | None  # on the main process

    def learning_rate(self, step: int) -> float:
        """Of update `step`, the first being 1: a function of the number, so there is nothing to step or to save."""
        return self.config.learning_rate * self.schedule.lr_lambdas[0](step - 1)


# ---- without weights


def start_accelerator(args) -> Accelerator:
    """The accelerator, after checking that the machine can do what is asked for."""
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") or not torch.accelerator.is_available()
    if precision == "fp16" and on_cpu:
        raise UserError("--mixed_precision: fp16 needs a GPU and none is in use; use bf16 or no")
    plugin = sharding.plugin(args, precision)
    accelerator = Accelerator(
        mixed_precision=precision,
        fsdp_plugin=plugin,
        # Several processes on a machine without a GPU are one training only where this is said.
        cpu=on_cpu,
        log_with=trackers(args) or None,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=str(Path(args.output_dir) / args.logging_dir)
        ),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if plugin is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Of itself accelerate shards on GPUs only; told that it does, it does so on CPUs, where it can be tried.
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    known = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.FSDP)
    if accelerator.distributed_type not in known:
        raise UserError(
            f"accelerate's distributed type {accelerator.distributed_type.value} is not supported; use data"
            " parallelism (accelerate launch --multi_gpu) or FSDP2 (--config_file recipes/accelerate/fsdp2.yaml)"
        )
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != accelerator.num_processes:
        raise UserError(
            f"WORLD_SIZE: {started} processes were started, but accelerate joins {accelerator.num_processes} of them;"
            " they would overwrite each other's files. Start one, or set up accelerate for several (accelerate config)"
        )
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # They read what the processes before them left in the launcher's store: pytorch/pytorch#167288.
        logger.warning(
            "--max-restarts: %d; processes that are started again may not find each other; set"
            " TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, and with accelerate launch give --rdzv_backend c10d",
            restarts,
        )
    return accelerator


def check(args, accelerator: Accelerator, expected_in_channels: int) -> Plan:
    """Everything that can go wrong before weights load, and the numbers that follow from flags and data."""
    output_dir = Path(args.output_dir)
    check_folder("--output_dir", output_dir)
    if args.resume_from_checkpoint == "hub" and not args.dry_run:
        with accelerator.main_process_first():
            if accelerator.is_main_process:
                kept = checkpoints.list_checkpoints(output_dir)
                if not kept:
                    _refuse_to_overwrite(output_dir, None)
                hub.fetch_checkpoint(args, kept)
    checkpoint = checkpoints.find_checkpoint(args.resume_from_checkpoint, output_dir)
    state = checkpoints.read_state(checkpoint) if checkpoint else {"step": 0, "samples_seen": 0}
    _refuse_to_overwrite(output_dir, checkpoint)
    seed = _agree_on_seed(args, state)

    configs = sd.read_base_configs(args)
    sd.check_channels(configs, expected_in_channels, args.pretrained_model_name_or_path)
    latent_side = sd.check_resolution(configs, args.resolution)
    with accelerator.local_main_process_first():
        triples, sources = _load_rows(args, seed, accelerator.is_local_main_process)
    replayed = [told["dataset"] for told in triples.told() if told["replay"]]
    if replayed and configs["unet"]["in_channels"] != 8:
        raise UserError(
            f"--dataset_mixture: {replayed[0]} is to be replayed, but {args.pretrained_model_name_or_path} edits no"
            " images yet; leave replay out, or fine-tune a model that does"
        )
    config = resolve(args, accelerator, seed, rows=len(triples))
    if state["step"] > config.max_train_steps:
        remedy = f"give {state['step']} or more, or export the checkpoint with tools/export_checkpoint.py"
        update = f"{checkpoint} is of update {state['step']}"
        raise UserError(f"--max_train_steps: {config.max_train_steps}, but {update}; {remedy}")
    optimizers.check(config)
    _say_what_is_unusual(config)
    if checkpoint is not None:
        _say_what_changed(config, state)
        if (before := state.get("mixture", [])) != triples.told():
            logger.warning("the mixture differs from the checkpoint's: %s -> %s", before, triples.told())
    prediction_type = sd.prediction_type(configs)
    cut_instructions = _count_cut_instructions(sd.load_tokenizer(config), triples)
    space_needed = _space_needed(config, configs, state["step"])
    validation_images, held_out_triples, recommended, repo_id = [], None, None, None
    if accelerator.is_main_process:
        check_folder("--output_dir", output_dir, space_needed, "what training writes (checkpoints and the pipeline)")
        held_out_triples = load_held_out(config, sources)
    if not config.dry_run and accelerator.is_main_process:
        validation_images = load_validation_images(config, multiple=sd.resolution_multiple(configs))
        if configs["unet"]["in_channels"] == 8 and (validation_images or held_out_triples):
            recommended = editing.recommended_settings(config.pretrained_model_name_or_path)
        if config.push_to_hub:
            repo_id = hub.prepare_repo(config)
    return Plan(
        config=config,
        accelerator=accelerator,
        configs=configs,
        prediction_type=prediction_type,
        latent_side=latent_side,
        triples=triples,
        cut_instructions=cut_instructions,
        checkpoint=checkpoint,
        first_step=state["step"],
        first_position=state["samples_seen"],
        space_needed=space_needed,
        validation_images=validation_images,
        held_out_triples=held_out_triples,
        recommended=recommended,
        repo_id=repo_id,
    )


def _load_rows(args, seed: int, show_progress: bool) -> tuple[Triples, list[Source]]:
    """The rows to train on, and the dataset or datasets that they are of."""
    options = {"cache_dir": args.cache_dir, "token": args.hub_token}
    options |= {"streaming": args.streaming, "stream_cache": args.stream_cache_gb * 1e9}
    if args.dataset_mixture:
        entries = read_mixture(args, **options)
        return load_mixture(args, entries, seed, show_progress), [entry.source for entry in entries]
    source = source_of(args, "--dataset_name", "--train_data_dir", **options)
    return load_triples(source, seed, args.max_train_samples, show_progress, args.image_geometry), [source]


def print_dry_run(plan: Plan) -> None:
    """The resolved flags and what follows from them, as JSON."""
    config, triples = plan.config, plan.triples
    described = {
        "flags": resolved(config),
        "dataset": {
            "rows": len(triples),
            "rows_that_cannot_be_used": len(triples.bad),
            **({"files": triples.counts} if triples.counts else {}),
            **triples.described(),
            "instructions_cut": plan.cut_instructions,
        },
        "processes": plan.accelerator.num_processes,
        "images_per_update": plan.images_per_update,
        "updates": config.max_train_steps,
        "updates_already_done": plan.first_step,
        "epochs": round(plan.epoch(config.max_train_steps), 3),
        "prediction_type": plan.prediction_type,
        "disk_space": {"needed_bytes": plan.space_needed, "free_bytes": free_space(config.output_dir)},
    }
    json.dump(described, sys.stdout, indent=2, ensure_ascii=False)
    print()


def _refuse_to_overwrite(output_dir: Path, checkpoint: Path | None) -> None:
    """Nothing that another run or the user made is written over, and two courses of training never share a folder,
    where they could not be told apart afterwards."""
    kept = checkpoints.list_checkpoints(output_dir)
    if checkpoint is not None and checkpoint.parent.resolve() == output_dir.resolve():
        kept = [path for path in kept if damage(path) is None]
        if kept and checkpoint.name != kept[-1].name:
            raise UserError(
                f"--resume_from_checkpoint: {checkpoint.name} is not the newest of {output_dir}; move {kept[-1].name}"
                " and others after it away, or name another --output_dir"
            )
        return
    if kept:
        raise UserError(
            f"--output_dir: {output_dir} holds {kept[-1].name} of an earlier run; go on with"
            " --resume_from_checkpoint latest, or name another folder"
        )
    if (output_dir / "model_index.json").exists():
        raise UserError(f"--output_dir: {output_dir} holds a trained pipeline already; name another folder")
    in_the_way = [name for name in publishing.EXPORTED if (output_dir / name).exists()]
    if in_the_way and not (output_dir / publishing.CONFIG_FILE).exists():
        raise UserError(f"--output_dir: {output_dir} holds {in_the_way[0]}, which is not a run's; name another folder")


def _space_needed(config, configs: dict, first_step: int) -> int:
    """Bytes for two checkpoints, of which one makes room for the next, the best where it is kept, and the pipeline;
    none where all is done.

    float32: what is trained, the optimizer's state, the average; the pipeline's models.
    """
    counts, left = sd.count_parameters(configs), config.max_train_steps - first_step
    adapted = 0 if config.lora_rank is None else adapters.count_trained(configs["unet"], config)
    state = optimizers.STATE_BYTES.get(config.optimizer, 8)
    checkpoint = (adapted or counts["unet"]) * (4 + state + 4 * config.use_ema)
    # Of a run that goes on, some lie there already; a short run writes but one.
    most = 2 + (config.keep_best is not None) - len(checkpoints.list_checkpoints(Path(config.output_dir)))
    to_come = 0 if left <= 0 else max(1, min(most, math.ceil(left / config.checkpointing_steps)))
    pipeline = 4 * (sum(counts.values()) + adapted)
    pushed = checkpoint + pipeline if config.hub_strategy != "end" and left > 0 else 0  # while the push goes on
    return int(to_come * checkpoint + pipeline + pushed)


def _agree_on_seed(args, state: dict) -> int:
    """One seed for all processes: the flag's, else the checkpoint's, else one that rank 0 draws."""
    if args.seed is not None:
        if state.get("seed", args.seed) != args.seed:
            logger.warning("--seed %d is not the checkpoint's %d: the random streams change", args.seed, state["seed"])
        return args.seed
    seed = [state.get("seed", int.from_bytes(os.urandom(4), "big") // 2)]
    broadcast_object_list(seed)
    logger.info("seed %d", seed[0])
    return seed[0]


def _say_what_is_unusual(config) -> None:
    if config.optimizer == "prodigy" and config.learning_rate < 0.1:
        logger.warning("--learning_rate: prodigy multiplies its own step by %g; usual is 1", config.learning_rate)
    if config.conditioning_dropout_prob == 0:
        logger.warning("--conditioning_dropout_prob 0: the model never learns to be guided, guidance will not work")
    if config.lr_scheduler != "constant" and 2 * config.lr_warmup_steps >= config.max_train_steps:
        logger.warning(
            "--lr_warmup_steps: %d of the %d updates are warm-up; lower it for a run this short",
            min(config.lr_warmup_steps, config.max_train_steps),
            config.max_train_steps,
        )


def _say_what_changed(config, state: dict) -> None:
    """A resumed run may change flags, on purpose or not; those that change the course of training are named."""
    harmless = {"output_dir", "resume_from_checkpoint", "report_to", "max_train_steps", "num_train_epochs"}
    harmless |= {"tracker_project_name", "run_name", "wandb_entity", "tags", "keep_best", "stream_cache_gb"}
    harmless |= {"push_to_hub", "hub_model_id", "hub_private_repo", "hub_strategy", "train_decoder_skips"}
    now, then = resolved(config), state["flags"]
    then = {"optimizer": "adamw8bit" if then.get("use_8bit_adam") else "adamw"} | then  # of before there was a choice
    for name in ("optimizer", "lora_rank", "lora_alpha", "use_dora"):  # which tensors there are, and of what kind
        if (before := then.get(name) or None) != (now[name] or None):
            made = {None: "without it", True: "with it"}.get(before, f"with {before}")
            raise UserError(f"--{name}: the checkpoint was made {made}; give the flag as it was")
    taken_back = publishing.hide_paths(now)  # what a checkpoint that was on the Hub knows of these
    names = sorted((then.keys() & now.keys()) - harmless)
    changed = [f"{n} {then[n]} -> {now[n]}" for n in names if then[n] not in (now[n], taken_back[n])]
    if changed:
        logger.warning("flags differ from the checkpoint's: %s", "; ".join(changed))


def _count_cut_instructions(tokenizer, triples: Triples) -> int:
    """How many distinct instructions have more tokens than the text encoder reads; said once, with the longest."""
    texts = triples.distinct_instructions()
    whole = tokenizer(texts, verbose=False).input_ids  # neither padded nor cut
    lengths = [(len(ids), text) for text, ids in zip(texts, whole, strict=True)]
    cut = [length for length in lengths if length[0] > tokenizer.model_max_length]
    if cut:
        tokens, text = max(cut)
        logger.warning(
            "%d instruction(s) are cut: the text encoder reads %d tokens, they have more; the longest has %d (%s...)",
            len(cut),
            tokenizer.model_max_length,
            tokens,
            text[:60],
        )
    return len(cut)


# ---- with weights


def build(plan: Plan) -> Run:
    """Load the models on every process, restore a checkpoint if there is one, and line up the batches."""
    config, accelerator = plan.config, plan.accelerator
    on_gpu = accelerator.device.type == "cuda"
    if config.allow_tf32:
        torch.set_float32_matmul_precision("high")
    frozen_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    tokenizer, text_encoder, vae = sd.load_frozen(config)
    vae.to(accelerator.device, frozen_dtype)
    text_encoder.to(accelerator.device, frozen_dtype)
    cache = None
    if config.cache_latents:
        cache = latent_cache.open_cache(config, accelerator, plan.triples, tokenizer, text_encoder, vae)

    alphas_cumprod = DDPMScheduler.from_config(plan.configs["scheduler"]).alphas_cumprod
    frozen, base = (tokenizer, text_encoder, vae), None
    if any(told["replay"] for told in plan.triples.told()):
        # A copy, also beside adapters: conv_in, which they leave out, is trained in full.
        base = sd.load_model(config, "unet").requires_grad_(False).eval().to(accelerator.device, frozen_dtype)
    make_inputs = WindowEncoder(config, accelerator.device, *frozen, cache, alphas_cumprod, plan.prediction_type, base)
    held_out = HeldOut(plan, make_inputs) if plan.held_out_triples is not None else None
    if cache is not None:
        vae.to("cpu")
        if not config.embedding_noise:
            text_encoder.to("cpu")

    unet = sd.load_unet(config, plan.checkpoint)
    if config.compile and config.enable_xformers_memory_efficient_attention:
        logger.info("--compile: PyTorch's attention, as lean as xformers', which the compiler cannot look into")
    elif config.enable_xformers_memory_efficient_attention:
        sd.enable_memory_efficient_attention(unet)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    if config.compile and on_gpu and config.optimizer != "adamw8bit":  # which lays the weights out anew by itself
        unet.to(memory_format=torch.channels_last)  # slower on a CPU
    if config.compile and on_gpu:
        torch.backends.cudnn.benchmark = True  # shapes never change
    optimizer = optimizers.build(config, adapters.trained_parameters(unet).values())
    schedule = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )
    model, optimizer = accelerator.prepare(unet, optimizer)
    unet = accelerator.unwrap_model(model)
    if sharding.is_sharded(unet):  # accelerate sees to it elsewhere
        unet.forward = accelerator.autocast()(unet.forward)
    trained = adapters.trained_parameters(unet).values()
    ema = EMA(trained, config.ema_decay, config.offload_ema) if config.use_ema else None
    if plan.checkpoint is not None:
        state = checkpoints.load_training_state(plan.checkpoint, unet, optimizer.optimizer, ema)
        if accelerator.scaler is not None and state["loss_scaler"]:
            accelerator.scaler.load_state_dict(state["loss_scaler"])

    if plan.first_step < config.max_train_steps:

        def blank_inputs():
            return make_inputs(make_inputs.blank_window(plan.latent_side))

        update = step.choose_update(config, accelerator, model, optimizer, ema, blank_inputs)
    else:
        update = step.Update(config, accelerator, model, optimizer, ema, config.train_batch_size)
    latent_shape = (vae.config.latent_channels, plan.latent_side, plan.latent_side)
    return Run(
        **vars(plan),
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        optimizer=optimizer.optimizer,
        ema=ema,
        schedule=schedule,
        windows=WindowLoader(plan, cache, latent_shape, num_timesteps=len(alphas_cumprod)),
        make_inputs=make_inputs,
        held_out=held_out,
        update=update,
        checkpoints=checkpoints.Writer(),
        pushes=hub.Pushes(config, plan.repo_id) if plan.repo_id else None,
    )
