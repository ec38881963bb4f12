"""Files that are there whole or not at all, and fingerprints of what files hold."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

from instruct_pix2pix.cli import UserError, first_line


def folder_or_url(text: str) -> Path | str:
    """An argparse type: a folder of this machine as a Path, one of an object storage (s3://, gs://, hf://) as it is."""
    return text if is_remote(text) else Path(text)


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is an address that fsspec opens, such as s3://bucket/folder."""
    return "://" in str(path)


def file_system(path: str | os.PathLike):
    """fsspec's file system for a path or URL, and what the path is called there; it remembers no earlier listing."""
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    if not is_remote(path):
        return LocalFileSystem(), os.path.abspath(path)
    system, inner = url_to_fs(str(path))
    system.invalidate_cache()
    return system, inner


def opened(path: str | os.PathLike):
    """A file, or an object of a URL, to read bytes from."""
    if not is_remote(path):
        return open(path, "rb")
    system, inner = file_system(path)
    return system.open(inner)


os.umask(_UMASK := os.umask(0))  # it cannot be asked for without being set


@contextmanager
def written_whole(path: str | os.PathLike):
    """Gives a temporary path beside `path`; what is written there takes `path`'s place when the block ends well.

    `path` may be a URL. The temporary path is then one of this machine, and the file is uploaded at the end.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            yield (temporary := Path(folder, str(path).rpartition("/")[2]))
            system, inner = file_system(path)
            try:
                system.put_file(str(temporary), inner)
            except Exception as error:  # every storage has kinds of its own
                remedy = "what is finished is kept: see to the storage and run the command again"
                raise UserError(f"{path}: {first_line(error)}; {remedy}") from error
        return
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")  # a killed run's is written over
    try:
        with naming(path):
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    with written_whole(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | os.PathLike, content: str) -> None:
    """As UTF-8; what has no place there, such as a stray byte of a command line, as its number (and so still JSON)."""
    write_bytes(path, content.encode("utf-8", "backslashreplace"))


def write_json(path: str | os.PathLike, content) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_json_lines(path: str | os.PathLike, rows: Iterable) -> None:
    with written_whole(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read_json_lines(path: str | os.PathLike) -> list:
    """What `write_json_lines` wrote, or was appended line by line: without what a kill cut short, and [] of no file."""
    found = []
    # Not splitlines, which also parts at characters that a text may hold.
    for line in Path(path).read_text(encoding="utf-8").split("\n") if Path(path).exists() else []:
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def flush(path: str | os.PathLike) -> None:
    """Make a file or folder survive a power cut before the rename that declares it whole."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(path: Path) -> None:
    """`flush` a file, or a folder and all in it that was just written. Others may read the files as the umask says,
    which safetensors leaves to their owner alone."""
    for written in (path, *path.rglob("*")):
        if written.is_file():
            written.chmod(0o666 & ~_UMASK)
        flush(written)


def file_sha256(path: str | os.PathLike) -> str:
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(content) -> str:
    """A hash of any JSON value, 32 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def state_of_files(paths: Iterable[Path]) -> str:
    """A fingerprint of where files of this machine lie, and of their sizes and times: another once they change."""
    return fingerprint([(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths])


def unit_hash(*parts) -> float:
    """A number in [0, 1) that depends on nothing but `parts`: the same on every machine, in any order."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def check_folder(flag: str, folder: str | os.PathLike, needed: int = 0, what: str = "what is written") -> None:
    """Raise UserError if files cannot be written into `folder`, which need not exist yet, or `what`, of `needed`
    bytes, finds no room there."""
    existing = _existing(folder)
    if not existing.is_dir():
        raise UserError(f"{flag}: {existing} is a file; give a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{flag}: {existing} is not writable; choose another folder")
    if needed > (free := free_space(folder)):
        raise UserError(
            f"{flag}: {folder} has too little room: {what} takes {in_megabytes(needed)}, free are"
            f" {in_megabytes(free)}; make room or choose another folder"
        )


def check_new_folder(flag: str, folder: str | os.PathLike) -> None:
    """Raise UserError unless `folder` is empty or not there yet."""
    if os.path.lexists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise UserError(f"{flag}: {folder} is not empty; name a new folder")


def _existing(path: str | os.PathLike) -> Path:
    path = Path(path).absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def free_space(path: str | os.PathLike) -> int:
    """Bytes that can still be written where `path` is or would be."""
    return shutil.disk_usage(_existing(path)).free


def in_megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


@contextmanager
def naming(path: str | os.PathLike):
    """Gives `path` to an OSError of the block that names no file, as what writes to an open one does not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


def for_others(argument) -> str:
    """An argument as it is published: of a path of this machine (also in --flag=path) its last part only."""
    flag, equals, value = str(argument).rpartition("=")
    local = os.path.isabs(value) or (value and os.path.exists(value))
    return flag + equals + (os.path.basename(os.path.abspath(value)) if local else value)


def as_text(value) -> str:
    """Any text, of a user or of a file, for a line of Markdown: shown as it is and never markup."""
    return re.sub(r"([\\`*<>\[\]|&])", r"\\\1", " ".join(str(value).split()))


def as_code(value) -> str:
    """Any text as one Markdown code span. In a table, its | needs a backslash before it."""
    text = " ".join(str(value).split()) or " "
    fence = "`" * (1 + _most_backticks(text))
    pad = " " if "`" in (text[0], text[-1]) else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def code_block(language: str, content: str) -> str:
    """Any lines as a Markdown code block."""
    fence = "`" * max(3, 1 + _most_backticks(content))
    return f"{fence}{language}\n{content}\n{fence}"


def _most_backticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
