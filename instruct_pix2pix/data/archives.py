"""Zip and tar archives, unpacked once into the cache: nothing of theirs lands outside their folder there."""

import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm.auto import tqdm

from instruct_pix2pix.cli import UserError, first_line
from instruct_pix2pix.files import free_space, state_of_files
from instruct_pix2pix.images import is_junk

ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
SHARE_OF_DISK = 0.95  # of what is free, that unpacked files may take


def is_archive(path: Path) -> bool:
    return path.name.lower().endswith(ENDINGS) and path.is_file()


def unpack(archives: list[Path], cache: Path, what: str) -> Path:
    """Unpack archives into a folder of `cache`, each into a sub-folder of its own name -> that folder.

    What an earlier run has unpacked of the same files is used again. Links and devices inside are left out. Raises
    UserError, beginning with `what`, for a damaged archive, one with paths that lead out of it, or too small a disk.
    """
    root = cache / f"unpacked-{state_of_files(archives)[:16]}"
    root.mkdir(parents=True, exist_ok=True)
    for path in tqdm(archives, desc="Unpacking", unit="archive", leave=False, delay=1):
        ending = next(ending for ending in sorted(ENDINGS, key=len, reverse=True) if path.name.lower().endswith(ending))
        folder = root / path.name[: -len(ending)]
        partial = root / f".{folder.name}.partial"
        if folder.is_dir():
            continue
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            _unpack_one(path, partial)
        except UserError as error:
            shutil.rmtree(partial)
            raise UserError(f"{what}: {path.name} {error}") from None
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"{what}: {path.name} cannot be unpacked into {cache} ({first_line(error)})") from None
        os.replace(partial, folder)
    return root


def _unpack_one(path: Path, folder: Path) -> None:
    """Every file of an archive into `folder`. Raises UserError, the message going on after the archive's name."""
    room = SHARE_OF_DISK * free_space(folder)
    try:
        for name, size, open_file in _members(path):
            if (room := room - size) < 0:
                raise UserError(f"unpacks to more than is free in {folder.parent}; make room or name a --cache_dir")
            place = PurePosixPath(name.replace("\\", "/"))
            if place.is_absolute() or ".." in place.parts or ":" in place.parts[0]:
                raise UserError(f"holds {name[:80]!r}, which leads out of it; it is not unpacked")
            if any(map(is_junk, place.parts)):
                continue
            target = folder / place
            target.parent.mkdir(parents=True, exist_ok=True)
            with open_file() as source, open(target, "xb") as file:
                shutil.copyfileobj(source, file)
    except FileExistsError as error:
        raise UserError(f"holds {Path(error.filename).name} twice") from None
    except Exception as error:  # the readers raise almost anything on damaged bytes
        if isinstance(error, UserError) or getattr(error, "errno", None):  # such as a full disk
            raise
        raise UserError(f"is damaged or encrypted ({first_line(error)}); download it again") from None


def _members(path: Path) -> Iterator[tuple[str, int, Callable[[], IO[bytes]]]]:
    """Name, unpacked size in bytes, and a way to open each file of an archive."""
    if path.name.lower().endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                is_link = member.external_attr >> 28 == 0xA
                if not member.is_dir() and not is_link:
                    yield member.filename, member.file_size, lambda member=member: archive.open(member)
    else:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isreg():
                    yield member.name, member.size, lambda member=member: archive.extractfile(member)
            while archive.fileobj.read(1 << 20):  # the checksum stands at the end
                pass
