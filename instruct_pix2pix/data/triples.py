"""Any source of (original image, instruction, edited image) triples, to training samples.

`load_triples` finds and checks rows and columns; `TripleDataset` turns a position of the endless sample stream into
pixels, text and the random numbers that belong to this position.
"""

import csv
import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from instruct_pix2pix.cli import RowError, UserError
from instruct_pix2pix.data.geometry import align_original, alignment, crop_pair
from instruct_pix2pix.data.order import SampleOrder, stream
from instruct_pix2pix.images import SUFFIXES as IMAGE_SUFFIXES
from instruct_pix2pix.images import BadImage, image_size, read_image

logger = logging.getLogger(__name__)

# Names under which published datasets keep the three columns.
COLUMN_NAMES = {
    "original_image": ("input_image", "original_image", "source_image", "source_img", "image", "input"),
    "edit_prompt": ("edit_prompt", "instruction", "prompt", "text", "caption"),
    "edited_image": (
        "edited_image",
        "cartoonized_image",
        "ground_truth_image",
        "target_image",
        "target_img",
        "output",
    ),
}
# Rows whose sizes and instructions are looked at before training; a larger dataset is sampled evenly.
ROWS_CHECKED = 10_000
METADATA_FILES = ("metadata.jsonl", "metadata.csv")


@dataclass
class Triples:
    """Checked rows. `rows` is a datasets.Dataset whose image columns are undecoded; `indices` (N,) are the rows in
    use; the three names are its columns; `source` is how messages call it."""

    rows: datasets.Dataset
    indices: np.ndarray
    original_image: str
    edit_prompt: str
    edited_image: str
    source: str

    def __len__(self) -> int:
        return len(self.indices)

    def distinct_instructions(self, most: int = ROWS_CHECKED) -> list[str]:
        """The instructions of at most `most` rows, evenly chosen, each once."""
        chosen = self.indices[np.linspace(0, len(self) - 1, min(len(self), most)).astype(int)]
        column = self.rows.select_columns([self.edit_prompt])
        return list(dict.fromkeys(text for i in chosen for text in instructions_of(column[int(i)], self, int(i))))

    def first_instruction(self) -> str:
        return instructions_of(self.rows[int(self.indices[0])], self, int(self.indices[0]))[0]


def load_triples(args, seed: int, show_progress: bool = True) -> Triples:
    """Find the rows and the columns, and check sizes and instructions. Raises UserError naming flag, row and column."""
    flag = "--dataset_name" if args.dataset_name else "--train_data_dir"
    name = args.dataset_name or args.train_data_dir
    source = f"{flag}: {name}"
    rows = _load_rows(name, source, args)
    if len(rows) == 0:
        raise UserError(f"{source} is empty; it needs at least one row")
    columns = find_columns(rows.column_names, args, source)
    rows = rows.select_columns(list(dict.fromkeys(columns.values())))  # a control run names one column twice
    for role in ("original_image", "edited_image"):
        rows = _as_undecoded_images(rows, columns[role], role, source)

    indices = np.arange(len(rows))
    if args.max_train_samples is not None and args.max_train_samples < len(rows):
        indices = np.sort(stream(seed, "subset").permutation(len(rows))[: args.max_train_samples])
    triples = Triples(rows, indices, **columns, source=source)
    _check_rows(triples, show_progress)
    return triples


# ---- where the rows come from


