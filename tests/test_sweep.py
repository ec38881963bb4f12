"""The sweep: what it runs, where it goes on, what it recommends, and who edits by it."""

import json
import re
import shutil
from argparse import Namespace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation import sweep
from inference import cartoonize, edit_images
from instruct_pix2pix import editing, publishing
from instruct_pix2pix.cli import UserError
from instruct_pix2pix.edit_folder import model_fingerprint
from instruct_pix2pix.evaluation import summary
from instruct_pix2pix.evaluation.settings import SETTINGS_FILE, Setting, choose_setting, read_settings
from tests.conftest import ROOT, copy_tree, small_photo

TINY = ROOT / "assets/tiny-instruct-pix2pix"
FOUND = {
    "all": {"steps": 3, "image_guidance_scale": 1.0, "guidance_scale": 2.0, "scheduler": None},
    "tasks": {
        "gray": {
            "steps": 2,
            "image_guidance_scale": 1.0,
            "guidance_scale": 1.0,
            "scheduler": "ddim",
            "instructions": ["make it gray", "remove the colours"],
        }
    },
}


@pytest.fixture(scope="module")
def pipeline():
    return editing.load_pipeline(str(TINY))


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    paths = sorted((ROOT / "assets/photos/test").glob("*.webp"))[:2]
    return [Image.open(path).convert("RGB").resize((64, 64)) for path in paths]


def edit(pipeline, images, **changes) -> np.ndarray:
    """(B, H, W, 3) float"""
    settings = {"steps": 4, "guidance_scale": 1.0, "image_guidance_scale": 1.0} | changes
    edited = editing.edit_batch(pipeline, ["make it gray"] * len(images), images, [1, 2], **settings)
    return np.stack([np.asarray(image, float) for image in edited])


# ---- samplers


def test_every_scheduler_denoises_and_leaves_the_pipeline_its_own(pipeline, images):
    own = pipeline.scheduler
    gray = np.stack([np.asarray(image.convert("L").convert("RGB"), float) for image in images])
    before = edit(pipeline, images)
    results = {name: edit(pipeline, images, scheduler=name) for name in editing.SCHEDULERS}
    for name, result in results.items():
        assert np.sqrt(np.mean((result - gray) ** 2)) < 20, name  # noise, or another prediction, is 60 away
    assert len({result.tobytes() for result in results.values()}) == 4
    assert pipeline.scheduler is own
    # None is what it was before there was a choice.
    import torch

    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    plain = pipeline(
        ["make it gray"] * 2,
        image=images,
        num_inference_steps=4,
        guidance_scale=1.0,
        image_guidance_scale=1.0,
        generator=generators,
        output_type="np",
    ).images
    assert np.array_equal(before, (plain * 255).round())
    assert np.array_equal(before, edit(pipeline, images, scheduler=None))


