"""Pairs on a local disk as people keep them, in layouts that the `datasets` library does not read, as columns.

    metadata.jsonl, .json, .csv, .tsv    rows that name both images; any name will do, several files are one table
    original/  edited/                   two folders of equal file names, of these or other usual names (FOLDER_PAIRS)
    <key>.<column>.<ending>              files of one key are a row (webdataset)
    seeds.json  <id>/prompt.json         InstructPix2Pix's own data

Beside two folders, the instructions are in a metadata file with file names, in a text file per image, or in
instructions.txt for all. A split is a folder around a layout (test/original), in its names (testA, train.jsonl), or
inside the two folders (A/test).
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tqdm.auto import tqdm

from instruct_pix2pix.cli import UserError, first_line, warn
from instruct_pix2pix.data.pairing import SPLIT_NAMES, pair_by_name, split_in_name, stem
from instruct_pix2pix.data.sources import COLUMN_NAMES, TASK_COLUMN, Source, find_columns, read_lines, read_wordings
from instruct_pix2pix.images import describe_others, find_images, is_junk, is_url, suffixes

DATA_FILES = (".jsonl", ".json", ".csv", ".tsv")
# JSON that is about a dataset or a model, not rows of one.
NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "config.json", "plan.jsonl", "skipped.jsonl", "edits.jsonl"}
# Folders of originals and of edited images, in small letters.
FOLDER_PAIRS = [
    tuple(pair.split("/"))
    for pair in (
        "original/edited originals/edited original_image/edited_image original_images/edited_images a/b"
        " input/target inputs/targets input/output inputs/outputs input/gt input/groundtruth input/ground_truth"
        " input_image/edited_image source/target sources/targets source/edited src/tgt lq/gt lq/hq lr/hr blur/sharp"
        " blurry/sharp blur/gt low/high low/normal noisy/clean noisy/gt rainy/clean rain/clean rain/norain rain/gt"
        " hazy/clear hazy/clean hazy/gt degraded/clean degraded/gt data/gt before/after photo/cartoon photos/cartoons"
    ).split()
]
CAPTION_FOLDERS = ("captions", "prompts", "instructions", "text", "txt")
FILE_KEYS = ("file_name", "filename", "file", "image_path", "name")


@dataclass
class Table:
    """Columns by name, an image's as absolute paths or addresses, None where a row has none."""

    columns: dict[str, list]
    counts: dict = field(default_factory=dict)  # how many pairs, files without a partner, other files by ending
    left_out: list[dict] = field(default_factory=list)  # {"file", "reason"} of what became no row


@dataclass(frozen=True)
class Place:
    """Where one split of a local dataset lies."""

    folder: Path
    tables: tuple[Path, ...] = ()
    sides: tuple[Path, Path] | None = None  # folders of the originals and of the edited images
    shards: tuple[Path, ...] = ()  # folders of <key>.<column>.<ending> files
    seeds: str = ""  # the split of seeds.json


# ---- what is where


def find_places(path: Path, source: Source) -> dict[str, Place]:
    """The splits of a local dataset and where they lie; none where the `datasets` library has to read `path`.

    What lies in `path` itself, and nothing says otherwise, is the split train. Raises UserError for two folders of
    which one is missing, or for more than two that could be a pair.
    """
    if path.is_file():
        return {"train": Place(path.parent, (path,))} if path.suffix.lower() in DATA_FILES else {}
    if has_tables_of_the_library(path):
        return {}
    if (path / "seeds.json").is_file():
        return {split: Place(path, seeds=split) for split in ("train", "validation", "test")}
    places = _places_in(path, source)
    used = {side for place in places.values() for side in place.sides or ()}
    for child in _folders(path):
        if child not in used and not any(child in side.parents for side in used):
            for split, place in _places_in(child, source).items():
                places.setdefault(child.name if split == "train" else split, place)
    return places


def has_tables_of_the_library(path: Path) -> bool:
    """Whether a folder was saved by `datasets`, or holds parquet, up to one folder down, and no metadata file."""
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return True
    parquet = any(path.glob("*.parquet")) or any(path.glob("*/*.parquet"))
    return parquet and not any((path / f"metadata{ending}").is_file() for ending in DATA_FILES)


