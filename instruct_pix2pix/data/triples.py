"""Triples (original image, instruction, edited image), checked, opened and made into training samples.

`load_triples` is the one reader, for training, evaluation and export; `TripleDataset` turns a position of the endless
sample stream into pixels, text and the random numbers that belong to this position.
"""

import contextlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property

import datasets
import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from instruct_pix2pix.cli import RowError, SourceLost, UserError
from instruct_pix2pix.data.geometry import align_original, alignment, crop_pair
from instruct_pix2pix.data.order import MixtureOrder, SampleOrder, draw_subset, stream
from instruct_pix2pix.data.rows import Files, find_rows
from instruct_pix2pix.data.sources import COLUMN_NAMES, TASK_COLUMN, Source
from instruct_pix2pix.data.streaming import GROUPS_MIXED, StreamedTable
from instruct_pix2pix.images import BadImage, image_size, read_image

logger = logging.getLogger(__name__)

# Rows whose sizes and instructions are looked at before training; a larger dataset is sampled evenly.
ROWS_CHECKED = 10_000
ROWS_NAMED = 5  # of those that are found at once and cannot be used


@dataclass
class Triples:
    """Checked rows. `rows` is a table of the columns named, images undecoded, and a `task` if there is one; `indices`
    (N,) are the rows in use, those that cannot be used among them; `source` is how messages call it."""

    rows: datasets.Dataset | StreamedTable
    indices: np.ndarray
    original_image: str
    edited_image: str
    edit_prompt: str | None  # None where `wordings` are every row's
    wordings: list[str] | None
    files: Files
    source: str
    on_bad_row: str  # skip or error
    geometry: str
    counts: dict  # of the files that a local layout found, see layouts.Table
    left_out: list[dict]  # {"file", "reason"} of files that became no row
    bad: dict[int, str] = field(default_factory=dict)  # rows found so far that cannot be used -> why
    first_row: int | None = None  # in a mixture, the number there of this one's first row

    def __post_init__(self):
        self._texts = None if self.edit_prompt is None else self._light([self.edit_prompt])
        feature = self.rows.features.get(self.edit_prompt)
        self._classes = feature.names if isinstance(feature, datasets.ClassLabel) else None

    def __len__(self) -> int:
        return len(self.indices)

    def _light(self, columns: list[str]) -> datasets.Dataset | StreamedTable:
        """The rows, as far as they can be read without their images."""
        return self.rows if isinstance(self.rows, StreamedTable) else self.rows.select_columns(columns)

    def group_sizes(self) -> np.ndarray:
        """(G,) of the rows in use those in each row group of a stream; all in one group otherwise."""
        if not isinstance(self.rows, StreamedTable):
            return np.array([len(self)])
        return np.diff(np.searchsorted(self.indices, np.append(self.rows.firsts, len(self.rows))))

    def order(self, seed: int) -> SampleOrder:
        """The order in which the places in `indices` are trained on; of a stream it fetches what comes next."""
        order = SampleOrder(len(self), seed, self.group_sizes(), GROUPS_MIXED)
        order.announce = getattr(self.rows, "expect", None)
        return order

    def part_of(self, index: int) -> tuple["Triples", int]:
        """The dataset that a row is of, and its number there: of what is no mixture, both as they are."""
        return self, index

    def dataset_of(self, place: int) -> int:
        """Which dataset of a mixture a place in `indices` is of, counted from 0."""
        return 0

    def is_replayed(self, place: int) -> bool:
        """Whether the target of a place in `indices` is not its edited image, but what the frozen base predicts."""
        return False

    def told(self) -> list[dict]:
        """What log, checkpoint and card say of each dataset of a mixture; this is none."""
        return []

    def described(self) -> dict:
        """What else the dry run shows."""
        return {f"{role}_column": getattr(self, role) for role in ("original_image", "edit_prompt", "edited_image")}

    def instructions(self, index: int) -> list[str]:
        """The wordings of a row: its string, its list of strings, or its class's name. Raises RowError for others."""
        if self.wordings is not None:
            return self.wordings
        value = self._texts[index][self.edit_prompt]
        if self._classes is not None and value is not None:
            return [self._classes[value]]
        wordings = value if isinstance(value, list) else [value]
        if not wordings or not all(isinstance(wording, str) for wording in wordings):
            raise self.row_error(index, self.edit_prompt, f"{value!r} is not an instruction; it must be a string")
        if not all(wording.strip() for wording in wordings):
            raise self.row_error(index, self.edit_prompt, "the instruction is empty")
        return wordings

    def distinct_instructions(self) -> list[str]:
        """The instructions of at most ROWS_CHECKED rows, evenly chosen, each once."""
        return list(dict.fromkeys(self._texts_of(self.some(ROWS_CHECKED))))

    def some(self, most: int) -> np.ndarray:
        """At most so many rows, evenly chosen; of a stream those of the first row group, which takes a fetch each."""
        sizes = self.group_sizes()
        count = sizes[sizes > 0][0]
        return self.indices[np.linspace(0, count - 1, min(count, most)).astype(int)]

    @cached_property
    def first_instruction(self) -> str:
        return next(self._texts_of(self.indices))

    def _texts_of(self, indices: Iterable[int]) -> Iterator[str]:
        """The wordings of rows, those that have none left out, whatever else is known of them by now."""
        for index in indices:
            with contextlib.suppress(RowError):
                yield from self.instructions(int(index))

    def tasks(self) -> list[str]:
        """The task of each row in use; "all" for rows that name none."""
        if not isinstance(self.rows.features.get(TASK_COLUMN), datasets.Value):
            return ["all"] * len(self)
        cells = self._light([TASK_COLUMN])
        return [cells[int(index)][TASK_COLUMN] or "all" for index in self.indices]

    def row_error(self, index: int, column: str, problem: str) -> RowError:
        error = RowError(f"{self.source}: row {index}, column {column}: {problem}")
        error.row, error.reason = int(index), f"column {column}: {problem}"
        if self.first_row is not None:
            error.row, error.reason = self.in_mixture(error.row, error.reason)
        return error

    def in_mixture(self, index: int, reason: str) -> tuple[int, str]:
        """The number of a row in the mixture that this dataset is of, and why it cannot be used, with its name here."""
        return self.first_row + index, f"row {index} of {self.source}: {reason}"

    def leave_out(self, found: Iterable[tuple[int, str]]) -> None:
        """Note rows that cannot be used, each with the reason, and say so of those not known yet."""
        new = {index: reason for index, reason in found if index not in self.bad}
        self.bad |= new
        for index in list(new)[:ROWS_NAMED]:
            logger.warning("%s: row %d is left out: %s", self.source, index, new[index])
        if len(new) > ROWS_NAMED:
            logger.warning("%s: and %d more rows", self.source, len(new) - ROWS_NAMED)

    def known_reason(self, place: int) -> str | None:
        """Why the row at a place in `indices` cannot be used, as far as is known."""
        return self.bad.get(int(self.indices[place]))

    def skipped(self) -> list[dict]:
        """What was left out, for a list: files that made no row, then rows."""
        return self.left_out + [{"row": index, "reason": reason} for index, reason in sorted(self.bad.items())]