def test_a_scheduler_keeps_the_models_own_schedule(pipeline):
    """Also what the own one takes by default, which another class would take otherwise."""
    from diffusers import EulerAncestralDiscreteScheduler, PNDMScheduler

    theirs = Namespace(scheduler=PNDMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction"))
    for holder in (pipeline, theirs):
        own = holder.scheduler.config
        for name, kind in editing.SCHEDULERS.items():
            with editing.sample_with(holder, name):
                config = holder.scheduler.config
                assert type(holder.scheduler).__name__ == kind
                for key in "beta_start beta_end beta_schedule prediction_type timestep_spacing steps_offset".split():
                    assert config[key] == own[key], (name, key)
    # Latents of Stable Diffusion are no pixels in [-1, 1], and DDIM would clip to that.
    euler = Namespace(scheduler=EulerAncestralDiscreteScheduler())
    with editing.sample_with(euler, "ddim"):
        assert euler.scheduler.config.clip_sample is False


def test_encoded_images_edit_as_images_do(pipeline, images):
    for scales in ({}, {"guidance_scale": 3.0, "image_guidance_scale": 1.5}):
        plain = edit(pipeline, images, **scales)
        assert np.array_equal(plain, edit(pipeline, editing.encode_images(pipeline, images), **scales))


# ---- the grid


def test_what_is_ignored_or_equal_runs_once():
    flags = {"guidance_scales": [0.5, 1, 7], "image_guidance_scales": [0.5, 1, 1.5], "steps": [2, 20]}
    args = Namespace(**flags, schedulers=[None, "ddim"])
    settings = sweep.grid(args, "DDIMScheduler")
    assert settings[0] == editing.USUAL and len(settings) == len(set(settings))
    scales = [(1.0, 1.0), (7.0, 1.0), (7.0, 1.5)]
    assert set(settings) == {Setting(steps, image, text) for steps in (2, 20) for text, image in scales}
    assert len(sweep.grid(args, "PNDMScheduler")) == 2 * len(settings)


# ---- a sweep


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, images) -> Path:
    """Two tasks that the tiny model knows; no validation split. The test split has other photos."""
    import datasets

    folder = tmp_path_factory.mktemp("sweep") / "data"
    photos = [
        Image.open(path).convert("RGB").resize((64, 48)) for path in sorted(ROOT.glob("assets/photos/test/*"))[4:8]
    ]
    for split, chosen in (("train", photos[:2]), ("test", photos[2:])):
        rows = [
            {
                "instruction": [f"make it {task}"],
                "input_image": photo,
                "ground_truth_image": target(photo),
                "task": task,
            }
            for photo in chosen
            for task, target in (
                ("gray", lambda p: p.convert("L").convert("RGB")),
                ("darker", lambda p: p.point(lambda v: v // 2)),
            )
        ]
        features = {"instruction": datasets.List(datasets.Value("string")), "task": datasets.Value("string")}
        features |= dict.fromkeys(("input_image", "ground_truth_image"), datasets.Image())
        table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
        table.to_parquet(folder / f"{split}.parquet")
    return folder


CARD = """# Mine

My own words.

## Training

| flag | value |
"""


def run_sweep(model, dataset, output_dir, *flags) -> None:
    usual = ["--guidance_scales=1", "--image_guidance_scales=1", "--steps", "1", "2", "--schedulers", "own", "ddim"]
    paths = [f"--model={model}", f"--dataset={dataset}", f"--output_dir={output_dir}"]
    sweep.main([*paths, *usual, "--test_split=test", "--batch_size=2", *flags])


@pytest.fixture(scope="module")
def swept(dataset, tmp_path_factory) -> tuple[Path, Path]:
    """A model with a card, and the folder of its sweep."""
    folder = tmp_path_factory.mktemp("swept")
    model = copy_tree(TINY, folder / "model")
    (model / "README.md").write_text(CARD)
    run_sweep(model, dataset, folder / "out")
    return model, folder / "out"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_best_setting_of_each_task_is_recommended(swept, dataset):
    model, out = swept
    results, found = lines(out / "results.jsonl"), read_settings(model / SETTINGS_FILE)
    assert len(results) == 5 * 4  # the usual setting and two samplers of two steps, for four rows
    assert list(found["tasks"]) == ["gray", "darker"]
    for task in ("all", "gray", "darker"):
        means = {}
        for record in results:
            if task in ("all", record["task"]):
                means.setdefault(tuple(record[name] for name in Setting._fields), []).append(record["psnr"])
        entry = found["all"] if task == "all" else found["tasks"][task]
        chosen = tuple(entry[name] for name in Setting._fields)
        assert np.mean(means[chosen]) == max(map(np.mean, means.values()))
        assert entry["chosen_on"]["psnr"]["mean"] == pytest.approx(np.mean(means[chosen]), abs=1e-5)
        over = np.subtract(means[chosen], means[tuple(editing.USUAL)])
        assert entry["chosen_on"]["over_usual"] == summary.interval(over)
        assert entry["chosen_on"]["over_usual"]["mean"] > 1  # the tiny model overshoots with guidance,
        assert entry["held_out"]["over_usual"]["low"] > 0.5  # on other photos too
    assert found["tasks"]["gray"]["instructions"] == ["make it gray"]
    assert (found["split"], found["held_out_split"], found["images"], found["dataset"]) == ("train", "test", 4, "data")
    assert str(dataset.parent) not in (model / SETTINGS_FILE).read_text()
    for name in ("trade_off.png", "seconds.png"):
        assert Image.open(out / name).size == (960, 720)


def test_scores_are_those_of_an_edit_by_hand(swept, dataset, pipeline):
    record = lines(swept[1] / "results.jsonl")[-1]
    args = sweep.parse_args([f"--model={TINY}", f"--dataset={dataset}"])
    split, rows, _ = sweep.read_split(args, ["validation", "train"], None)
    row = rows[record["row"]]
    assert split == "train" and row["instruction"] == record["instruction"]
    setting = {name: record[name] for name in Setting._fields}
    image = Image.fromarray(row["input"])
    seed = sweep.noise_seed(0, sha256(image.tobytes()).hexdigest())
    [edited] = editing.edit(pipeline, [row["instruction"]], [image], [seed], **setting)
    assert sweep.scores(np.asarray(edited), row)["psnr"] == pytest.approx(record["psnr"], abs=0.02)


def test_rows_are_the_first_of_each_task_and_may_have_another_splits_instructions(dataset):
    flags = [f"--model={TINY}", f"--dataset={dataset}", "--images_per_task=1", "--wordings_from=other"]
    args = sweep.parse_args(flags)
    known = {"gray": {"lose the colours": None}, "darker": {"dim": None}}
    _, rows, own = sweep.read_split(args, ["test"], known)
    assert [(row["task"], row["instruction"]) for row in rows] == [("gray", "lose the colours"), ("darker", "dim")]
    assert list(own["gray"]) == ["make it gray"]
    with pytest.raises(UserError, match="--wordings_from: other has no instruction for the task darker"):
        sweep.read_split(args, ["test"], {"gray": known["gray"]})


def test_a_killed_sweep_goes_on_to_the_same_file(swept, dataset, tmp_path, monkeypatch, capsys):
    model, done = swept
    whole = (done / "results.jsonl").read_bytes()
    out = tmp_path / "out"
    out.mkdir()
    first = whole.splitlines(keepends=True)
    (out / "results.jsonl").write_bytes(b"".join(first[:9]) + first[9][:30])  # amid a batch of two, and a line
    (out / "seconds.jsonl").write_bytes((done / "seconds.jsonl").read_bytes())
    edited, edit_batch = [], editing.edit_batch
    monkeypatch.setattr(editing, "edit_batch", lambda *a, **s: edited.append(s) or edit_batch(*a, **s))
    before = (model / SETTINGS_FILE).read_bytes()
    run_sweep(model, dataset, out)
    assert (out / "results.jsonl").read_bytes() == whole
    assert (out / "held_out.jsonl").read_bytes() == (done / "held_out.jsonl").read_bytes()
    assert (model / SETTINGS_FILE).read_bytes() == before
    made = len(edited)
    assert "no split named validation" in capsys.readouterr().err
    run_sweep(model, dataset, out)
    assert 0 < made < 20 and len(edited) == made  # nothing is made twice
    with pytest.raises(UserError, match=r"results.jsonl is of another model, dataset or seed; name another folder"):
        run_sweep(model, dataset, out, "--seed=1")
    with pytest.raises(UserError, match="--test_split: test is what settings are chosen on"):
        run_sweep(model, dataset, out, "--split=test")


# ---- who edits by it


@pytest.fixture
def recommending(tmp_path) -> Path:
    model = copy_tree(TINY, tmp_path / "model")
    (model / SETTINGS_FILE).write_text(json.dumps(FOUND))
    return model


def test_flags_win_over_what_is_recommended_over_defaults(recommending):
    found = editing.recommended_settings(str(recommending))
    parser = editing.Parser("")
    editing.add_sampling_flags(parser, model_id="m")

    def taken(instruction, *flags):
        return editing.sampling_of(parser.parse_args(flags), found, instruction)

    said = "recommended_settings.json, gray: steps 2, image_guidance_scale 1.0, guidance_scale 1.0, scheduler ddim"
    assert taken(" Make it GRAY") == (Setting(2, 1.0, 1.0, "ddim"), said)
    assert taken("make it grey")[0] == Setting(3, 1.0, 2.0, None)
    setting, said = taken("remove the colours", "--steps=20", "--scheduler=own")
    assert setting == Setting(20, 1.0, 1.0, None) and "steps" not in said.partition(":")[2].split()
    every = ["--steps=5", "--scheduler=unipc", "--guidance_scale=4", "--image_guidance_scale=1.5"]
    assert taken("make it gray", *every) == (Setting(5, 1.5, 4.0, "unipc"), "")
    assert editing.sampling_of(parser.parse_args([]), None, "make it gray") == (editing.USUAL, "")
    with pytest.raises(UserError, match="--scheduler: 'dpm' is not a scheduler; give own, euler_ancestral"):
        parser.parse_args(["--scheduler=dpm"])


def test_scripts_edit_by_it_and_record_it(recommending, tmp_path, capsys):
    photo = tmp_path / "photo.png"
    small_photo().save(photo)
    lines_file = tmp_path / "instructions.txt"
    lines_file.write_text("make it gray\nmake it pale\n")
    out = tmp_path / "out"
    flags = ["--model_id", str(recommending), "--guidance_scale", "1"]
    edit_images.main([str(photo), *flags, "--instructions_file", str(lines_file), "--output_dir", str(out)])
    said = capsys.readouterr().out
    assert "recommended_settings.json, gray: steps 2" in said and "recommended_settings.json, all: steps 3" in said
    records = {r["instruction"]: r for r in lines(out / "edits.jsonl") if "instruction" in r}
    assert (records["make it gray"]["steps"], records["make it gray"]["scheduler"]) == (2, "ddim")
    assert (records["make it pale"]["steps"], records["make it pale"]["scheduler"]) == (3, None)
    with pytest.raises(UserError, match="was made with scheduler ddim, now it is unipc"):
        again = [str(photo), *flags, "--instruction", "make it gray", "--output_dir", str(out / "make-it-gray")]
        shutil.copy(out / "edits.jsonl", out / "make-it-gray/edits.jsonl")
        text = (out / "edits.jsonl").read_text().replace("make-it-gray/photo.png", "photo.png")
        (out / "make-it-gray/edits.jsonl").write_text(text)
        edit_images.main([*again, "--contact_sheet=0", "--scheduler=unipc"])

    cartoonize.main(
        ["--image", str(photo), *flags, "--instruction", "make it gray", "--output", str(tmp_path / "x.png")]
    )
    assert "gray: steps 2, image_guidance_scale 1.0, scheduler ddim\n" in capsys.readouterr().out
    pipeline = editing.load_pipeline(str(recommending))
    setting = choose_setting(FOUND, "make it gray")[1]._asdict()
    [by_hand] = editing.edit(pipeline, ["make it gray"], [small_photo()], [0], **setting)
    assert np.array_equal(np.asarray(by_hand), np.asarray(Image.open(tmp_path / "x.png")))


def test_the_hub_is_asked_once_and_may_have_none(recommending, monkeypatch, capsys):
    import huggingface_hub

    there, path = {SETTINGS_FILE}, str(recommending / SETTINGS_FILE)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "file_exists", lambda _, name: name in there)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_: path)
    assert editing.recommended_settings("somebody/model") == FOUND
    there.clear()
    assert editing.recommended_settings("somebody/model") is None and capsys.readouterr().err == ""
    monkeypatch.setattr(huggingface_hub, "file_exists", lambda *_: 1 / 0)  # no network
    assert editing.recommended_settings("somebody/model") is None
    assert "somebody/model: the Hub cannot be asked for recommended_settings.json" in capsys.readouterr().err