def _places_in(path: Path, source: Source) -> dict[str, Place]:
    """The splits that lie in a folder itself. A table that names both images goes before folders that look like pairs,
    since such a table's images lie in some folder."""
    with os.scandir(path) as entries:  # one look at a folder of a million images
        files = sorted(entry.name for entry in entries if entry.is_file() and not is_junk(entry.name))
    data = [path / name for name in files if name.lower().endswith(DATA_FILES) and name.lower() not in NOT_ROWS]
    metadata = [file for file in data if file.stem.lower() == "metadata"]
    rows = {file: _first_row(file) for file in metadata or data}
    pairs = [file for file, row in rows.items() if row and _name_both_images([row], source)]
    sides = {} if pairs else _sides(path, source, metadata)
    if sides:
        texts = metadata or [file for file, row in rows.items() if row and all(_text_keys(row, source))]
        return {split: Place(path, _of_split(texts, split, len(sides) > 1), sides[split]) for split in sides}
    if not metadata and any(_is_shard_image(name, source) for name in files[:100]):
        return {"train": Place(path, shards=(path,))}
    tables = pairs or list(rows)
    splits = dict.fromkeys(split_in_name(file.stem) or "train" for file in tables)
    return {split: Place(path, _of_split(tables, split, True)) for split in splits}


def _first_row(path: Path) -> dict | None:
    """A first look at a data file: a row, or None where there is none, which reading it will say."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = _rows(file, path)
            row = dict.fromkeys(rows.fieldnames) if isinstance(rows, csv.DictReader) else next(iter(rows))
    except (OSError, ValueError, TypeError, StopIteration, csv.Error, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _sides(path: Path, source: Source, metadata: list[Path]) -> dict[str, tuple[Path, Path]]:
    """Split -> the folders of the originals and of the edited images."""
    by_split: dict[str, dict[str, Path]] = defaultdict(dict)
    known = {side for pair in FOLDER_PAIRS for side in pair}
    prefix = re.compile(rf"({'|'.join(sorted(SPLIT_NAMES, key=len, reverse=True))})[_-]?(.+)")
    for child in _folders(path):
        name = child.name.lower()
        match = prefix.fullmatch(name)
        if match and match[2] in known:
            by_split[SPLIT_NAMES[match[1]]][match[2]] = child
        elif name in known:
            by_split[""][name] = child
    found = {}
    for split, folders in by_split.items():
        pairs = [pair for pair in FOLDER_PAIRS if set(pair) <= folders.keys()]
        if len(pairs) > 1:
            shown = ", ".join(f"{folders[x].name}+{folders[y].name}" for x, y in pairs)
            raise UserError(f"{source} could pair {shown}; name the two folders with --original_dir and --edited_dir")
        if pairs:
            found |= split_sides(folders[pairs[0][0]], folders[pairs[0][1]], split or "train")
        for one, other in (("original", "edited"), ("edited", "original")):
            if one in folders and other not in folders and not pairs and not metadata:
                raise UserError(f"{source} has no folder {other}/ beside the other; pairs need original/ and edited/")
    return found


def split_sides(original: Path, edited: Path, split: str = "train") -> dict[str, tuple[Path, Path]]:
    """The two folders as one split, or, where both hold nothing but folders of splits, each split's."""
    inside = [{SPLIT_NAMES.get(name.lower()): name for name in _names(side)} for side in (original, edited)]
    if inside[0] and None not in inside[0] and inside[0].keys() == inside[1].keys():
        return {name: (original / inside[0][name], edited / inside[1][name]) for name in inside[0]}
    return {split: (original, edited)}


def inner_folder(path: Path) -> Path:
    """The folder itself, or the one inside where it holds nothing else, as archives often do."""
    while len(names := _names(path)) == 1 and (path / names[0]).is_dir() and names[0].lower() not in SPLIT_NAMES:
        path = path / names[0]
    return path


