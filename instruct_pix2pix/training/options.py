"""The flags of both training scripts, in named groups, and every check that needs no model and no data.

Imports nothing heavy, so that `--help` and a wrong flag answer at once.
"""

import argparse
import importlib.util
import math
from pathlib import Path

from instruct_pix2pix import editing
from instruct_pix2pix.cli import Parser, UserError, above_zero, whole_number
from instruct_pix2pix.data.geometry import GEOMETRIES, crop_is_fixed
from instruct_pix2pix.data.sources import add_source_flags, read_mixture, source_of
from instruct_pix2pix.images import is_url

LR_SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
)
TRACKERS = ("tensorboard", "wandb", "trackio", "none")
HUB_STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")
OPTIMIZERS = {  # short names, and where the classes are
    "adamw": "torch.optim.AdamW",
    "adamw8bit": "bitsandbytes.optim.AdamW8bit",
    "adafactor": "transformers.Adafactor",
    "muon": "torch.optim.Muon",
    "prodigy": "prodigyopt.Prodigy",
    "schedulefree": "schedulefree.AdamWScheduleFree",
}
KEEP_BEST = {"loss": "lower", "psnr": "higher", "ssim": "higher"}  # which values of a validation are better


def _size_or_auto(text: str) -> int | str:
    """An argparse type: a number of at least 1, or auto."""
    return text if text == "auto" else whole_number(1)(text)


class _OneOrMore(argparse.Action):
    """Takes one value or more. A single one stays a string: cards, and checkpoints of old, have it as one."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values if len(values) > 1 else values[0])


def as_list(value: str | list[str] | None) -> list[str]:
    """The values of a flag that takes one or more."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _optimizer_name(text: str) -> str:
    """An argparse type: a key of OPTIMIZERS, if need be for the class that was named, or any other package.Class."""
    if text not in OPTIMIZERS and "." not in text.strip("."):
        raise argparse.ArgumentTypeError(f"{text!r} is unknown; give {', '.join(OPTIMIZERS)}, or package.Class")
    return next((name for name, path in OPTIMIZERS.items() if path == text), text)


