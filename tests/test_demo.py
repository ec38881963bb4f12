"""The demo: its page over loopback, as visitors meet it, and the folder of a Space."""

import subprocess
import sys

import numpy as np
import pytest
from huggingface_hub import SpaceCard
from PIL import Image, ImageOps

import inference.app as app
from instruct_pix2pix import Editor
from instruct_pix2pix.cli import UserError
from instruct_pix2pix.images import PIXEL_LIMIT
from tests.conftest import ROOT, small_photo

TINY = str(ROOT / "assets/tiny-instruct-pix2pix")
SETTINGS = {"steps": 2, "image_scale": 1.0, "text_scale": 1.5, "scheduler": "ddim"}
FOUND = {
    "all": {"steps": 3, "image_guidance_scale": 1.0, "guidance_scale": 2.0, "scheduler": None},
    "tasks": {
        "gray": {"steps": 4, "image_guidance_scale": 1.5, "guidance_scale": 3.0, "scheduler": "ddim"},
        "sepia": {"steps": 5, "image_guidance_scale": 1.0, "guidance_scale": 1.0, "scheduler": None},
    },
}
FOUND["tasks"]["gray"]["instructions"] = ["make it gray", "remove the colours"]
FOUND["tasks"]["sepia"]["instructions"] = ["make it sepia"]


@pytest.fixture(autouse=True)
def no_limit_left(monkeypatch):
    monkeypatch.setenv(PIXEL_LIMIT, "1000000")  # what parse_args sets here is taken back


@pytest.fixture(scope="module")
def editor() -> Editor:
    return Editor.from_pretrained(TINY)


@pytest.fixture(scope="module")
def client(editor):
    """A visitor of the page, which is served on loopback; gradio_client leaves its answers' files alone."""
    pytest.importorskip("gradio")
    from gradio_client import Client

    page = app.build_page(editor, app.parse_args(["--model_id", TINY, "--resolution=64"]))
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    yield Client(url, verbose=False)
    page.close()


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("photos")
    paths = [folder / "sea.png", folder / "mirrored.png"]
    small_photo().save(paths[0])
    ImageOps.mirror(small_photo()).save(paths[1])
    return [str(path) for path in paths]


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def submit(client, photo, instruction="make it gray", **changes):
    from gradio_client import handle_file

    request = {"path": photo and handle_file(photo), "instruction": instruction, "painted": None, "seed": 0}
    return client.submit(**request | SETTINGS | changes, api_name="/edit")


def refusal(job) -> str:
    with pytest.raises(Exception, match=".") as caught:
        job.result()
    return str(caught.value)


def test_visitors_at_once_get_what_each_would_get_alone(client, editor, photos):
    wanted = [(photos[0], "make it gray", 1), (photos[1], "make it sepia", 2), (photos[0], "make it gray", 3)]
    jobs = [submit(client, photo, instruction, seed=seed) for photo, instruction, seed in wanted]
    shown = [[pixels(path) for path in job.result()] for job in jobs]
    setting = {"steps": 2, "image_guidance_scale": 1.0, "guidance_scale": 1.5, "scheduler": "ddim", "resolution": 64}
    for (before, after), (photo, instruction, seed) in zip(shown, wanted, strict=True):
        np.testing.assert_array_equal(before, pixels(photo))
        np.testing.assert_array_equal(after, np.asarray(editor(photo, instruction, seed=seed, **setting)))
    assert not np.array_equal(shown[0][1], shown[2][1])  # another seed


def test_only_what_is_painted_changes(client, photos, tmp_path):
    from gradio_client import handle_file

    layer = Image.new("RGBA", Image.open(photos[0]).size)
    layer.paste((249, 115, 22, 255), (0, 0, 40, 30))
    layer.save(tmp_path / "layer.png")
    painted = {"background": None, "layers": [handle_file(str(tmp_path / "layer.png"))], "composite": None, "id": None}
    before, after = (pixels(path) for path in submit(client, photos[0], painted=painted).result())
    changed = (before != after).any(axis=2)
    assert changed[:30, :40].mean() > 0.5
    changed[:30, :40] = False
    assert not changed.any()


def test_what_cannot_be_edited_is_one_message_without_a_traceback(client, photos, tmp_path, capfd):
    no_image, cut, enormous = (tmp_path / name for name in ("none.png", "cut.png", "enormous.png"))
    no_image.write_text("no picture\n" * 40)
    cut.write_bytes(open(photos[0], "rb").read()[:4000])
    Image.new("1", (1200, 1000)).save(enormous)
    assert "The photo cannot be used: not an image." in refusal(submit(client, str(no_image)))
    assert "The photo cannot be used: cannot be read" in refusal(submit(client, str(cut)))
    said = refusal(submit(client, str(enormous)))
    assert "The photo cannot be used: 1200x1000 is more than 1 million pixels." in said and "--" not in said
    assert "Choose a photo, and say what to do" in refusal(submit(client, None))
    assert "Choose a photo, and say what to do" in refusal(submit(client, photos[0], "  "))
    assert "Traceback" not in "".join(capfd.readouterr())