def _names(path: Path) -> list[str]:
    return sorted(name for name in os.listdir(path) if not is_junk(name))


def _folders(path: Path) -> list[Path]:
    with os.scandir(path) as entries:
        return sorted(Path(entry.path) for entry in entries if entry.is_dir() and not is_junk(entry.name))


def _of_split(files: list[Path], split: str, several: bool) -> tuple[Path, ...]:
    """The files of a split: those that its name says, or that name none and are the split train."""
    named = [file for file in files if (split_in_name(file.stem) or "train") == split]
    return tuple(named if several else files)


# ---- rows that name their files


def read_place(place: Place, source: Source, folders: list[Path]) -> Table:
    """The columns of a split. Paths in its tables are relative to the tables' folder, or to one of `folders`, where
    archives beside them were unpacked. Raises UserError."""
    if place.seeds:
        return _read_seeds(place.folder, place.seeds, source)
    if place.shards:
        return _table(_read_shards(place.shards, source), source, [place.folder])
    records = [record for file in place.tables for record in _read_records(file, source)]
    if place.sides is not None and not _name_both_images(records, source):
        return _read_sides(place, records, source)
    if not records:
        raise UserError(f"{source} is empty; {place.tables[0].name} needs at least one row")
    return _table(records, source, [place.folder, *folders])


def _read_records(path: Path, source: Source) -> list[dict]:
    """The rows of a data file. Raises UserError for a file that cannot be read as such."""
    what = f"{source}: {path.name}"
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            records = list(_rows(file, path))
    except (ValueError, csv.Error, RecursionError) as error:
        raise UserError(f"{what} cannot be read: {first_line(error)}") from error
    except OSError as error:
        raise UserError(f"{what} cannot be read: {error.strerror}") from error
    if not all(isinstance(record, dict) for record in records):
        raise UserError(f"{what} must hold JSON objects, a row each: one a line in .jsonl, a list of them in .json")
    if any(None in record for record in records):
        line = next(number for number, record in enumerate(records, start=1) if None in record)
        raise UserError(f"{source}: row {line} of {path.name} has more values than there are columns; quote its commas")
    return records


def _rows(file: IO[str], path: Path) -> Iterable:
    """What should be the rows of an open data file; of .csv and .tsv a csv.DictReader."""
    ending = path.suffix.lower()
    if ending == ".jsonl":
        return (json.loads(line) for line in file if line.strip())
    if ending == ".json":
        return _listed(json.load(file))
    csv.field_size_limit(2**24)  # a long instruction is no mistake; a file without line ends is
    header = re.sub(r'"[^"]*"', "", file.readline())
    file.seek(0)
    return csv.DictReader(file, delimiter="\t" if ending == ".tsv" else max(",;\t", key=header.count))


def _listed(content) -> list:
    """Rows of a JSON document: a list of objects, alone or under one name; columns; or texts by file name. A None
    stands for what is no row."""
    if not isinstance(content, dict):
        return content if isinstance(content, list) else [None]
    values = list(content.values())
    if values and all(isinstance(value, str) for value in values):
        return [{"file_name": name, "prompt": text} for name, text in content.items()]
    lists = [value for value in values if isinstance(value, list)]
    if values and len(lists) == len(values) > 1 and len({len(value) for value in lists}) == 1:
        return [dict(zip(content, row, strict=True)) for row in zip(*lists, strict=True)]
    return lists[0] if len(lists) == 1 else [None]


def _named(records: list[dict], source: Source) -> dict[str, str]:
    """Column -> key of the records. <column>_file_name is the column, and the image folder's file_name is image; as
    they stand where a flag names them."""
    keys = list(dict.fromkeys(key for record in records for key in record))
    given = {getattr(source, f"{role}_column") for role in COLUMN_NAMES}
    columns: dict[str, str] = {}
    for key in keys:
        plain = key if key in given else "image" if key == "file_name" else key.removesuffix("_file_name")
        if plain in columns:
            raise UserError(f"{source} has both {columns[plain]} and {key} in its metadata; keep one of them")
        columns[plain] = key
    return columns


