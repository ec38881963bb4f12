"""The command line: help at once, every flag explained, every wrong value one line and exit code 2."""

import math
import subprocess
import sys

import pytest

from instruct_pix2pix.cli import MemoryShortage, UserError, run
from instruct_pix2pix.training.config import Config, resolved
from instruct_pix2pix.training.options import build_parser, check, parse_args, trackers
from tests.conftest import ROOT, to_argv

NEEDED = ["--pretrained_model_name_or_path=model", "--dataset_name=data"]
# The flags of the original's scripts, of diffusers' today, and our own.
FLAGS = """
    pretrained_model_name_or_path base_config revision variant dataset_name dataset_config_name train_data_dir
    original_image_column edit_prompt_column edited_image_column val_image_url validation_prompt
    num_validation_images validation_epochs validation_steps max_train_samples output_dir cache_dir seed
    resolution center_crop random_flip train_batch_size num_train_epochs max_train_steps
    gradient_accumulation_steps gradient_checkpointing learning_rate scale_lr lr_scheduler lr_warmup_steps
    conditioning_dropout_prob snr_gamma optimizer allow_tf32 use_ema ema_decay offload_ema non_ema_revision
    dataloader_num_workers adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm
    push_to_hub hub_token hub_model_id hub_private_repo logging_dir mixed_precision report_to local_rank
    checkpointing_steps checkpoints_total_limit resume_from_checkpoint enable_xformers_memory_efficient_attention
    image_geometry cache_latents cached_crops max_micro_batch_size compile dry_run lr_num_cycles lr_power
    guidance_scale image_guidance_scale max_image_pixels original_dir edited_dir instruction split validation_split
    on_bad_row check_rows validation_dataset max_validation_samples keep_best tracker_project_name run_name
    wandb_entity tags hub_strategy lora_rank lora_alpha use_dora loss_type huber_delta debiased_estimation_loss
    zero_terminal_snr streaming stream_cache_gb dataset_mixture timestep_bias_multiplier
    timestep_bias_portion train_decoder_skips embedding_noise
""".split()
# Defaults of the original's scripts, but for the dropout, which the paper sets and the original left out.
DEFAULTS = {
    "resolution": 256,
    "train_batch_size": 16,
    "num_train_epochs": 100,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-4,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 500,
    "conditioning_dropout_prob": 0.05,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_weight_decay": 1e-2,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "num_validation_images": 4,
    "validation_epochs": 1,
    "checkpointing_steps": 500,
    "report_to": "tensorboard",
    "hub_strategy": "end",
    "logging_dir": "logs",
    "output_dir": "instruct-pix2pix-model",
    "image_geometry": "resize_crop",
}


def test_every_flag_is_there_explained_grouped_and_has_its_default():
    parser = build_parser("")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    assert sorted(actions) == sorted(FLAGS)
    assert all(len(action.help) > 10 for action in actions.values())
    grouped = {action.dest for group in parser._action_groups[2:] for action in group._group_actions}
    assert grouped == set(FLAGS)
    args = parse_args("", NEEDED)
    assert {name: getattr(args, name) for name in DEFAULTS} == DEFAULTS


