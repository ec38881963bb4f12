"""Pairs as people keep them: every layout gives the right original, instruction and edited image, row by row."""

import io
import json
import tarfile
import threading
import unicodedata
import zipfile
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from instruct_pix2pix.cli import UserError
from instruct_pix2pix.data.archives import unpack
from instruct_pix2pix.data.rows import find_rows
from instruct_pix2pix.data.sources import Source
from instruct_pix2pix.data.triples import load_triples, open_pair

BRIGHTER = 100


def original(number: int) -> Image.Image:
    """A picture that tells its number: noise, so that no two are alike."""
    pixels = np.random.default_rng(number).integers(0, 100, (20, 24, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def edited(number: int) -> Image.Image:
    return Image.fromarray(np.asarray(original(number)) + np.uint8(BRIGHTER))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def save(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def save_sides(first: Path, second: Path, numbers=(0, 1, 2), names="{}.png") -> None:
    for number in numbers:
        save(first / names.format(number), original(number))
        save(second / names.format(number), edited(number))


def read(folder, **fields) -> list[tuple[int, list[str]]]:
    """(number of the picture, wordings) of each row, once every pair is checked to belong together."""
    source = Source(str(folder), "--dataset_name", **{"on_bad_row": "error", **fields})
    triples, rows = load_triples(source), []
    for index in triples.indices.tolist():
        wordings, first, second = open_pair(triples, index)
        number = next(n for n in range(60) if np.array_equal(np.asarray(first), np.asarray(original(n))))
        assert np.array_equal(np.asarray(second), np.asarray(edited(number))), "another picture's edit"
        rows.append((number, wordings))
    return rows


def refusal(folder, **fields) -> str:
    with pytest.raises(UserError) as caught:
        read(folder, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


THREE = [(number, ["edit it"]) for number in range(3)]


# ---- two folders


@pytest.mark.parametrize(
    "names",
    ["original edited", "A B", "input target", "gt lq", "blur sharp", "low high", "noisy clean", "Input GT"],
)
def test_two_folders_of_usual_names(names, tmp_path):
    first, second = names.split()
    if first == "gt":
        first, second = second, first
    save_sides(tmp_path / first, tmp_path / second)
    (tmp_path / "instructions.txt").write_text("edit it\n")
    assert read(tmp_path) == THREE


@pytest.mark.parametrize("layout", ["train/A", "A/train", "trainA", "train_A", "Train/Input"])
def test_splits_around_and_inside_two_folders(layout, tmp_path):
    for split, numbers in (("train", [0, 1]), ("test", [2]), ("val", [3])):
        sides = {
            "train/A": (f"{split}/A", f"{split}/B"),
            "A/train": (f"A/{split}", f"B/{split}"),
            "trainA": (f"{split}A", f"{split}B"),
            "train_A": (f"{split}_A", f"{split}_B"),
            "Train/Input": (f"{split.title()}/Input", f"{split.title()}/Target"),
        }[layout]
        save_sides(tmp_path / sides[0], tmp_path / sides[1], numbers)
    fields = {"instruction": "edit it"}
    assert read(tmp_path, **fields) == THREE[:2]
    assert read(tmp_path, split="test", **fields) == THREE[2:]
    assert read(tmp_path, split="validation", **fields) == [(3, ["edit it"])]
    assert "no split named held_out, only" in refusal(tmp_path, split="held_out", **fields)


def test_two_folders_of_any_names(tmp_path):
    save_sides(tmp_path / "summer days", tmp_path / "elsewhere" / "winter")
    (tmp_path / "words.txt").write_text("make it winter\n\nlet it snow\n")
    two = {"edited_dir": str(tmp_path / "elsewhere" / "winter")}
    rows = read(tmp_path / "summer days", instruction=str(tmp_path / "words.txt"), **two)
    assert rows == [(number, ["make it winter", "let it snow"]) for number in range(3)]
    (tmp_path / "instructions.txt").write_text("edit it")
    assert read(tmp_path / "summer days", **two) == THREE


def test_a_folder_of_its_own_inside_one_side_is_part_of_the_names(tmp_path):
    save_sides(tmp_path / "original" / "cats", tmp_path / "edited" / "dogs")
    assert "0 pairs of equal names and 6 images without a partner" in refusal(tmp_path, instruction="edit it")


def test_two_folders_train_and_their_card_names_them(small_run, tmp_path):
    save_sides(tmp_path / "summer", tmp_path / "winter")
    run = small_run(original_dir=tmp_path / "summer", edited_dir=tmp_path / "winter", instruction="let it snow")
    card = (run / "README.md").read_text()
    assert "on\n`summer` and `winter`" in card and '"let it snow",' in card and str(tmp_path) not in card


def test_folders_that_could_be_several_pairs_are_refused(tmp_path):
    for name in ("input", "target", "gt"):
        save_sides(tmp_path / name, tmp_path / "gt")
    assert "could pair input+target, input+gt; name the two folders with --original_dir" in refusal(tmp_path)


def test_a_caption_file_per_image(tmp_path):
    save_sides(tmp_path / "A", tmp_path / "B", names="000{}.png")
    for number in range(3):
        (tmp_path / "B" / f"000{number}.txt").write_text(f"words of {number}\nmore words\n")
    assert read(tmp_path) == [(number, [f"words of {number}", "more words"]) for number in range(3)]
    assert find_rows(Source(str(tmp_path), "--dataset_name")).counts["other files"] == {}
    (tmp_path / "A" / "0000.txt").write_text("a photo")
    assert "A/ and B/ both have a text file per image" in refusal(tmp_path)


def test_a_text_that_is_no_caption_is_another_file(tmp_path):
    save_sides(tmp_path / "A", tmp_path / "B")
    (tmp_path / "A" / "readme.txt").write_text("photographs of mine")
    (tmp_path / "instructions.txt").write_text("edit it")
    assert read(tmp_path) == THREE
    assert find_rows(Source(str(tmp_path), "--dataset_name")).counts["other files"] == {".txt": 1}


def test_a_caption_that_is_missing_is_counted_and_named(tmp_path):
    save_sides(tmp_path / "A", tmp_path / "B")
    (tmp_path / "captions").mkdir()
    for number in (0, 2):
        (tmp_path / "captions" / f"{number}.txt").write_text("edit it")
    source = Source(str(tmp_path), "--dataset_name")
    assert find_rows(source).counts["pairs without an instruction"] == 1
    assert load_triples(source).bad == {1: "column edit_prompt: None is not an instruction; it must be a string"}


def test_unpaired_files_are_counted_listed_and_left_out(tmp_path):
    save_sides(tmp_path / "original", tmp_path / "edited", range(5))
    (tmp_path / "edited" / "1.png").unlink()
    (tmp_path / "original" / "2.png").unlink()
    (tmp_path / "edited" / "notes.pdf").write_bytes(b"x")
    (tmp_path / "edited" / "._3.png").write_bytes(b"x")
    (tmp_path / "edited" / ".ipynb_checkpoints").mkdir()
    save(tmp_path / "edited" / ".ipynb_checkpoints" / "1.png", edited(1))
    (tmp_path / "instructions.txt").write_text("edit it")
    found = find_rows(Source(str(tmp_path), "--dataset_name"))
    assert found.counts == {
        "pairs": 3,
        "inputs without a partner": 1,
        "targets without a partner": 1,
        "other files": {".pdf": 1},
        "pairs without an instruction": 0,
    }
    assert found.left_out == [
        {"file": "original/1.png", "reason": "no partner of the same name in edited/"},
        {"file": "edited/2.png", "reason": "no partner of the same name in original/"},
    ]
    assert [number for number, _ in read(tmp_path, on_bad_row="skip")] == [0, 3, 4]
    assert "2 file(s) make no row, the first original/1.png (no partner" in refusal(tmp_path)
    for number in (3, 4):
        (tmp_path / "edited" / f"{number}.png").unlink()
    assert "1 pairs of equal names and 4 images without a partner" in refusal(tmp_path, on_bad_row="skip")


def test_two_files_of_one_stem_are_two_pictures(tmp_path):
    save_sides(tmp_path / "original", tmp_path / "edited", names="{}.png")
    (tmp_path / "instructions.txt").write_text("edit it")
    original(7).save(tmp_path / "original" / "1.bmp")
    assert [number for number, _ in read(tmp_path, on_bad_row="skip")] == [0, 1, 2]
    (tmp_path / "edited" / "1.png").rename(tmp_path / "edited" / "1.webp")
    assert "1.bmp and 1.png could both belong to 1.webp" in refusal(tmp_path)


def test_names_that_differ_in_unicode_form_are_one(tmp_path):
    save(tmp_path / "original" / "café.png", original(0))
    save(tmp_path / "edited" / unicodedata.normalize("NFD", "café.png"), edited(0))
    write_rows(tmp_path / "metadata.jsonl", [{"file_name": "café.png", "edit_prompt": "edit it"}])
    assert read(tmp_path) == THREE[:1]


@pytest.mark.parametrize("named", ["{}.png", "original/{}.png", "edited\\{}.png", "./{}.png", "{}"])
def test_several_rows_for_one_image_are_several_instructions(named, tmp_path):
    save_sides(tmp_path / "original", tmp_path / "edited")
    words = ("make it a cartoon", "draw it as a comic")
    rows = [{"file_name": named.format(number), "edit_prompt": text} for number in range(3) for text in words]
    write_rows(tmp_path / "metadata.jsonl", [*rows, {"file_name": "9.png", "edit_prompt": "x"}])
    assert read(tmp_path) == [(number, list(words)) for number in range(3)]
    assert find_rows(Source(str(tmp_path), "--dataset_name")).counts["rows of metadata.jsonl without a pair"] == 1


def test_prompts_by_file_name_for_each_split(tmp_path):
    """The layout of img2img-turbo: train_A/, train_B/, train_prompts.json."""
    for split, numbers in (("train", [0, 1]), ("test", [2])):
        save_sides(tmp_path / f"{split}_A", tmp_path / f"{split}_B", numbers)
        prompts = {f"{number}.png": f"{split} {number}" for number in numbers}
        (tmp_path / f"{split}_prompts.json").write_text(json.dumps(prompts))
    assert read(tmp_path) == [(0, ["train 0"]), (1, ["train 1"])]
    assert read(tmp_path, split="test") == [(2, ["test 2"])]


@pytest.mark.parametrize(
    "name, content", [("metadata.jsonl", ""), ("metadata.json", "[]"), ("edits.csv", "file_name,edit_prompt\n")]
)
def test_a_table_of_no_rows_beside_two_folders(name, content, tmp_path):
    save_sides(tmp_path / "original", tmp_path / "edited")
    (tmp_path / name).write_text(content)
    assert "file_name" in refusal(tmp_path)


def test_metadata_that_names_both_images_beside_such_folders(tmp_path):
    save_sides(tmp_path / "original", tmp_path / "edited")
    rows = [
        {"file_name": f"original/{n}.png", "edited_image": f"edited/{n}.png", "edit_prompt": "edit it"} for n in (2, 0)
    ]
    write_rows(tmp_path / "metadata.jsonl", rows)
    assert read(tmp_path) == [THREE[2], THREE[0]]


# ---- tables


def numbered_rows(folder: Path, numbers=range(3), first="source_image", second="edited_image", prefix="") -> list[dict]:
    rows = []
    for number in numbers:
        save(folder / "src" / f"{number}.png", original(number))
        save(folder / "tgt" / f"{number}.png", edited(number))
        images = {first: f"{prefix}src/{number}.png", second: f"{prefix}tgt/{number}.png"}
        rows.append(images | {"edit_prompt": "edit it"})
    return rows


def write_table(path: Path, rows: list[dict]) -> Path:
    kind = path.name.partition(".")[2]
    if kind in ("csv", "tsv", "semicolon.csv", "tab.csv"):
        between = {"csv": ",", "semicolon.csv": ";"}.get(kind, "\t")
        lines = [between.join(rows[0]), *(between.join(f'"{value}"' for value in row.values()) for row in rows)]
        path.write_text("\ufeff" + "\n".join(lines))
    elif kind == "jsonl":
        write_rows(path, rows)
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        wrapped = {"json": rows, "named.json": {"data": rows}}
        wrapped["columns.json"] = {name: [row[name] for row in rows] for name in rows[0]}
        path.write_text(json.dumps(wrapped[kind]))
    return path


@pytest.mark.parametrize(
    "kind",
    "csv semicolon.csv tab.csv tsv jsonl json named.json columns.json parquet".split(),
)
@pytest.mark.parametrize("whole_folder", [False, True])
def test_tables_of_every_kind_have_paths_relative_to_their_folder(kind, whole_folder, tmp_path):
    path = write_table(tmp_path / f"anything.{kind}", numbered_rows(tmp_path))
    assert read(tmp_path if whole_folder else path) == THREE


def test_a_folder_of_tables_has_their_splits(tmp_path):
    write_rows(tmp_path / "train.jsonl", numbered_rows(tmp_path, [0, 1]))
    write_rows(tmp_path / "pairs-test.jsonl", numbered_rows(tmp_path, [2]))
    assert read(tmp_path) == THREE[:2] and read(tmp_path, split="test") == THREE[2:]
    (tmp_path / "train.jsonl").unlink()
    assert read(tmp_path) == THREE[2:], "the only split"


def test_absolute_and_backslash_paths(tmp_path):
    rows = numbered_rows(tmp_path)
    rows[0]["source_image"] = str(tmp_path / rows[0]["source_image"])
    rows[1]["edited_image"] = "tgt\\1.png"
    rows[2]["source_image"] = ".\\src\\2.png"
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read(tmp_path / "rows.jsonl") == THREE


def test_image_cells_that_are_structs_or_lists_of_one_and_prompts_of_mixed_types(tmp_path):
    rows = numbered_rows(tmp_path)
    rows[0]["source_image"] = {"path": rows[0]["source_image"], "bytes": None}
    rows[1]["source_image"] = [rows[1]["source_image"]]
    rows[1]["edit_prompt"] = ["edit it", "change it"]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read(tmp_path / "rows.jsonl") == [THREE[0], (1, ["edit it", "change it"]), THREE[2]]


@pytest.mark.parametrize("cells", ["struct", "list of images", "list of structs", "bytes"])
def test_cells_of_parquet_files_as_others_write_them(cells, tmp_path):
    def cell(image):
        struct = {"bytes": png(image), "path": "a.png"}
        return {"struct": struct, "list of structs": [struct], "bytes": png(image), "list of images": [image]}[cells]

    plain = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    image = {
        "struct": plain,
        "list of structs": datasets.List(plain),
        "bytes": datasets.Value("binary"),
        "list of images": datasets.List(datasets.Image()),
    }[cells]
    rows = {
        "input_image": [cell(original(number)) for number in range(3)],
        "edit_prompt": [0, 1, 0],
        "edited_image": [cell(edited(number)) for number in range(3)],
    }
    classes = datasets.ClassLabel(names=["edit it", "change it"])
    features = datasets.Features({"input_image": image, "edit_prompt": classes, "edited_image": image})
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    expected = [THREE[0], (1, ["change it"]), THREE[2]]
    assert read(path) == expected and read(tmp_path) == expected


def test_the_column_file_name_and_ones_beside_it(tmp_path):
    rows = numbered_rows(tmp_path, first="input_image", second="file_name")
    write_rows(tmp_path / "metadata.jsonl", rows)
    assert read(tmp_path, original_image_column="input_image", edited_image_column="file_name") == THREE
    write_rows(tmp_path / "metadata.jsonl", [row | {"image": "x.png"} for row in rows])
    assert "has both file_name and image in its metadata; keep one of them" in refusal(tmp_path)


def test_one_instruction_for_all_needs_no_column_of_instructions(tmp_path):
    rows = [{key: row[key] for key in ("source_image", "edited_image")} for row in numbered_rows(tmp_path)]
    write_rows(tmp_path / "metadata.jsonl", rows)
    assert "--edit_prompt_column: no column has a known name" in refusal(tmp_path)
    assert read(tmp_path, instruction="edit it") == THREE
    assert "--instruction: the text is empty" in refusal(tmp_path, instruction=" ")


@pytest.mark.parametrize("splits", [("train", "dev"), ("FreeForm_0", "FreeForm_1")])
@pytest.mark.parametrize(
    "columns", [("source_img", "instruction", "target_img"), ("source_image", "edit_prompt", "edited_image")]
)
def test_published_columns_and_splits(splits, columns, tmp_path):
    """MagicBrush's and UltraEdit's, with their masks."""

    def rows(numbers):
        content = {columns[0]: [original(n) for n in numbers], "mask_image": [original(40) for _ in numbers]}
        content |= {columns[1]: ["edit it" for _ in numbers], columns[2]: [edited(n) for n in numbers]}
        image = datasets.Image()
        kinds = {columns[0]: image, "mask_image": image, columns[1]: datasets.Value("string"), columns[2]: image}
        return datasets.Dataset.from_dict(content, features=datasets.Features(kinds))

    datasets.DatasetDict({splits[0]: rows([0, 1]), splits[1]: rows([2])}).save_to_disk(tmp_path)
    assert read(tmp_path, split=splits[0]) == THREE[:2] and read(tmp_path, split=splits[1]) == THREE[2:]
    if splits[0] == "train":
        assert read(tmp_path) == THREE[:2] and read(tmp_path, split="validation") == THREE[2:]
    else:
        assert "no split named train, only FreeForm_0, FreeForm_1; choose one with --split" in refusal(tmp_path)


def test_the_layout_of_the_original_data(tmp_path):
    """Twenty ids: 18 train, 1 for validation, 1 test; a row for each seed."""
    seeds = []
    for number in range(20):
        folder = tmp_path / f"{number:07d}"
        folder.mkdir()
        (folder / "prompt.json").write_text(json.dumps({"input": "a", "edit": f"edit {number}", "output": "b"}))
        names = ["11", "22"] if number == 0 else ["33"]
        for name in names:
            original(number).save(folder / f"{name}_0.jpg", "PNG")
            edited(number).save(folder / f"{name}_1.jpg", "PNG")
        seeds.append([folder.name, names])
    (tmp_path / "seeds.json").write_text(json.dumps(seeds))
    assert read(tmp_path) == [(0, ["edit 0"]), *((n, [f"edit {n}"]) for n in range(18))]
    assert read(tmp_path, split="val") == [(18, ["edit 18"])] and read(tmp_path, split="test") == [(19, ["edit 19"])]
    (tmp_path / "0000019" / "prompt.json").unlink()
    assert "is empty" in refusal(tmp_path, split="test")
    (tmp_path / "0000003" / "prompt.json").unlink()
    assert "1 file(s) make no row, the first 0000003/prompt.json (cannot be read" in refusal(tmp_path)


# ---- archives


def archive(path: Path, files: dict[str, bytes]) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            for name, content in files.items():
                file.writestr(name, content)
    else:
        with tarfile.open(path, "w:" + path.suffix[1:].replace("tar", "")) as file:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    return path


def files_of_rows(numbers=range(3)) -> dict[str, bytes]:
    sides = {f"src/{n}.png": png(original(n)) for n in numbers}
    return sides | {f"tgt/{n}.png": png(edited(n)) for n in numbers}


@pytest.mark.parametrize("name", ["images.zip", "images.tar", "images.tar.gz"])
def test_an_archive_beside_metadata_or_around_everything(name, tmp_path):
    files = files_of_rows()
    pair = {"original_image": "src/{}.png", "edited_image": "tgt/{}.png", "edit_prompt": "edit it"}
    rows = [{key: text.format(number) for key, text in pair.items()} for number in range(3)]
    (tmp_path / "beside").mkdir()
    archive(tmp_path / "beside" / name, files)
    write_rows(tmp_path / "beside" / "metadata.jsonl", rows)
    read_cached = partial(read, cache_dir=str(tmp_path / "cache"))
    assert read_cached(tmp_path / "beside") == THREE
    inside = {f"top/{key}": content for key, content in files.items()}
    inside["top/metadata.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows).encode()
    inside["__MACOSX/top/._metadata.jsonl"] = b"junk"
    whole = archive(tmp_path / name, inside)
    assert read_cached(whole) == THREE
    unpacked = sorted((tmp_path / "cache").rglob("*.png"))
    before = [path.stat().st_mtime_ns for path in unpacked]
    assert read_cached(whole) == THREE and [path.stat().st_mtime_ns for path in unpacked] == before, "unpacked once"


def test_an_archive_for_each_side(tmp_path):
    for side, make in (("A", original), ("B", edited)):
        archive(tmp_path / f"{side}.zip", {f"{side}/{n}.png": png(make(n)) for n in range(3)})
    assert read(tmp_path, instruction="edit it", cache_dir=str(tmp_path / "cache")) == THREE


def test_webdataset_shards(tmp_path):
    for shard, numbers in enumerate(([0, 1], [2])):
        files = {}
        for n in numbers:
            files |= {f"{n:04d}.input_image.png": png(original(n)), f"{n:04d}.edited_image.png": png(edited(n))}
            files |= {f"{n:04d}.json": b'{"edit_prompt": "edit it"}'} if n else {"0000.edit_prompt.txt": b"edit it"}
        archive(tmp_path / f"train-{shard:05d}.tar", files)
    cache = {"cache_dir": str(tmp_path / "cache")}
    assert read(tmp_path, **cache) == THREE
    assert read(tmp_path / "train-00000.tar", **cache) == THREE[:2]


@pytest.mark.parametrize("name", ["../out.png", "/tmp/out.png", "a/../../out.png", "..\\out.png", "C:\\out.png"])
@pytest.mark.parametrize("kind", ["evil.zip", "evil.tar"])
def test_archives_cannot_write_outside_their_folder(kind, name, tmp_path):
    path = archive(tmp_path / kind, {name: png(original(0))})
    before = set(tmp_path.rglob("*"))
    assert "leads out of it; it is not unpacked" in refusal(path, cache_dir=str(tmp_path / "cache"))
    left = {p for p in set(tmp_path.rglob("*")) - before if p.is_file()}
    assert not left and not Path("/tmp/out.png").exists()


def test_links_in_archives_and_archives_cut_short(tmp_path):
    with tarfile.open(tmp_path / "links.tar", "w") as file:
        link = tarfile.TarInfo("src/0.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    cache = {"cache_dir": str(tmp_path / "cache")}
    refusal(tmp_path / "links.tar", **cache)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_symlink()]
    for name in ("cut.zip", "cut.tar.gz"):
        whole = archive(tmp_path / name, files_of_rows())
        whole.write_bytes(whole.read_bytes()[:-900])
        assert f"{name} is damaged" in refusal(whole, **cache)


@pytest.mark.parametrize("ending", ["zip", "tar.gz", "tar.bz2", "tar.xz"])
def test_archives_with_a_byte_that_is_not_as_it_was(ending, tmp_path):
    """Whichever byte it is: the archive is refused, or what it holds is whole all the same."""
    content = archive(tmp_path / f"a.{ending}", files_of_rows()).read_bytes()
    refused = 0
    for number, place in enumerate(np.linspace(20, len(content) - 1, 25).astype(int)):
        damaged = tmp_path / f"{number}.{ending}"
        damaged.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        try:
            folder = unpack([damaged], tmp_path / "cache", "--dataset_name")
        except UserError as error:
            refused += 1
            assert f"{damaged.name} is damaged" in str(error)
        else:
            found = {p.relative_to(folder / str(number)).as_posix(): p.read_bytes() for p in folder.rglob("*.png")}
            assert found.items() <= files_of_rows().items(), place
    assert refused > 15


# ---- addresses


class Server(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        places = {"/file": "file:///etc/passwd", "/ftp": "ftp://127.0.0.1/a.png", "/moved": "/0a.png"}
        if self.path in places:
            self.send_response(302)
            self.send_header("Location", places[self.path])
            self.end_headers()
            return
        number = int(self.path[1]) if self.path[1].isdigit() else 0
        content = png((original if "a.png" in self.path else edited)(number))
        content = {"/text": b"<html>no picture</html>"}.get(self.path, content)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content) + (99 if self.path == "/cut" else 0)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as httpd:
        httpd.asked = []
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield httpd
        httpd.shutdown()
        thread.join()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_addresses_are_fetched_once_into_the_cache(kind, server, tmp_path):
    address = f"http://127.0.0.1:{server.server_port}"
    rows = [
        {"original_image": f"{address}/{n}a.png", "edited_image": f"{address}/{n}b.png", "edit_prompt": "edit it"}
        for n in range(3)
    ]
    rows[0]["original_image"] = f"{address}/moved"
    path = write_table(tmp_path / f"rows.{kind}", rows)
    cache = {"cache_dir": str(tmp_path / "cache")}
    assert read(path, **cache) == THREE
    asked = sorted(server.asked)
    assert asked == sorted(["/0a.png", "/0b.png", "/1a.png", "/1b.png", "/2a.png", "/2b.png", "/moved"])
    assert read(path, **cache) == THREE and sorted(server.asked) == asked


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/text", "not an image"),
        ("/file", "file:///etc/passwd"),
        ("/ftp", "leads to ftp://"),
        ("/cut", "cut short"),
    ],
)
def test_addresses_that_are_no_images_are_refused(path, reason, server, tmp_path):
    address = f"http://127.0.0.1:{server.server_port}"
    write_rows(
        tmp_path / "rows.jsonl",
        [{"original_image": f"{address}{path}", "edited_image": f"{address}/0b.png", "edit_prompt": "edit it"}],
    )
    message = refusal(tmp_path / "rows.jsonl", cache_dir=str(tmp_path / "cache"))
    assert f"row 0, column original_image: not a readable image ({address}{path} " in message and reason in message
    assert len([p for p in (tmp_path / "cache").rglob("*") if p.is_file()]) == 1


def test_a_download_has_a_size_and_a_time(server, tmp_path, monkeypatch):
    from instruct_pix2pix import images

    address = f"http://127.0.0.1:{server.server_port}/0a.png"
    monkeypatch.setattr(images, "MAX_DOWNLOAD_BYTES", 100)
    with pytest.raises(images.BadImage, match="is larger than 0 MiB"):
        images.fetch(address)
    monkeypatch.setattr(images, "MAX_DOWNLOAD_BYTES", 2**20)
    monkeypatch.setattr(images, "DOWNLOAD_SECONDS", -1)
    with pytest.raises(images.BadImage, match="takes longer than -1 seconds"):
        images.fetch(address)


def test_a_split_that_is_there_under_another_name(tmp_path):
    save_sides(tmp_path / "dev" / "A", tmp_path / "dev" / "B")
    source = Source(str(tmp_path), "--dataset_name", instruction="edit it")
    assert len(load_triples(source)) == len(load_triples(replace(source, split="validation"))) == 3