def test_the_page_opens_no_file_that_was_not_uploaded(client):
    import httpx

    secret = {"path": str(ROOT / "assets/quickstart.jpg"), "meta": {"_type": "gradio.FileData"}}
    data = [secret, "make it gray", None, *SETTINGS.values(), 0]
    address = f"{client.src}gradio_api/call/edit"
    event = httpx.post(address, json={"data": data}).json()["event_id"]
    assert "event: error" in httpx.get(f"{address}/{event}", timeout=60).text


def functions(page) -> dict:
    return {function.name: function.fn for function in page.fns.values()}


def labelled(page) -> dict:
    return {block.label: block for block in page.blocks.values() if getattr(block, "label", None)}


def test_the_page_starts_with_what_is_recommended_and_follows_the_task(editor, monkeypatch):
    gradio = pytest.importorskip("gradio")
    monkeypatch.setattr(editor, "recommended", FOUND)
    page = app.build_page(editor, app.parse_args(["--model_id", TINY, "--guidance_scale=6"]))
    shown = labelled(page)
    assert shown["Instruction"].value == "make it gray"
    names = ("Steps", "Image guidance", "Text guidance", "Scheduler")
    assert [shown[name].value for name in names] == [4, 1.5, 6, "ddim"]  # a flag that was given goes first
    examples = [block.samples for block in page.blocks.values() if isinstance(block, gradio.Dataset)]
    assert [["make it gray"], ["make it sepia"]] in examples

    follow = functions(page)["follow"]
    start = [4, 1.5, 6, "ddim"]
    assert follow("Remove the colours", start) == gradio.skip()  # what a visitor has set stays
    assert follow("make it sepia", start) == ([5, 1.0, 6, "own"], 5, 1.0, 6, "own")


def test_a_bad_upload_is_taken_away_and_a_good_one_shown_to_paint_on(editor, photos, tmp_path):
    gradio = pytest.importorskip("gradio")
    choose = functions(app.build_page(editor, app.parse_args(["--model_id", TINY])))["choose"]
    (tmp_path / "none.png").write_text("no picture")
    with pytest.warns(UserWarning, match="The photo cannot be used: not an image"):
        assert choose(str(tmp_path / "none.png")) == (None, None)
    picture, photo = choose(photos[0])
    assert picture.size == Image.open(photos[0]).size and photo == gradio.skip()


def test_progress_is_told_step_by_step(editor, photos):
    pytest.importorskip("gradio")
    edit, told = functions(app.build_page(editor, app.parse_args(["--model_id", TINY])))["edit"], []
    edit(photos[0], "make it gray", None, 3, 1.0, 1.0, "own", 0, bar=lambda done, desc: told.append(done))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_a_lent_gpu_is_taken_for_the_edit_alone(editor, monkeypatch):
    pytest.importorskip("gradio")
    lent = []

    class Spaces:
        @staticmethod
        def GPU(function):
            lent.append(function.__name__)
            return function

    monkeypatch.setattr(app, "spaces", Spaces)
    app.build_page(editor, app.parse_args(["--model_id", TINY]))
    assert lent == ["edit"]


# ---- the Space


def test_the_space_says_what_it_needs_and_starts_the_page_with_the_flags(tmp_path, monkeypatch):
    folder, flags = tmp_path / "space", ["--model_id", "owner/cartoons", "--steps=7"]
    app.main([*flags, "--write_space", str(folder), "--examples", "make it gray"])
    card = SpaceCard.load(folder / "README.md").data
    assert (card.sdk, card.app_file, card.models) == ("gradio", "app.py", ["owner/cartoons"])
    assert f"gradio=={card.sdk_version}" in (ROOT / "requirements-demo.txt").read_text()
    requirements = (folder / "requirements.txt").read_text()
    assert "diffusers==" in requirements and "editable" not in requirements and str(ROOT) not in requirements

    # Its own copy of this project understands the flags that it was given, and has the photos of the page.
    code = "import sys, runpy; from inference import app; app.main = lambda argv: print(*argv, sep='\\n'); "
    code += "runpy.run_path('app.py'); print(app.__file__, [(app.ROOT / name).is_file() for name in app.PHOTOS])"
    shown = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True).stdout
    *given, last = shown.splitlines()
    assert given == [*flags, "--examples", "make it gray"] and app.parse_args(given).steps == 7
    assert last.startswith(str(folder.resolve())) and "False" not in last


def test_a_space_is_written_into_a_new_folder_for_a_model_on_the_hub(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="--write_space: .* is not empty"):
        app.main(["--model_id", "owner/cartoons", "--write_space", str(tmp_path)])
    with pytest.raises(UserError, match="--model_id: .* is a folder here"):
        app.main(["--model_id", TINY, "--write_space", str(tmp_path / "new")])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_flag_without_a_part_in_the_page_is_refused():
    with pytest.raises(UserError, match="--num_variations: 3, but the page shows one edit"):
        app.parse_args(["--model_id", TINY, "--num_variations=3"])