def _name_both_images(records: list[dict], source: Source) -> bool:
    columns = _named(records, source)
    given = (source.original_image_column, source.edited_image_column)
    usual = (COLUMN_NAMES["original_image"], COLUMN_NAMES["edited_image"])
    return all(
        column in columns if column else any(name in columns for name in names)
        for column, names in zip(given, usual, strict=True)
    )


def _table(records: list[dict], source: Source, folders: list[Path]) -> Table:
    """The columns that training needs of rows that name both images."""
    keys = _named(records, source)
    roles = find_columns(list(keys), source)
    columns = {}
    for role in ("original_image", "edited_image"):
        columns[roles[role]] = [_image(record.get(keys[roles[role]]), folders) for record in records]
    if "edit_prompt" in roles:
        columns[roles["edit_prompt"]] = _prompts([record.get(keys[roles["edit_prompt"]]) for record in records])
    if TASK_COLUMN in keys and TASK_COLUMN not in columns:
        tasks = [record.get(keys[TASK_COLUMN]) for record in records]
        columns[TASK_COLUMN] = [task if isinstance(task, str) else None for task in tasks]
    return Table(columns)


def _image(cell, folders: list[Path]) -> str | None:
    """The path or address in a cell, which may be a list of one, or an object with a path."""
    if isinstance(cell, list) and len(cell) == 1:
        cell = cell[0]
    if isinstance(cell, dict):
        cell = cell.get("path") or cell.get("file_name")
    if not isinstance(cell, str) or not cell.strip() or "\0" in cell:
        return None
    return cell if is_url(cell) else locate(cell, folders)


def locate(name: str, folders: list[Path]) -> str:
    """The file that a path means: absolute, or in the first of `folders` that has it, also with Windows' separators;
    at last in the folder one works in. Where there is no such file, what it would be called in the first."""
    name = os.path.expanduser(name)
    forms = [name, name.replace("\\", "/")] if "\\" in name else [name]
    candidates = [os.path.join(folder, form) for form in forms for folder in folders] + forms[-1:]
    return next(filter(os.path.exists, candidates), os.path.join(folders[0], forms[-1]))


def _prompts(values: list) -> list:
    """Instructions as one type: strings, or lists of strings where some row has several. What is neither is None."""

    def tidy(value):
        if isinstance(value, list):
            return value if value and all(isinstance(text, str) for text in value) else None
        return value if isinstance(value, str) else None

    values = [tidy(value) for value in values]
    if any(isinstance(value, list) for value in values):
        return [[value] if isinstance(value, str) else value for value in values]
    return values


# ---- two folders


def _read_sides(place: Place, records: list[dict], source: Source) -> Table:
    """Pairs of equal file names. Files without a partner, and pairs without an instruction, are left out and counted;
    where they are more than the pairs, the two folders do not belong together."""
    sides = list(place.sides)
    for number, side in enumerate(sides):  # A.zip often holds A/
        while [name.lower() for name in _names(side)] == [side.name.lower()]:
            side = sides[number] = side / _names(side)[0]
    names, others = zip(*(find_images(side) for side in sides), strict=True)
    found = pair_by_name(*names, str(source))
    counts = found.counts()
    left_out = []
    for side, other, alone in ((0, 1, found.inputs_alone), (1, 0, found.targets_alone)):
        reason = f"no partner of the same name in {sides[other].name}/"
        left_out += [{"file": f"{sides[side].name}/{name}", "reason": reason} for name in alone]
    if len(left_out) > len(found.pairs):
        first = f"{left_out[0]['file']} has {left_out[0]['reason']}" if left_out else "there is no image in them"
        raise UserError(
            f"{source}: {len(found.pairs)} pairs of equal names and {len(left_out)} images without a partner in"
            f" {sides[0].name}/ and {sides[1].name}/; {first}"
        )
    images = {side: [str(sides[side] / pair[side]) for pair in found.pairs] for side in (0, 1)}
    columns = {"original_image": images[0], "edited_image": images[1]}
    others = others[0] + others[1]
    if source.instruction is None:
        captions = _captions(place, sides, found.pairs, others, source)
        if place.tables:
            table = place.tables[0].name
            prompts, unused = _match(found.pairs, sides, records, source, table)
            counts[f"rows of {table} without a pair"] = unused
        elif captions:
            prompts, others = captions, others - Counter({".txt": others[".txt"]})
        else:
            prompts = [_instructions_for_all(place, source)] * len(found.pairs)
        # A flag that names another column is wrong where there is no table.
        columns[source.edit_prompt_column if place.tables and source.edit_prompt_column else "edit_prompt"] = prompts
        counts["pairs without an instruction"] = sum(prompt is None for prompt in prompts)
    if others:
        warn(f"{source}: left out what is no image: {describe_others(others)}")
    counts["other files"] = dict(sorted(others.items()))
    return Table(columns, counts, left_out)


