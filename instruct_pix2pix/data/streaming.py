"""Parquet shards that stay where they are: row groups are fetched when their turn comes, and kept while there is room.

The row groups of all shards, in the order of the shards' names, are one table that is read by index, so what comes when
is decided elsewhere, by arithmetic (`order.SampleOrder`). A row group is fetched once for all processes of a machine,
in pieces, into an Arrow file that all of them map into memory; the oldest of these files go when the next needs room.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.data_files import DataFilesList, EmptyDatasetError, get_data_patterns
from datasets.table import table_cast
from filelock import FileLock, Timeout
from tqdm.contrib.concurrent import thread_map

from instruct_pix2pix.cli import SourceLost, UserError, first_line
from instruct_pix2pix.data.pairing import split_in_name
from instruct_pix2pix.data.sources import Source
from instruct_pix2pix.files import check_folder, fingerprint, free_space, in_megabytes, write_json, written_whole

logger = logging.getLogger(__name__)
T = TypeVar("T")

GROUPS_MIXED = 8  # row groups whose rows are shuffled together
PAUSES = (1, 2, 4, 8, 16, 32, 60, 60)  # seconds before a server that failed is asked again
PATIENCE = 30  # seconds after which waiting for a row group is said
FETCHES_AT_A_TIME = 4  # of one process
BYTES_AT_ONCE = 32 * 2**20  # a row group up to this is one request, of a larger one its columns are read
BYTES_PER_REQUEST = 8 * 2**20  # so much at a time
ROWS_PER_BATCH = 16  # that are in memory while a row group is written


def shard_patterns(source: Source) -> dict[str, list[str]]:
    """Split -> patterns of the parquet files at an address: a file, a pattern with *, or a folder, whose splits are
    found by the rules of the `datasets` library."""
    address = source.name.rstrip("/")
    if address.endswith(".parquet"):
        return {split_in_name(address.rsplit("/", 1)[-1].split("*")[0].removesuffix(".parquet")) or "train": [address]}
    options = datasets.DownloadConfig(token=source.token)
    found = retried(lambda: get_data_patterns(address, options), source, "the list", PAUSES)
    return {str(split): [f"{address}/{pattern}" for pattern in patterns] for split, patterns in found.items()}


def retried(call: Callable[[], T], source: Source, what: str, pauses: tuple[int, ...]) -> T:
    """call(), again after a pause where it fails, which is said; what waiting does not mend fails at once. Raises
    SourceLost."""
    for attempt in itertools.count():
        try:
            return call()
        except UserError:
            raise
        except Exception as error:  # every file system below, and every library of theirs, has its own
            problem = f"{source}: {what} cannot be read ({type(error).__name__}: {first_line(error)})"
            # Of a file that was there, FileNotFoundError is what fsspec makes of a web server's 503.
            lasting = isinstance(error, EmptyDatasetError | PermissionError | ImportError)
            lasting |= isinstance(error, ValueError) and not isinstance(error, pa.ArrowInvalid)  # of bytes cut short
            if lasting or attempt == len(pauses) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                tried = f" after {attempt + 1} tries; the same command goes on from here" if attempt else ""
                raise SourceLost(problem + tried) from error
        logger.warning("%s; try %d of %d in %d s", problem, attempt + 2, len(pauses) + 1, pauses[attempt])
        for _ in range(pauses[attempt]):
            time.sleep(1)
            _check_alive(source)


def _check_alive(source: Source) -> None:
    """A process that ends waits for its threads, which have no need to go on."""
    if not threading.main_thread().is_alive():
        raise SourceLost(f"{source}: is needed no more")


class StreamedTable:
    """Rows of parquet shards, read by index like a `datasets.Dataset`: a row as a dict, `len()`, and `features`, which
    `select_columns` and `cast_column` change. `sizes` (G,) are how many rows each row group has."""

    def __init__(self, shards: DataFilesList, features: datasets.Features | None, source: Source, cache: Path):
        self.shards, self.source, self.folder = list(shards), source, cache / "streams"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.pauses = PAUSES if "://" in self.shards[0] else ()
        self.origins = shards.origin_metadata  # of each shard its time or tag, or () where the server tells none
        footers = self._footers()
        self.digests = [footer["digest"] for footer in footers]
        counts = [len(footer["rows"]) for footer in footers]
        self.shard = np.repeat(np.arange(len(footers)), counts)  # (G,) of each row group, and its number there
        self.number = np.concatenate([np.arange(count) for count in counts])
        self.sizes = np.concatenate([np.array(footer["rows"], dtype=np.int64) for footer in footers])
        self.bytes = np.concatenate([np.array(footer["bytes"], dtype=np.int64) for footer in footers])
        self.firsts = np.cumsum(self.sizes) - self.sizes
        self.features = features or self._read_features()
        self._process = None
        self._check_room()

    def __len__(self) -> int:
        return int(self.sizes.sum())

    @property
    def column_names(self) -> list[str]:
        return list(self.features)

    def select_columns(self, names: list[str]) -> StreamedTable:
        return self._with(datasets.Features({name: self.features[name] for name in names}))

    def cast_column(self, name: str, feature) -> StreamedTable:
        return self._with(datasets.Features({**self.features, name: feature}))

    def _with(self, features: datasets.Features) -> StreamedTable:
        table = copy.copy(self)
        table.features = features
        return table

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_process": None}

    def __getitem__(self, index: int) -> dict:
        """A row. Waits for its row group; raises SourceLost where that cannot be read."""
        group = int(np.searchsorted(self.firsts, index, side="right")) - 1
        future, waited = self._future(group), 0
        if future.done() and future.exception() is not None:  # what failed ahead of time may be there by now
            del self._here()[group]
            future = self._future(group)
        while not wait([future], timeout=PATIENCE).done:
            waited += PATIENCE
            logger.warning("%s: waiting for %s since %d s", self.source, self._name(group), waited)
        return future.result()[index - int(self.firsts[group])]

    def expect(self, groups: Iterable[int]) -> None:
        """Fetch these row groups in the background, the first ones first, and let go of all others."""
        groups = list(dict.fromkeys(map(int, groups)))
        for group in groups:
            self._future(group)
        for group in self._here().keys() - set(groups):
            self._here().pop(group).cancel()

    # ---- row groups

    def _here(self) -> dict[int, Future]:
        """The row groups of this process, open or to come: a thread does not live on in a fork."""
        if self._process is None or self._process[0] != os.getpid():
            self._process = (os.getpid(), {}, ThreadPoolExecutor(FETCHES_AT_A_TIME))
        return self._process[1]

    def _future(self, group: int) -> Future:
        here = self._here()
        if group not in here:
            here[group] = self._process[2].submit(self._opened, group)
        return here[group]

    def _name(self, group: int) -> str:
        return f"row group {self.number[group]} of {self.shards[self.shard[group]]}"

    def _opened(self, group: int) -> datasets.Dataset:
        """A row group, mapped into memory, fetched where no process has it yet."""
        _check_alive(self.source)
        shard, pauses = self.shard[group], self.pauses
        content = [self.shards[shard], self.origins[shard], self.digests[shard], int(self.number[group])]
        path = self.folder / f"{fingerprint([*content, str(self.features)])}.arrow"
        lock = FileLock(self.folder / f".lock-{path.name[:3]}")  # few files for all
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            held, pauses = lock.acquire(), ()  # where it is not there then, another process has tried for long
        with held:
            with suppress(FileNotFoundError):  # it may be removed at this very moment
                os.utime(path)  # the last to go
                return datasets.Dataset.from_file(str(path))
            self._make_room(int(self.bytes[group]))
            retried(lambda: self._fetch(group, path), self.source, self._name(group), pauses)
            return datasets.Dataset.from_file(str(path))

    def _fetch(self, group: int, path: Path) -> None:
        shard, number, schema = self.shards[self.shard[group]], int(self.number[group]), self.features.arrow_schema
        columns = list(self.features)
        reading = {"buffer_size": BYTES_PER_REQUEST, "pre_buffer": bool(self.bytes[group] <= BYTES_AT_ONCE)}
        with self._open(shard) as file, pq.ParquetFile(file, **reading) as parquet:
            if _digest(parquet.metadata) != self.digests[self.shard[group]]:
                raise SourceLost(f"{self.source}: {shard} is not what it was when training started; start again")
            batches = parquet.iter_batches(ROWS_PER_BATCH, row_groups=[number], columns=columns, use_threads=False)
            with written_whole(path) as temporary, pa.OSFile(str(temporary), "wb") as sink:
                with pa.ipc.new_stream(sink, schema) as writer:
                    for batch in batches:
                        _check_alive(self.source)
                        writer.write_table(table_cast(pa.Table.from_batches([batch]), schema))

    def _make_room(self, needed: int) -> None:
        """Remove the files that were not used for longest, until `needed` bytes more keep to the limit."""
        files = self._files()
        total = needed + sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= self.source.stream_cache and free_space(self.folder) > 2 * needed:
                break
            Path(path).unlink(missing_ok=True)
            total -= size

    def _files(self) -> list[tuple[float, int, str]]:
        """(when last used, bytes, path) of what is kept, the oldest first."""
        found = []
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):  # another process removes, too
                if entry.name.endswith((".arrow", ".partial")):
                    found.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
        return sorted(found)

    def _check_room(self) -> None:
        """Raise UserError where the row groups of one block and of the next would not fit."""
        largest = int(self.bytes.max(initial=0))
        needed, limit = min(2 * GROUPS_MIXED * largest, int(self.bytes.sum())), self.source.stream_cache
        if needed > limit:
            raise UserError(
                f"--stream_cache_gb: {limit / 1e9:g} is too small for {self.source}: its row groups have up to"
                f" {in_megabytes(largest)}, and {2 * GROUPS_MIXED} of them are needed; give {needed / 1e9:.1f} or more"
            )
        kept = sum(size for _, size, _ in self._files())
        check_folder("--cache_dir", self.folder, max(0, needed - kept), "a stream's row groups")

    # ---- shards

    def _open(self, shard: str):
        options = {"token": self.source.token} if shard.startswith("hf://") and self.source.token else {}
        if shard.startswith(("http://", "https://")):
            options = {"client_kwargs": {"trust_env": True}}  # proxies
        system, path = fsspec.url_to_fs(shard, **options)
        return system.open(path, "rb", **({} if system.protocol[0] == "file" else {"cache_type": "none"}))

    def _footers(self) -> list[dict]:
        """Of each shard a digest, and the rows and bytes of each row group: looked up once while the shards stay as
        they are."""

        def look(shard: str) -> dict:
            with self._open(shard) as file, pq.ParquetFile(file) as parquet:
                metadata = parquet.metadata
                groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
                rows, sizes = [group.num_rows for group in groups], [group.total_byte_size for group in groups]
                return {"digest": _digest(metadata), "rows": rows, "bytes": sizes}

        known = self.folder / f"{fingerprint([self.shards, self.origins])}.json"
        if all(self.origins):
            with suppress(OSError, ValueError):
                return json.loads(known.read_text(encoding="utf-8"))

        bar = {"desc": "Reading footers", "unit": "shard", "leave": False, "disable": None, "max_workers": 16}
        patient = partial(retried, source=self.source, pauses=self.pauses)
        found = thread_map(lambda shard: patient(partial(look, shard), what=shard), self.shards, **bar)
        write_json(known, found)
        return found

    def _read_features(self) -> datasets.Features:
        def read() -> datasets.Features:
            with self._open(self.shards[0]) as file:
                return datasets.Features.from_arrow_schema(pq.read_schema(file))

        return retried(read, self.source, self.shards[0], self.pauses)


def _digest(metadata: pq.FileMetaData) -> str:
    """Of all that a shard says of itself, where its row groups lie and what they hold in outline."""
    content = pa.BufferOutputStream()
    metadata.write_metadata_file(content)
    return hashlib.sha256(content.getvalue()).hexdigest()[:32]
