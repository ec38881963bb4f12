"""The rows of a source: from a local layout of ours, or whatever the `datasets` library reads, local or on the Hub."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import datasets
from datasets.packaged_modules.parquet.parquet import Parquet
from tqdm.auto import tqdm

from instruct_pix2pix.cli import UserError, first_line
from instruct_pix2pix.data.archives import is_archive, unpack
from instruct_pix2pix.data.layouts import (
    Place,
    find_places,
    has_tables_of_the_library,
    inner_folder,
    locate,
    places_of_two_folders,
    read_place,
)
from instruct_pix2pix.data.pairing import split_in_name
from instruct_pix2pix.data.sources import TASK_COLUMN, Source, choose_split, find_columns, wordings_of
from instruct_pix2pix.data.streaming import StreamedTable, shard_patterns
from instruct_pix2pix.files import state_of_files, write_bytes
from instruct_pix2pix.images import BadImage, fetch, image_size, is_url, suffixes

DOWNLOADS_AT_A_TIME = 8
T = TypeVar("T", datasets.Dataset, StreamedTable)


@dataclass
class Rows:
    """`table` holds the columns named, images undecoded, and a `task` if there is one. `columns` names the column of
    each role (the keys of COLUMN_NAMES); without edit_prompt, `wordings` are every row's instructions."""

    table: datasets.Dataset | StreamedTable
    columns: dict[str, str]
    wordings: list[str] | None
    files: Files
    counts: dict = field(default_factory=dict)  # of a local layout, see layouts.Table
    left_out: list[dict] = field(default_factory=list)  # {"file", "reason"} of what became no row


@dataclass(frozen=True)
class Files:
    """Where the images that rows name by path or address are found."""

    folder: Path  # that relative paths start from
    cache: Path  # holds what was fetched
    failed: dict[str, str] = field(default_factory=dict)  # addresses that could not be fetched, and why

    def image(self, cell) -> bytes | str:
        """What an undecoded cell holds, for images.read_image: an encoded file's bytes or its path.

        A cell is {"bytes", "path"}, where the path may be an address, or a list of one. Raises BadImage for an empty
        one, and for an address that `fetch_all` has not had.
        """
        if isinstance(cell, list):
            if len(cell) != 1:
                raise BadImage(f"a list of {len(cell)} images where one is needed")
            cell = cell[0]
        if not cell or (cell["bytes"] is None and not cell["path"]):
            raise BadImage("no image")
        if cell["bytes"] is not None:
            return cell["bytes"]
        path = cell["path"]
        if "\0" in path:
            raise BadImage("not a path")
        if is_url(path):
            if not self._kept(path).is_file():
                raise BadImage(f"{path} {self.failed.get(path, 'was not fetched')}")
            return str(self._kept(path))
        return path if os.path.isabs(path) else locate(path, [self.folder])

    def fetch_all(self, cells: Iterable, show_progress: bool) -> None:
        """Fetch what the addresses among `cells` lead to and keep it, each once for this and later runs."""
        addresses = {}
        for cell in cells:
            cell = cell[0] if isinstance(cell, list) and cell else cell
            path = cell["path"] if cell and cell["bytes"] is None else None
            if path and is_url(path) and not self._kept(path).is_file():
                addresses[path] = None
        bar = tqdm(desc="Fetching images", total=len(addresses), disable=not (addresses and show_progress), leave=False)
        with bar, ThreadPoolExecutor(DOWNLOADS_AT_A_TIME) as pool:
            for address, reason in zip(addresses, pool.map(self._fetch, addresses), strict=True):
                bar.update()
                if reason:
                    self.failed[address] = reason

    def _fetch(self, address: str) -> str:
        """Fetch one address; returns what went wrong, "" for nothing."""
        try:
            content = fetch(address)
            image_size(content)
        except BadImage as error:
            return str(error)
        path = self._kept(address)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
        return ""

    def _kept(self, address: str) -> Path:
        digest = hashlib.sha256(address.encode()).hexdigest()
        return self.cache / "fetched" / digest[:2] / digest


def find_rows(source: Source) -> Rows:
    """The rows of a source. Raises UserError for a source that cannot be read, has no rows, or not the columns."""
    wordings = wordings_of(source)
    table, files, counts, left_out = _load(source)
    if len(table) == 0:
        raise UserError(f"{source} is empty; it needs at least one row")
    if left_out and source.on_bad_row == "error":
        first = f"{left_out[0]['file']} ({left_out[0]['reason']})"
        raise UserError(f"{source}: {len(left_out)} file(s) make no row, the first {first}; --on_bad_row skip goes on")
    columns = find_columns(table.column_names, source)
    kept = list(dict.fromkeys(columns.values()))  # a control run names one column twice
    if isinstance(table.features.get(TASK_COLUMN), datasets.Value) and TASK_COLUMN not in kept:
        kept.append(TASK_COLUMN)
    table = table.select_columns(kept)
    for role in ("original_image", "edited_image"):
        table = _undecoded(table, columns[role], role, source)
    return Rows(table, columns, wordings, files, counts, left_out)