def _instructions_for_all(place: Place, source: Source) -> list[str]:
    """The lines of instructions.txt, which may also lie above the split's folder."""
    for folder in (place.folder, place.folder.parent):
        if (folder / "instructions.txt").is_file():
            return read_wordings(folder / "instructions.txt", str(source))
    remedy = "add instructions.txt (wordings for all pairs), metadata.jsonl, or --instruction TEXT"
    raise UserError(f"{source} has no instructions; {remedy}")


def _captions(place: Place, sides: list[Path], pairs, others: Counter[str], source: Source) -> list | None:
    """The lines of the text file that each pair has beside one of its images, or in a folder beside the two, None for
    a pair without; None where no pair has one."""
    places = {folder: 0 for name in CAPTION_FOLDERS if (folder := place.folder / name).is_dir()}
    if others[".txt"]:
        places |= {sides[0]: 0, sides[1]: 1}
    found = {}
    for folder, side in places.items():
        captions = [_caption(folder / f"{stem(pair[side])}.txt", source) for pair in pairs]
        if any(captions):
            found[folder.name] = captions
    if len(found) > 1:
        first, second = sorted(found)[:2]
        raise UserError(
            f"{source}: {first}/ and {second}/ both have a text file per image; which are the instructions? Keep one"
        )
    return next(iter(found.values()), None)


def _caption(path: Path, source: Source) -> list[str] | None:
    return read_lines(path, str(source)) or None if path.exists() else None


def _match(pairs: list[tuple[str, str]], sides, records: list[dict], source: Source, table: str) -> tuple[list, int]:
    """The instructions that rows with a file name give each pair, where several rows for one pair are several wordings;
    and how many rows name none of them."""
    text, file = _text_keys(next(iter(records), {}), source)
    wanted = source.edit_prompt_column or "edit_prompt"
    if text is None or file is None or not all(isinstance(record.get(file), str) for record in records):
        raise UserError(f"{source}: {table} needs file_name and {wanted} in every row, or both images' columns")
    places: dict[str, set[int]] = defaultdict(set)
    for number, pair in enumerate(pairs):
        for side, name in enumerate(pair):
            for form in (name, f"{sides[side].name}/{name}", stem(name), f"{sides[side].name}/{stem(name)}"):
                places[unicodedata.normalize("NFC", form)].add(number)
    prompts: list[list[str] | None] = [None] * len(pairs)
    unused = 0
    for record in records:
        name = unicodedata.normalize("NFC", record[file].replace("\\", "/").removeprefix("./"))
        numbers = places.get(name) or places.get(stem(name)) or set()
        if len(numbers) > 1:
            shown = " and ".join(pairs[number][0] for number in sorted(numbers)[:2])
            raise UserError(f"{source}: {table}: {record[file]} could be {shown}; write the whole file name")
        wordings = record.get(text) if isinstance(record.get(text), list) else [record.get(text)]
        unused += not numbers
        for number in numbers:
            prompts[number] = [*(prompts[number] or []), *(word for word in wordings if isinstance(word, str))] or None
    return prompts, unused