def load_triples(
    source: Source,
    seed: int | None = None,
    max_rows: int | None = None,
    show_progress: bool = True,
    geometry: str = "resize_crop",
) -> Triples:
    """Find rows and columns, fetch what they name by address, and check sizes and instructions.

    At most `max_rows` rows are used: drawn with `seed`, or the first ones without a seed. Raises UserError naming flag,
    row and column; of rows that cannot be used only where the source says so, or where most are of that kind.
    """
    found = find_rows(source)
    indices = np.arange(len(found.table))
    if max_rows is not None and max_rows < len(indices):
        groups = found.table.sizes if source.streaming else np.array([len(indices)])
        indices = indices[:max_rows] if seed is None else draw_subset(max_rows, seed, groups, GROUPS_MIXED)
    columns = {role: found.columns.get(role) for role in COLUMN_NAMES}
    about = {"source": str(source), "on_bad_row": source.on_bad_row, "geometry": geometry}
    about |= {"counts": found.counts, "left_out": found.left_out, "files": found.files}
    triples = Triples(found.table, indices, **columns, wordings=found.wordings, **about)
    if triples.left_out and show_progress:
        first = "{file} ({reason})".format(**triples.left_out[0])
        logger.warning("%s: %d file(s) make no row, the first %s", source, len(triples.left_out), first)
    _fetch_images(triples, show_progress)
    _check_rows(triples, show_progress, source.check_all)
    return triples


# ---- rows


