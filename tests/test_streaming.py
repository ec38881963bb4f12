"""Streams: rows and order as a dataset on disk has them, whatever happens to the server, the cache and the run."""

import contextlib
import json
import logging
import re
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from instruct_pix2pix.cli import SourceLost, UserError
from instruct_pix2pix.data import streaming
from instruct_pix2pix.data.order import SampleOrder, draw_subset, stream, window_positions
from instruct_pix2pix.data.sources import Source
from instruct_pix2pix.data.triples import TripleDataset, load_triples
from instruct_pix2pix.images import encode_image
from tests.conftest import assert_same_tensors, copy_tree, losses
from tests.loopback_hub import loopback_hub
from tests.test_data_export import in_a_client

UNET = "unet/diffusion_pytorch_model.safetensors"
ROWS, GROUP = 24, 2  # of the shards below: 3 shards of 4 row groups of 2 rows


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), rows=ROWS, group=GROUP)


def write_shards(folder, rows: int, group: int, shards: int = 3, split: str = "train", bad: tuple[int, ...] = ()):
    """Pairs of plain colours, each another one: row n's instruction is n."""
    folder.mkdir(exist_ok=True)
    pictures = [encode_image(Image.new("RGB", (48, 40), (10 * n % 256, n % 256, 90)), ".png") for n in range(rows)]
    cells = [{"bytes": b"none" if n in bad else picture, "path": None} for n, picture in enumerate(pictures)]
    columns = {"input_image": cells, "edit_prompt": list(map(str, range(rows))), "edited_image": cells}
    features = {
        "input_image": datasets.Image(),
        "edit_prompt": datasets.Value("string"),
        "edited_image": datasets.Image(),
    }
    table = datasets.Dataset.from_dict(columns | {"other": [0] * rows}, datasets.Features(
        features | {"other": datasets.Value("int64")})).data.table  # fmt: skip
    for shard in range(shards):
        part = table.slice(shard * rows // shards, rows // shards)
        pq.write_table(part, folder / f"{split}-{shard:05d}-of-{shards:05d}.parquet", row_group_size=group)
    return folder


class Server(ThreadingHTTPServer):
    """A folder over HTTP, with ranges and listings. `fails(path, first byte)` says what is answered with 503."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.url = folder, f"http://127.0.0.1:{self.server_address[1]}"
        self.fails, self.pause, self.served = lambda path, start: False, 0, []


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        path = self.server.folder / self.path.strip("/")
        start, end = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "bytes=0-")).groups()
        status, content = 404, b""
        if path.is_dir():
            status, content = 200, "".join(f'<a href="{child.name}">' for child in path.iterdir()).encode()
        elif path.is_file():
            whole = path.read_bytes()
            status, content = 206, whole[int(start) : int(end or len(whole)) + 1]
            self.server.served.append(self.path)
        if self.server.fails(self.path, int(start)):
            status, content = 503, b""
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{int(start) + len(content) - 1}/{len(whole)}")
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        time.sleep(self.server.pause)
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET


@contextmanager
def serving(folder):
    with Server(folder) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server
        server.shutdown()


def load(name, cache, **options) -> "streaming.StreamedTable":
    options = {"streaming": True, "stream_cache": 1e9} | options
    return load_triples(Source(str(name), "--dataset_name", cache_dir=str(cache), **options), 1, show_progress=False)


def rows_of(triples) -> list[dict]:
    return [triples.rows[index] for index in range(len(triples.rows))]


# ---- order


@pytest.mark.parametrize("seed", [0, 7, 2**40])
def test_one_group_is_shuffled_as_the_rows_of_a_dataset_on_disk(seed):
    order = SampleOrder(31, seed)
    for epoch in (0, 1, 4):
        expected = stream(seed, "order", epoch).permutation(31).tolist()
        assert [order.locate(31 * epoch + place) for place in range(31)] == [(epoch, row) for row in expected]
    draws = stream(seed, "substitute", 5)
    candidates = order.candidates(5)
    assert next(candidates) == order.locate(5)
    assert [next(candidates)[1] for _ in range(50)] == [int(draws.integers(31)) for _ in range(50)]
    assert draw_subset(9, seed, np.array([31]), 8).tolist() == sorted(
        stream(seed, "subset").permutation(31)[:9].tolist()
    )


def test_an_epoch_has_each_row_once_and_stays_with_few_groups_at_a_time():
    sizes, told = np.array([3, 0, 5, 1, 4, 2, 6]), []
    order = SampleOrder(21, 3, sizes, mixed=2)
    order.announce = lambda groups: told.append(groups.tolist())
    group_of = np.repeat(np.arange(7), sizes)
    epochs = [[order.locate(21 * epoch + place)[1] for place in range(21)] for epoch in range(3)]
    assert all(sorted(rows) == list(range(21)) for rows in epochs) and epochs[0] != epochs[1] != epochs[2]
    for place in range(3 * 21):
        told.clear()
        fresh = SampleOrder(21, 3, sizes, mixed=2)  # wherever one starts
        fresh.announce = order.announce
        row = fresh.locate(place)[1]
        assert row == epochs[place // 21][place % 21] and group_of[row] in told[0][:2]
        candidates = fresh.candidates(place)
        block = {group_of[stand_in] for _, (_, stand_in) in zip(range(20), candidates, strict=False)}
        assert block <= set(told[0]) and len(block) <= 2
    changes = [
        group for before, group in zip(group_of[epochs[0]], group_of[epochs[0]][1:], strict=False) if before != group
    ]
    assert len(changes) > 4  # the rows of two groups are mixed


def test_a_subset_comes_of_few_groups():
    sizes = np.full(1000, 10)
    rows = draw_subset(64, 1, sizes, 8)
    assert len(rows) == len(set(rows)) == 64 and len(set(rows // 10)) <= 8
    assert len(set(draw_subset(500, 1, sizes, 8) // 10)) == 50


# ---- rows


def test_rows_are_those_that_the_library_reads_from_the_same_shards(shards, tmp_path):
    streamed, read = load(shards, tmp_path / "a"), load(shards, tmp_path / "b", streaming=False)
    assert rows_of(streamed) == rows_of(read) and streamed.rows.features == read.rows.features
    assert streamed.rows.column_names == ["input_image", "edit_prompt", "edited_image"]
    assert streamed.first_instruction == "0" and streamed.distinct_instructions() == ["0", "1"]
    one = load(shards / "train-00001-of-00003.parquet", tmp_path / "a")
    assert rows_of(one) == rows_of(read)[8:16]


def test_shards_that_say_the_same_of_themselves_are_told_apart(tmp_path):
    (tmp_path / "shards").mkdir()
    for shard, colour in enumerate(("red", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / "plain.bmp")  # of one size, whatever it shows
        cell = {"bytes": (tmp_path / "plain.bmp").read_bytes(), "path": None}
        columns = {"input_image": [cell], "edit_prompt": ["x"], "edited_image": [cell]}
        plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        pq.write_table(pa.table(columns), tmp_path / f"shards/train-{shard}.parquet", **plain)
    footers = [pq.read_metadata(path) for path in sorted((tmp_path / "shards").iterdir())]
    assert streaming._digest(footers[0]) == streaming._digest(footers[1])
    first, second = rows_of(load(tmp_path / "shards", tmp_path / "cache"))
    assert first["input_image"]["bytes"] != second["input_image"]["bytes"]


def test_addresses_over_http_and_s3(shards, storage, tmp_path):
    expected = rows_of(load(shards, tmp_path / "local"))
    with serving(shards.parent) as server:
        for name in (shards.name, f"{shards.name}/train-*.parquet"):
            assert rows_of(load(f"{server.url}/{name}", tmp_path / "http")) == expected
        assert len(server.served) > 12
        served = Counter(server.served)
        load(f"{server.url}/{shards.name}", tmp_path / "http")
        footers = Counter(server.served) - served  # this server names no version, so they are read again
        assert 3 <= footers.total() < served.total() / 3

        with pytest.raises(UserError, match="nothing doesn't contain any data files"):
            load(f"{server.url}/nothing", tmp_path / "http")
        with pytest.raises(UserError, match="is an address, which only training with --streaming reads"):
            load(f"{server.url}/{shards.name}", tmp_path / "http", streaming=False)

    storage.put(f"{shards}/", "datasets/pairs/", recursive=True)
    assert rows_of(load("s3://datasets/pairs", tmp_path / "s3")) == expected


@pytest.mark.slow
def test_the_hub_by_name_and_by_address(shards, tmp_path):
    with loopback_hub(tmp_path / "hub") as hub:
        hub.add("tester/pairs", "dataset")
        api = huggingface_hub.HfApi(hub.url, "hf_loopback_token_for_tests")
        monkey = pytest.MonkeyPatch()
        with monkey.context() as patched:
            patched.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
            patched.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
            api.upload_folder(repo_id="tester/pairs", repo_type="dataset", folder_path=shards, path_in_repo="data")
        code = (
            "import json, sys\nfrom instruct_pix2pix.data.sources import Source\n"
            "from instruct_pix2pix.data.triples import load_triples\nfound = []\n"
            "for number, name in enumerate(sys.argv[2:]):\n"
            "    source = Source(name, '--dataset_name', streaming=True, cache_dir=sys.argv[1] + str(number))\n"
            "    triples = load_triples(source, 1, show_progress=False)\n"
            "    found.append([triples.rows[row]['edit_prompt'] for row in range(len(triples))])\n"
            "print(json.dumps(found))"
        )
        names = ("tester/pairs", "hf://datasets/tester/pairs/data")
        assert in_a_client(hub, code, tmp_path / "cache", *names) == [list(map(str, range(ROWS)))] * 2


def test_what_cannot_go_together_is_one_line(small_run, shards, pairs, tmp_path):
    wrong = {
        "--cached_crops: needs the whole dataset at hand": {"cached_crops": 2},
        "--cache_latents: needs the whole dataset at hand": {"cache_latents": True, "center_crop": True},
        "--original_dir: needs the whole": {"original_dir": pairs / "original", "edited_dir": pairs / "edited"},
        "--check_rows: all would read the whole stream": {"check_rows": "all"},
        "--stream_cache_gb: -1 is out of range": {"stream_cache_gb": -1},
        "--stream_cache_gb: 1e-06 is too small for --dataset_name: .* give 0.0 or more": {"stream_cache_gb": 1e-6},
        "--streaming: .* is not parquet": {"dataset_name": pairs},
    }
    for message, flags in wrong.items():
        flags = ({} if "original_dir" in flags else {"dataset_name": shards}) | flags
        with pytest.raises(UserError, match=message) as error:
            small_run(streaming=True, cache_dir=tmp_path / "cache", **flags)
        assert "\n" not in str(error.value)


# ---- the disk


def test_the_disk_holds_no_more_than_the_limit(tmp_path):
    most = 40 * 1024
    triples = load(write_shards(tmp_path / "shards", rows=96, group=1), tmp_path / "cache", stream_cache=most)
    order = triples.order(1)
    order.announce, largest, names = triples.rows.expect, 0, set()
    for position in range(2 * len(triples)):
        row = triples.rows[order.locate(position)[1]]
        assert row["edit_prompt"] == str(order.locate(position)[1])
        sizes = {}
        for file in (tmp_path / "cache/instruct_pix2pix/streams").glob("*.arrow"):
            with contextlib.suppress(FileNotFoundError):  # a thread makes room
                sizes[file.name] = file.stat().st_size
        largest = max(largest, sum(sizes.values()))
        names |= sizes.keys()
    size = max(sizes.values())
    assert len(names) == 96 and largest <= most + streaming.FETCHES_AT_A_TIME * size
    assert 96 * size > 2 * most  # it could not have held them all
    assert len(triples.rows._here()) <= 2 * streaming.GROUPS_MIXED


# ---- servers


def test_a_server_that_fails_is_asked_again_which_is_said(shards, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(streaming, "PAUSES", (0, 0))
    asked = Counter()

    def fails(path, start) -> bool:
        asked[path, start] += 1
        return asked[path, start] <= 1 and path.endswith("00001-of-00003.parquet")

    with serving(shards) as server:
        triples = load(server.url, tmp_path / "cache")
        server.fails = fails
        assert rows_of(triples) == rows_of(load(shards, tmp_path / "local"))
        said = [message for message in caplog.messages if "try 2 of 3 in 0 s" in message]
        assert said and "row group 0 of " + server.url in said[0] and "503" in said[0]

        triples = load(server.url, tmp_path / "other")
        server.fails = lambda path, start: True
        with pytest.raises(
            SourceLost, match=r"row group 3 of http.* cannot be read .* after 3 tries; the same command"
        ):
            triples.rows[ROWS - 1]
        server.fails = lambda path, start: False
        assert triples.rows[ROWS - 1]["edit_prompt"] == str(ROWS - 1)  # asked for again, it is fetched again
        assert all("try" not in message or "in 0 s" in message for message in caplog.messages)

        server.fails = lambda path, start: True
        with pytest.raises(UserError, match="the list cannot be read .*503.* after 3 tries"):
            load(server.url, tmp_path / "other")


def test_a_slow_server_is_waited_for_which_is_said(shards, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(streaming, "PATIENCE", 0.1)
    with serving(shards) as server:
        triples = load(server.url, tmp_path / "cache")
        server.pause = 0.3
        assert triples.rows[ROWS - 1]["edit_prompt"] == str(ROWS - 1)
        assert any(re.search("waiting for row group 3 of .* since", message) for message in caplog.messages)


def test_a_shard_that_changes_while_it_is_read_is_an_error(tmp_path):
    shards = write_shards(tmp_path / "shards", rows=6, group=1)
    triples = load(shards, tmp_path / "cache")
    write_shards(shards, rows=6, group=2)
    with pytest.raises(SourceLost, match="train-00001-of-00003.parquet is not what it was when training started"):
        triples.rows[2]
    assert rows_of(load(shards, tmp_path / "cache"))[2]["edit_prompt"] == "2"


# ---- training


STREAM = {"streaming": True, "resolution": 32, "checkpointing_steps": 2, "random_flip": True}


def test_one_row_group_trains_bit_for_bit_what_a_dataset_on_disk_does(small_run, tmp_path):
    one = write_shards(tmp_path / "one", rows=10, group=10, shards=1)
    flags = STREAM | {"dataset_name": one, "cache_dir": tmp_path / "cache"}
    streamed = small_run(name="streamed", **flags)
    read = small_run(name="read", **flags | {"streaming": False})
    assert losses(streamed) == losses(read)
    assert_same_tensors(streamed / UNET, read / UNET)


def test_it_goes_on_to_the_bit_with_other_processes_and_no_cache(small_run, shards, tmp_path, capsys):
    flags = STREAM | {"dataset_name": shards, "max_train_steps": 6}
    whole = small_run(name="whole", cache_dir=tmp_path / "cache", **flags)
    (tmp_path / "killed").mkdir()
    copy_tree(whole / "checkpoint-4", tmp_path / "killed" / "checkpoint-4")  # in the middle of the second block
    again = flags | {"resume_from_checkpoint": "latest", "dataloader_num_workers": 1, "stream_cache_gb": 1}
    resumed = small_run(name="killed", cache_dir=tmp_path / "new cache", **again)
    assert_same_tensors(resumed / UNET, whole / UNET)
    assert losses(resumed) == losses(whole)[4:]

    small_run(name="dry", cache_dir=tmp_path / "cache", dry_run=True, **flags)
    described = json.loads(capsys.readouterr().out)
    assert described["dataset"]["rows"] == ROWS and described["flags"]["cache_latents"] is False


def test_a_server_that_is_lost_costs_no_update(small_run, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "PAUSES", (0,))
    flags = STREAM | {"max_train_steps": 6, "checkpointing_steps": 100, "resume_from_checkpoint": "latest"}
    order, starts = SampleOrder(ROWS, 7, np.full(ROWS // GROUP, GROUP), streaming.GROUPS_MIXED), {}
    for path in sorted(shards.iterdir()):
        metadata = pq.read_metadata(path)
        for number in range(metadata.num_row_groups):
            columns = [metadata.row_group(number).column(column) for column in range(metadata.num_columns)]
            start = min(column.dictionary_page_offset or column.data_page_offset for column in columns)
            starts[len(starts)] = (f"/{path.name}", start)
    second = {order.locate(position)[1] // GROUP for position in range(16, ROWS)}
    assert len(second) == 4 and 0 not in second  # which is looked at before training
    lost = {starts[group] for group in second}
    with serving(shards) as server:
        flags |= {"dataset_name": server.url, "cache_dir": tmp_path / "cache"}
        whole = small_run(name="whole", **flags | {"cache_dir": tmp_path / "whole cache"})
        server.fails = lambda path, start: (path, start) in lost
        for workers in (1, 0):  # the second time, nothing is there to be kept
            with pytest.raises(SourceLost, match="row group .* cannot be read .*503.* after 2 tries"):
                small_run(dataloader_num_workers=workers, **flags)
            assert (tmp_path / "run/checkpoint-4").is_dir()  # 16 rows
        server.fails = lambda path, start: False
        assert_same_tensors(small_run(**flags) / UNET, whole / UNET)


def samples_of(triples, ranks: int, updates: range) -> list[dict]:
    """What so many ranks train on, as lists of each update's rows in the order of the positions."""
    args = SimpleNamespace(seed=5, resolution=32, image_geometry="resize_crop", center_crop=False)
    args.random_flip, args.timestep_bias_multiplier, args.embedding_noise = True, 1.0, 0.0
    rank_sets = [TripleDataset(triples, args, (4, 4, 4), 1000) for _ in range(ranks)]
    done = {}
    for step in updates:
        for rank, dataset in enumerate(rank_sets):
            done |= {at: dataset[at] for at in window_positions(0, step, 4 // ranks, 2, rank, ranks)}
    return [done[position] for position in sorted(done)]


def test_two_ranks_see_what_one_sees_and_no_row_twice(tmp_path):
    shards = write_shards(tmp_path / "shards", rows=48, group=2, bad=(5, 30))
    one = samples_of(load(shards, tmp_path / "a"), 1, range(6))
    two = samples_of(load(shards, tmp_path / "b"), 2, range(6))
    both = [
        *samples_of(load(shards, tmp_path / "c"), 2, range(3)),
        *samples_of(load(shards, tmp_path / "c"), 1, range(3, 6)),
    ]
    for others in (two, both):
        assert [sample["skipped"] for sample in one] == [sample["skipped"] for sample in others]
        for ours, theirs in zip(one, others, strict=True):
            assert ours["instruction"] == theirs["instruction"] and torch.equal(ours["noise"], theirs["noise"])
            assert torch.equal(ours["edited"], theirs["edited"])
    assert sorted(row for sample in one for row, _ in sample["skipped"]) == [5, 30]
    used = [int(sample["instruction"]) for sample in one if not sample["skipped"]]
    assert sorted(used) == [row for row in range(48) if row not in (5, 30)]


def test_a_split_is_held_out_and_bad_rows_are_stood_in_for(small_run, shards, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    both = write_shards(copy_tree(shards, tmp_path / "both"), rows=12, group=3, shards=2, split="test")
    write_shards(both, rows=ROWS, group=GROUP, bad=(4, 9, 17))
    flags = STREAM | {"dataset_name": both, "cache_dir": tmp_path / "cache", "max_train_samples": 20}
    held_out = {"validation_split": "test", "max_validation_samples": 5, "num_validation_images": 1}
    output_dir = small_run(max_train_steps=6, guidance_scale=1, image_guidance_scale=1, **held_out, **flags)
    assert [json.loads(line)["step"] for line in (output_dir / "validation_log.jsonl").open()] == [5, 6]  # 20 rows
    skipped = [json.loads(line) for line in (output_dir / "skipped.jsonl").read_text().splitlines()]
    assert skipped and {line["row"] for line in skipped} <= {4, 9, 17}
