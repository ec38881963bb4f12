"""The editor of three lines, and what its keywords and the scripts' flags do: one code for both."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from inference import cartoonize, edit_images, low_level_image_processing
from instruct_pix2pix import Editor, devices, edit_folder, editing, records
from instruct_pix2pix.cli import MemoryShortage, UserError
from instruct_pix2pix.evaluation.settings import SETTINGS_FILE
from tests.conftest import ROOT, copy_tree

TINY = ROOT / "assets/tiny-instruct-pix2pix"  # trained to make pictures gray
PHOTOS = sorted((ROOT / "assets/photos/test").glob("*.webp"))
GRAY = "make it gray"


@pytest.fixture(scope="module")
def editor():
    return Editor.from_pretrained(TINY, device="cpu")


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "a.png"
    Image.open(PHOTOS[0]).convert("RGB").resize((72, 48)).save(path)
    return path


def pixels(image) -> np.ndarray:
    return np.asarray(image if isinstance(image, Image.Image) else Image.open(image).convert("RGB")).astype(int)


def run(script, *arguments) -> None:
    script.main([str(argument) for argument in [*arguments, "--model_id", TINY, "--device", "cpu", "--steps", 2]])


def mask_of(size: tuple[int, int], left: int, path: Path | None = None) -> Image.Image:
    """Black up to a column, white from there on."""
    mask = Image.new("L", size)
    mask.paste(255, (left, 0, *size))
    if path:
        mask.save(path)
    return mask


def warnings(said) -> list[str]:
    return [line.partition("warning: ")[2] for line in said.err.splitlines() if "warning: " in line]


# Three lines.


def test_importing_the_package_stays_light():
    command = "import sys, instruct_pix2pix; print(*sys.modules); instruct_pix2pix.Editor; print(*sys.modules)"
    before, after = subprocess.check_output([sys.executable, "-c", command], text=True).splitlines()
    heavy = {"torch", "diffusers", "transformers", "numpy", "PIL", "cv2", "instruct_pix2pix.editor"}
    assert not heavy & set(before.split()) and heavy & set(after.split()) == {"instruct_pix2pix.editor"}
    with pytest.raises(ImportError):
        from instruct_pix2pix import Nothing  # noqa: F401


def test_the_scripts_do_what_the_editor_does(editor, photo, tmp_path):
    edited = editor(photo, GRAY, steps=2, guidance_scale=3.0, seed=5)
    assert edited.size == (72, 48) and edited.mode == "RGB"
    flags = ["--image", photo, "--instruction", GRAY, "--guidance_scale", 3, "--seed", 5]
    run(cartoonize, *flags, "--output", tmp_path / "script.png")
    assert np.array_equal(pixels(edited), pixels(tmp_path / "script.png"))
    opened = Image.open(photo).convert("RGBA")
    for source in (str(photo), photo.read_bytes(), opened):  # a path, a file's bytes, a picture
        assert np.array_equal(pixels(editor(source, GRAY, steps=2, guidance_scale=3.0, seed=5)), pixels(edited))
    # Without any keyword it edits as the published models do, and the other script without guidance.
    usual = editor(photo, GRAY, steps=2)
    same = editor(photo, GRAY, steps=2, image_guidance_scale=1.5, guidance_scale=7.0, scheduler="own", seed=0)
    assert np.array_equal(pixels(usual), pixels(same))
    run(low_level_image_processing, *flags[:4], "--output", tmp_path / "other.png")
    without = editor(photo, GRAY, steps=2, image_guidance_scale=1.0, guidance_scale=1.0)
    assert np.array_equal(pixels(without), pixels(tmp_path / "other.png"))
    assert not np.array_equal(pixels(without), pixels(usual))


def test_what_is_recommended_goes_before_defaults_and_after_keywords(editor, photo, tmp_path, capsys, monkeypatch):
    model, asked = copy_tree(TINY, tmp_path / "model"), []
    best = {"steps": 3, "image_guidance_scale": 1.0, "guidance_scale": 2.0, "scheduler": "ddim"}
    (model / SETTINGS_FILE).write_text(json.dumps({"all": best, "tasks": {}}))
    recommending = Editor(model)
    recommending.pipeline = editor.pipeline
    monkeypatch.setattr(editing, "edit", lambda *_, **how: asked.append(how) or [Image.new("RGB", (72, 48))])
    recommending(photo, GRAY)
    assert "recommended_settings.json, all: steps 3" in capsys.readouterr().out
    recommending(photo, GRAY, steps=2, scheduler="own", guidance_scale=1.5)
    recommending(photo, GRAY, scheduler="unipc")
    how = [{name: options[name] for name in best} for options in asked]
    assert how == [best, best | {"steps": 2, "scheduler": None, "guidance_scale": 1.5}, best | {"scheduler": "unipc"}]


@pytest.mark.parametrize(
    "keywords, said",
    [
        ({"image": "nowhere.png"}, "--image: nowhere.png: does not exist; give the path"),
        ({"image": b"nothing"}, "--image: its bytes: not an image; give the path"),
        ({"mask": "nowhere.png"}, "--mask: nowhere.png: does not exist; give the path"),
        ({"mask": Image.new("L", (72, 51), 255)}, "--mask: 72x51 for an image of 72x48, another shape; give a mask"),
        ({"mask": Image.new("L", (48, 72), 255)}, "--mask: 48x72 for an image of 72x48, another shape; give a mask"),
        ({"mask": Image.new("L", (72, 48), 90)}, "--mask: nowhere brighter than mid-grey; paint white what"),
        ({"scheduler": "eule"}, "--scheduler: 'eule' is not a scheduler; give own, euler_ancestral"),
    ],
)
def test_what_is_wrong_is_said_before_weights_load(keywords, said, photo, monkeypatch):
    monkeypatch.setattr(editing, "load_pipeline", lambda *_, **__: pytest.fail("loaded the model for nothing"))
    with pytest.raises(UserError) as refused:
        Editor(TINY)(**{"image": photo, "instruction": GRAY} | keywords)
    assert str(refused.value).startswith(said) and "\n" not in str(refused.value)


# Where and in what precision.


@pytest.mark.parametrize(
    "there, device, dtype, expected",
    [
        ({"cuda", "mps"}, "auto", "auto", ("cuda", torch.float16)),
        ({"mps"}, "auto", "auto", ("mps", torch.float32)),
        (set(), "auto", "auto", ("cpu", torch.float32)),
        ({"cuda"}, "cpu", "auto", ("cpu", torch.float32)),
        ({"cuda"}, "cuda", "bfloat16", ("cuda", torch.bfloat16)),
        ({"mps"}, "mps", "float16", ("mps", torch.float16)),
        (set(), "cuda", "auto", "--device: PyTorch finds no cuda here; give auto or cpu"),
        ({"cuda"}, "mps", "auto", "--device: PyTorch finds no mps here; give auto or cpu"),
        (set(), "gpu", "auto", "--device: PyTorch finds no gpu here; give auto or cpu"),
    ],
)
def test_choice_of_device(there, device, dtype, expected, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: "cuda" in there)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: "mps" in there)
    if isinstance(expected, str):
        with pytest.raises(UserError) as refused:
            devices.choose_device(device, dtype)
        assert str(refused.value) == expected
    else:
        assert devices.choose_device(device, dtype) == (torch.device(expected[0]), expected[1])


def test_each_process_of_a_launch_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert devices.choose_device()[0] == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "6")
    assert devices.choose_device("cuda")[0] == torch.device("cuda:2")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_edits_alike(dtype, editor, photo):
    half = Editor.from_pretrained(TINY, device="cpu", dtype=dtype)
    assert half.pipeline.unet.dtype == half.pipeline.vae.dtype == getattr(torch, dtype)
    how = {"steps": 2, "guidance_scale": 1.0, "image_guidance_scale": 1.0, "tile": 32}
    # The noise is drawn in the model's precision: of bfloat16's few digits the difference tells.
    first, second = (pixels(one(photo, GRAY, **how)) for one in (editor, half))
    assert 0 < np.abs(first - second).mean() < 25


# Variations and the negative prompt.


def test_the_first_variation_is_what_one_is_to_the_bit(editor, photo, tmp_path, capsys):
    calls = []
    edits = editor(photo, GRAY, steps=2, seed=3, num_variations=3, on_step=lambda *call: calls.append(call))
    assert calls == [(done, 6) for done in range(1, 7)]
    for number, edit in enumerate(edits):
        assert np.array_equal(pixels(edit), pixels(editor(photo, GRAY, steps=2, seed=3 + number)))
    assert not np.array_equal(pixels(edits[0]), pixels(edits[1]))
    flags = ["--image", photo, "--instruction", GRAY, "--seed", 3, "--num_variations", 2]
    run(cartoonize, *flags, "--output", tmp_path / "new/b.png")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["b-1.png", "b-2.png"]
    assert all(np.array_equal(pixels(tmp_path / f"new/b-{n}.png"), pixels(edits[n - 1])) for n in (1, 2))
    for name, source in {"b.png": "b-2.png", "c.png": "c.png"}.items():  # a file that is read is not written
        (tmp_path / source).write_bytes(photo.read_bytes())
        flags = ["--image", tmp_path / source, "--output", tmp_path / name]
        with pytest.raises(UserError, match="is an input image itself; give another name"):
            run(cartoonize, *flags, *(["--num_variations", 2] if name == "b.png" else []))
        assert (tmp_path / source).read_bytes() == photo.read_bytes()


def test_the_negative_prompt_is_diffusers_own(editor, photo, capsys):
    scales = {"image_guidance_scale": 1.5, "guidance_scale": 5.0}
    ours = editor(photo, GRAY, steps=2, negative_prompt="a red house", **scales)
    [theirs] = editor.pipeline(
        GRAY,
        image=editing.fit_image(Image.open(photo), 0, 16),
        negative_prompt="a red house",
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        **scales,
    ).images
    assert np.array_equal(pixels(ours), pixels(theirs.crop((0, 0, 72, 48))))
    assert not np.array_equal(pixels(ours), pixels(editor(photo, GRAY, steps=2, **scales)))
    assert warnings(capsys.readouterr()) == []
    for guidance, said in {
        1.0: "--negative_prompt is not used without guidance",
        0.5: "--guidance_scale 0.5 is not above 1: diffusers turns all guidance off, of the text and of the image; "
        "--negative_prompt is not used without guidance",
    }.items():
        how = {"steps": 1, "guidance_scale": guidance, "image_guidance_scale": 1.0}
        plain = editor(photo, GRAY, **how)
        capsys.readouterr()
        assert np.array_equal(pixels(editor(photo, GRAY, **how, negative_prompt="a red house")), pixels(plain))
        assert warnings(capsys.readouterr()) == [said]


def test_what_the_model_does_not_read_is_said(editor, photo, capsys):
    words = [f"{number}" for number in range(10, 99)]
    tokens = editor.pipeline.tokenizer
    fits = next(n for n in range(len(words), 0, -1) if len(tokens(" ".join(words[:n])).input_ids) <= 77)
    editor(photo, " ".join(words[:fits]), steps=1)
    assert warnings(capsys.readouterr()) == []
    first = editor(photo, " ".join(words[:fits] + ["red", "hat"]), steps=1, negative_prompt=" ".join(words))
    long, negative = warnings(capsys.readouterr())
    assert long.startswith("--instruction: longer than the 77 tokens that the model reads; it does not see '")
    assert "hat" in long.replace(" ", "") and negative.startswith("--negative_prompt: longer than the 77 tokens")
    # And it is true: another end makes no difference.
    other = editor(photo, " ".join(words[:fits] + ["red", "cup"]), steps=1, negative_prompt=" ".join(words))
    assert np.array_equal(pixels(first), pixels(other))


def test_a_long_text_is_said_in_short(editor, photo, capsys):
    editor(photo, "word " * 5000, steps=1)
    assert len(capsys.readouterr().err) < 300


def test_too_little_memory_is_one_line(editor, photo, monkeypatch):
    def edit(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(editing, "edit", edit)
    with pytest.raises(MemoryShortage, match="--resolution: .* pixels do not fit into the GPU's memory; .*--tile"):
        editor(photo, "blur it")


def test_a_scaled_image_is_said(editor, photo, capsys):
    editor(photo, GRAY, steps=1, resolution=32)
    assert "--resolution 32: scaled down to 48x32 for the model, and back up" in capsys.readouterr().out
    editor(photo, GRAY, steps=1)
    assert capsys.readouterr().out == ""


# Masks.


def test_outside_the_mask_every_pixel_is_the_inputs(editor, photo):
    how = {"steps": 2, "resolution": 32}  # also where the model sees the image scaled
    before, whole = pixels(photo), pixels(editor(photo, GRAY, **how))
    assert np.abs(before - whole).min(axis=-1).max() > 20
    after = pixels(editor(photo, GRAY, **how, mask=mask_of((72, 48), 30)))
    assert np.array_equal(after[:, :30], before[:, :30]) and np.array_equal(after[:, 31:], whole[:, 31:])
    assert np.array_equal(pixels(editor(photo, GRAY, **how, mask=Image.new("RGB", (72, 48), "white"))), whole)
    half = pixels(editor(photo, GRAY, **how, mask=Image.new("L", (72, 48), 128)))
    assert np.abs(half - (before + whole) / 2).max() <= 1  # grey is a mixture


def test_the_edge_is_soft_inside_alone():
    before, edited = Image.new("RGB", (640, 320)), Image.new("RGB", (640, 320), "white")
    row = pixels(editing.keep_outside(before, edited, mask_of((640, 320), 300)))[100, :, 0]
    assert not row[:300].any() and (row[304:] == 255).all()  # 320 / 64 pixels wide
    assert row[300:304].tolist() == [51, 102, 153, 204]
    stroke = Image.new("L", (640, 320))
    stroke.putpixel((7, 9), 255)
    assert pixels(editing.keep_outside(before, edited, stroke)).sum() == 3 * 51  # a thin one is not lost


def test_a_mask_of_the_same_shape_is_scaled(editor, photo, capsys):
    small, large = mask_of((36, 24), 15), mask_of((719, 480), 300)  # a side may have been rounded
    for mask in (small, large):
        after = pixels(editor(photo, GRAY, steps=1, mask=mask))
        assert f"--mask: {mask.width}x{mask.height} is scaled to the image's size" in capsys.readouterr().out
        assert np.array_equal(after[:, :28], pixels(photo)[:, :28]) and (after[:, 33:] != pixels(photo)[:, 33:]).any()


def test_a_mask_file_beside_the_script(photo, tmp_path, editor):
    mask = mask_of((72, 48), 30, tmp_path / "mask.png")
    flags = ["--image", photo, "--instruction", GRAY, "--mask", tmp_path / "mask.png"]
    run(cartoonize, *flags, "--output", tmp_path / "b.png")
    assert np.array_equal(pixels(tmp_path / "b.png"), pixels(editor(photo, GRAY, steps=2, mask=mask)))
    with pytest.raises(UserError, match="is an input image itself"):
        run(cartoonize, *flags, "--output", tmp_path / "mask.png")


# Folders.


@pytest.fixture
def folder(tmp_path) -> Path:
    for index, name in enumerate(["a.png", "sub/b.jpg"]):
        path = tmp_path / "photos" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.open(PHOTOS[index]).convert("RGB").resize((64, 48)).save(path, quality=95)
    return tmp_path / "photos"


def records_of(output_dir: Path) -> dict[str, dict]:
    lines = (output_dir / "edits.jsonl").read_text().splitlines()
    return {record["output"]: record for record in map(json.loads, lines)}


def test_folders_take_variations_masks_and_the_rest(folder, tmp_path, editor, capsys):
    (tmp_path / "masks/sub").mkdir(parents=True)
    mask_of((64, 48), 32, tmp_path / "masks/a.webp")
    mask_of((32, 24), 16, tmp_path / "masks/sub/b.png")
    out = tmp_path / "out"
    flags = [folder, "--instruction", GRAY, "--output_dir", out, "--contact_sheet", 0, "--resolution", 0]
    more = ["--num_variations", 2, "--mask", tmp_path / "masks", "--negative_prompt", "red", "--tile", 32]
    run(edit_images, *flags, *more)
    assert "--mask: 1 of 2 are scaled to their images' sizes" in capsys.readouterr().out
    made = records_of(out)
    assert set(made) == {"a-1.png", "a-2.png", "sub/b-1.png", "sub/b-2.png"}
    for name, record in made.items():
        image = pixels(record["image"])
        assert np.array_equal(pixels(out / name)[:, :30], image[:, :30])
        assert record["noise_seed"] == records.noise_seed(record["variation"] - 1, record["input_sha256"])
        mask = tmp_path / ("masks/a.webp" if name.startswith("a") else "masks/sub/b.png")
        how = {"steps": 2, "seed": record["noise_seed"], "negative_prompt": "red", "tile": 32, "resolution": 0}
        alone = editor(record["image"], GRAY, **how, mask=mask)
        assert np.abs(pixels(alone) - pixels(out / name)).max() <= 1
    run(edit_images, *flags, *more)
    assert "0 edited, 4 there before" in capsys.readouterr().out
    # Each tells edits apart; the device does not, nor does a precision that nobody asks for.
    run(edit_images, *flags, *more, "--dtype", "float32")
    for others, said in [
        (["--negative_prompt", "blue"], "was made with negative_prompt red, now it is blue"),
        (["--tile", 64], "was made with tile 32, now it is 64"),
        (["--dtype", "bfloat16"], "was made with dtype float32, now it is bfloat16"),
    ]:
        with pytest.raises(UserError, match=said):
            run(edit_images, *flags, *more, *others)
    mask_of((64, 48), 20, tmp_path / "masks/a.webp")
    with pytest.raises(UserError, match="a-1.png: was made with mask_sha256"):
        run(edit_images, *flags, *more)
    (tmp_path / "masks/sub/b.png").unlink()
    with pytest.raises(UserError, match="has no mask for sub/b.jpg; give one image, or a folder of one for each"):
        run(edit_images, *flags, *more)
    mask_of((64, 40), 20, tmp_path / "one.png")
    with pytest.raises(UserError, match="one.png: 64x40 for an image of 64x48, another shape"):
        run(edit_images, *flags, "--mask", tmp_path / "one.png")


def test_a_folder_from_before_these_settings_goes_on(folder, tmp_path, capsys):
    out = tmp_path / "out"
    flags = [folder, "--instruction", GRAY, "--output_dir", out, "--contact_sheet", 0]
    run(edit_images, *flags)
    later = {"negative_prompt", "variation", "mask_sha256", "tile", "dtype"}
    old = [{key: record[key] for key in record.keys() - later} for record in records_of(out).values()]
    assert all(later < record.keys() for record in records_of(out).values())
    (out / "edits.jsonl").write_text("".join(json.dumps(record) + "\n" for record in old))
    capsys.readouterr()
    for more in ([], ["--dtype", "float32"]):
        run(edit_images, *flags, *more)
        assert "0 edited, 2 there before" in capsys.readouterr().out
    mask_of((64, 48), 20, tmp_path / "mask.png")
    for more, said in [
        (["--dtype", "bfloat16"], "was made with dtype float32, now it is bfloat16"),
        (["--negative_prompt", "red"], "was made with negative_prompt , now it is red"),
        (["--tile", 64], "was made with tile 0, now it is 64"),
        (["--mask", tmp_path / "mask.png"], "was made with mask_sha256 None, now it is"),
    ]:
        with pytest.raises(UserError, match=said):
            run(edit_images, *flags, *more)


def test_names_of_variations_do_not_meet():
    wanted = [(Path(f"/p/{name}"), name, "x") for name in ("a.jpg", "a-1.jpg", "a.png")]
    outputs = [edit.output for edit in edit_folder.plan_outputs(wanted, ".png", 2)]
    assert len(set(outputs)) == 6 and "a-1-2.png" in outputs
    assert [edit.variation for edit in edit_folder.plan_outputs(wanted, ".png", 2)] == [1, 2] * 3