def build_parser(description: str) -> argparse.ArgumentParser:
    """The parser both scripts use. `description` is the script's docstring."""
    parser = Parser(
        description, usage="%(prog)s --pretrained_model_name_or_path MODEL --dataset_name DATASET [options]"
    )

    model = parser.add_argument_group("model")
    add = model.add_argument
    add(
        "--pretrained_model_name_or_path",
        required=True,
        help="Folder or Hub id of the base model, or Stable Diffusion 1 or 2 in one file (.safetensors, .ckpt).",
    )
    add(
        "--base_config",
        metavar="FOLDER_OR_ID",
        help="Pipeline whose configurations and tokenizer a base model in one file goes by. When left out, from the"
        " Hub: Stable Diffusion 1.5's, or InstructPix2Pix's where the file has 8 input channels.",
    )
    add("--revision", help="Branch, tag or commit of the base model on the Hub.")
    add(
        "--variant",
        help="File variant of the base model's weights, such as fp16, which is found without it where nothing else is.",
    )
    add("--non_ema_revision", help="Revision to take the UNet from; --revision when left out.")
    add(
        "--cache_dir",
        help="Where downloaded models and datasets are kept (the Hub's own cache when left out) and the latent cache"
        " (--output_dir when left out).",
    )

    add = parser.add_argument_group("adapters", "Instead of the whole UNet (docs/adapters.md).").add_argument
    add(
        "--lora_rank",
        type=whole_number(1),
        help="Train conv_in and changes of this rank of the attentions' projections.",
    )
    add("--lora_alpha", type=above_zero, help="Multiply them by this over the rank; the rank itself when left out.")
    add("--use_dora", action="store_true", help="Train each projection's lengths of rows, too (DoRA).")

    data = parser.add_argument_group("dataset")
    add = data.add_argument
    add(
        "--dataset_name",
        help="Hub id of a dataset of triples, or a local folder or file: parquet, save_to_disk, JSONL, JSON, CSV or TSV"
        " with image paths or addresses, two folders of equal file names, zip and tar (docs/data.md).",
    )
    add("--train_data_dir", help="The same for a local folder or file. Ignored with --dataset_name.")
    add(
        "--dataset_mixture",
        metavar="FILE",
        help="Instead of one dataset a YAML file of several, each with its weight, columns and instructions; what a"
        " model knows already can be replayed, so as not to be forgotten (docs/mixtures.md).",
    )
    add_source_flags(data)
    add("--max_train_samples", type=whole_number(1), help="Train on this many rows, drawn with the seed.")
    add(
        "--dataloader_num_workers",
        type=whole_number(0),
        help="Processes that load data; 0 is the main one. When left out: 0 on a CPU; on a GPU 1 from the latent cache"
        " and up to 8 without it.",
    )

    add = parser.add_argument_group("streaming", "Datasets larger than the disk (docs/training.md).").add_argument
    add(
        "--streaming",
        action="store_true",
        help="Leave the dataset's parquet shards where they are (on disk, the Hub, or at an hf://, s3:// or https://"
        " address) and fetch row groups when their turn comes.",
    )
    add("--stream_cache_gb", type=above_zero, default=10, help="Disk for row groups, in --cache_dir, in 10^9 bytes.")

    image = parser.add_argument_group("images")
    add = image.add_argument
    add("--resolution", type=whole_number(1), default=256, help="Side of the square training images, in pixels.")
    add(
        "--image_geometry",
        choices=GEOMETRIES,
        default="resize_crop",
        help="resize_crop: short side to --resolution, then crop. crop: cut at native resolution, enlarging only"
        " what is too small (for blur, noise and rain, which downscaling erases). squash: ignore the aspect.",
    )
    add("--center_crop", action="store_true", help="Crop the middle instead of a random place.")
    add("--random_flip", action="store_true", help="Mirror a pair, both images together, half of the time.")

    cache = parser.add_argument_group("latent cache")
    add = cache.add_argument
    add(
        "--cache_latents",
        action=argparse.BooleanOptionalAction,
        help="Encode every image and instruction once, keep the result on disk, and train from it. When left out: on"
        " with --cached_crops, and where the crop is fixed (--center_crop or squash) and encoding once is less work.",
    )
    add(
        "--cached_crops",
        type=whole_number(1),
        help="Random crops of each pair to cache, those of the first so many epochs, used in turn; needed where the"
        " crop is random.",
    )

    optim = parser.add_argument_group("training")
    add = optim.add_argument
    add("--output_dir", default="instruct-pix2pix-model", help="Where pipeline, checkpoints and logs go.")
    add("--seed", type=whole_number(0), help="Seed of every random stream; drawn and written down when left out.")
    add("--train_batch_size", type=whole_number(1), default=16, help="Images per process in one forward pass.")
    add("--gradient_accumulation_steps", type=whole_number(1), default=1, help="Forward passes per update.")
    add(
        "--max_micro_batch_size",
        type=_size_or_auto,
        help="Merge the forward passes of an update into ones of at most so many images, or, with auto, the largest"
        " that fit the GPU. The update stays the same to rounding. --train_batch_size when left out.",
    )
    add("--num_train_epochs", type=whole_number(1), default=100, help="Epochs, where --max_train_steps is not given.")
    add("--max_train_steps", type=whole_number(1), help="Updates in all; overrides --num_train_epochs.")
    add("--gradient_checkpointing", action="store_true", help="Trade a slower backward pass for memory.")
    add(
        "--conditioning_dropout_prob",
        type=float,
        default=0.05,
        help="Probability of dropping the instruction only, the image only, and both, each"
        " (InstructPix2Pix, section 3.2.1). 0 trains a model that cannot be guided.",
    )
    add(
        "--embedding_noise",
        type=float,
        default=0.0,
        metavar="S",
        help="Noise on the vectors of an instruction's words, up to S of their standard deviations: for new wordings"
        " (docs/training.md). 0 for none.",
    )

    add(
        "--train_decoder_skips",
        type=whole_number(0),
        default=0,
        metavar="UPDATES",
        help="When the UNet is trained, train skips from the source image into the decoder for so many updates: detail"
        " that latents do not hold (docs/training.md). 0 for none.",
    )

    loss = parser.add_argument_group("loss and noise")
    add = loss.add_argument
    add("--loss_type", choices=("mse", "huber"), default="mse", help="Squared error, or Huber's function of the error.")
    add("--huber_delta", type=above_zero, default=0.1, help="Error from which on Huber's function grows linearly.")
    add(
        "--timestep_bias_multiplier",
        type=above_zero,
        default=1.0,
        metavar="M",
        help="Draw the noisiest timesteps M times as often as the others: for editing in few steps, which suits tasks"
        " with one right answer (docs/restoration.md).",
    )
    add("--timestep_bias_portion", type=float, default=0.1, metavar="P", help="Which: the noisiest P of all.")
    weighting = loss.add_mutually_exclusive_group().add_argument
    weighting("--snr_gamma", type=above_zero, help="Weight the loss by min-SNR with this gamma (5.0 in the paper).")
    weighting("--debiased_estimation_loss", action="store_true", help="Weight the loss of the noise by 1 / sqrt(SNR).")
    add("--zero_terminal_snr", action="store_true", help="End the noise schedule without signal (v-prediction only).")

    optimizer = parser.add_argument_group("optimizer")
    add = optimizer.add_argument
    names = f"{', '.join(OPTIMIZERS)}, or package.Class of an installed library (docs/optimizers.md)."
    add("--optimizer", type=_optimizer_name, default="adamw", metavar="NAME", help=names)
    add("--learning_rate", type=above_zero, default=1e-4, help="Learning rate after warm-up.")
    add("--scale_lr", action="store_true", help="Multiply it by processes x accumulation x batch size.")
    add("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="Learning rate schedule.")
    add(
        "--lr_warmup_steps", type=whole_number(0), default=500, help="Warm-up updates, for the schedules that have one."
    )
    add(
        "--lr_num_cycles",
        type=whole_number(1),
        default=1,
        help="Restarts of the cosine_with_restarts schedule, plus one.",
    )
    add("--lr_power", type=above_zero, default=1.0, help="Power of the polynomial schedule; 1 is linear.")
    eight_bit = {"action": "store_const", "const": "adamw8bit", "dest": "optimizer"}
    add("--use_8bit_adam", **eight_bit, help="AdamW with 8-bit state (bitsandbytes): --optimizer adamw8bit.")
    add("--adam_beta1", type=float, default=0.9, help="AdamW's beta1, and of others that have it; so the next ones.")
    add("--adam_beta2", type=float, default=0.999, help="AdamW's beta2.")
    add("--adam_weight_decay", type=float, default=1e-2, help="AdamW's weight decay.")
    add("--adam_epsilon", type=above_zero, default=1e-8, help="AdamW's epsilon.")
    add("--max_grad_norm", type=above_zero, default=1.0, help="Clip the gradient to this norm.")

    ema = parser.add_argument_group("exponential moving average")
    add = ema.add_argument
    on_or_off = argparse.BooleanOptionalAction
    add("--use_ema", action=on_or_off, default=False, help="Keep an average of the UNet, to validate with and export.")
    add("--ema_decay", type=float, default=0.9999, help="Decay; warmed up as min((1 + t) / (10 + t), decay).")
    add("--offload_ema", action="store_true", help="Keep the average in CPU memory.")

    speed = parser.add_argument_group("precision and speed")
    add = speed.add_argument
    add(
        "--mixed_precision",
        choices=("no", "fp16", "bf16"),
        help="fp16 needs a GPU; accelerate's own setting when left out.",
    )
    add("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere GPUs and newer.")
    add(
        "--enable_xformers_memory_efficient_attention",
        action="store_true",
        help="xformers where it works; PyTorch's scaled-dot-product attention otherwise.",
    )
    add(
        "--compile",
        action="store_true",
        help="Compile the UNet (torch.compile, a minute or more at the start), and use channels_last on a GPU. Same"
        " numbers to rounding.",
    )
    add("--local_rank", type=int, default=-1, help="Set by launchers; accelerate reads its own environment.")

    checkpoints = parser.add_argument_group("checkpoints")
    add = checkpoints.add_argument
    add("--checkpointing_steps", type=whole_number(1), default=500, help="Write a checkpoint every so many updates.")
    add("--checkpoints_total_limit", type=whole_number(1), help="Keep only the newest so many; all when left out.")
    add(
        "--keep_best",
        choices=tuple(KEEP_BEST),
        help="Keep the checkpoint that is best by this measure of the held-out rows, too; each is validated for it.",
    )
    add(
        "--resume_from_checkpoint",
        help="A checkpoint folder; or latest: go on from the newest if there is one; or hub: the same, after taking the"
        " newest back from --hub_model_id's repository where --output_dir has none.",
    )

    validation = parser.add_argument_group(
        "validation",
        "The guidance scales are also what the model card recommends. Both at 1 are no guidance, which suits tasks with"
        f" one right answer. Left out, they are those of a base's {editing.SETTINGS_FILE}, as are steps and scheduler.",
    )
    add = validation.add_argument
    several = {"nargs": "+", "action": _OneOrMore}
    add("--val_image_url", **several, help="Images to edit during training: URLs or local paths.")
    add("--validation_prompt", **several, help="Instructions to edit them with: one for each image, or one for all.")
    add(
        "--validation_dataset",
        help="Held-out rows, anything that --dataset_name takes, read by the training set's flags for columns and"
        " images. Their loss is logged with fixed noise and timesteps, and some are edited beside their targets.",
    )
    add(
        "--validation_split",
        help="Split of the validation dataset, or, without one, of the training set, to take held-out rows from.",
    )
    add(
        "--max_validation_samples",
        type=whole_number(1),
        default=64,
        help="Held-out rows for the loss; of more, the same so many are drawn in every run.",
    )
    add(
        "--num_validation_images",
        type=whole_number(1),
        default=4,
        help="Edits of each image, and held-out rows that are edited and measured (PSNR, SSIM).",
    )
    add("--validation_epochs", type=whole_number(1), default=1, help="Validate every so many epochs.")
    add("--validation_steps", type=whole_number(1), help="Validate every so many updates instead.")
    editing.add_guidance_flags(validation, action=editing.Stated)
    parser.set_defaults(stated=set())

    tracking = parser.add_argument_group("tracking and publishing")
    add = tracking.add_argument
    add(
        "--report_to",
        default="tensorboard",
        help=f"Trackers, separated by commas: {', '.join(TRACKERS)}, or all that are installed.",
    )
    add("--tracker_project_name", default="instruct-pix2pix", help="Project of W&B and trackio, folder of TensorBoard.")
    add("--run_name", help="Name of the run in W&B and trackio; made of --output_dir and a number when left out.")
    add("--wandb_entity", help="W&B user or team to log to.")
    add("--tags", nargs="+", help="Tags of the W&B run.")
    add("--logging_dir", default="logs", help="TensorBoard's folder, inside --output_dir.")
    add("--push_to_hub", action="store_true", help="Upload pipeline and model card when done.")
    add(
        "--hub_strategy",
        choices=HUB_STRATEGIES,
        default="end",
        help="Pipeline and card at the end, or with every_save at each checkpoint, too, in the background; with"
        " checkpoint the newest one as well, to resume from, or with all_checkpoints each.",
    )
    add("--hub_token", help="Hub token; better given by `hf auth login` or HF_TOKEN. Never written anywhere.")
    add("--hub_model_id", help="Repository to upload to; the name of --output_dir when left out.")
    add("--hub_private_repo", action="store_true", help="Where the repository is made for this, make it private.")
    add("--dry_run", action="store_true", help="Check everything, print the resolved configuration, and stop.")
    return parser


def parse_args(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check. Raises UserError, naming the flag, its value and the remedy."""
    args = build_parser(description).parse_args(argv)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Every check that needs neither a model nor data nor a heavy import."""
    if args.dataset_mixture:
        read_mixture(args)
    else:
        source_of(args, "--dataset_name", "--train_data_dir")
    if args.dataset_mixture and args.validation_split and not args.validation_dataset:
        raise UserError("--validation_split: of a mixture; name one of its datasets with --validation_dataset as well")
    if not args.adam_weight_decay >= 0:
        raise UserError(f"--adam_weight_decay: {args.adam_weight_decay} is negative; give 0 or more")
    if not 0 < args.timestep_bias_portion < 1:
        raise UserError(f"--timestep_bias_portion: {args.timestep_bias_portion} is no share; give one between 0 and 1")
    for name in ("adam_beta1", "adam_beta2", "ema_decay"):
        value = getattr(args, name)
        if not 0 <= value < 1:
            raise UserError(f"--{name}: {value} is out of range; give a number from 0 to below 1")
    if args.cached_crops is not None and args.cached_crops > 1 and crop_is_fixed(args.image_geometry, args.center_crop):
        raise UserError(f"--cached_crops: {args.cached_crops} of a crop that is always the same; leave the flag out")
    if args.cache_latents and args.cached_crops is None and not crop_is_fixed(args.image_geometry, args.center_crop):
        raise UserError(
            "--cache_latents: the crop is random, so say how many of each pair to keep with --cached_crops (4, say),"
            " or fix it with --center_crop"
        )
    for name in ("cache_latents", "cached_crops", "original_dir") if args.streaming else ():
        if getattr(args, name):
            raise UserError(f"--{name}: needs the whole dataset at hand; leave it out, or --streaming")
    if args.streaming and args.check_rows == "all":
        raise UserError("--check_rows: all would read the whole stream; leave it out, rows are checked as they come")
    if args.lora_rank is None and (args.lora_alpha is not None or args.use_dora):
        raise UserError(f"--{'use_dora' if args.use_dora else 'lora_alpha'}: is of adapters; give --lora_rank, 16 say")
    # Three exclusive events of equal probability: more than a third each cannot be.
    if not 0 <= args.conditioning_dropout_prob <= 1 / 3:
        raise UserError(
            f"--conditioning_dropout_prob: {args.conditioning_dropout_prob} is out of range; give 0 to 1/3 (it"
            " drops the instruction, the image and both with this probability each; 0.05 in the paper)"
        )
    if not 0 <= args.embedding_noise < math.inf:
        raise UserError(f"--embedding_noise: {args.embedding_noise} is out of range; give 0 or more, 1 or 2 say")
    trackers(args)

    if args.output_dir and Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        raise UserError(f"--output_dir: {args.output_dir} is a file; name a folder")
    images, prompts = as_list(args.val_image_url), as_list(args.validation_prompt)
    if bool(images) != bool(prompts):
        missing = "--validation_prompt" if images else "--val_image_url"
        raise UserError(f"{missing}: missing; validation needs an image and an instruction, or neither")
    if len(prompts) not in (1, len(images)) and images:
        counts = f"{len(prompts)} instructions for {len(images)} image(s)"
        raise UserError(f"--validation_prompt: {counts}; give one for each, or one for all")
    for image in images:
        if not is_url(image) and not Path(image).is_file():
            raise UserError(f"--val_image_url: {image} is not a file; give a URL or the path of an image")
    if args.hub_strategy != "end" and not args.push_to_hub:
        raise UserError(f"--hub_strategy: {args.hub_strategy} pushes nothing without --push_to_hub; give that as well")
    if args.keep_best and not (args.validation_dataset or args.validation_split):
        remedy = "name them with --validation_dataset or --validation_split"
        raise UserError(f"--keep_best: {args.keep_best} is one of held-out rows; {remedy}")
    if args.dataset_name is None and args.train_data_dir and not Path(args.train_data_dir).expanduser().exists():
        raise UserError(f"--train_data_dir: {args.train_data_dir} is not a folder or a file")


def trackers(args: argparse.Namespace) -> list[str]:
    """The trackers asked for, without `none`."""
    names = [name.strip() for name in args.report_to.split(",") if name.strip()]
    unknown = [name for name in names if name not in (*TRACKERS, "all")]
    if unknown:
        raise UserError(f"--report_to: {unknown[0]!r} is unknown; choose from {', '.join(TRACKERS)}, all")
    installed = [name for name in TRACKERS if name != "none" and importlib.util.find_spec(name)]
    if "all" in names:
        return installed
    if missing := [name for name in names if name not in (*installed, "none")]:
        raise UserError(f"--report_to: {missing[0]} is not installed; pip install {missing[0]}, or leave it out")
    return [name for name in names if name != "none"]