def _load(source: Source) -> tuple[datasets.Dataset | StreamedTable, Files, dict, list[dict]]:
    cache = Path(source.cache_dir or datasets.config.HF_DATASETS_CACHE) / "instruct_pix2pix"
    path, unpacked = Path(source.name).expanduser(), []
    places = places_of_two_folders(source) if source.edited_dir else {}
    if not places and path.exists() and not source.streaming:
        archives = [path] if is_archive(path) else _archives_in(path)
        if archives:
            root = unpack(archives, cache, str(source))
            unpacked = [root, *sorted(child for child in root.iterdir() if child.is_dir())]
        places = {} if is_archive(path) else find_places(path, source)
        if unpacked and not any(place.tables or place.sides for place in places.values()):
            path = inner_folder(unpacked[0])
            places = _merged_shards(unpacked[1:], source) or find_places(path, source)
    files = Files(path if path.is_dir() else path.parent, cache)
    if places:
        read = read_place(places[choose_split(places, source)], source, unpacked)
        try:
            table = datasets.Dataset.from_dict(read.columns)
        except Exception as error:  # pyarrow's errors, for text that is no Unicode say
            raise UserError(f"{source} cannot be made into a table: {first_line(error)}") from error
        return table, files, read.counts, read.left_out
    return _load_by_library(path, source, cache), files, {}, []


def _archives_in(path: Path) -> list[Path]:
    """The archives in a folder, unless it is a dataset without them."""
    if not path.is_dir() or has_tables_of_the_library(path):
        return []
    return sorted(child for child in path.iterdir() if not child.name.startswith(".") and is_archive(child))


def _merged_shards(folders: list[Path], source: Source) -> dict[str, Place]:
    """Webdataset archives of one split are one table."""
    merged = {}
    for folder in folders:
        places = find_places(inner_folder(folder), source)
        if set(places) != {"train"} or not places["train"].shards:
            return {}
        split = split_in_name(folder.name) or "train"
        known = merged.get(split)
        merged[split] = replace(known, shards=known.shards + places["train"].shards) if known else places["train"]
    return merged


def _load_by_library(path: Path, source: Source, cache: Path) -> datasets.Dataset | StreamedTable:
    is_address = "://" in source.name
    if is_address and not source.streaming:
        raise UserError(f"{source} is an address, which only training with --streaming reads; give a local copy")
    if path.is_file() and path.suffix.lower() != ".parquet":
        endings = "a .jsonl, .json, .csv, .tsv, .parquet, .zip or .tar file"
        raise UserError(f"{source} is no dataset; give a folder, {endings}, or a Hub id")
    if not path.exists() and not is_address and (source.name.startswith((".", "/", "~")) or source.name.count("/") > 1):
        raise UserError(f"{source} is not a folder or a file; give one, or a Hub id")
    try:
        if not source.streaming and any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(str(path))
        else:
            name, options = source.name, {"cache_dir": source.cache_dir, "token": source.token}
            if path.exists():
                files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
                options["cache_dir"] = _cache_of(files, source.cache_dir)
                name, options = str(path), options | _data_files(path, files)
            if is_address:
                options["data_files"] = shard_patterns(source)
            if "data_files" in options:
                name = "parquet"
            load = datasets.load_dataset_builder if source.streaming else datasets.load_dataset
            loaded = load(name, source.config_name, **options)
    except UserError:
        raise
    except Exception as error:  # datasets raises a dozen kinds for what is wrong with a source
        if "corresponds to no data" in str(error):
            raise UserError(f"{source} is empty; it needs at least one row") from error
        raise UserError(f"{source} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if source.streaming:  # so far only where its files are
        files = loaded.config.data_files
        if not isinstance(loaded, Parquet):
            raise UserError(f"--streaming: {source.name} is not parquet; save it as such, or leave the flag out")
        return StreamedTable(files[choose_split(files, source)], loaded.info.features, source, cache)
    if isinstance(loaded, datasets.Dataset):  # saved without its split's name, or with it
        loaded = {"train": loaded, str(loaded.split or "train"): loaded}
    return loaded[choose_split(loaded, source)]


def _data_files(path: Path, files: list[Path]) -> dict:
    """The parquet files by split where `datasets` would not take them: one alone, or some among images they name."""
    if path.is_file():
        return {"data_files": {"train": [str(path)]}}
    parquet = [file for file in files if file.suffix.lower() == ".parquet"]
    images = sum(file.suffix.lower() in suffixes() for file in files)
    splits: dict[str, list[str]] = defaultdict(list)
    for file in parquet if images > len(parquet) else ():
        splits[split_in_name(file.stem) or "train"].append(str(file))
    return {"data_files": splits} if splits else {}


def _cache_of(files: list[Path], cache_dir: str | None) -> str:
    """Where `datasets` keeps its copy of local files: a place for these with what they hold now.

    Where a card lists the data files, `datasets` 5 tells folders apart by their name and card alone: for another
    folder, or the same one built anew, it would give the old rows.
    """
    return os.path.join(cache_dir or datasets.config.HF_DATASETS_CACHE, f"folder-{state_of_files(files)[:16]}")


def _undecoded(table: T, column: str, role: str, source: Source) -> T:
    """The table with an image column as it is encoded, so that decoding and its errors are ours."""
    feature = table.features[column]
    plain = _encoded_feature(feature)
    if plain is None:
        raise UserError(f"--{role}_column: {column} holds {feature}, not images ({source})")
    return table if plain == feature else table.cast_column(column, plain)


def _encoded_feature(feature):
    """The type in which cells of an image type are left as they are; None for what holds no images."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.Value):
        encoded = feature.dtype in ("string", "large_string", "binary", "large_binary")
        return datasets.Image(decode=False) if encoded else None
    if isinstance(feature, dict):
        return feature if {"bytes", "path"} <= set(feature) else None
    if isinstance(feature, datasets.List | datasets.LargeList):
        inner = _encoded_feature(feature.feature)
        return None if inner is None else datasets.List(inner)
    return None
