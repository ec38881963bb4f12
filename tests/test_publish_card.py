"""The model card shows what the run has to show, and its metadata pass the Hub's own check."""

import json
import re
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import DatasetCard, ModelCard
from PIL import Image

from instruct_pix2pix import evidence, publishing
from instruct_pix2pix.evaluation import summary
from instruct_pix2pix.files import for_others, write_json, write_json_lines
from tests.conftest import ROOT, small_photo
from tests.loopback_hub import here, loopback_hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with loopback_hub(tmp_path / "hub") as running:
        here(running, monkeypatch)
        yield running


@pytest.fixture
def run_folder(tmp_path):
    """What a run of 100 updates leaves: its logs, pictures of two validations, and an evaluation of its pipeline."""
    folder = tmp_path / "run"
    rng = np.random.default_rng(0)
    losses = [{"step": step, "loss": float(0.1 + rng.random() / step)} for step in range(1, 121)]
    losses[9]["loss"] = float("nan")
    folder.mkdir()
    write_json_lines(folder / "training_log.jsonl", losses)
    with (folder / "training_log.jsonl").open("a") as file:
        file.write('{"step": 121, "lo')  # killed there
    held_out = [{"step": 50, "loss": 0.5, "psnr": 20.0}, {"step": 100, "loss": 0.3}, {"step": 110, "psnr": 1.0}]
    write_json_lines(folder / "validation_log.jsonl", held_out)
    for step, ending, colour in ((50, "", "red"), (100, "", "blue"), (110, "", "green"), (50, "-held-out", "red")):
        path = evidence.validation_picture(folder, step, ending)
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (2000, 500), colour).save(path)
    evaluate(folder, {"run": folder, "other": tmp_path / "other"}, {"run": 100, "other": 3})
    return folder


def evaluate(folder, models, steps) -> None:
    """metrics.json as evaluation/evaluate.py writes it."""
    about = {"task": "derain", "instruction": "derain it", "ssim": 0.9}
    rows = [
        about | {"name": str(number), "model": label, "psnr": 20.0 + number + len(label)}
        for label in ("identity", *models)
        for number in range(4)
    ]
    found = {"models": summary.summarize(rows, {"identity": "identity"} | dict.fromkeys(models, "model"))}
    for label, step in steps.items():
        found["models"][label]["training"] = {"steps": step}
    names = {label: for_others(path) for label, path in models.items()}
    found["settings"] = {"models": names, "dataset": for_others(folder.parent / "pairs"), "split": "test"}
    (folder / "evaluation").mkdir(exist_ok=True)
    write_json(folder / "evaluation" / "metrics.json", found)


def card(folder, pipeline, step=100, **changes) -> str:
    """The card that an export at an update writes, its pictures being put into `pipeline`."""
    config = SimpleNamespace(
        pretrained_model_name_or_path=str(ROOT / "assets/tiny-instruct-pix2pix"),
        dataset_name=None,
        train_data_dir=str(folder.parent / "pairs"),
        output_dir=str(folder),
        guidance_scale=7.0,
        image_guidance_scale=1.5,
    )
    vars(config).update(changes)
    pipeline.mkdir()
    summary_of_it = {"steps": step, "device": "NVIDIA H100", "commit": "0123456789ab"}
    shown = evidence.gather(folder, step, pipeline)
    return publishing.model_card(config, vars(config), summary_of_it, "tester/model", "derain it", *shown)


def test_a_card_shows_curve_pictures_and_evaluation(hub, run_folder, tmp_path):
    text = card(run_folder, tmp_path / "pipeline")
    images = tmp_path / "pipeline" / "images"
    assert {path.name for path in images.iterdir()} == {"loss.png", "validation.webp", "validation-held-out.webp"}
    assert sorted(re.findall(r"\]\((images/.*?)\)", text)) == sorted(f"images/{path.name}" for path in images.iterdir())
    sheets = [Image.open(images / f"validation{ending}.webp").convert("RGB") for ending in ("", "-held-out")]
    assert [sheet.size for sheet in sheets] == [(1600, 400)] * 2
    blue, red = (sheet.getpixel((800, 200)) for sheet in sheets)
    assert blue[2] > 200 > 50 > blue[0] and red[0] > 200 > 50 > red[2]  # the newest up to this update
    assert "After update 100, input" in text and "After update 50, rows" in text
    assert sum(path.stat().st_size for path in images.iterdir()) < 200_000

    # The evaluation: the table that was printed, and as metadata, which the Hub's check takes and the client reads.
    printed = summary.table(json.loads((run_folder / "evaluation" / "metrics.json").read_text())["models"])
    assert "\n".join(printed) in text
    read = ModelCard(text)
    read.validate()
    results = {result.metric_type: result for result in read.data.eval_results}
    assert list(results) == ["psnr", "ssim"] and results["psnr"].metric_value == pytest.approx(24.5)
    assert (results["psnr"].dataset_name, results["psnr"].dataset_split) == ("pairs", "test")
    assert results["psnr"].task_type == "image-to-image" and read.data.model_name == "model"
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings == ["Use", "Results", "Limits", "Training"]
    assert "device NVIDIA H100, commit 0123456789ab." in text and str(tmp_path) not in text


