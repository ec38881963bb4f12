"""Several datasets as one: --dataset_mixture.

Each is opened, checked and cropped like a single one; here their rows are counted through, and their turns shared out.
"""

import argparse
import logging

import numpy as np

from instruct_pix2pix.cli import RowError, UserError
from instruct_pix2pix.data.geometry import crop_is_fixed
from instruct_pix2pix.data.order import MixtureOrder, mixing_counts
from instruct_pix2pix.data.triples import Triples, load_triples

logger = logging.getLogger(__name__)


class Mixture(Triples):
    """Triples of several datasets, whose rows and places are counted through: those of the first, of the second, ...
    What belongs to a row is asked of the dataset that it is of, see `part_of`: a mixture has no table, files or
    wordings of its own."""

    def __init__(self, source: str, parts: list[Triples], entries: list[argparse.Namespace]):
        self.source, self.parts, self.entries = source, parts, entries
        rows, self.sizes = np.array([len(part.rows) for part in parts]), np.array([len(part) for part in parts])
        self.firsts = np.cumsum(rows) - rows
        for part, first in zip(parts, self.firsts, strict=True):
            part.first_row = int(first)
        self.indices = np.concatenate([part.indices + part.first_row for part in parts])
        self.bad = dict(part.in_mixture(*known) for part in parts for known in part.bad.items())
        self.left_out = [entry for part in parts for entry in part.left_out]
        self.on_bad_row, self.counts = parts[0].on_bad_row, {}
        self.geometry = [[part.geometry, len(part)] for part in parts]
        self.datasets = np.repeat(np.arange(len(parts)), self.sizes)
        caps = np.array([entry.cap or np.inf for entry in entries])
        weights = np.array([entry.weight for entry in entries])
        self.samples = mixing_counts(self.sizes, weights, caps, entries[0].temperature)

    def part_of(self, index: int) -> tuple[Triples, int]:
        part = self.parts[np.searchsorted(self.firsts, index, side="right") - 1]
        return part, int(index) - part.first_row

    def instructions(self, index: int) -> list[str]:
        part, row = self.part_of(index)
        return part.instructions(row)

    def some(self, most: int) -> np.ndarray:
        each = -(-most // len(self.parts))
        return np.concatenate([part.some(each) + part.first_row for part in self.parts])

    def order(self, seed: int) -> MixtureOrder:
        # Each has a seed of its own, or datasets made of the same photos would show them at the same time.
        orders = [part.order(seed + number) for number, part in enumerate(self.parts)]
        return MixtureOrder(orders, self.samples, seed)

    def dataset_of(self, place: int) -> int:
        return int(self.datasets[place])

    def is_replayed(self, place: int) -> bool:
        return self.entries[self.dataset_of(place)].replay

    def described(self) -> dict:
        columns = [part.described() for part in self.parts]
        return {"mixture": [told | its for told, its in zip(self.told(), columns, strict=True)]}

    def told(self) -> list[dict]:
        """Of each dataset: name, rows in use, share of the samples, replay."""
        shares = (self.samples / self.samples.sum()).round(4).tolist()
        facts = zip(self.entries, self.sizes.tolist(), shares, strict=True)
        return [
            {"dataset": entry.source.name, "rows": rows, "share": share, "replay": entry.replay}
            for entry, rows, share in facts
        ]


def load_mixture(args, entries: list[argparse.Namespace], seed: int, show_progress: bool) -> Mixture:
    """The datasets of --dataset_mixture, `entries` as `sources.read_mixture` gives them. Raises UserError."""
    mistake, parts = f"--dataset_mixture: {args.dataset_mixture}", []
    for number, entry in enumerate(entries, 1):
        where, geometry = f"{mistake}: dataset {number}", entry.image_geometry
        if crop_is_fixed(args.image_geometry, args.center_crop) > crop_is_fixed(geometry, args.center_crop):
            raise UserError(
                f"{where}: image_geometry {geometry} crops at random, and {args.image_geometry} does not; give"
                f" --image_geometry {geometry}, and {args.image_geometry} to the datasets it is for"
            )
        try:
            parts.append(load_triples(entry.source, seed, entry.max_train_samples, show_progress, geometry))
        except RowError:
            raise  # which every process says for itself
        except UserError as error:
            raise UserError(f"{where}: {str(error).removeprefix('--')}") from error
    mixture = Mixture(mistake, parts, entries)
    for number, (told, samples) in enumerate(zip(mixture.told(), mixture.samples, strict=True), 1):
        if samples == 0:
            raise UserError(
                f"{mistake}: dataset {number}: of {len(mixture)} samples none is its share; raise its weight"
            )
        if show_progress:
            replayed = ", replayed" if told["replay"] else ""
            share = f"{samples} of {len(mixture)} samples of an epoch ({told['share']:.1%}){replayed}"
            logger.info("%s: %d rows, %s", told["dataset"], told["rows"], share)
    return mixture