def _fetch_images(triples: Triples, show_progress: bool) -> None:
    if isinstance(triples.rows, StreamedTable):  # which is not looked through beforehand
        return
    for column in dict.fromkeys((triples.original_image, triples.edited_image)):
        cells = triples.rows.select_columns([column])
        first = cells[int(triples.indices[0])][column]
        first = first[0] if isinstance(first, list) and first else first
        if not first or first["bytes"] is None:  # else pixels are in the table, and to look through it takes long
            triples.files.fetch_all((cells[int(index)][column] for index in triples.indices), show_progress)


def _check_rows(triples: Triples, show_progress: bool, check_all: bool) -> None:
    """Look at headers, sizes and instructions before any weights load, or at the pixels of all rows."""
    chosen = triples.some(len(triples) if check_all else ROWS_CHECKED)
    count = len(chosen)
    kinds: Counter[str] = Counter()
    errors: list[RowError] = []

    def look(index) -> str | RowError:
        try:
            if check_all:
                open_pair(triples, int(index))
            return _look_at_headers(triples, int(index))
        except RowError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count() if check_all else 1) as pool:  # Pillow decodes without Python's lock
        bar = {"total": count, "desc": "Checking pairs", "unit": "pair", "leave": False}
        for found in tqdm(pool.map(look, chosen), **bar, disable=not show_progress):
            if not isinstance(found, RowError):
                kinds[found] += 1
            elif triples.on_bad_row == "error":
                pool.shutdown(cancel_futures=True)
                raise found
            else:
                errors.append(found)
    if 2 * len(errors) > count:
        raise UserError(f"{errors[0]}; {len(errors)} of {count} rows cannot be used: is this the right dataset?")
    triples.leave_out((error.row, error.reason) for error in errors)
    if kinds["whitebox"] and show_progress:
        logger.info("%d of %d originals are cut the way their cartoons were", kinds["whitebox"], count)
    if kinds["resized"] and show_progress:
        logger.warning("%d of %d originals are resized to the size of their edited image", kinds["resized"], count)


def _look_at_headers(triples: Triples, index: int) -> str:
    """How a row's two images fit together, see geometry.alignment. Raises RowError."""
    triples.instructions(index)
    sizes = _both(triples, index, image_size, "not a readable image")
    try:
        return alignment(*sizes, triples.geometry)
    except ValueError as error:
        raise triples.row_error(index, triples.edited_image, str(error)) from error


# ---- samples


class TripleDataset(torch.utils.data.Dataset):
    """Position of the endless sample stream -> one training sample with its random numbers.

    A sample holds
        original, edited    uint8   (3, R, R)
        instruction         str
        row                 int     its place among the rows of the split
        dataset             int     which of a mixture's
        replay              bool    whether the target is what the frozen base predicts
        noise               float32 (C, h, w)   the diffusion's epsilon
        posterior_noise     float32 (C, h, w)   samples the VAE's posterior of the edited image
        timestep            int     [0, T)
        dropout             float   [0, 1)      decides the conditioning dropout
        embedding_seed      int     of the noise on words, where --embedding_noise asks for it

        skipped             list of (row, reason)  that could not be used in its place

    Where rows that cannot be used are an error, one comes back as a RowError instead of being raised, so that it
    crosses from a loader process in one piece; and so does the SourceLost of a stream.
    """

    def __init__(self, triples: Triples, args, latent_shape: tuple[int, int, int], num_timesteps: int):
        self.triples, self.args = triples, args
        self.latent_shape, self.num_timesteps = latent_shape, num_timesteps
        self.order = triples.order(args.seed)
        self.bad = dict(triples.bad)  # not decoded again; its own, so that what is found here is news to the trainer

    def __getitem__(self, position: int) -> dict | UserError:
        args, triples = self.args, self.triples

        def reason(index: int) -> str | None:
            row_index = int(triples.indices[index])
            if row_index not in self.bad:
                try:
                    opened.append(open_pair(triples, row_index))
                except RowError as error:
                    self.bad[row_index] = error.reason
            return self.bad.get(row_index)

        opened: list[tuple] = []
        try:
            epoch, index, skipped = first_usable(triples, self.order, position, reason)
        except (RowError, SourceLost) as error:
            return error
        row_index = int(triples.indices[index])
        [(wordings, original, edited)] = opened
        original, edited = crop_pair(
            original,
            edited,
            args.resolution,
            triples.part_of(row_index)[0].geometry,
            args.center_crop,
            args.random_flip,
            stream(args.seed, "augmentation", epoch, row_index),
        )
        wording = stream(args.seed, "instruction", epoch, row_index).integers(len(wordings))
        return {
            "original": torch.from_numpy(np.ascontiguousarray(original.transpose(2, 0, 1))),
            "edited": torch.from_numpy(np.ascontiguousarray(edited.transpose(2, 0, 1))),
            "instruction": wordings[wording],
            "row": torch.tensor(index),
            "dataset": torch.tensor(triples.dataset_of(index)),
            "replay": torch.tensor(triples.is_replayed(index)),
            "skipped": skipped,
            **diffusion_draws(args, position, self.latent_shape, self.num_timesteps),
        }