SCRIPTS = ["train_instruct_pix2pix.py", "finetune_instruct_pix2pix.py", "evaluation/evaluate.py", "evaluation/sweep.py"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_wrong_flags_answer_without_heavy_imports(script):
    probe = (
        "import runpy, sys\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print('heavy:', {'torch', 'diffusers', 'datasets', 'transformers', 'cv2'} & set(sys.modules))\n"
    )
    helped = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv = [{script!r}, '--help']\n{probe}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert helped.returncode == 0 and "heavy: set()" in helped.stdout, helped.stderr
    assert "default:" in helped.stdout and script.rsplit("/")[-1] in helped.stdout
    wrong = subprocess.run([sys.executable, script, "--no_such_flag"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1 and "error:" in wrong.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"resolution": 0}, "--resolution: 0 is too small"),
        ({"max_train_steps": -1}, "--max_train_steps: -1 is too small"),
        ({"train_batch_size": 0}, "--train_batch_size: 0 is too small"),
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps: 0 is too small"),
        ({"checkpoints_total_limit": 0}, "--checkpoints_total_limit: 0 is too small"),
        ({"lr_warmup_steps": -5}, "--lr_warmup_steps: -5 is too small"),
        ({"learning_rate": "nan"}, "--learning_rate: nan is out of range"),
        ({"adam_beta1": 1.0}, "--adam_beta1: 1.0 is out of range"),
        ({"conditioning_dropout_prob": 0.4}, "--conditioning_dropout_prob: 0.4 is out of range"),
        ({"conditioning_dropout_prob": -0.1}, "--conditioning_dropout_prob: -0.1 is out of range"),
        ({"embedding_noise": -1.0}, "--embedding_noise: -1.0 is out of range"),
        ({"embedding_noise": math.nan}, "--embedding_noise: nan is out of range"),
        ({"lr_scheduler": "cosin"}, "--lr_scheduler: invalid choice: 'cosin'"),
        ({"report_to": "tensorbord"}, "--report_to: 'tensorbord' is unknown"),
        ({"output_dir": "README.md"}, "--output_dir: README.md is a file"),
        ({"val_image_url": "README.md"}, "--validation_prompt: missing"),
        ({"val_image_url": "none.png", "validation_prompt": "x"}, "--val_image_url: none.png is not a file"),
        ({"keep_best": "psnr"}, "--keep_best: psnr is one of held-out rows; name them with --validation_dataset or"),
        ({"keep_best": "fid", "validation_split": "test"}, "--keep_best: invalid choice"),
        ({"max_validation_samples": 0}, "--max_validation_samples: 0 is too small"),
        ({"image_geometry": "stretch"}, "--image_geometry: invalid choice"),
        ({"max_train_steps": "many"}, "--max_train_steps: 'many' is not a whole number"),
        ({"dataset_name": None}, "--dataset_name: none given"),
        ({"dataset_name": None, "train_data_dir": "/no/such"}, "--train_data_dir: /no/such is not a folder"),
    ],
)
def test_wrong_values_are_one_line_that_names_flag_and_remedy(flags, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    given = {"pretrained_model_name_or_path": "model", "dataset_name": "data", **flags}
    with pytest.raises(UserError) as caught:
        parse_args("", to_argv(given))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_images_and_instructions_to_validate_with_come_in_pairs(monkeypatch):
    monkeypatch.chdir(ROOT)
    images = [*NEEDED, "--val_image_url", "README.md", "LICENSE", "--validation_prompt"]
    assert parse_args("", [*images, "one for all"]).validation_prompt == "one for all"
    assert parse_args("", [*images, "one", "each"]).validation_prompt == ["one", "each"]
    with pytest.raises(
        UserError, match="--validation_prompt: 3 instructions for 2 image.s.; give one for each, or one"
    ):
        parse_args("", [*images, "a", "b", "c"])


def test_a_third_and_zero_dropout_are_allowed():
    for probability in (0, 1 / 3):
        check(parse_args("", [*NEEDED, f"--conditioning_dropout_prob={probability}"]))


def test_nothing_assigns_to_the_resolved_configuration():
    config = Config(vars(parse_args("", NEEDED)))
    with pytest.raises(AttributeError):
        config.learning_rate = 1.0
    assert config.learning_rate == 1e-4


def test_the_token_is_never_among_what_is_written_down():
    args = parse_args("", [*NEEDED, "--hub_token=hf_secret"])
    assert "hf_secret" not in str(resolved(args)) and args.hub_token == "hf_secret"


def test_trackers():
    assert trackers(parse_args("", [*NEEDED, "--report_to=none"])) == []
    assert trackers(parse_args("", [*NEEDED, "--report_to=wandb,tensorboard"])) == ["wandb", "tensorboard"]
    assert trackers(parse_args("", [*NEEDED, "--report_to=all"])) == ["tensorboard", "wandb", "trackio"]


def test_trackers_that_are_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "trackio" else name)
    assert trackers(parse_args("", [*NEEDED, "--report_to=all"])) == ["tensorboard", "wandb"]
    with pytest.raises(UserError, match="--report_to: trackio is not installed; pip install trackio"):
        parse_args("", [*NEEDED, "--report_to=tensorboard,trackio"])


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("--seed: 1 is odd; give 2"), 2, "error: --seed: 1 is odd; give 2"),
        (KeyboardInterrupt(), 130, "stopped; the same command goes on from here"),
        (MemoryShortage("--resolution: 512 does not fit"), 2, "error: --resolution: 512 does not fit"),
    ],
)
def test_what_a_user_can_mend_is_one_line(error, code, said, capsys, monkeypatch):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as caught:
        run(main)
    message = capsys.readouterr().err
    assert caught.value.code == code and said in message and message.count("\n") == 1
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        run(main)
    assert bool(capsys.readouterr().err) == isinstance(error, MemoryShortage)


def test_other_errors_keep_their_traceback(capsys):
    def main(argv):
        raise RuntimeError("a defect of ours")

    with pytest.raises(SystemExit) as caught:
        run(main)
    error = capsys.readouterr().err
    assert caught.value.code == 1 and "Traceback" in error and "RuntimeError: a defect of ours" in error


def test_every_module_can_be_imported_first():
    """Without another that must have been there before it: an import that runs in a circle is found by one order."""
    code = """
import importlib, pkgutil, sys
import instruct_pix2pix
modules = [found.name for found in pkgutil.walk_packages(instruct_pix2pix.__path__, "instruct_pix2pix.")]
for name in modules:
    for earlier in [other for other in sys.modules if other.startswith("instruct_pix2pix")]:
        del sys.modules[earlier]
    importlib.import_module(name)
print(len(modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50
