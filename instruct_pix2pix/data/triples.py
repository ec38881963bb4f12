"""Triples (original image, instruction, edited image), checked, opened and made into training samples.

`load_triples` is the one reader, for training, evaluation and export; `TripleDataset` turns a position of the endless
sample stream into pixels, text and the random numbers that belong to this position.
"""

import logging
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from instruct_pix2pix.cli import RowError
from instruct_pix2pix.data.geometry import align_original, alignment, crop_pair
from instruct_pix2pix.data.order import SampleOrder, stream
from instruct_pix2pix.data.sources import TASK_COLUMN, Source, find_rows
from instruct_pix2pix.images import BadImage, image_size, is_url, read_image

logger = logging.getLogger(__name__)

# Rows whose sizes and instructions are looked at before training; a larger dataset is sampled evenly.
ROWS_CHECKED = 10_000


@dataclass
class Triples:
    """Checked rows. `rows` is a datasets.Dataset of the three columns named, images undecoded, and a `task` if there is
    one; `indices` (N,) are the rows in use; `source` is how messages call it."""

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

    def tasks(self) -> list[str]:
        """The task of each row in use; "all" for rows that name none."""
        if not isinstance(self.rows.features.get(TASK_COLUMN), datasets.Value):
            return ["all"] * len(self)
        return [task or "all" for task in self.rows.select_columns([TASK_COLUMN])[self.indices][TASK_COLUMN]]


def load_triples(
    source: Source, seed: int | None = None, max_rows: int | None = None, show_progress: bool = True
) -> Triples:
    """Find rows and columns, and check sizes and instructions. Raises UserError naming flag, row and column.

    At most `max_rows` rows are used: drawn with `seed`, or the first ones without a seed.
    """
    rows, columns = find_rows(source)
    indices = np.arange(len(rows))
    if max_rows is not None and max_rows < len(rows):
        if seed is not None:
            indices = stream(seed, "subset").permutation(len(rows))
        indices = np.sort(indices[:max_rows])
    triples = Triples(rows, indices, **columns, source=str(source))
    _check_rows(triples, show_progress)
    return triples


# ---- rows


def image_source(cell: dict | None) -> bytes | str:
    """What an undecoded cell ({'bytes', 'path'}) holds, for images.read_image. Raises BadImage where it is empty, or an
    address, which would be fetched anew at every use."""
    if not cell or (cell["bytes"] is None and not cell["path"]):
        raise BadImage("no image")
    if cell["bytes"] is None and is_url(cell["path"]):
        raise BadImage(f"{cell['path']} is an address; download it and name the file")
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
