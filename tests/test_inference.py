"""The inference scripts: what a user types, what comes out, and that nothing of theirs is lost on the way."""

import concurrent.futures
import contextlib
import errno
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inference import cartoonize, edit_images, low_level_image_processing
from instruct_pix2pix import cli, edit_folder, editing, files, images, records
from tests.loopback_hub import loopback_hub

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["cartoonize.py", "low_level_image_processing.py", "edit_images.py"]
PHOTOS = sorted((ROOT / "assets/photos/test").glob("*.webp"))


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    """In float32, also on a machine with a GPU: half precision would not hold what these tests hold."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A complete InstructPix2Pix pipeline with random weights, small enough for a test."""
    from instruct_pix2pix.models.tiny import build_tiny_pipeline

    folder = tmp_path_factory.mktemp("model") / "tiny"
    build_tiny_pipeline(in_channels=8, seed=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Five real photographs, small, in subfolders, of three sizes: two share one, two more do once padded."""
    folder = tmp_path_factory.mktemp("photos")
    for name, photo, size in [
        ("a.png", 0, (64, 48)),
        ("b.jpg", 1, (64, 48)),
        ("sub/a.png", 2, (48, 64)),
        ("sub/deeper/c.webp", 3, (45, 61)),
        ("d.png", 4, (33, 70)),
    ]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(PHOTOS[photo]).convert("RGB").resize(size).save(folder / name, quality=90)
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


OUTPUTS = ["a.png", "b.png", "d.png", "sub/a.png", "sub/deeper/c.png"]


def edit(model, *arguments) -> None:
    edit_images.main([*map(str, arguments), "--model_id", str(model), "--steps", "2"])


def stopped_edit(model, *arguments) -> int:
    """The exit code of an `edit` that stops, as the shell sees it."""
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda _: edit(model, *arguments))
    return stopped.value.code


@pytest.fixture(scope="module")
def edited(model, photos, tmp_path_factory):
    """The photographs edited once, in batches of three; tests that change the folder copy it first."""
    folder = tmp_path_factory.mktemp("edited") / "out"
    edit(model, photos, "--instruction", "Cartoonize the image", "--output_dir", folder, "--batch_size", 3)
    return folder


def outputs(folder) -> dict[str, bytes]:
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def refusal(capsys, main, arguments) -> str:
    """The line that a wrong command gets; what else is printed is no error of its own."""
    with pytest.raises(cli.UserError) as refused:
        main(list(map(str, arguments)))
    assert refused.value.exit_code == 2 and "\n" not in str(refused.value)
    assert "error" not in capsys.readouterr().err
    return str(refused.value)


def warnings(said) -> list[str]:
    """The warnings of what capsys has read."""
    return [line.partition("warning: ")[2] for line in said.err.splitlines() if "warning: " in line]


# The command line.


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_complete_and_loads_nothing_heavy(script):
    command = [sys.executable, "-X", "importtime", ROOT / "inference" / script, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "argparse" in imported
    heavy = {"torch", "diffusers", "transformers", "huggingface_hub", "numpy", "PIL", "cv2", "tqdm"}
    assert not imported & heavy
    assert f"python inference/{script}" in done.stdout  # the docstring with the launch command
    flags = set(re.findall(r"^  (--\w+)", done.stdout, re.MULTILINE))
    assert {"--model_id", "--steps", "--seed", "--guidance_scale", "--image_guidance_scale"} <= flags
    scales = ["1.0"] if script.startswith("low_level") else ["1.5", "7.0"]  # a restoration is best without guidance
    for default in ["20", "512", *scales]:
        assert f"(default: {default})" in re.sub(r"\s+", " ", done.stdout)


@pytest.fixture
def shell_of_a_model(tmp_path):
    """Only the files that are looked at before weights load; loading it would fail in other words."""

    def make(channels):
        folder = tmp_path / f"model{channels}"
        (folder / "unet").mkdir(parents=True)
        (folder / "model_index.json").write_text("{}")
        (folder / "unet/config.json").write_text(json.dumps({"in_channels": channels}))
        return folder

    return make


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--steps", "0"], "--steps: 0 is too small; give 1 or more"),
        (["--steps", "two"], "--steps: 'two' is not a whole number"),
        (["--seed", "-1"], "--seed: -1 is too small; give 0 or more"),
        (
            ["--guidance_scale", "nan"],
            "--guidance_scale: nan is not a guidance scale; give a number of at least 0",
        ),
        (["--resolution", "-8"], "--resolution: -8 is too small; give 0 or more"),
        (["--stepz", "3"], "--stepz 3: not understood; see --help"),
        (["--image", "nowhere.png"], "--image: nowhere.png: does not exist; give the path or the URL"),
        (["--image", "http://127.0.0.1:1/a.png"], "http://127.0.0.1:1/a.png: cannot be fetched"),
        (["--image", str(ROOT / "Makefile")], "Makefile: not an image; give"),
        (
            ["--output", "cartoon.txt"],
            "--output: cartoon.txt has no ending for an image; use .png, .jpg or .webp",
        ),
        (["--output", f"{PHOTOS[0]}/x.png"], f"--output: {PHOTOS[0]} is a file; give a folder"),
        (["--output", str(PHOTOS[0])], "is an input image itself; give another name"),
        (
            ["--model_id", "./nowhere"],
            "--model_id: ./nowhere is no folder here, and the Hub does not give it",
        ),
        (
            ["--model_id", str(ROOT / "assets")],
            "has no model_index.json; give a folder as save_pretrained writes it",
        ),
    ],
)
def test_snippet_refuses_in_one_line(arguments, said, shell_of_a_model, capsys, tmp_path):
    usual = ["--image", PHOTOS[0], "--model_id", shell_of_a_model(8), "--output", tmp_path / "x.png"]
    line = refusal(capsys, cartoonize.main, usual + arguments)
    assert said in line and "; " in line  # the remedy


def test_snippet_needs_an_image_and_eight_channels(shell_of_a_model, capsys):
    assert refusal(capsys, cartoonize.main, []) == "--image: missing; see --help"
    line = refusal(capsys, cartoonize.main, ["--image", PHOTOS[0], "--model_id", shell_of_a_model(4)])
    assert "4 input channels, and editing takes 8; train it first with train_instruct_pix2pix.py" in line
    # Complete as far as is looked at, but without weights: still one line, not a traceback.
    line = refusal(capsys, cartoonize.main, ["--image", PHOTOS[0], "--model_id", shell_of_a_model(8)])
    assert "cannot be loaded" in line and line.endswith("save or download it again")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["photos"], "--instruction: give either --instruction or --instructions_file"),
        (
            ["photos", "--instruction", " "],
            "--instruction: the text is empty; say what to do with the images",
        ),
        (["--instruction", "x"], "inputs: missing; give files, folders or quoted globs of images"),
        (["nowhere", "--instruction", "x"], "nowhere: does not exist; give files, folders or quoted globs"),
        (["n*where", "--instruction", "x"], "n*where: no image found"),
        (["empty", "--instruction", "x"], "empty: no image found"),
        (
            ["photos", "--instruction", "x", "--batch_size", "0"],
            "--batch_size: 0 is too small; give 1 or more",
        ),
        (["photos", "--instruction", "x", "--format", "gif"], "--format: invalid choice: 'gif'"),
        (
            ["photos", "--instruction", "x", "--output_dir", "a.txt"],
            "/a.txt is a file; give a folder",
        ),
        (["photos", "--instructions_file", "a.txt"], "--instructions_file: a.txt holds no instruction"),
        (["photos", "--instructions_file", "a.md"], "--instructions_file: a.md has an unknown ending"),
        (["photos", "--instructions_file", "no.txt"], "--instructions_file: no.txt cannot be read"),
        (
            ["--instructions_file", "a.jsonl"],
            "--instructions_file: a.jsonl, row 2, lacks a text for image or",
        ),
        (["--instructions_file", "a.csv"], "--instructions_file: a.csv, row 1, lacks a text for image or"),
        (
            ["photos", "--instructions_file", "b.jsonl"],
            "photos: b.jsonl names the images; give one or the other",
        ),
        (
            ["bad", "--instruction", "x"],
            "bad.png: not an image; none of 1 images can be read",
        ),
        (["photos", "--instruction", "x", "--model_id", "model4"], "a UNet of 4 input channels"),
    ],
)
def test_edit_images_refuses_in_one_line(arguments, said, shell_of_a_model, photos, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").symlink_to(photos)
    Path("empty").mkdir()
    Path("bad").mkdir()
    Path("bad/bad.png").write_bytes(b"no image")
    Path("a.txt").write_text("# only a comment\n\n")
    Path("a.md").write_text("x")
    Path("a.jsonl").write_text('{"image": "a.png", "instruction": "x"}\n{"image": "a.png"}\n')
    Path("b.jsonl").write_text('{"image": "a.png", "instruction": "x"}\n')
    Path("a.csv").write_text("file,instruction\na.png,x\n")
    shell_of_a_model(4)
    usual = ["--output_dir", "out", "--model_id", shell_of_a_model(8)]
    line = refusal(capsys, edit_images.main, usual + arguments)
    assert said in line
    assert not Path("out").exists()


def test_guidance_warning_agrees_with_the_pipeline(model, capsys):
    from diffusers import StableDiffusionInstructPix2PixPipeline

    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(model)
    for guidance in (0.0, 0.99, 1.0, 1.01, 7.0):
        for image_guidance in (0.0, 0.99, 1.0, 1.5):
            pipeline._guidance_scale, pipeline._image_guidance_scale = guidance, image_guidance
            silent = editing.guidance_warning(guidance, image_guidance) is None
            asked_for = guidance == image_guidance == 1  # no guidance
            assert silent == (pipeline.do_classifier_free_guidance or asked_for)
    usual = ["--image", "nowhere.png", "--model_id", str(model)]
    with pytest.raises(cli.UserError):
        cartoonize.main([*usual, "--image_guidance_scale", "0.5"])
    expected = "--image_guidance_scale 0.5 is below 1: diffusers turns all guidance off, of the text and of the image"
    assert warnings(capsys.readouterr()) == [expected]
    with pytest.raises(cli.UserError):
        low_level_image_processing.main(usual)  # without guidance by default, and so without a warning
    assert warnings(capsys.readouterr()) == []


# Images and sizes.


def test_images_are_turned_upright_and_converted(tmp_path):
    photo = Image.open(PHOTOS[0]).convert("RGB").resize((40, 30))
    upright = photo.transpose(Image.Transpose.ROTATE_270)  # what a viewer shows for orientation 6
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(images.read_image(tmp_path / "turned.png"), upright)
    assert images.image_size(tmp_path / "turned.png") == upright.size == (30, 40)

    clear = photo.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(photo.size))
    clear.save(tmp_path / "clear.png")
    loaded = np.asarray(images.read_image(tmp_path / "clear.png")).astype(float)
    alpha = np.asarray(clear)[..., 3:] / 255
    assert np.abs(loaded - (alpha * np.asarray(photo) + (1 - alpha) * 255)).max() <= 1

    grey = np.asarray(photo.convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(images.read_image(tmp_path / "deep.png"))[..., 1], grey)

    (tmp_path / "cut.png").write_bytes((tmp_path / "turned.png").read_bytes()[:-400])
    with pytest.raises(images.BadImage, match=r"cannot be read \("):
        images.read_image(tmp_path / "cut.png")


def test_an_image_from_a_url(tmp_path):
    Image.open(PHOTOS[1]).convert("RGB").resize((40, 30)).save(tmp_path / "a b.png")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        assert np.array_equal(images.read_image(f"{address}/a%20b.png"), pixels(tmp_path / "a b.png"))
        with pytest.raises(images.BadImage, match="cannot be fetched .*404"):
            images.read_image(f"{address}/c.png")
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("size", [(64, 64), (65, 31), (1, 1), (17, 90), (300, 200)])
@pytest.mark.parametrize("multiple", [16, 64])
def test_fit_and_restore_are_inverse(size, multiple):
    image = Image.open(PHOTOS[2]).convert("RGB").resize(size)
    fitted = editing.fit_image(image, 0, multiple)
    assert fitted.width % multiple == fitted.height % multiple == 0
    assert fitted.width - size[0] < multiple and fitted.height - size[1] < multiple
    assert np.array_equal(editing.restore_image(fitted, size, 0), image)
    if size[0] % multiple and size[0] > 1:
        assert np.array_equal(np.asarray(fitted)[: size[1], size[0]], np.asarray(image)[:, size[0] - 2])


def test_resolution_caps_the_short_side_only():
    image = Image.open(PHOTOS[2]).convert("RGB").resize((300, 200))
    fitted = editing.fit_image(image, 100, 64)
    assert editing.inner_size(image.size, 100) == (150, 100) and fitted.size == (192, 128)
    restored = editing.restore_image(fitted, image.size, 100)
    assert restored.size == image.size
    assert np.abs(np.asarray(restored, float) - np.asarray(image, float)).mean() < 12  # a blurred copy
    assert editing.inner_size((90, 300), 100) == (90, 300)


def test_edit_takes_a_batch_of_sizes_that_agree_once_padded(model, photos):
    """With a pipeline in memory, as validation does; every image is what it would be alone."""
    from diffusers import StableDiffusionInstructPix2PixPipeline

    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(model)
    photo = images.read_image(photos / "a.png")
    batch = [photo, photo.crop((0, 0, 60, 40))]
    settings = {"steps": 2, "guidance_scale": 7.0, "image_guidance_scale": 1.0}
    edited = editing.edit(pipeline, ["x", "y"], batch, [1, 2], **settings)
    assert [image.size for image in edited] == [(64, 48), (60, 40)]
    [alone] = editing.edit(pipeline, ["y"], batch[1:], [2], **settings)
    assert np.abs(np.asarray(alone).astype(int) - np.asarray(edited[1])).max() <= 1


# The snippets.


def test_cartoonize_keeps_size_and_follows_the_seed(model, photos, tmp_path, capsys):
    def run(name, *arguments):
        usual = ["--image", photos / "d.png", "--model_id", model, "--steps", 2, "--output", tmp_path / name]
        cartoonize.main(list(map(str, [*usual, *arguments])))
        return pixels(tmp_path / name)

    first = run("new/one.png", "--seed", 3)
    assert first.shape == (70, 33, 3) and first.std() > 1
    assert np.array_equal(first, run("two.webp", "--seed", 3))
    assert not np.array_equal(first, run("three.png", "--seed", 4))
    assert not np.array_equal(first, run("four.png", "--seed", 3, "--guidance_scale", 1))
    assert sorted(outputs(tmp_path)) == ["four.png", "new/one.png", "three.png", "two.webp"]


@pytest.mark.slow
def test_low_level_snippet_from_the_hub(model, photos, tmp_path):
    """As a reader runs it: a fresh interpreter, a model id on the Hub, an image by URL, a file written."""
    upload = (
        "import sys; from huggingface_hub import HfApi; api = HfApi(); api.create_repo('tester/derain');"
        "api.upload_folder(repo_id='tester/derain', folder_path=sys.argv[1]);"
        "api.create_repo('tester/photos', repo_type='dataset');"
        "api.upload_file(repo_id='tester/photos', repo_type='dataset', path_in_repo='a.png',"
        "path_or_fileobj=sys.argv[2])"
    )
    with loopback_hub(tmp_path / "hub") as hub:
        run = partial(
            subprocess.run,
            env=hub.environment(CUDA_VISIBLE_DEVICES=""),
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        done = run([sys.executable, "-c", upload, model, photos / "a.png"])
        assert done.returncode == 0, done.stderr
        url = f"{hub.url}/datasets/tester/photos/resolve/main/a.png"
        script = ROOT / "inference/low_level_image_processing.py"
        done = run([sys.executable, script, "--model_id", "tester/derain", "--image", url, "--steps", "2"])
        assert done.returncode == 0, done.stderr
        assert done.stdout == "wrote processed.png\n"
        assert Image.open(tmp_path / "processed.png").size == (64, 48)
        done = run([sys.executable, script, "--model_id", "tester/nothing", "--image", url])
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.splitlines() == [
            "low_level_image_processing.py: error: --model_id: tester/nothing is no folder here, and the Hub "
            "shows no such Stable Diffusion model; check the name and HF_TOKEN"
        ]


# Folders of images.


def test_every_image_is_edited_in_its_place_and_size(edited, photos):
    assert sorted(outputs(edited)) == sorted([*OUTPUTS, "contact_sheet.png", "edits.jsonl"])
    for name in OUTPUTS:
        [source] = [path for path in photos.rglob(f"{Path(name).stem}.*") if path.parent == photos / Path(name).parent]
        assert Image.open(edited / name).size == Image.open(source).size
    records = [json.loads(line) for line in (edited / "edits.jsonl").read_text().splitlines()]
    record = next(record for record in records if record["output"] == "sub/deeper/c.png")
    assert record["image"] == str(photos / "sub/deeper/c.webp")
    assert (record["steps"], record["instruction"]) == (2, "Cartoonize the image")


def test_output_does_not_depend_on_batch_or_company(edited, model, photos, tmp_path):
    """One at a time, in another order, and through the snippet: the same image comes out the same.

    Not to the bit, since a batch of another size may be summed in another order: to 1/255 a pixel.
    """
    reversed_files = [photos / "sub/deeper/c.webp", photos / "d.png", photos / "b.jpg"]
    instruction = ["--instruction", "Cartoonize the image"]
    edit(model, *reversed_files, *instruction, "--output_dir", tmp_path / "one", "--batch_size", 1)
    for name, before in {"c.png": "sub/deeper/c.png", "d.png": "d.png", "b.png": "b.png"}.items():
        assert np.abs(pixels(tmp_path / "one" / name) - pixels(edited / before)).max() <= 1
    assert np.abs(pixels(edited / "a.png") - pixels(edited / "b.png")).max() > 20  # each has its own noise

    records = [json.loads(line) for line in (edited / "edits.jsonl").read_text().splitlines()]
    seed = next(record["noise_seed"] for record in records if record["output"] == "b.png")
    snippet = ["--image", photos / "b.jpg", "--model_id", model, "--steps", 2, "--seed", seed, *instruction]
    cartoonize.main(list(map(str, [*snippet, "--output", tmp_path / "snippet.png"])))
    assert np.abs(pixels(tmp_path / "snippet.png") - pixels(edited / "b.png")).max() <= 1


def test_noise_depends_on_the_seed_and_the_image_alone():
    seeds = {records.noise_seed(seed, image) for seed in range(40) for image in ("ab", "cd", "1ab")}
    assert len(seeds) == 120 and all(0 <= seed < 2**32 for seed in seeds)
    assert records.noise_seed(0, "ab") == 681517781  # a change would make every resumed folder a mixture


def test_batches_share_a_size_once_padded():
    sizes = {name: size for name, size in zip("abcdef", [(64, 48)] * 3 + [(60, 40), (48, 64), (1, 1)], strict=True)}
    batches = edit_folder.make_batches(sizes, 16, 2)
    assert batches == [["a", "b"], ["c", "d"], ["e"], ["f"]]
    narrow_first = dict(reversed(sizes.items()))
    assert edit_folder.make_batches(narrow_first, 16, 2) == [["d", "c"], ["b", "a"], ["e"], ["f"]]


@pytest.fixture
def evaluated(monkeypatch) -> list[int]:
    """How many images each call of a UNet evaluates, once the hooks before it have run."""
    from diffusers import UNet2DConditionModel

    counts, forward = [], UNet2DConditionModel.forward

    def count(unet, sample, *arguments, **more):
        counts.append(len(sample))
        return forward(unet, sample, *arguments, **more)

    monkeypatch.setattr(UNet2DConditionModel, "forward", count)
    return counts


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "EulerAncestralDiscreteScheduler"])
@pytest.mark.parametrize("guidance, image_guidance, branches", [(7, 1, 2), (1.5, 1.5, 2), (7, 1.5, 3), (1, 1, 1)])
def test_a_guidance_branch_that_cancels_is_not_evaluated(
    guidance, image_guidance, branches, scheduler, model, photos, evaluated
):
    import diffusers
    import torch

    pipeline = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(model)
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)

    def run():
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        return pipeline(
            ["turn it into a cartoon", "derain it"],
            image=[Image.open(photos / name) for name in ("a.png", "b.jpg")],
            num_inference_steps=3,
            guidance_scale=guidance,
            image_guidance_scale=image_guidance,
            generator=generators,
            output_type="np",
        ).images

    with editing.skip_needless_branch(pipeline.unet, guidance, image_guidance):
        skipped = run()
    assert set(evaluated) == {2 * branches}
    evaluated.clear()
    plain = run()  # what was put on the UNet is off again
    assert set(evaluated) == {2 * (1 if guidance == 1 else 3)}
    assert np.abs(skipped - plain).max() < 1e-4 and plain.std() > 0.01


def test_all_scripts_skip_the_branch_and_agree(model, photos, tmp_path, evaluated):
    usual = ["--model_id", model, "--steps", 2, "--image_guidance_scale", 1, "--instruction", "Derain the image"]
    folders = [photos / "a.png", photos / "b.jpg", "--output_dir", tmp_path / "out"]
    edit_images.main(list(map(str, [*folders, *usual])))
    assert evaluated == [4, 4]
    record = json.loads((tmp_path / "out/edits.jsonl").read_text().splitlines()[1])
    snippet = ["--image", record["image"], "--seed", record["noise_seed"], "--output", tmp_path / "snippet.png"]
    cartoonize.main(list(map(str, [*snippet, *usual])))
    assert evaluated == [4, 4, 2, 2]
    assert np.abs(pixels(tmp_path / "snippet.png") - pixels(tmp_path / "out" / record["output"])).max() <= 1
    # A restoration is best without guidance: the other snippet asks for one prediction a step.
    low_level_image_processing.main(list(map(str, [*snippet, "--model_id", model, "--steps", 2])))
    assert evaluated == [4, 4, 2, 2, 1, 1]


@pytest.fixture
def fresh_compiler(tmp_path, monkeypatch):
    """Nothing compiled before, in this process or on the disk, and nothing left behind."""
    import torch

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.long
def test_compiled_edits_agree(edited, model, photos, tmp_path, fresh_compiler, capsys):
    import torch

    command = [photos / "a.png", photos / "b.jpg", "--instruction", "Cartoonize the image"]
    edit(model, *command, "--output_dir", tmp_path / "out", "--compile")
    assert warnings(capsys.readouterr()) == []
    assert torch._dynamo.utils.counters["inductor"]  # its optimizations were at work
    for name in ("a.png", "b.png"):
        assert np.abs(pixels(tmp_path / "out" / name) - pixels(edited / name)).max() <= 1


@pytest.mark.long
def test_images_of_many_sizes_share_what_is_compiled(model, photos, tmp_path, fresh_compiler, monkeypatch, capfd):
    """A second size and a smaller batch do not compile every block anew."""
    import torch

    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    counts = {}
    for name, inputs in {"one size": [photos / "a.png", photos / "b.jpg"], "three sizes": [photos]}.items():
        torch._dynamo.reset()
        graphs.clear()
        edit(model, *inputs, "--instruction", "x", "--output_dir", tmp_path / name, "--batch_size", 2, "--compile")
        counts[name] = len(graphs)
    assert 0 < counts["three sizes"] < 2 * counts["one size"], counts
    assert "recompile_limit" not in capfd.readouterr().err


def test_a_failing_compiler_loses_no_edit(edited, model, photos, tmp_path, fresh_compiler, monkeypatch, capsys):
    import torch

    def fail(*_, **__):
        raise RuntimeError("no such thing\nas a compiler")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=fail))
    command = [photos, "--instruction", "Cartoonize the image", "--output_dir", tmp_path / "out", "--batch_size", 3]
    edit(model, *command, "--compile")
    said = capsys.readouterr()
    not_image, not_compiled = warnings(said)
    assert not_image == "left out what is no image: 1 .txt"
    assert not_compiled == "--compile: no such thing; editing goes on without it"
    assert "5 edited, 0 there before, 0 images left out" in said.out
    for name in OUTPUTS:
        assert np.array_equal(pixels(tmp_path / "out" / name), pixels(edited / name))


def test_a_mistake_of_the_model_is_not_the_compilers(model, photos, tmp_path, monkeypatch):
    """What fails without the compiler too comes out as it is."""
    monkeypatch.setattr(editing, "edit_batch", lambda *_, **__: 1 / 0)
    for flags in ([], ["--compile"]):
        with pytest.raises(ZeroDivisionError):
            edit(model, photos, "--instruction", "x", "--output_dir", tmp_path / "out", *flags)


def test_one_batch_is_read_ahead():
    from instruct_pix2pix.images import ordered_map

    read = {number: threading.Event() for number in range(4)}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for number in ordered_map(pool, lambda number: read[number].set() or number, read, 2):
            if number < 3:
                assert read[number + 1].wait(60)  # though nobody asked for it yet
            assert not any(read[later].is_set() for later in range(number + 2, 4))
        assert number == 3
        assert list(ordered_map(pool, str, [], 2)) == []


@pytest.mark.gpu
def test_half_precision_on_a_gpu(model, photos, tmp_path, monkeypatch):
    import torch

    if torch.cuda.device_count() == 0:
        pytest.skip("needs a CUDA device")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    edit(model, photos, "--instruction", "x", "--output_dir", tmp_path / "out")
    [*records, _] = [json.loads(line) for line in (tmp_path / "out/edits.jsonl").read_text().splitlines()]
    assert len(records) == 5 and {record["device"] for record in records} == {"cuda"}
    assert all(pixels(tmp_path / "out" / record["output"]).std() > 1 for record in records)


def test_same_command_makes_only_what_is_missing(edited, model, photos, tmp_path, capsys, monkeypatch):
    out = shutil.copytree(edited, tmp_path / "out")
    command = [photos, "--instruction", "Cartoonize the image", "--output_dir", out]
    (out / "d.png").unlink()
    with (out / "edits.jsonl").open("a") as file:
        file.write('{"output": "a.png", "inst')  # cut short by a crash
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    edit(model, *command)
    assert "1 edited, 4 there before, 0 images left out" in capsys.readouterr().out
    assert np.abs(pixels(out / "d.png") - pixels(edited / "d.png")).max() <= 1
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items() if "sheet" not in path.name)

    # Nothing left to do: not even the model is loaded.
    monkeypatch.setattr(edit_folder, "edit_all", lambda *_: pytest.fail("loaded the model for nothing"))
    before = outputs(out)
    edit(model, *command)
    assert outputs(out) == before


@pytest.mark.parametrize(
    ("owner", "step", "dies_at", "kept"),
    [
        (os, "replace", 2, 0),  # the first batch is written, but not yet declared whole
        (records, "append_records", 1, 2),
        (os, "replace", 4, 2),  # the first of two outputs is in its place
    ],
)
def test_stopped_at_a_write_goes_on(owner, step, dies_at, kept, model, photos, tmp_path, monkeypatch, capsys):
    """A batch is there or not; the same command completes the folder, the same to the byte as in one go."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    command = [photos, "--instruction", "Cartoonize the image", "--batch_size", 3, "--output_dir"]
    edit(model, *command, whole)
    work, calls = getattr(owner, step), []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == dies_at:
            raise KeyboardInterrupt
        work(*arguments)

    monkeypatch.setattr(owner, step, stop)
    assert stopped_edit(model, *command, out) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    monkeypatch.setattr(owner, step, work)
    edit(model, *command, out)
    assert f"{5 - kept} edited, {kept} there before" in capsys.readouterr().out
    everything = {path.relative_to(whole) for path in whole.rglob("*")}
    assert {path.relative_to(out) for path in out.rglob("*")} == everything
    assert all(
        (out / name).read_bytes() == (whole / name).read_bytes() for name in everything if (whole / name).is_file()
    )


def test_what_a_killed_run_had_ready_does_not_replace_a_file_that_came_since(
    model, photos, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    command = [photos, "--instruction", "x", "--output_dir", out]

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(records, "append_records", stop)
        assert stopped_edit(model, *command) == 130
    (out / "a.png").write_bytes(b"mine")
    assert stopped_edit(model, *command) == 2
    assert f"{out / 'a.png'}: was not made by this script" in capsys.readouterr().err
    assert (out / "a.png").read_bytes() == b"mine"


@pytest.mark.parametrize("text", ["first\u2028second", "a\x85b", "\udce4"])
def test_a_record_holds_any_text(text, tmp_path):
    """Line separators that are not line feeds, and the bytes of a file name that are no UTF-8."""
    known = {"output": f"{text}.png", "instruction": text}
    records.keep(tmp_path, [(known, b"image")])
    records.append_records(tmp_path, [{"output": "next.png"}])
    found = records.read_records(tmp_path)
    assert found.keys() == {f"{text}.png", "next.png"}
    assert records.own_record(tmp_path, f"{text}.png", found)["instruction"] == text
    with (tmp_path / "edits.jsonl").open("w", encoding="utf-8", errors="ignore") as file:  # as it was written before
        file.write(json.dumps(known, ensure_ascii=False).replace("\udce4", "") + "\n")
    assert len(records.read_records(tmp_path)) == 1


def test_stopped_while_editing_finishes_what_is_being_written(model, photos, tmp_path, monkeypatch, capsys):
    """Ctrl-C reaches the second batch while the first is being written: this one is there, whole, and recorded."""
    out, editing_again = tmp_path / "out", threading.Event()
    edit_batch, encode_image = editing.edit_batch, edit_folder.encode_image

    def interrupted(*arguments, **settings):
        if editing_again.is_set():
            pytest.fail("a third batch was edited")
        if len(first) == 0:
            first.append(True)
            return edit_batch(*arguments, **settings)
        editing_again.set()
        raise KeyboardInterrupt

    def wait_for_the_second(*arguments):
        assert editing_again.wait(60)
        return encode_image(*arguments)

    first: list[bool] = []
    monkeypatch.setattr(editing, "edit_batch", interrupted)
    monkeypatch.setattr(edit_folder, "encode_image", wait_for_the_second)
    command = [photos, "--instruction", "x", "--output_dir", out, "--batch_size", 2]
    assert stopped_edit(model, *command) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert sorted(outputs(out)) == ["a.png", "b.png", "edits.jsonl"]
    monkeypatch.undo()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    edit(model, *command)
    assert "3 edited, 2 there before" in capsys.readouterr().out


def test_a_full_disk_is_one_line(model, photos, tmp_path, monkeypatch, capsys):
    out, written = tmp_path / "out", []

    def full_at_the_second(path, rows, write=files.write_json_lines):
        if len(written) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(rows[0]["output"])
        write(path, rows)

    monkeypatch.setattr(records, "write_json_lines", full_at_the_second)
    assert stopped_edit(model, photos, "--instruction", "x", "--output_dir", out, "--batch_size", 1) == 2
    assert f"error: --output_dir: {out} cannot be written" in capsys.readouterr().err.splitlines()[-1]
    assert written == [name for name in outputs(out) if name != "edits.jsonl"]


def test_other_settings_are_noticed(edited, model, photos, tmp_path, capsys):
    out = shutil.copytree(edited, tmp_path / "out")
    usual = ["--output_dir", out, "--model_id", model, "--instruction", "Cartoonize the image", "--steps", 2]
    before = outputs(out)
    for arguments, said in [
        (["--steps", 3], "was made with steps 2, now it is 3"),
        (["--seed", 1], "was made with seed 0, now it is 1"),
        (
            ["--instruction", "Derain it"],
            "was made with instruction Cartoonize the image, now it is Derain it",
        ),
    ]:
        line = refusal(capsys, edit_images.main, [photos, *usual, *arguments])
        assert f"{out}/a.png: {said}; choose another --output_dir, or --overwrite" in line
    changed = shutil.copytree(photos, tmp_path / "photos")
    shutil.copy(photos / "b.jpg", changed / "a.png")
    assert "was made with input_sha256" in refusal(capsys, edit_images.main, [changed, *usual])
    assert outputs(out) == before

    edit_images.main(list(map(str, [photos / "a.png", *usual, "--seed", 1, "--overwrite"])))
    after = outputs(out)
    assert [name for name in before if before[name] != after[name]] != []
    assert after["a.png"] != before["a.png"] and after["b.png"] == before["b.png"]


def test_a_retrained_model_is_noticed(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "copy")
    assert records.model_fingerprint(str(copy)) == records.model_fingerprint(str(model))
    weights = copy / "unet/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    assert records.model_fingerprint(str(copy)) != records.model_fingerprint(str(model))
    assert records.model_fingerprint("owner/name") == "owner/name"


def test_what_lies_beside_a_models_parts_is_not_the_model(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "copy")
    before = records.model_fingerprint(str(copy))
    for file in ("evaluation/metrics.json", "checkpoint-4/state.json"):
        (copy / file).parent.mkdir()
        (copy / file).write_text("{}")
    assert records.model_fingerprint(str(copy)) == before
    (copy / "decoder_skips").mkdir()
    (copy / "decoder_skips/config.json").write_text("{}")
    assert records.model_fingerprint(str(copy)) != before


def test_files_of_others_are_never_overwritten(edited, model, photos, tmp_path, capsys):
    out = shutil.copytree(edited, tmp_path / "out")
    arguments = [photos, "--output_dir", out, "--model_id", model, "--instruction", "Cartoonize the image"]
    arguments += ["--steps", 2, "--overwrite"]
    for name in ["b.png", "contact_sheet.png"]:
        own = (out / name).read_bytes()
        shutil.copy(PHOTOS[0], out / name)
        line = refusal(capsys, edit_images.main, arguments)
        assert f"{out}/{name}: was not made by this script, or was changed since; move it away" in line
        assert (out / name).read_bytes() == PHOTOS[0].read_bytes()
        (out / name).write_bytes(own)
    # The folder of the photographs as output folder: they would be in the way of their own edits.
    line = refusal(capsys, edit_images.main, [photos, *arguments[1:], "--output_dir", photos])
    assert "no image found outside --output_dir" in line


def test_bad_images_are_left_out_and_listed(model, photos, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    shutil.copy(photos / "a.png", folder / "good.png")
    (folder / "cut.jpg").write_bytes((photos / "b.jpg").read_bytes()[:-400])  # a good header
    (folder / "text.jpg").write_text("no image")
    edit(model, folder, "--instruction", "x", "--output_dir", tmp_path / "out", "--contact_sheet", 0)
    said = capsys.readouterr()
    first, second = warnings(said)
    assert first == f"left out {folder}/text.jpg: not an image"  # found before the model loads
    assert second.startswith(f"left out {folder}/cut.jpg: cannot be read (")
    assert "1 edited, 0 there before, 2 images left out" in said.out
    assert sorted(outputs(tmp_path / "out")) == ["edits.jsonl", "good.png"]


@pytest.fixture
def nan_model(model, tmp_path):
    """A complete pipeline whose UNet says nothing but NaN, as after a training that diverged."""
    from safetensors.numpy import load_file, save_file

    broken = shutil.copytree(model, tmp_path / "broken")
    weights = load_file(broken / "unet/diffusion_pytorch_model.safetensors")
    weights["conv_out.bias"][:] = np.nan
    save_file(weights, broken / "unet/diffusion_pytorch_model.safetensors", {"format": "pt"})
    return broken


@pytest.mark.parametrize("script", [cartoonize, low_level_image_processing])
def test_snippet_refuses_an_output_that_is_not_a_number(script, nan_model, photos, tmp_path, capsys):
    arguments = ["--image", photos / "a.png", "--model_id", nan_model, "--steps", 2, "--output", tmp_path / "x.png"]
    line = refusal(capsys, script.main, arguments)
    assert line.startswith(f"{nan_model}: the model's output is not a number; ")
    assert not (tmp_path / "x.png").exists()


def test_output_that_is_not_a_number_is_not_written(nan_model, photos, tmp_path, capsys):
    arguments = [photos / "a.png", "--instruction", "x", "--output_dir", tmp_path / "out"]
    assert stopped_edit(nan_model, *arguments) == 1
    [warning] = warnings(capsys.readouterr())
    assert warning == f"left out {photos / 'a.png'}: the model's output is not a number"
    assert not (tmp_path / "out/a.png").exists()


def test_what_turns_an_image_may_stand_at_its_files_end(model, photos, tmp_path):
    """Then its size is known only once it is read: it is edited all the same, beside one that is not turned."""
    folder = tmp_path / "photos"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(photos / "a.png").save(folder / "turned.png", exif=exif)
    content = (folder / "turned.png").read_bytes()
    start, data, end = content.index(b"eXIf") - 4, content.index(b"IDAT") - 4, content.index(b"IEND") - 4
    assert start < data
    (folder / "turned.png").write_bytes(content[:start] + content[data:end] + content[start:data] + content[end:])
    shutil.copy(photos / "a.png", folder / "upright.png")
    edit(model, folder, "--instruction", "x", "--output_dir", tmp_path / "out")
    assert pixels(tmp_path / "out/turned.png").shape == (64, 48, 3)
    assert pixels(tmp_path / "out/upright.png").shape == (48, 64, 3)


def test_instructions_files_and_contact_sheet(model, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos)
    (tmp_path / "lines.txt").write_text("Derain the image\n\n# a comment\nDenoise the image!\nDerain the image\n")
    command = ["a.png", "sub/*.png", "--instructions_file", tmp_path / "lines.txt", "--format", "webp"]
    edit(model, *command, "--output_dir", tmp_path / "lines", "--contact_sheet", 1)
    names = {f"{what}-the-image/{name}" for what in ("derain", "denoise") for name in ("a.webp", "a-png.webp")}
    made = set(outputs(tmp_path / "lines")) - {"edits.jsonl", "contact_sheet.png"}
    assert len(made) == 4 and all(name.startswith(("derain-the-image/a-", "denoise-the-image/a-")) for name in made)
    assert names.isdisjoint(made)  # two images of one name: both say which they are

    rows = [("a.png", "Derain it"), ("sub/a.png", "Denoise it")]
    (tmp_path / "rows.csv").write_text("image,instruction\n" + "".join(f"{photos}/{a},{b}\n" for a, b in rows))
    (photos / "rows.jsonl").write_text("".join(json.dumps({"image": a, "instruction": b}) + "\n" for a, b in rows))
    edit(model, "--instructions_file", "rows.jsonl", "--output_dir", tmp_path / "rows")
    (photos / "rows.jsonl").unlink()
    assert {"a.png", "sub/a.png"} <= set(outputs(tmp_path / "rows"))
    records = [json.loads(line) for line in (tmp_path / "rows/edits.jsonl").read_text().splitlines()]
    assert [(record["output"], record["instruction"]) for record in records[:-1]] == rows
    assert edit_folder.read_instructions(str(tmp_path / "rows.csv")) == [(f"{photos}/{a}", b) for a, b in rows]

    sheet = pixels(tmp_path / "rows/contact_sheet.png")
    image, result = pixels(photos / "a.png"), pixels(tmp_path / "rows/a.png")
    assert np.array_equal(sheet[8 : 8 + 48, 8 : 8 + 64], image)
    assert np.array_equal(sheet[8 : 8 + 48, 16 + 64 : 16 + 128], result)
    below = sheet[8 + 48 : 8 + 48 + 40]
    assert below.min() < 60 and below.max() == 255  # a caption


def test_output_names():
    def names(*wanted, suffix=".png"):
        edits = edit_folder.plan_outputs([(Path(image), relative, text) for image, relative, text in wanted], suffix)
        return [edit.output for edit in edits]

    assert names(("/p/a.jpg", "a.jpg", "x"), ("/p/s/a.jpg", "s/a.jpg", "x")) == ["a.png", "s/a.png"]
    assert names(("/p/a.jpg", "a.jpg", "x"), ("/p/A.png", "A.png", "x")) == ["a-jpg.png", "A-png.png"]
    assert names(("/p/contact_sheet.jpg", "contact_sheet.jpg", "x")) == ["contact_sheet-jpg.png"]
    assert names(("/p/a.jpg", "a.jpg", "x"), ("/p/a.jpg", "a.jpg", "x"), suffix=".webp") == ["a.webp"]
    same = names(("/p/a.jpg", "a.jpg", "x"), ("/q/a.jpg", "a.jpg", "x"))
    assert len(set(same)) == 2 and all(re.fullmatch(r"a-jpg-[0-9a-f]{8}\.png", name) for name in same)
    # Names depend on the images, not on their order.
    assert names(("/q/a.jpg", "a.jpg", "x"), ("/p/a.jpg", "a.jpg", "x")) == same[::-1]
    assert names(("/p/a.jpg", "../a.jpg", "x"), ("/p/b.jpg", "/p/b.jpg", "x")) == ["a.png", "b.png"]
    several = names(("/p/a.jpg", "a.jpg", "Derain it!"), ("/p/a.jpg", "a.jpg", "Entregna la imagen"))
    assert several == ["derain-it/a.png", "entregna-la-imagen/a.png"]
    alike = names(("/p/a.jpg", "a.jpg", "Derain it!"), ("/p/a.jpg", "a.jpg", "derain it"))
    assert len(set(alike)) == 2
    strange = "\udce4.png"  # a byte that is no UTF-8, as file names may have
    assert len(set(names(("/p/" + strange, strange, "x"), ("/q/" + strange, strange, "x")))) == 2


def test_find_inputs(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos)

    def found(*inputs, output_dir="out"):
        return [name for _, name in edit_folder.find_inputs(list(inputs), Path(output_dir))]

    everything = ["a.png", "b.jpg", "d.png", "sub/a.png", "sub/deeper/c.webp"]
    assert found(".") == found("**/*") == everything
    assert found("**/*.png") == ["a.png", "d.png", "sub/a.png"]
    assert found("b.jpg", ".") == ["b.jpg", "a.png", "d.png", "sub/a.png", "sub/deeper/c.webp"]
    assert found("sub/../a.png", "./a.png") == ["a.png"]
    assert found(".", output_dir="sub") == ["a.png", "b.jpg", "d.png"]
    other = shutil.copytree(photos, tmp_path / "other")
    assert found("sub", str(other / "sub")) == [
        f"{folder}/{name}" for folder in ("sub", "sub") for name in ("a.png", "deeper/c.webp")
    ]


def test_a_file_is_written_whole_or_the_old_one_stays(tmp_path):
    path = tmp_path / "a.png"
    files.write_bytes(path, b"old")
    with contextlib.suppress(TypeError):
        files.write_bytes(path, "not bytes")
    assert outputs(tmp_path) == {"a.png": b"old"}
