"""What the training tests share: tiny base models, a few real pairs, and the scripts run in this process."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFilter

from instruct_pix2pix.images import PIXEL_LIMIT

ROOT = Path(__file__).parent.parent

# No test reaches the network; a test of the Hub talks to its own one on loopback, in a subprocess.
os.environ["HF_HUB_OFFLINE"] = "1"
# One thread, here and in the scripts that tests start: the models are tiny, two threads that wait for each other on a
# busy machine are far slower, and equal bits need equal sums.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base_models(tmp_path_factory) -> dict[str, Path]:
    """A 4-channel and an 8-channel tiny pipeline with random weights: `train` and `finetune` start from them."""
    from instruct_pix2pix.models.tiny import build_tiny_pipeline, save_pipeline

    folder = tmp_path_factory.mktemp("base")
    models = {"train": folder / "tiny-stable-diffusion", "finetune": folder / "tiny-instruct-pix2pix"}
    save_pipeline(build_tiny_pipeline(in_channels=4, seed=0), models["train"])
    save_pipeline(build_tiny_pipeline(in_channels=8, seed=0), models["finetune"])
    return models


@pytest.fixture(scope="session")
def plain_bases(base_models, tmp_path_factory) -> dict[str, Path]:
    """Bases whose UNet has no embedding of the text beside attention, which the original code does not know."""
    from diffusers import UNet2DConditionModel

    bases = {}
    for script, base in base_models.items():
        bases[script] = copy_tree(base, tmp_path_factory.mktemp("plain") / base.name)
        config = UNet2DConditionModel.load_config(bases[script], subfolder="unet")
        torch.manual_seed(0)
        UNet2DConditionModel.from_config(config | {"addition_embed_type": None}).save_pretrained(bases[script] / "unet")
    return bases


@pytest.fixture(scope="session")
def photos() -> list[Image.Image]:
    """Ten real photographs of different shapes, short side 72."""
    images = []
    for path in sorted((ROOT / "assets/photos/train").glob("*.webp"))[::20][:10]:
        image = Image.open(path).convert("RGB")
        scale = 72 / min(image.size)
        images.append(image.resize([round(side * scale) for side in image.size], Image.Resampling.LANCZOS))
    return images


@pytest.fixture(scope="session")
def pairs(tmp_path_factory, photos) -> Path:
    """A folder of ten pairs: photographs and their blurred copies, with two wordings."""
    folder = tmp_path_factory.mktemp("pairs")
    for side in ("original", "edited"):
        (folder / side).mkdir()
    for index, photo in enumerate(photos):
        photo.save(folder / "original" / f"{index}.png")
        photo.filter(ImageFilter.GaussianBlur(2)).save(folder / "edited" / f"{index}.png")
    (folder / "instructions.txt").write_text("blur it\nmake it blurry\n")
    return folder


def to_argv(flags: dict) -> list[str]:
    """{"seed": 1, "use_ema": True} -> ["--seed=1", "--use_ema"]; None and False leave a flag out; a list is several
    values."""
    argv = []
    for name, value in flags.items():
        if value is True:
            argv.append(f"--{name}")
        elif isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        elif value is not None and value is not False:
            argv.append(f"--{name}={value}")
    return argv


def run_script(script: str, **flags) -> None:
    """Run train_instruct_pix2pix.py or finetune_instruct_pix2pix.py in this process; UserError comes out as it is."""
    from accelerate.state import AcceleratorState, GradientState

    import finetune_instruct_pix2pix
    import train_instruct_pix2pix

    main = {"train": train_instruct_pix2pix.main, "finetune": finetune_instruct_pix2pix.main}[script]
    try:
        main(to_argv(flags))
    finally:
        # accelerate keeps its state for the life of a process; the scripts' own processes live for one run.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.fixture
def small_run(base_models, pairs, tmp_path):
    """`small_run(script="finetune", name="run", **flags)` trains for a moment and returns the output folder.

    Defaults: 64 px, batch 2, accumulation 2, 4 updates, seed 7, no trackers.
    """

    def run(script: str = "finetune", name: str = "run", **flags) -> Path:
        output_dir = tmp_path / name
        defaults = {
            "pretrained_model_name_or_path": base_models[script],
            "train_data_dir": None if {"dataset_name", "original_dir"} & flags.keys() else pairs,
            "output_dir": output_dir,
            "resolution": 64,
            "train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_train_steps": 4,
            "learning_rate": 1e-3,
            "seed": 7,
            "report_to": "none",
        }
        run_script(script, **{**defaults, **flags})
        return output_dir

    return run


@pytest.fixture(autouse=True)
def _exact_kernels(monkeypatch):
    """On a GPU: the same numbers in every run, in full float32, so that tests can compare them."""
    import torch

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # training with --compile turns it on


@pytest.fixture(autouse=True)
def _own_pixel_limit(monkeypatch):
    """--max_image_pixels stays in the environment of a process, and here many runs share one."""
    monkeypatch.setenv(PIXEL_LIMIT, "1")
    monkeypatch.delenv(PIXEL_LIMIT)


@pytest.fixture(autouse=True)
def _fresh_logging():
    """A script sets up logging once per process; tests run it many times."""
    yield
    for handler in logging.getLogger().handlers[:]:
        if type(handler) is logging.StreamHandler:
            logging.getLogger().removeHandler(handler)


def losses(output_dir: Path) -> list[float]:
    """The loss of each update, from training_log.jsonl."""
    return [json.loads(line)["loss"] for line in (output_dir / "training_log.jsonl").read_text().splitlines()]


def assert_same_tensors(first: Path, second: Path) -> None:
    """Two safetensors files hold the same tensors, bit by bit."""
    from safetensors.torch import load_file

    one, other = load_file(first), load_file(second)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def copy_tree(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def small_photo() -> Image.Image:
    """A real photograph, 64 by 64."""
    return Image.open(ROOT / "assets/photos/test/sea6.webp").convert("RGB").resize((64, 64))


@pytest.fixture(scope="session")
def storage():
    """An object storage on loopback with a bucket `datasets`, found by environment variables as a user's own would be;
    Ray's processes, started later, inherit them. One for all tests: fsspec keeps a file system, its endpoint included,
    for whoever asks for s3:// next."""
    s3fs, moto = pytest.importorskip("s3fs"), pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        system = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
        system.mkdir("datasets")
        yield system
    server.stop()
