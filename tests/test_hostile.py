"""Files from strangers: damaged or made to harm, they are refused in one line, within bounds of time and memory."""

import contextlib
import io
import json
import re
import signal
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image

from instruct_pix2pix import files, publishing
from instruct_pix2pix.building import whitebox_weights
from instruct_pix2pix.cli import UserError
from instruct_pix2pix.data.sources import Source
from instruct_pix2pix.data.triples import load_triples
from instruct_pix2pix.edit_folder import read_instructions
from instruct_pix2pix.images import contact_sheet
from instruct_pix2pix.training import checkpoint as checkpoints
from tests.conftest import ROOT
from tests.test_data_whitebox import write_saved_model

SECONDS = 20  # after which a reader counts as hanging; each takes milliseconds


def hostile(examples: int):
    """The same inputs in every run, a fresh folder's worth of files in one folder."""
    unhealthy = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=unhealthy
    )


@contextlib.contextmanager
def refused_or_read():
    """What is inside ends in time: well, or with a UserError of one line."""

    def hangs(*_):
        raise TimeoutError(f"not done after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    try:
        yield
    except UserError as error:
        assert "\n" not in str(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def damaged(content: bytes):
    """`content` with some bytes replaced, by others or by numbers that are too large; or cut short."""
    numbers = st.sampled_from([b"\xff" * 4, b"\xff" * 8, b"\0" * 4, b"\xff\xff\xff\x7f", struct.pack("<Q", 2**60)])
    place = st.integers(0, max(0, len(content) - 1))
    edit = st.tuples(place, st.integers(0, 8), st.binary(max_size=8) | numbers)

    def change(edits: list, end: int | None) -> bytes:
        changed = bytearray(content)
        for start, count, put in edits:
            changed[start : start + count] = put
        return bytes(changed[:end])

    return st.builds(change, st.lists(edit, min_size=1, max_size=6), st.none() | place)


# ---- metadata

DEEP = b'{"input_image": ' + b"[" * 100_000  # deeper than Python's stack
ROWS = {
    "metadata.jsonl": [{"input_image": "a.png", "edit_prompt": "x", "edited_image": "a.png"}, {"edit_prompt": None}],
    "metadata.csv": 'input_image,edit_prompt,edited_image\na.png,x,a.png\na.png,"y\nz",a.png\n',
}
ROWS["metadata.jsonl"] = "".join(json.dumps(row) + "\n" for row in ROWS["metadata.jsonl"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(["input_image", "edit_prompt", "edited_image", "file_name", "task"]) | st.text(max_size=5)
RECORDS = st.lists(VALUES | st.dictionaries(NAMES, VALUES, max_size=4), max_size=4)


def json_lines(records: list) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "instructions.txt"])
def test_metadata_of_any_content(name, tmp_path):
    folders = [tmp_path / "a", *(tmp_path / "a" / side for side in ("original", "edited"))]
    for folder in folders[: 3 if name == "instructions.txt" else 1]:
        folder.mkdir()
        Image.new("RGB", (8, 8)).save(folder / "a.png")
    whole = ROWS.get(name, "one\ntwo\n").encode()

    @hostile(60)
    @given(st.binary(max_size=200) | damaged(whole) | RECORDS.map(json_lines))
    def check(content):
        (folders[0] / name).write_bytes(content)
        with refused_or_read():
            load_triples(Source(str(folders[0]), "--train_data_dir"), show_progress=False)

    check()
    for content in (whole, b"1" * 10_000, b"input_image,edit_prompt,edited_image\n" + b"a" * 200_000, b"\0" * 99):
        (folders[0] / name).write_bytes(content)
        with refused_or_read():
            load_triples(Source(str(folders[0]), "--train_data_dir"), show_progress=False)


def whole_files() -> dict[str, bytes]:
    """A good file of every other kind that makes a dataset."""
    image, packed, table = io.BytesIO(), {"zip": io.BytesIO(), "tar": io.BytesIO()}, io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    rows = [{"input_image": "a.png", "edit_prompt": "x", "edited_image": "a.png"}]
    contents = {"a.png": image.getvalue(), "metadata.jsonl": ROWS["metadata.jsonl"].encode()}
    with zipfile.ZipFile(packed["zip"], "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    with tarfile.open(fileobj=packed["tar"], mode="w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    datasets.Dataset.from_list(rows).to_parquet(table)
    return {
        "rows.json": json.dumps(rows).encode(),
        "rows.tsv": b"input_image\tedit_prompt\tedited_image\na.png\tx\ta.png\n",
        "seeds.json": b'[["0000001", ["12", "34"]], ["0000002", ["5"]]]',
        "rows.zip": packed["zip"].getvalue(),
        "rows.tar.gz": packed["tar"].getvalue(),
        "rows.parquet": table.getvalue(),
    }


@pytest.mark.parametrize("name", whole_files())
def test_other_kinds_of_datasets_of_any_content(name, tmp_path):
    whole, folder = whole_files()[name], tmp_path / "a"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    named = str(folder if name == "seeds.json" else folder / name)
    number = iter(range(10_000))

    def read(content: bytes) -> int:
        (folder / name).write_bytes(content)
        cache = tmp_path / f"cache-{next(number)}"  # an archive of the same size and time would be taken from it
        return len(load_triples(Source(named, "--dataset_name", cache_dir=str(cache)), show_progress=False))

    if name != "seeds.json":  # which has no images here
        assert read(whole) in (1, 2)

    @hostile(10 if name == "rows.parquet" else 40)
    @given(st.binary(max_size=200) | damaged(whole))
    def check(content):
        with refused_or_read():
            read(content)

    check()
    with refused_or_read():
        read(DEEP)
    outside = {path for path in tmp_path.iterdir() if not path.name.startswith("cache-")}
    assert outside == {folder} and {path.name for path in folder.iterdir()} == {"a.png", name}


def test_metadata_nested_deeper_than_the_stack(tmp_path):
    (tmp_path / "metadata.jsonl").write_bytes(DEEP)
    with pytest.raises(UserError, match="metadata.jsonl cannot be read"):
        load_triples(Source(str(tmp_path), "--train_data_dir"))


@pytest.mark.parametrize("name", ["lines.txt", "rows.jsonl", "rows.csv"])
def test_instructions_of_any_content(name, tmp_path):
    path = tmp_path / name
    whole = {"rows.jsonl": b'{"image": "a.png", "instruction": "x"}\n', "rows.csv": b"image,instruction\na.png,x\n"}

    @hostile(60)
    @given(st.binary(max_size=200) | damaged(whole.get(name, b"one\ntwo\n")) | RECORDS.map(json_lines))
    def check(content):
        path.write_bytes(content)
        with refused_or_read():
            assert all(text.strip() for _, text in read_instructions(str(path)))

    check()
    for content in (DEEP, b"image,instruction\na," + b"a" * 200_000, b"\0" * 99):
        path.write_bytes(content)
        with refused_or_read():
            read_instructions(str(path))


# ---- weights


class FlatBuffer:
    """Writes the few parts of a FlatBuffer that a TensorFlow Lite model has; children come after their parents."""

    def __init__(self):
        self.data = bytearray(8)

    def reserve(self, size: int) -> int:
        self.data += bytes(-len(self.data) % 8)
        self.data += bytes(size)
        return len(self.data) - size

    def table(self, fields: dict) -> int:
        """fields: place -> number, or a function that writes what the field points at and returns where."""
        places = max(fields, default=-1) + 1
        offsets = self.reserve(4 + 2 * places)
        start = self.reserve(4 + 4 * places)
        struct.pack_into("<HH", self.data, offsets, 4 + 2 * places, 4 + 4 * places)
        struct.pack_into("<i", self.data, start, start - offsets)
        for place, value in fields.items():
            at = start + 4 + 4 * place
            struct.pack_into("<H", self.data, offsets + 4 + 2 * place, at - start)
            value = value() - at if callable(value) else value
            struct.pack_into("<I", self.data, at, value)
        return start

    def tables(self, items: list[dict]) -> int:
        start = self.reserve(4 + 4 * len(items))
        struct.pack_into("<I", self.data, start, len(items))
        for number, fields in enumerate(items):
            at = start + 4 + 4 * number
            struct.pack_into("<I", self.data, at, self.table(fields) - at)
        return start

    def vector(self, values: np.ndarray, count: int | None = None) -> int:
        raw = values.tobytes()
        start = self.reserve(4 + len(raw))
        struct.pack_into("<I", self.data, start, len(values) if count is None else count)
        self.data[start + 4 :] = raw
        return start


def tflite(weights: dict[str, np.ndarray], claim: int | None = None) -> bytes:
    """A model of convolutions only; `claim` is what the first buffer says of its length."""
    flat, tensors, buffers, operators = FlatBuffer(), [], [{}], []
    for name, array in weights.items():
        array = array.transpose(0, 2, 3, 1) if array.ndim == 4 else array
        raw = np.frombuffer(array.tobytes(), np.uint8)
        count = claim if claim is not None and len(buffers) == 1 else len(raw)
        shape = np.array(array.shape, "<i4")
        tensors.append({0: lambda shape=shape: flat.vector(shape), 2: len(buffers)})
        buffers.append({0: lambda raw=raw, count=count: flat.vector(raw, count)})
        if name.endswith("bias"):
            inputs = np.array([0, len(tensors) - 2, len(tensors) - 1], "<i4")
            operators.append({1: lambda inputs=inputs: flat.vector(inputs)})
    graph = {0: lambda: flat.tables(tensors), 3: lambda: flat.tables(operators)}
    codes = [{3: 3}]
    model = flat.table(
        {1: lambda: flat.tables(codes), 2: lambda: flat.tables([graph]), 4: lambda: flat.tables(buffers)}
    )
    struct.pack_into("<I4s", flat.data, 0, model, b"TFL3")
    return bytes(flat.data)


@pytest.fixture
def small_weights(monkeypatch) -> dict[str, np.ndarray]:
    """Weights of a generator of two convolutions, so that files are small and quick to damage everywhere."""
    shapes = {"conv0.weight": (2, 3, 3, 3), "conv0.bias": (2,), "conv1.weight": (3, 2, 1, 1), "conv1.bias": (3,)}
    monkeypatch.setattr(whitebox_weights, "SHAPES", shapes)
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def npz(arrays: dict) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def same(read: dict, weights: dict) -> bool:
    return read.keys() == weights.keys() and all(np.array_equal(read[name], weights[name]) for name in weights)


@pytest.mark.parametrize("kind", ["npz", "tflite", "safetensors", "index", "data"])
def test_weights_of_any_content(kind, small_weights, tmp_path):
    from safetensors.numpy import save

    source = tmp_path / f"weights.{kind}"
    path = source
    if kind in ("index", "data"):
        source = write_saved_model(tmp_path / "model", small_weights)
        path = source / "variables" / {"index": "variables.index", "data": "variables.data-00000-of-00001"}[kind]
        whole = path.read_bytes()
    else:
        whole = {"npz": npz, "tflite": tflite, "safetensors": save}[kind](small_weights)
    path.write_bytes(whole)
    assert same(whitebox_weights.read_weights(str(source)), small_weights)

    @hostile(150)
    @given(st.binary(max_size=200) | damaged(whole))
    def check(content):
        path.write_bytes(content)
        with refused_or_read():
            read = whitebox_weights.read_weights(str(source))
            assert {name: array.shape for name, array in read.items()} == whitebox_weights.SHAPES

    check()


def refusal(path: Path, content: bytes) -> tuple[str, int]:
    """The one line about a file of weights, and the most bytes of memory that reading it took."""
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as caught:
            whitebox_weights.read_weights(str(path))
        return str(caught.value), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [2**34, 2**60])
def test_a_header_that_claims_too_much_allocates_nothing(size, small_weights, tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (size,)})
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("conv0.bias.npy", header.getvalue())
    message, memory = refusal(tmp_path / "a.npz", archive.getvalue())
    assert f"conv0.bias has shape ({size},), not (2,)" in message and memory < 2**20
    message, memory = refusal(tmp_path / "a.tflite", tflite(small_weights, claim=min(size, 2**32 - 1)))
    assert "a list of 4294967295" in message and memory < 2**20


def test_an_archive_that_unpacks_to_more_than_the_weights_is_not_unpacked(small_weights, tmp_path):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("conv0.bias.npy", npy(np.zeros(2**24, np.float32)))  # 64 MB in 64 kB
        file.writestr("others.npy", npy(np.zeros(2**24, np.float32)))
    message, memory = refusal(tmp_path / "a.npz", archive.getvalue())
    assert "conv0.bias has shape (16777216,), not (2,)" in message and memory < 2**22


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_pickled_arrays_are_refused(small_weights, tmp_path):
    array = np.empty(2, object)
    message, _ = refusal(tmp_path / "a.npz", npz({**small_weights, "conv0.bias": array}))
    assert "conv0.bias holds object, not floats" in message


def test_numbers_and_lists_without_end(small_weights, tmp_path):
    """Each would take hours: a number of a million digits, a list that every operator reads anew."""
    with refused_or_read(), pytest.raises(ValueError, match="too long"):
        whitebox_weights.read_varints(b"\xff" * 1_000_000, 0, 1)
    flat = FlatBuffer()
    numbers = np.zeros(200_000, "<i4")

    def operators():
        start = flat.reserve(4 + 4 * len(numbers))
        struct.pack_into("<I", flat.data, start, len(numbers))
        one = flat.table({1: lambda: flat.vector(numbers)})
        for number in range(len(numbers)):
            place = start + 4 + 4 * number
            struct.pack_into("<I", flat.data, place, one - place)
        return start

    graph = {3: operators}
    model = flat.table({1: lambda: flat.tables([{3: 3}]), 2: lambda: flat.tables([graph])})
    struct.pack_into("<I4s", flat.data, 0, model, b"TFL3")
    with refused_or_read():
        message, _ = refusal(tmp_path / "a.tflite", bytes(flat.data))
    assert "a list of 200000" in message


# ---- checkpoints


@pytest.fixture
def checkpoint(tmp_path):
    """(A module, its optimizer, its checkpoint), as training writes it, of a "UNet" of six numbers."""

    class Small(torch.nn.Linear):
        def to_json_string(self) -> str:
            return "{}"

    module = Small(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    writer = checkpoints.Writer()
    state = {"step": 4, "samples_seen": 8, "seed": 1, "loss_scaler": None}
    state["flags"] = {"pretrained_model_name_or_path": "base"}
    writer.save(tmp_path, state, module, optimizer, None, None)
    writer.wait()
    writer.close()
    return module, optimizer, tmp_path / "checkpoint-4"


@pytest.mark.parametrize("name", ["state.json", "optimizer.safetensors"])
def test_a_checkpoint_of_any_content(name, checkpoint):
    module, optimizer, folder = checkpoint
    file = folder / name
    whole = file.read_bytes()

    @hostile(150)
    @given(st.binary(max_size=200) | damaged(whole) | VALUES.map(lambda value: json.dumps(value).encode()))
    def check(content):
        file.write_bytes(content)
        with refused_or_read():
            found = checkpoints.find_checkpoint("latest", folder.parent)
            assert found == folder
            checkpoints.load_training_state(found, module, optimizer, None)

    check()
    file.write_bytes(whole)
    assert checkpoints.load_training_state(folder, module, optimizer, None)["step"] == 4


# ---- cards and reports

TEXTS = st.text(max_size=30) | st.sampled_from(
    [
        "<script>alert(1)</script>",
        "a | b",
        "```\n# heading\n```",
        "`",
        "``` `` `",
        "---\nlicense: mit\n---",
        "\n\n---\n\n",
        "*x* [y](javascript:z) ![i](http://example.org/i.png)",
        "key: [value, {",
        "\\",
        "&lt;b&gt;",
        "\udcff",  # a byte of the command line that is no UTF-8
        '\'"""\'',
        "a\u2028b\u0085c\x0b",
    ]
)
MARKDOWN = MarkdownIt("commonmark").enable("table")
OWN_COMMENT = re.compile(r"<!-- (evaluation/sweep\.py writes from here: \[[^>\n]*\]|to here) -->")


def shown(card: str) -> dict[str, list[str]]:
    """What a reader sees of a card: headings, text, code and the cells of tables. No markup but the card's own."""
    seen = {"heading": [], "text": [], "code": [], "cells": [], "fence": []}
    body = re.sub(r"\A---\n.*?\n---\n", "", card, count=1, flags=re.DOTALL)
    tokens = MARKDOWN.parse(body)
    for number, token in enumerate(tokens):
        assert token.type not in ("hr", "code_block"), token
        if token.type == "html_block":  # the two comments that a sweep finds its part by, which no text ends early
            assert OWN_COMMENT.fullmatch(token.content.strip()), token
        if token.type == "fence":
            seen["fence"].append(token.content)
        for child in token.children or []:
            assert child.type != "html_inline", child
            if child.type == "code_inline":
                seen["code"].append(child.content)
            elif child.type == "text":
                seen["text"].append(child.content)
            elif child.type in ("link_open", "image"):
                assert child.attrs.get("href", child.attrs.get("src")) in (
                    "https://arxiv.org/abs/2211.09800",
                    "preview.png",
                )
        if token.type == "inline" and tokens[number - 1].type == "heading_open":
            seen["heading"].append(token.content)
        if token.type == "inline" and tokens[number - 1].type in ("td_open", "th_open"):
            seen["cells"].append("".join(child.content for child in token.children))
    return seen


def one_line(text: str) -> str:
    return " ".join(text.split())


@hostile(150)
@given(TEXTS, TEXTS, TEXTS.filter(lambda text: text.strip("./ \n\0")), TEXTS)
def test_a_model_card_shows_what_was_typed_as_text(instruction, base, name, prompt):
    config = SimpleNamespace(
        pretrained_model_name_or_path=f"nobody/{base}",
        dataset_name=base,
        train_data_dir=None,
        original_dir=None,
        edited_dir=None,
        output_dir=f"outputs/{name}",
        guidance_scale=7.0,
        image_guidance_scale=1.5,
    )
    flags = {"validation_prompt": prompt, "seed": 1}
    card = publishing.model_card(config, flags, {"steps": 1}, None, instruction)
    assert ModelCard(card).data.to_dict()["license"] == "other"
    seen = shown(card)
    assert len(seen["heading"]) == 4 and seen["heading"][1:] == ["Use", "Limits", "Training"]
    [snippet] = seen["fence"]
    calls = [line.strip().rstrip(",") for line in snippet.split("\n") if line.startswith('    "')]
    assert [json.loads(call) for call in calls] == [instruction]
    rows = list(zip(*[iter(seen["cells"])] * 2, strict=True))
    assert rows[0] == ("flag", "value") and rows[-1] == ("--seed", "1") and len(rows) == 3
    if one_line(prompt) and "\0" not in prompt:
        assert rows[1] == ("--validation_prompt", one_line(files.for_others(prompt)))


@hostile(60)
@given(st.binary(max_size=200) | damaged(b"---\nlicense: apache-2.0\ntags:\n- a\n---\n\n# Card\n"))
def test_a_base_models_card_of_any_content(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("base")
    (folder / "README.md").write_bytes(content)
    with refused_or_read():
        licence = publishing.card_licence(str(folder))
        assert licence is None or isinstance(licence, str)


def test_a_base_models_card_made_to_harm(tmp_path):
    nested = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 64))
    for content in (f"---\n{nested}license: *a63\n---\n", "---\n" + "\n" * 1_000_000 + "x", "---\n" + "[" * 100_000):
        (tmp_path / "README.md").write_text(content)
        with refused_or_read():
            assert publishing.card_licence(str(tmp_path)) is None
    (tmp_path / "README.md").write_text('---\nlicense: "mit\\n---\\n<b>"\n---\n')
    assert publishing.card_licence(str(tmp_path)) == "mit\n---\n<b>"


@hostile(100)
@given(TEXTS)
def test_text_code_and_blocks_of_a_card(text):
    seen = shown(f"# {files.as_text('x' + text)}\n\n{files.as_code(text)}\n\n{files.code_block('bash', text)}\n")
    assert len(seen["heading"]) == 1 and len(seen["fence"]) == 1 and len(seen["code"]) == 1
    if "\0" not in text:  # which Markdown replaces
        assert "".join(seen["text"]) == one_line("x" + text)
        assert seen["code"] == [one_line(text) or " "]
        assert seen["fence"][0].split() == text.split()


def test_a_card_names_storage_as_it_is_and_of_paths_here_the_last_part():
    from instruct_pix2pix.building.build import shown as published

    assert published("--output_dir=s3://bucket/data/x") == "--output_dir=s3://bucket/data/x"
    assert published("derain=/data/rain:/data/clean") == "derain=rain:clean"


def test_a_dataset_card_shows_the_licence_and_the_command_as_typed(tmp_path, monkeypatch):
    from data_preparation import build_generic_edits

    licence = "<script>alert(1)</script> | `x`\n```\n---\n# [y](z)"
    argv = ["--photos", str(ROOT / "assets/photos/test"), "--rows", "4", "--tile", "32", "--photos_license", licence]
    argv += ["--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["build_generic_edits.py", *argv])
    build_generic_edits.main(argv)
    card = (tmp_path / "out/README.md").read_text()
    assert ModelCard(card).data.license == "other"
    seen = shown(card)
    assert seen["heading"] == ["Generic edits", "Columns", "Rows", "Licences", "How it was made"]
    assert any(one_line(licence) in text for text in ["".join(seen["text"])])
    assert len(seen["fence"]) == 2 and licence in seen["fence"][0]


@hostile(60)
@given(TEXTS)
def test_a_contact_sheet_takes_any_text(text):
    with refused_or_read():
        contact_sheet([([Image.new("RGB", (32, 32))], [text, "below"])], cell=32)


def test_a_contact_sheet_cuts_a_long_text_at_once():
    with refused_or_read():
        sheet = contact_sheet([([Image.new("RGB", (32, 32))], ["make it blue, " * 20_000])], cell=32)
    assert sheet.width < 100


# ---- pickles


def test_nothing_is_pickled():
    """Neither written nor read, but for older weights by `weights_only=True`."""
    folders = ("instruct_pix2pix", "data_preparation", "inference", "evaluation", "tools")
    sources = [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    assert len(sources) > 40
    for path in sources:
        for line in path.read_text(encoding="utf-8").splitlines():
            code = line.split("#")[0]
            assert not re.search(
                r"^\s*(import|from) (pickle|cPickle|dill|cloudpickle|joblib|shelve|marshal)\b", code
            ), path
            assert "torch.save(" not in code and "allow_pickle=True" not in code, path
            assert "torch.load(" not in code or "weights_only=True" in code, path
            assert "np.load(" not in code, path