def test_the_file_is_no_part_of_the_model(recommending):
    assert model_fingerprint(str(recommending)) == model_fingerprint(str(TINY))


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"all": {}, "tasks": {}}', "KeyError: 'steps'"),
        (json.dumps(FOUND).replace('"ddim"', '"euler"'), "'euler' is not a scheduler"),
        (json.dumps(FOUND).replace('"steps": 2', '"steps": 0'), "0 is too small"),
    ],
)
def test_a_damaged_file_is_one_line(content, said, recommending):
    (recommending / SETTINGS_FILE).write_text(content)
    with pytest.raises(UserError) as refused:
        editing.recommended_settings(str(recommending))
    assert said in str(refused.value) and "take it away, or sweep again" in str(refused.value)


# ---- the card


def test_the_card_keeps_its_words_and_gets_one_table(swept):
    model, _ = swept
    card, found = (model / "README.md").read_text(), read_settings(model / SETTINGS_FILE)
    assert card.count("## Settings") == 1 and card.startswith("# Mine\n\nMy own words.\n")
    assert card.endswith("## Training\n\n| flag | value |\n")
    gray = found["tasks"]["gray"]
    line = rf"^\| gray \| 2 \| 1/1/{gray['steps']} .* \| {gray['held_out']['psnr']['mean']:.2f} \\\["
    assert re.search(line, card, re.MULTILINE)
    (model / "README.md").write_text(CARD)
    for _ in range(2):
        publishing.recommend(model, found)
        assert (model / "README.md").read_text() == card
    half = card.removesuffix("| flag | value |\n").replace("<!-- to here -->\n", "") + "the end\n"
    (model / "README.md").write_text(half)  # a mark that somebody broke
    publishing.recommend(model, found)
    assert (model / "README.md").read_text().endswith("the end\n")
    assert SETTINGS_FILE in publishing.PUBLISHED


