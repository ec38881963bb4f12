"""Where images come from: folders of photos, datasets with an image column, downloaded restoration sets."""

import contextlib
import hashlib
import io
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from instruct_pix2pix.cli import UserError, first_line, warn
from instruct_pix2pix.data.pairing import SPLIT_NAMES, split_in_name
from instruct_pix2pix.images import BadImage, describe_others, encode_image, find_images, read_image

UNKNOWN_LICENCE = "unknown, see where they come from"


class Photos(NamedTuple):
    """A source of photos that are read one at a time."""

    names: list[str]  # sorted; a file's path within the folder, or "<split>/<row number>"
    splits: list[str]  # the split the source itself puts each photo in, or ""
    read: Callable[[str], bytes]  # the encoded file behind a name
    digest: str  # changes when names or sizes change


def decode_image(data: bytes):
    """An encoded file's picture as (H, W, 3) uint8 RGB, upright: images.read_image, for numpy."""
    import numpy as np

    return np.array(read_image(data))


def encode_png(pixels) -> bytes:
    """(H, W, 3) uint8 RGB -> a PNG file, as rows hold them."""
    from PIL import Image

    return encode_image(Image.fromarray(pixels), ".png", fast=True)


def image_hash(pixels) -> str:
    """SHA-256 of the pixels and the size: the same for two files that hold the same picture."""
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def files_digest(root: Path, names: Iterable[str]) -> str:
    """Changes when the names or sizes of the files under `root` do."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(os.fsencode(f"{name}\t{(root / name).stat().st_size}\n"))
    return digest.hexdigest()


def find_photos(root: Path) -> Photos:
    """A folder of photos, nested in any way. Children train, val or validation, and test are its splits.

    Imagenette's own archives are known too: `imagenette2*/{train,val}/<synset>/*.JPEG`, unpacked inside
    `root`.
    """
    if not root.is_dir():
        raise UserError(f"--photos: {root}: no such folder; give a folder of images")
    names, others = find_images(root)
    if not names:
        raise UserError(f"--photos: {root}: no image at any depth, only {describe_others(others) or 'empty folders'}")
    if others:
        warn(f"--photos: {root}: left out what is no image: {describe_others(others)}")
    splits = []
    for name in names:
        parts = name.split("/")
        if parts[0].startswith("imagenette2"):
            parts = parts[1:]
        splits.append(SPLIT_NAMES.get(parts[0].lower(), "") if len(parts) > 1 else "")
    return Photos(names, splits, lambda name: (root / name).read_bytes(), files_digest(root, names))


def find_dataset_images(name: str, config: str | None, revision: str | None, column: str) -> Photos:
    """The images of a dataset that is kept as parquet files: a local folder or a repository on the Hub.

    A file's split is told by its path (`320px/train-00000-of-00001.parquet`, `320px/train/0000.parquet`); a
    path that tells none counts as train.
    """
    from datasets import Image, load_dataset

    root = Path(name)
    if root.is_dir():
        files = choose_files([path.relative_to(root).as_posix() for path in root.rglob("*.parquet")], config, name)
    else:
        root, files = download_parquet(name, config, revision)

    by_split: dict[str, list[str]] = {}
    for file in files:
        by_split.setdefault(split_in_name(file) or "train", []).append(str(root / file))
    tables = None
    try:
        tables = load_dataset("parquet", data_files=by_split)
        tables = tables.select_columns([column]).cast_column(column, Image(decode=False))
    except Exception as error:  # datasets raises many kinds for files it cannot read or cast
        columns = next(iter(tables.column_names.values())) if tables else ()
        if columns and column not in columns:
            raise UserError(f"--image_column: {name} has no {column} but {', '.join(columns)}") from None
        raise UserError(f"--dataset: {name}: cannot be read: {first_line(error)}; give another dataset") from None

    def read(key: str) -> bytes:
        split, row = key.split("/")
        cell = tables[split][int(row)][column]
        if not cell or (cell["bytes"] is None and not cell["path"]):
            raise BadImage("no image")
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    names = [f"{split}/{row}" for split, table in tables.items() for row in range(len(table))]
    splits = [split for split, table in tables.items() for _ in range(len(table))]
    return Photos(names, splits, read, files_digest(root, files))


def download_parquet(name: str, config: str | None, revision: str | None) -> tuple[Path, list[str]]:
    """Fetch a dataset's parquet files from the Hub, or find them in its cache -> (folder, paths within it).

    A repository that holds a loading script instead is read from the Hub's own conversion of it, which is the
    revision `refs/convert/parquet`. Without a connection, what an earlier run has downloaded serves.
    """
    from huggingface_hub import HfApi, snapshot_download

    revisions = [revision] if revision else ["main", "refs/convert/parquet"]
    files: list[str] = []
    try:  # besides its own errors the client raises those of whichever HTTP library it uses
        for revision in revisions:
            listed = [file.rfilename for file in HfApi().dataset_info(name, revision=revision).siblings]
            if files := [file for file in listed if file.endswith(".parquet")]:
                break
        files = choose_files(files, config, name)
        return Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=files)), files
    except UserError:
        raise
    except Exception as error:
        patterns = [f"{config}/*.parquet", f"*/{config}/*.parquet"] if config else ["*.parquet"]
        where = {"repo_type": "dataset", "allow_patterns": patterns, "local_files_only": True}
        for revision in revisions:
            with contextlib.suppress(Exception):
                root = Path(snapshot_download(name, revision=revision, **where))
                files = [path.relative_to(root).as_posix() for path in root.rglob("*.parquet")]
                return root, choose_files(files, config, name)
        raise UserError(f"--dataset: {name}: {first_line(error)}; give a folder or a dataset on the Hub") from None


def choose_files(files: list[str], config: str | None, name: str) -> list[str]:
    """Those of a configuration, sorted. Where there are several, one must be named."""
    if config:
        files = [file for file in files if config in file.split("/")[:-1]]
    configs = {file.split("/")[0] for file in files if "/" in file} - {"data", *SPLIT_NAMES}
    if len(configs) > 1:
        raise UserError(f"--dataset_config: {name} has {', '.join(sorted(configs))}; choose one")
    if not files:
        where = f"{name}, configuration {config}" if config else name
        raise UserError(f"--dataset: {where}: no parquet file in it; give a dataset that is kept as such")
    return sorted(files)


def is_plain(data: bytes) -> bool:
    """Whether any reader sees in this file what `decode_image` does: a PNG, RGB, upright, opaque."""
    from PIL import Image

    image = Image.open(io.BytesIO(data))
    try:
        upright = image.getexif().get(0x0112, 1) == 1
    except Exception:  # a broken EXIF block, which others may take ill
        return False
    return image.format == "PNG" and image.mode == "RGB" and upright and "transparency" not in image.info
