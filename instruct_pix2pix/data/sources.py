"""Where triples come from: rows and columns of a local folder, a metadata file or a dataset on the Hub.

The command line reads this module for its flags, so what is heavy is imported where it is used.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from instruct_pix2pix.cli import UserError, first_line
from instruct_pix2pix.images import add_pixel_limit, find_images

if TYPE_CHECKING:
    import datasets

# Names under which published datasets keep the three columns.
COLUMN_NAMES = {
    "original_image": ("input_image", "original_image", "source_image", "source_img", "image", "input"),
    "edit_prompt": ("edit_prompt", "instruction", "prompt", "text", "caption"),
    "edited_image": ("edited_image", "cartoonized_image", "ground_truth_image", "target_image", "target_img", "output"),
}
TASK_COLUMN = "task"  # where rows of several tasks are mixed, the name of each row's
METADATA_FILES = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True)
class Source:
    """One split of a dataset. `str()` is how messages call it."""

    name: str  # a folder, a .jsonl or .csv file, or a Hub id
    flag: str  # the flag that gave the name, such as --dataset_name
    config_name: str | None = None
    split: str = "train"
    original_image_column: str | None = None  # found by name when left out, like the other two
    edit_prompt_column: str | None = None
    edited_image_column: str | None = None
    cache_dir: str | None = None  # of the `datasets` library; its own place when left out
    token: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"{self.flag}: {self.name}"


def add_source_flags(group) -> None:
    """Add to a parser, or a group of flags, what `source_of` reads besides the name of the dataset."""
    add = group.add_argument
    add("--dataset_config_name", help="Configuration of the dataset, where it has several.")
    add("--original_image_column", help="Column of the source image; found by name when left out.")
    add("--edit_prompt_column", help="Column of the instruction, a string or a list of wordings; found by name.")
    add("--edited_image_column", help="Column of the edited image; found by name when left out.")
    add_pixel_limit(add)


def source_of(args, *flags: str, **options) -> Source:
    """The Source that parsed flags name: by the first of `flags` that was given, one of which must have been.

    `options` are the fields of Source that `add_source_flags` has no flag for.
    """
    flag = next(flag for flag in flags if getattr(args, flag.removeprefix("--")))
    columns = {f"{role}_column": getattr(args, f"{role}_column") for role in COLUMN_NAMES}
    name = getattr(args, flag.removeprefix("--"))
    return Source(name, flag, config_name=args.dataset_config_name, **columns, **options)


def find_rows(source: Source) -> tuple[datasets.Dataset, dict[str, str]]:
    """The rows of a source, and the column of each role (the keys of COLUMN_NAMES).

    Rows have these columns, images undecoded, and a task's name where there is one. Raises UserError.
    """
    import datasets

    rows = _load(source)
    if len(rows) == 0:
        raise UserError(f"{source} is empty; it needs at least one row")
    columns = find_columns(rows.column_names, source)
    kept = list(dict.fromkeys(columns.values()))  # a control run names one column twice
    if isinstance(rows.features.get(TASK_COLUMN), datasets.Value) and TASK_COLUMN not in kept:
        kept.append(TASK_COLUMN)
    rows = rows.select_columns(kept)
    for role in ("original_image", "edited_image"):
        rows = _as_undecoded_images(rows, columns[role], role, source)
    return rows, columns


def _load(source: Source) -> datasets.Dataset:
    import datasets

    path = Path(source.name).expanduser()
    if place := _own_layout(path, source):
        folders = [place / side for side in ("original", "edited")]
        paired = any(folder.is_dir() for folder in folders)
        columns = _read_paired_folders(place, source) if paired else _read_rows(_metadata_file(place), source)
        try:
            return datasets.Dataset.from_dict(columns)
        except Exception as error:  # pyarrow's errors for a column of mixed types
            raise UserError(f"{source} has a column of mixed types: {first_line(error)}") from error
    if not path.is_dir() and (path.exists() or source.name.startswith((".", "/", "~")) or source.name.count("/") > 1):
        raise UserError(f"{source} is not a folder; give a folder, a .jsonl or .csv file, or a Hub id")
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        else:
            name, cache_dir = source.name, source.cache_dir
            if path.is_dir():
                name, cache_dir = str(path), _folder_cache(path, source.cache_dir)
            loaded = datasets.load_dataset(name, source.config_name, cache_dir=cache_dir, token=source.token)
    except Exception as error:  # datasets raises a dozen kinds for what is wrong with a source
        if "corresponds to no data" in str(error):
            raise UserError(f"{source} is empty; it needs at least one row") from error
        raise UserError(f"{source} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if isinstance(loaded, datasets.Dataset):  # saved without its split's name, or with it
        loaded = {"train": loaded, str(loaded.split or "train"): loaded}
    if source.split not in loaded:
        raise _no_such_split(source, loaded)
    return loaded[source.split]


def _no_such_split(source: Source, splits) -> UserError:
    return UserError(f"{source} has no split named {source.split}, only {', '.join(splits)}")


def _folder_cache(folder: Path, cache_dir: str | None) -> str:
    """Where `datasets` keeps its copy of a local folder: a place for this folder with these files.

    Where a card lists the data files, `datasets` 5 tells folders apart by their name and card alone: for another
    folder, or the same one built anew, it would give the old rows.
    """
    import datasets

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    state = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest = hashlib.sha256(repr(state).encode()).hexdigest()[:16]
    return os.path.join(cache_dir or datasets.config.HF_DATASETS_CACHE, f"folder-{digest}")


# ---- layouts that `datasets` does not read


def _own_layout(path: Path, source: Source) -> Path | None:
    """Where the split's metadata file or its original/ and edited/ are; None where `path` holds neither.

    The split is the folder of its name inside `path`. What lies in `path` itself has no name and is the split train.
    """

    def ours(folder: Path) -> bool:
        return bool(_metadata_file(folder)) or (folder / "original").is_dir() or (folder / "edited").is_dir()

    if ours(path / source.split):
        return path / source.split
    if source.split == "train":
        return path if ours(path) else None
    splits = {child.name for child in path.glob("*") if ours(child)} | ({"train"} if ours(path) else set())
    if "train" in splits:
        raise _no_such_split(source, sorted(splits))
    return None


def _metadata_file(path: Path) -> Path | None:
    """`path` itself if it is a metadata file of any name, or the metadata file in the folder `path`."""
    if path.suffix in (".jsonl", ".csv") and path.is_file():
        return path
    return next((path / name for name in METADATA_FILES if (path / name).is_file()), None)


def _read_metadata(path: Path, source: Source) -> list[dict]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                return list(csv.DictReader(file))
            return [json.loads(line) for line in file if line.strip()]
    except (ValueError, csv.Error) as error:
        raise UserError(f"{source}: {path.name} cannot be read: {error}") from error


def _read_rows(path: Path, source: Source) -> dict[str, list]:
    """The columns of a metadata file, a row per line. Image columns, of a usual name or one that a flag names, hold
    paths relative to the file; they may be called <column>_file_name, and the image folder's plain file_name is the
    column image."""
    records = _read_metadata(path, source)
    if not records:
        raise UserError(f"{source} is empty; {path.name} needs at least one row")
    if not all(isinstance(record, dict) for record in records):
        raise UserError(f"{source}: every line of {path.name} must be a JSON object")
    if any(None in record for record in records):
        line = next(number for number, record in enumerate(records, start=1) if None in record)
        raise UserError(f"{source}: row {line} of {path.name} has more values than there are columns; quote its commas")
    keys = list(dict.fromkeys(key for record in records for key in record))
    if {"file_name", "image"} <= set(keys):
        raise UserError(f"{source}: {path.name} has both file_name and image; keep one of them")
    columns = {}
    usual = COLUMN_NAMES["original_image"] + COLUMN_NAMES["edited_image"]
    of_images = {*usual, source.original_image_column, source.edited_image_column}
    for key in keys:
        values = [record.get(key) for record in records]
        name = "image" if key == "file_name" else key.removesuffix("_file_name")
        if name in of_images or name != key:
            values = [os.path.join(path.parent, value) if isinstance(value, str) else value for value in values]
        columns[name] = values
    return columns


def _read_paired_folders(folder: Path, source: Source) -> dict[str, list]:
    """The columns of original/ and edited/ with equal file names (endings may differ), and instructions.txt or a
    metadata file.

    instructions.txt lists wordings that fit every pair, one a line: each epoch draws one per pair. A metadata file
    has file_name and an instruction for each pair.
    """
    sides = {}
    for side in ("original", "edited"):
        if not (folder / side).is_dir():
            raise UserError(f"{source} has no folder {side}/ beside the other; pairs need original/ and edited/")
        files = [Path(name) for name in find_images(folder / side)[0]]
        sides[side] = {file.with_suffix("").as_posix(): str(folder / side / file) for file in files}
    alone = sorted(sides["original"].keys() ^ sides["edited"].keys())
    if alone:
        side = "original" if alone[0] in sides["original"] else "edited"
        partnerless = f"{len(alone)} image(s) without a partner of the same name, the first {side}/{alone[0]}"
        raise UserError(f"{source}: {partnerless}")
    names = list(sides["original"])
    metadata, wordings, column = _metadata_file(folder), folder / "instructions.txt", "edit_prompt"
    if metadata:
        records = _read_metadata(metadata, source)
        usual = [source.edit_prompt_column] if source.edit_prompt_column else COLUMN_NAMES["edit_prompt"]
        keys = [key for key in usual if records and key in records[0]]
        if not keys or not all(isinstance(record.get("file_name"), str) for record in records):
            raise UserError(f"{source}: {metadata.name} needs file_name and {usual[0]} in every row")
        by_name = {Path(record["file_name"]).with_suffix("").as_posix(): record.get(keys[0]) for record in records}
        without = [name for name in names if name not in by_name]
        if without:
            raise UserError(f"{source}: {metadata.name} has no row for {without[0]} ({len(without)} missing)")
        prompts, column = [by_name[name] for name in names], source.edit_prompt_column or column
    elif wordings.is_file():
        try:
            text = wordings.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{source}: instructions.txt cannot be read ({error}); save it as UTF-8") from error
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            raise UserError(f"{source}: instructions.txt is empty; write one wording a line")
        prompts = [lines for _ in names]
    else:
        remedy = "add instructions.txt (wordings for all pairs) or metadata.jsonl"
        raise UserError(f"{source} has no instructions; {remedy}")
    return {
        "original_image": [sides["original"][name] for name in names],
        column: prompts,
        "edited_image": [sides["edited"][name] for name in names],
    }


# ---- columns


def find_columns(available: list[str], source: Source) -> dict[str, str]:
    """The column of each role: the one the flag names, or the only known name that is there."""
    columns = {}
    for role, names in COLUMN_NAMES.items():
        given = getattr(source, f"{role}_column")
        if given is not None:
            if given not in available:
                raise UserError(f"--{role}_column: {given} is not a column; there are {', '.join(available)}")
            columns[role] = given
            continue
        found = [name for name in names if name in available]
        if len(found) != 1:
            what = f"several columns could be it ({', '.join(found)})" if found else "no column has a known name"
            raise UserError(f"--{role}_column: {what}; name one of {', '.join(available)} ({source})")
        columns[role] = found[0]
    return columns


def _as_undecoded_images(rows: datasets.Dataset, column: str, role: str, source: Source) -> datasets.Dataset:
    """Cast an image, bytes or path column to undecoded images, so that decoding and its errors are ours."""
    import datasets

    feature, encoded = rows.features[column], ("string", "large_string", "binary", "large_binary")
    if isinstance(feature, datasets.Image) or (isinstance(feature, datasets.Value) and feature.dtype in encoded):
        return rows.cast_column(column, datasets.Image(decode=False))
    raise UserError(f"--{role}_column: {column} holds {feature}, not images ({source})")