def test_an_exports_card_edits_by_it_and_keeps_it_while_the_weights_are_the_same(swept, base_models, tmp_path):
    from tests.test_export import export

    folder = export(base_models["finetune"], tmp_path / "run")
    plain = (folder / "README.md").read_text()
    found = read_settings(swept[0] / SETTINGS_FILE) | {"all": swept_all(swept, scheduler="ddim", steps=2)}
    publishing.recommend(folder, found)
    card = (folder / "README.md").read_text()
    snippet = card.partition("```python\n")[2].partition("```")[0]
    assert "num_inference_steps=2," in snippet and " guidance_scale=1.0," in snippet and '"blur it",' in snippet
    assert "Recommended: guidance 1.0 for the instruction and 1.0 for the image." in card

    # What a reader runs is what `edit_batch` gives.
    pipeline = editing.load_pipeline(str(folder))
    code = snippet.replace("torch.float16", "torch.float32").replace('.to("cuda")', "")
    code = code.replace(json.dumps("run"), json.dumps(str(folder))).replace("photo.png", str(tmp_path / "photo.png"))
    code = code.replace("edited.png", str(tmp_path / "edited.png")).replace("image=image", "image=image, generator=g")
    small_photo().save(tmp_path / "photo.png")
    exec(f"import torch\ng = torch.Generator().manual_seed(1)\n{code}", {})
    by_hand = edit(pipeline, [small_photo()] * 2, steps=2, scheduler="ddim")
    instead = editing.edit_batch(
        pipeline,
        ["blur it"],
        [small_photo()],
        [1],
        steps=2,
        guidance_scale=1.0,
        image_guidance_scale=1.0,
        scheduler="ddim",
    )
    assert by_hand.std() > 0
    assert np.abs(np.asarray(instead[0], int) - np.asarray(Image.open(tmp_path / "edited.png"), int)).max() <= 1

    export(base_models["finetune"], folder)  # the same weights
    assert (folder / "README.md").read_text() == card and read_settings(folder / SETTINGS_FILE) == found
    import torch
    from diffusers import UNet2DConditionModel

    other = UNet2DConditionModel.from_pretrained(folder / "unet")
    with torch.no_grad():
        other.conv_out.bias += 1
    export(base_models["finetune"], folder, unet=other)
    assert (folder / "README.md").read_text() == plain and not (folder / SETTINGS_FILE).exists()


def swept_all(swept, **changes) -> dict:
    return read_settings(swept[0] / SETTINGS_FILE)["all"] | changes