def test_a_curve_is_of_the_updates_until_then(run_folder, tmp_path):
    def drawn(name: str, step: int) -> np.ndarray | None:
        card(run_folder, tmp_path / name, step)
        path = tmp_path / name / "images" / "loss.png"
        return np.asarray(Image.open(path).convert("RGB")) if path.exists() else None

    assert drawn("few", evidence.LEAST_UPDATES) is None  # of these one is not finite
    half, whole = drawn("half", 50), drawn("whole", 100)
    assert half.shape == whole.shape and not np.array_equal(half, whole) and np.array_equal(whole, drawn("again", 100))
    with (run_folder / "training_log.jsonl").open("a") as file:
        file.write('\n{"step": 130, "loss": 5.0}\n')
    assert np.array_equal(whole, drawn("later", 100))


def test_an_evaluation_of_other_weights_stays_out(run_folder, tmp_path, caplog):
    other = tmp_path / "other"
    for name, change in {
        "later": lambda: None,
        "elsewhere": lambda: evaluate(run_folder, {"other": other}, {"other": 120}),
        "by-hand": lambda: (run_folder / "evaluation" / "metrics.json").write_text("[1]"),
        "cut": lambda: (run_folder / "evaluation" / "metrics.json").write_text("{"),
    }.items():
        change()
        text = card(run_folder, tmp_path / name, step=120)
        assert "is not of this pipeline and does not go into its card" in caplog.text, name
        assert "PSNR" not in text and "model-index" not in text and "\nmodel_name" not in text, name
        caplog.clear()


def test_a_run_with_nothing_to_show(tmp_path):
    text = card(tmp_path / "none", tmp_path / "pipeline")
    assert "## Results" not in text and "\n\n\n\n" not in text and not list((tmp_path / "pipeline").iterdir())


def test_licences_are_the_bases_and_the_datasets_as_far_as_they_are_stated(hub, tmp_path):
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "README.md").write_text("---\nlicense: cc-by-nc-sa-4.0\n---\n")
    own = card(tmp_path / "none", tmp_path / "own")
    assert "license: apache-2.0" in own and "licence of its own: cc-by-nc-sa-4.0." in own
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: My own!\n---\n")
    odd = card(tmp_path / "none", tmp_path / "odd", pretrained_model_name_or_path=str(tmp_path / "base"))
    ModelCard(odd).validate()
    assert ModelCard(odd).data.license == "other" and "base model's: My own!." in odd
    with pytest.raises(ValueError, match="is none of the known"):  # or the check checks nothing
        ModelCard(odd.replace("license: other", "license: My own!")).validate()


def test_the_commit_is_that_of_this_clone_and_of_no_other(monkeypatch, tmp_path):
    evidence.code_commit.cache_clear()
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    found = evidence.code_commit()
    if head.returncode:
        assert found is None
    else:
        assert head.stdout.startswith(found.removesuffix("-dirty")) and len(found.removesuffix("-dirty")) >= 12
    (tmp_path / "site-packages" / "instruct_pix2pix").mkdir(parents=True)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)  # a project of the user's, with this one in it
    monkeypatch.setattr(evidence, "__file__", str(tmp_path / "site-packages" / "instruct_pix2pix" / "evidence.py"))
    evidence.code_commit.cache_clear()
    assert evidence.code_commit() is None
    evidence.code_commit.cache_clear()


def test_a_dataset_card_passes_the_check(hub, tmp_path):
    from data_preparation import build_generic_edits

    (tmp_path / "photos").mkdir()
    for n in range(8):
        small_photo().rotate(40 * n).save(tmp_path / "photos" / f"{n}.png")
    build_generic_edits.main(["--photos", str(tmp_path / "photos"), "--rows", "4", "--tile", "32", "--output_dir",
                              str(tmp_path / "out")])  # fmt: skip
    read = DatasetCard.load(tmp_path / "out" / "README.md")
    read.validate()
    assert read.data.task_categories == ["image-to-image"] and read.data.configs[0]["config_name"] == "default"
    assert str(tmp_path) not in str(read)