def _load_rows(name: str, source: str, args) -> datasets.Dataset:
    path = Path(name).expanduser()
    if path.is_file() and path.suffix in (".jsonl", ".csv"):
        return _from_metadata(path, source, args)
    if path.is_dir():
        folder = path / "train" if _metadata_file(path / "train") else path
        if (folder / "original").is_dir() and (folder / "edited").is_dir():
            return _from_paired_folders(folder, source, args)
        if (folder / "original").is_dir() != (folder / "edited").is_dir():
            missing = "edited" if (folder / "original").is_dir() else "original"
            raise UserError(f"{source} has no folder {missing}/ beside the other; pairs need original/ and edited/")
        if _metadata_file(folder):
            return _from_metadata(_metadata_file(folder), source, args)
    elif path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{source} is not a folder; give a folder, a .jsonl or .csv file, or a Hub id")
    try:
        if path.is_dir() and ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file()):
            loaded = datasets.load_from_disk(str(path))
        else:
            cache_dir = _folder_cache(path, args.cache_dir) if path.is_dir() else args.cache_dir
            loaded = datasets.load_dataset(name, args.dataset_config_name, cache_dir=cache_dir, token=args.hub_token)
    except Exception as error:  # datasets raises a dozen kinds for what is wrong with a source
        if "corresponds to no data" in str(error):
            raise UserError(f"{source} is empty; it needs at least one row") from error
        raise UserError(f"{source} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if "train" not in loaded:
        raise UserError(f"{source} has no split named train, only {', '.join(loaded)}")
    return loaded["train"]


def _folder_cache(folder: Path, cache_dir: str | None) -> str:
    """Where `datasets` keeps its copy of a local folder: a place for this folder with these files.

    Where a card lists the data files, `datasets` 5 tells folders apart by their name and card alone: another folder,
    or the same one built anew, would be answered with the old rows.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    state = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest = hashlib.sha256(repr(state).encode()).hexdigest()[:16]
    return os.path.join(cache_dir or datasets.config.HF_DATASETS_CACHE, f"folder-{digest}")


def _metadata_file(folder: Path) -> Path | None:
    found = [folder / file for file in METADATA_FILES if (folder / file).is_file()]
    return found[0] if found else None


def _read_metadata(path: Path, source: str) -> list[dict]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                return list(csv.DictReader(file))
            return [json.loads(line) for line in file if line.strip()]
    except (ValueError, csv.Error) as error:
        raise UserError(f"{source}: {path.name} cannot be read: {error}") from error


def _from_metadata(path: Path, source: str, args) -> datasets.Dataset:
    """A row per line. Image columns, of a usual name or one that a flag names, hold paths relative to the file; they
    may be called <column>_file_name, and the image folder's plain file_name is the column image."""
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
    of_images = {*usual, args.original_image_column, args.edited_image_column}
    for key in keys:
        values = [record.get(key) for record in records]
        name = "image" if key == "file_name" else key.removesuffix("_file_name")
        if name in of_images or name != key:
            values = [os.path.join(path.parent, value) if isinstance(value, str) else value for value in values]
        columns[name] = values
    try:
        return datasets.Dataset.from_dict(columns)
    except Exception as error:  # pyarrow's errors for a column of mixed types
        raise UserError(f"{source}: {path.name} has a column of mixed types: {error}") from error


def _from_paired_folders(folder: Path, source: str, args) -> datasets.Dataset:
    """original/ and edited/ with equal file names (endings may differ), and instructions.txt or a metadata file.

    instructions.txt lists wordings that fit every pair, one a line: each epoch draws one per pair. A metadata file
    has file_name and an instruction for each pair.
    """
    sides = {}
    for side in ("original", "edited"):
        files = sorted(p for p in (folder / side).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        sides[side] = {p.relative_to(folder / side).with_suffix("").as_posix(): str(p) for p in files}
    alone = sorted(sides["original"].keys() ^ sides["edited"].keys())
    if alone:
        side = "original" if alone[0] in sides["original"] else "edited"
        raise UserError(
            f"{source}: {len(alone)} image(s) without a partner of the same name, the first {side}/{alone[0]}"
        )
    names = list(sides["original"])
    metadata, wordings, column = _metadata_file(folder), folder / "instructions.txt", "edit_prompt"
    if metadata:
        records = _read_metadata(metadata, source)
        usual = [args.edit_prompt_column] if args.edit_prompt_column else COLUMN_NAMES["edit_prompt"]
        keys = [key for key in usual if records and key in records[0]]
        if not keys or not all(isinstance(record.get("file_name"), str) for record in records):
            raise UserError(f"{source}: {metadata.name} needs file_name and {usual[0]} in every row")
        by_name = {Path(record["file_name"]).with_suffix("").as_posix(): record.get(keys[0]) for record in records}
        without = [name for name in names if name not in by_name]
        if without:
            raise UserError(f"{source}: {metadata.name} has no row for {without[0]} ({len(without)} missing)")
        prompts, column = [by_name[name] for name in names], args.edit_prompt_column or column
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
        raise UserError(
            f"{source} has no instructions; add instructions.txt (wordings for all pairs) or metadata.jsonl"
        )
    return datasets.Dataset.from_dict(
        {
            "original_image": [sides["original"][name] for name in names],
            column: prompts,
            "edited_image": [sides["edited"][name] for name in names],
        }
    )


# ---- columns and rows


def find_columns(available: list[str], args, source: str) -> dict[str, str]:
    """The column of each role: the one the flag names, or the only known name that is there."""
    columns = {}
    for role, names in COLUMN_NAMES.items():
        given = getattr(args, f"{role}_column")
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


def _as_undecoded_images(rows: datasets.Dataset, column: str, role: str, source: str) -> datasets.Dataset:
    """Cast an image, bytes or path column to undecoded images, so that decoding and its errors are ours."""
    feature = rows.features[column]
    if isinstance(feature, datasets.Value) and feature.dtype in (
        "string",
        "large_string",
        "binary",
        "large_binary",
    ):
        return rows.cast_column(column, datasets.Image(decode=False))
    if isinstance(feature, datasets.Image):
        return rows.cast_column(column, datasets.Image(decode=False))
    raise UserError(f"--{role}_column: {column} holds {feature}, not images ({source})")


def image_source(cell: dict | None) -> bytes | str:
    """What an undecoded cell ({'bytes', 'path'}) holds, for images.read_image. Raises BadImage where it is empty."""
    if not cell or (cell["bytes"] is None and not cell["path"]):
        raise BadImage("no image")
    return cell["bytes"] if cell["bytes"] is not None else cell["path"]


def _check_rows(triples: Triples, show_progress: bool) -> None:
    """Look at headers, sizes and instructions before any weights load; pixels are decoded when they are needed."""
    count = min(len(triples), ROWS_CHECKED)
    chosen = triples.indices[np.linspace(0, len(triples) - 1, count).astype(int)]
    kinds = {"same": 0, "whitebox": 0, "resized": 0}
    for index in tqdm(chosen, desc="Checking pairs", unit="pair", disable=not show_progress, leave=False):
        row = triples.rows[int(index)]
        instructions_of(row, triples, int(index))
        sizes = []
        for column in (triples.original_image, triples.edited_image):
            try:
                sizes.append(image_size(image_source(row[column])))
            except BadImage as error:
                raise _row_error(triples, index, column, f"not a readable image ({error})") from error
        try:
            kinds[alignment(*sizes)] += 1
        except ValueError as error:
            raise _row_error(triples, index, triples.edited_image, str(error)) from error
    if kinds["whitebox"] and show_progress:
        logger.info("%d of %d originals are cut the way their cartoons were", kinds["whitebox"], count)
    if kinds["resized"] and show_progress:
        logger.warning("%d of %d originals are resized to the size of their edited image", kinds["resized"], count)


def instructions_of(row: dict, triples: Triples, index: int) -> list[str]:
    """The wordings of a row: its string, or its list of strings. Raises RowError for anything else."""
    value = row[triples.edit_prompt]
    wordings = value if isinstance(value, list) else [value]
    if not wordings or not all(isinstance(wording, str) for wording in wordings):
        raise _row_error(triples, index, triples.edit_prompt, f"{value!r} is not an instruction; it must be a string")
    return wordings


def _row_error(triples: Triples, index: int, column: str, problem: str) -> RowError:
    return RowError(f"{triples.source}: row {index}, column {column}: {problem}")


# ---- samples


class TripleDataset(torch.utils.data.Dataset):
    """Position of the endless sample stream -> one training sample with its random numbers.

    A sample holds
        original, edited    uint8   (3, R, R)
        instruction         str
        noise               float32 (C, h, w)   the diffusion's epsilon
        posterior_noise     float32 (C, h, w)   samples the VAE's posterior of the edited image
        timestep            int     [0, T)
        dropout             float   [0, 1)      decides the conditioning dropout

    A row that cannot be used comes back as a RowError instead of being raised, so that it crosses from a loader
    process in one piece.
    """

    def __init__(self, triples: Triples, args, latent_shape: tuple[int, int, int], num_timesteps: int):
        self.triples, self.args = triples, args
        self.latent_shape, self.num_timesteps = latent_shape, num_timesteps
        self.order = SampleOrder(len(triples), args.seed)

    def __getitem__(self, position: int) -> dict | RowError:
        args, triples = self.args, self.triples
        epoch, index = self.order.locate(position)
        row_index = int(triples.indices[index])
        try:
            wordings, original, edited = open_pair(triples, row_index)
        except RowError as error:
            return error
        original, edited = crop_pair(
            original,
            edited,
            args.resolution,
            args.image_geometry,
            args.center_crop,
            args.random_flip,
            stream(args.seed, "augmentation", epoch, row_index),
        )
        wording = stream(args.seed, "instruction", epoch, row_index).integers(len(wordings))
        return {
            "original": torch.from_numpy(np.ascontiguousarray(original.transpose(2, 0, 1))),
            "edited": torch.from_numpy(np.ascontiguousarray(edited.transpose(2, 0, 1))),
            "instruction": wordings[wording],
            **diffusion_draws(args.seed, position, self.latent_shape, self.num_timesteps),
        }


def open_pair(triples: Triples, row_index: int) -> tuple[list[str], Image.Image, Image.Image]:
    """Wordings, original and edited image of a row: RGB, the original brought to the edited image's size.

    Raises RowError for a row that cannot be used.
    """
    row = triples.rows[row_index]
    wordings = instructions_of(row, triples, row_index)
    images = {}
    for column in (triples.original_image, triples.edited_image):
        try:
            images[column] = read_image(image_source(row[column]))
        except BadImage as error:
            raise _row_error(triples, row_index, column, f"cannot be decoded ({error})") from error
    edited = images[triples.edited_image]
    try:
        return wordings, align_original(images[triples.original_image], edited.size), edited
    except ValueError as error:
        raise _row_error(triples, row_index, triples.edited_image, str(error)) from error


def diffusion_draws(seed: int, position: int, latent_shape: tuple[int, int, int], num_timesteps: int) -> dict:
    """The random numbers of a position of the stream that are not about the picture: see TripleDataset."""
    rng = stream(seed, "diffusion", position)
    return {
        "timestep": int(rng.integers(num_timesteps)),
        "noise": torch.from_numpy(rng.standard_normal(latent_shape, dtype=np.float32)),
        "posterior_noise": torch.from_numpy(rng.standard_normal(latent_shape, dtype=np.float32)),
        "dropout": float(stream(seed, "dropout", position).random()),
    }


def collate(samples: list[dict | RowError]) -> dict | RowError:
    """Stack samples into a batch; the first RowError among them takes the batch's place."""
    for sample in samples:
        if isinstance(sample, RowError):
            return sample
    tensors = [key for key, value in samples[0].items() if torch.is_tensor(value)]
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in tensors}
    batch["timesteps"] = torch.tensor([sample["timestep"] for sample in samples])
    batch["dropout"] = torch.tensor([sample["dropout"] for sample in samples])
    if "instruction" in samples[0]:
        batch["instructions"] = [sample["instruction"] for sample in samples]
    return batch


def to_unit_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [0, 255] to float32 [-1, 1]."""
    return pixels.float() / 127.5 - 1.0
