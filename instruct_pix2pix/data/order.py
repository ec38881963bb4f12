"""Every random number of training, as a pure function of the seed, a stream's name and a position.

Nothing is drawn from a running generator, so there is no state to save, to restore or to disturb: resuming is
arithmetic, validation cannot change training, a change of workers or processes changes no sample's numbers, and no
two ranks share a draw, since no two ranks share a position.
"""

from collections.abc import Callable, Iterator

import numpy as np

# The numbers are part of every run's identity: append, never renumber.
STREAMS = {
    "order": 0,
    "augmentation": 1,
    "instruction": 2,
    "diffusion": 3,
    "dropout": 4,
    "validation": 5,
    "subset": 6,
    "substitute": 7,
    "groups": 8,
    "mixture": 9,
    "decoder_skips": 10,
    "embedding_noise": 11,
    "held_back": 12,
}
SUBSTITUTES = 1000  # rows that are tried in the place of one that cannot be used


def stream(seed: int, name: str, *position: int) -> np.random.Generator:
    """A generator for one position of a stream, independent of all others (numpy's SeedSequence hashes the tuple)."""
    return np.random.default_rng((seed, STREAMS[name], *position))


class SampleOrder:
    """The endless stream of samples: one shuffled epoch after another, nothing dropped at the seams.

    Position p is sample p % num_rows of epoch p // num_rows. An update takes the next so many positions, so every
    update has the full effective batch, wherever an epoch ends.

    Where rows lie in groups that cost something to open, `groups` (G,) are their sizes in turn, num_rows in all. An
    epoch then shuffles the groups, takes `mixed` at a time, a block, and shuffles the rows of the block; what stands in
    for a row is of its block, too. By default all rows are one group, which is shuffled as a whole.
    """

    def __init__(self, num_rows: int, seed: int, groups: np.ndarray | None = None, mixed: int = 1):
        self.num_rows, self.seed, self.mixed = num_rows, seed, mixed
        self.sizes = np.array([num_rows]) if groups is None else groups
        self.firsts = np.cumsum(self.sizes) - self.sizes  # row at which each group starts
        self.announce: Callable[[np.ndarray], None] | None = None  # is told the groups of a block and of the next
        self._epoch = self._block = -1

    def locate(self, position: int) -> tuple[int, int]:
        """(epoch, row) at a position."""
        epoch, index = divmod(position, self.num_rows)
        self._enter(epoch, index)
        return epoch, int(self._permuted[index - self._starts[self._block]])

    def candidates(self, position: int) -> Iterator[tuple[int, int]]:
        """(epoch, row) at a position, and then the rows to stand in for it, in turn, where it cannot be used.

        They are drawn by the position alone, so what is trained on does not depend on when a row was found out, nor by
        whom: resumed, on more processes or from a latent cache, a run sees the same.
        """
        epoch, row = self.locate(position)
        rows = self._rows
        yield epoch, row
        draws = stream(self.seed, "substitute", position)
        for _ in range(SUBSTITUTES):
            yield epoch, int(rows[draws.integers(len(rows))])

    def _enter(self, epoch: int, index: int) -> None:
        """Shuffle the epoch and the block that hold a row, unless that is done."""
        if epoch != self._epoch:
            self._epoch, self._block = epoch, -1
            self._shuffled, self._starts = self._blocks(epoch)
        block = int(np.searchsorted(self._starts, index, side="right")) - 1
        if block == self._block:
            return
        self._block, groups = block, self._groups(self._shuffled, block)
        self._rows = np.concatenate([np.arange(self.sizes[group]) + self.firsts[group] for group in groups])
        name = (self.seed, "order", epoch, *((block,) if block else ()))  # of the first block as of a single group
        self._permuted = self._rows[stream(*name).permutation(len(self._rows))]
        if self.announce is not None:
            last = block + 1 == len(self._starts)
            following = self._groups(self._blocks(epoch + 1)[0] if last else self._shuffled, 0 if last else block + 1)
            self.announce(np.concatenate([groups, following]))

    def _blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The groups (G,) of an epoch in their order, and at which of its rows each block starts."""
        shuffled = stream(self.seed, "groups", epoch).permutation(len(self.sizes))
        sizes = self.sizes[shuffled]
        return shuffled, (np.cumsum(sizes) - sizes)[:: self.mixed]

    def _groups(self, shuffled: np.ndarray, block: int) -> np.ndarray:
        groups = shuffled[block * self.mixed : (block + 1) * self.mixed]
        return groups[self.sizes[groups] > 0]


def draw_subset(count: int, seed: int, groups: np.ndarray, mixed: int) -> np.ndarray:
    """`count` of all rows, drawn with the seed, sorted. Of groups of these sizes as few as hold so many are drawn
    first, but at least `mixed`, so that not all have to be opened."""
    rng = stream(seed, "subset")
    shuffled = rng.permutation(len(groups))
    enough = 1 + int(np.searchsorted(np.cumsum(groups[shuffled]), count))
    firsts = np.cumsum(groups) - groups
    rows = [np.arange(groups[group]) + firsts[group] for group in np.sort(shuffled[: max(enough, mixed)])]
    return np.sort(rng.permutation(np.concatenate(rows))[:count])


class MixtureOrder:
    """The endless stream of several datasets, the rows of the first counted first: in an epoch of sum(counts) samples
    counts[n] turns are dataset n's.

    Whose turn it is, is shuffled anew in every epoch. A dataset goes on in its own order, `orders[n]`, where it stood:
    each of its rows comes once before one comes again, however its turns and its rows divide. Its n-th turn in all
    epochs is position n of its own order, so this, too, is arithmetic.
    """

    def __init__(self, orders: list[SampleOrder], counts: np.ndarray, seed: int):
        self.orders, self.counts, self.seed = orders, counts, seed
        self.num_rows = int(counts.sum())  # of an epoch
        sizes = np.array([order.num_rows for order in orders])
        self.firsts = np.cumsum(sizes) - sizes
        self._epoch = -1

    def candidates(self, position: int) -> Iterator[tuple[int, int]]:
        """As SampleOrder's: epochs are the dataset's own, and what stands in for a row is of its dataset."""
        epoch, index = divmod(position, self.num_rows)
        if epoch != self._epoch:
            turns = np.repeat(np.arange(len(self.counts)), self.counts)
            self._turns = stream(self.seed, "mixture", epoch).permutation(turns)
            self._before = np.empty_like(turns)  # of the same dataset's turns, those earlier in the epoch
            self._before[np.argsort(self._turns, kind="stable")] = np.concatenate([np.arange(n) for n in self.counts])
            self._epoch = epoch
        dataset = int(self._turns[index])
        own = epoch * int(self.counts[dataset]) + int(self._before[index])
        for epoch, row in self.orders[dataset].candidates(own):
            yield epoch, int(self.firsts[dataset]) + row


def mixing_counts(rows: np.ndarray, weights: np.ndarray, caps: np.ndarray, temperature: float) -> np.ndarray:
    """(D,) how many samples of an epoch, which has rows.sum() of them, are each dataset's.

    Dataset m's share is proportional to w_m min(e_m, K_m)^(1/T), e_m its rows, K_m its cap (inf for none), T the
    temperature (examples-proportional mixing, Raffel et al. 2020, section 3.5.2, with weights w_m beside).
    """
    sizes = np.minimum(rows, caps)
    # Of the largest, or a low temperature's power and a large weight overflow.
    rates = weights / weights.max() * (sizes / sizes.max()) ** (1 / temperature)
    exact = rows.sum() * rates / rates.sum()
    counts = np.floor(exact).astype(int)
    largest_remainders = np.argsort(counts - exact, kind="stable")[: rows.sum() - counts.sum()]
    counts[largest_remainders] += 1
    return counts


def window_positions(
    start: int, step: int, batch_size: int, accumulation: int, rank: int, world_size: int
) -> list[int]:
    """Positions of one rank's accumulation window: update `step` covers batch_size x accumulation x world_size of them,
    dealt out to the ranks by the micro-batch."""
    firsts = (start + ((step * accumulation + micro) * world_size + rank) * batch_size for micro in range(accumulation))
    return [position for first in firsts for position in range(first, first + batch_size)]