def _text_keys(row: dict, source: Source) -> tuple[str | None, str | None]:
    """The keys of the instruction and of the file name in rows that name one image each."""
    usual = [source.edit_prompt_column] if source.edit_prompt_column else COLUMN_NAMES["edit_prompt"]
    files = [*FILE_KEYS, *COLUMN_NAMES["original_image"], *COLUMN_NAMES["edited_image"]]
    text, file = (next((key for key in keys if key in row), None) for keys in (usual, files))
    return text, file


# ---- other people's layouts


def _read_shards(folders: tuple[Path, ...], source: Source) -> list[dict]:
    """Rows of webdataset files: <key>.<column>.<ending>; a .json file holds further columns, a .txt one a text."""
    rows: dict[str, dict] = defaultdict(dict)
    for folder in folders:
        for file in sorted(path for path in folder.rglob("*") if path.is_file() and not is_junk(path.name)):
            row = rows[str(file.parent / file.name.split(".")[0])]
            column = _shard_column(file.name)
            if file.suffix.lower() == ".json":
                row |= _read_object(file, source)
            elif file.suffix.lower() in suffixes():
                row[column] = str(file)
            elif file.suffix.lower() in (".txt", ".caption"):
                row[column] = " ".join(_caption(file, source) or []) or None
    return [row for row in rows.values() if row]


def _read_object(file: Path, source: Source) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{source}: {file.name} cannot be read: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{source}: {file.name} must hold a JSON object")
    return content


def _is_shard_image(name: str, source: Source) -> bool:
    """Whether a file is an image of a webdataset: <key>.<column of a usual name, or one that a flag names>.<ending>."""
    given = (source.original_image_column, source.edited_image_column)
    known = {*COLUMN_NAMES["original_image"], *COLUMN_NAMES["edited_image"], *given}
    return name.count(".") == 2 and _shard_column(name) in known and os.path.splitext(name)[1].lower() in suffixes()


def _shard_column(name: str) -> str:
    """The column in <key>.<column>.<ending>; of <key>.<ending>, text for texts and image for the rest."""
    parts = name.split(".")
    return parts[1] if len(parts) > 2 else "text" if parts[-1].lower() in ("txt", "caption") else "image"


def _read_seeds(path: Path, split: str, source: Source) -> Table:
    """InstructPix2Pix's generated data: seeds.json lists [id, [seed, ...]], and <id>/ holds prompt.json and each seed's
    <seed>_0.jpg and <seed>_1.jpg. A row for every seed, where the original draws one anew each epoch; its splits are
    the first 90%, the next 5% and the last 5% of the ids (EditDataset of timothybrooks/instruct-pix2pix)."""
    try:
        ids = json.loads((path / "seeds.json").read_text(encoding="utf-8"))
        ids = [(str(name), [str(seed) for seed in seeds]) for name, seeds in ids]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{source}: seeds.json is no list of [id, [seed, ...]]: {first_line(error)}") from None
    low, high = {"train": (0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1)}[split]
    ids = ids[math.floor(low * len(ids)) : math.floor(high * len(ids))]
    columns: dict[str, list] = {"original_image": [], "edit_prompt": [], "edited_image": []}
    left_out = []
    for name, seeds in tqdm(ids, desc="Reading prompts", unit="id", leave=False, delay=2):
        try:
            text = json.loads((path / name / "prompt.json").read_text(encoding="utf-8"))["edit"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            left_out.append({"file": f"{name}/prompt.json", "reason": f"cannot be read ({first_line(error)})"})
            continue
        for seed in seeds:
            columns["original_image"].append(str(path / name / f"{seed}_0.jpg"))
            columns["edit_prompt"].append(text if isinstance(text, str) else None)
            columns["edited_image"].append(str(path / name / f"{seed}_1.jpg"))
    return Table(columns, {"ids": len(ids), "ids without a prompt": len(left_out)}, left_out)


def places_of_two_folders(source: Source) -> dict[str, Place]:
    """The splits of --original_dir and --edited_dir."""
    sides = [Path(name).expanduser() for name in (source.name, source.edited_dir)]
    above = sides[0].absolute().parent
    tables = tuple(file for ending in DATA_FILES if (file := above / f"metadata{ending}").is_file())
    return {split: Place(above, tables, pair) for split, pair in split_sides(*sides).items()}