def first_usable(
    triples: Triples, order: SampleOrder | MixtureOrder, position: int, reason: Callable[[int], str | None]
) -> tuple[int, int, list[tuple[int, str]]]:
    """(epoch, place in `indices`) of the row at a position, or of the first to stand in for it, and the rows that could
    not be used. `reason(place)` says why a row cannot be used, None where it can. Raises RowError."""
    skipped: list[tuple[int, str]] = []
    for epoch, index in order.candidates(position):
        if (why := reason(index)) is None:
            return epoch, index, skipped
        skipped.append((int(triples.indices[index]), why))
        if triples.on_bad_row == "error":
            break
    row, why = skipped[0]
    raise RowError(f"{triples.source}: row {row}, {why}" + ("" if len(skipped) == 1 else "; nor can others be used"))


def open_pair(triples: Triples, row_index: int) -> tuple[list[str], Image.Image, Image.Image]:
    """Wordings, original and edited image of a row: RGB, the original brought to the edited image's size, unless the
    geometry takes each by itself. Raises RowError for a row that cannot be used.
    """
    triples, row_index = triples.part_of(row_index)
    wordings = triples.instructions(row_index)
    original, edited = _both(triples, row_index, read_image, "cannot be decoded")
    try:
        return wordings, align_original(original, edited.size, triples.geometry), edited
    except ValueError as error:
        raise triples.row_error(row_index, triples.edited_image, str(error)) from error


def _both(triples: Triples, index: int, read: Callable, problem: str) -> list:
    """What `read` makes of a row's original and of its edited image. Raises RowError with the `problem`."""
    row, found = triples.rows[index], []
    for column in (triples.original_image, triples.edited_image):
        try:
            found.append(read(triples.files.image(row[column])))
        except BadImage as error:
            raise triples.row_error(index, column, f"{problem} ({error})") from error
    return found


def diffusion_draws(args, position: int, latent_shape: tuple[int, int, int], num_timesteps: int) -> dict:
    """The random numbers of a position of the stream that are not about the picture: see TripleDataset.

    The noisiest --timestep_bias_portion of the timesteps are --timestep_bias_multiplier times as likely as the others.
    """
    rng = stream(args.seed, "diffusion", position)
    timestep = None
    if args.timestep_bias_multiplier != 1:
        biased = args.timestep_bias_portion * args.timestep_bias_multiplier
        share = biased / (biased + 1 - args.timestep_bias_portion)
        late = max(1, num_timesteps - round(args.timestep_bias_portion * num_timesteps))
        timestep = int(rng.integers(late, num_timesteps) if rng.random() < share else rng.integers(late))
    draws = {
        "timestep": int(rng.integers(num_timesteps)) if timestep is None else timestep,
        "noise": torch.from_numpy(rng.standard_normal(latent_shape, dtype=np.float32)),
        "posterior_noise": torch.from_numpy(rng.standard_normal(latent_shape, dtype=np.float32)),
        "dropout": float(stream(args.seed, "dropout", position).random()),
    }
    if args.embedding_noise:
        draws["embedding_seed"] = torch.tensor(int(stream(args.seed, "embedding_noise", position).integers(2**63)))
    return draws


def collate(samples: list[dict | UserError]) -> dict | UserError:
    """Stack samples into a batch, "skipped" being a list; the first error among them takes the batch's place."""
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
    tensors = [key for key, value in samples[0].items() if torch.is_tensor(value)]
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in tensors}
    batch["timesteps"] = torch.tensor([sample["timestep"] for sample in samples])
    batch["dropout"] = torch.tensor([sample["dropout"] for sample in samples])
    if "instruction" in samples[0]:
        batch["instructions"] = [sample["instruction"] for sample in samples]
    batch["skipped"] = [row for sample in samples for row in sample["skipped"]]
    return batch


def to_unit_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [0, 255] to float32 [-1, 1]."""
    return pixels.float() / 127.5 - 1.0
