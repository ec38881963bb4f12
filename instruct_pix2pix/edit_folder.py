"""What edit_images.py is to do and what it has done: instructions, images, output names, the record of edits.

Files and names only: no model, no image is decoded here.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from instruct_pix2pix import editing

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
CONTACT_SHEET = "contact_sheet.png"
RECORD = "edits.jsonl"
# Two outputs are the same edit if these fields of their records agree.
SETTINGS = "input_sha256 instruction model seed steps image_guidance_scale guidance_scale resolution".split()


@dataclass(frozen=True)
class Edit:
    """One image to edit: where it is, what to do, where the result goes (relative to the output folder)."""

    image: Path
    instruction: str
    output: str


# What to edit.


def read_instructions(path: str) -> list[tuple[str | None, str]]:
    """(image or None, instruction) for each line of a .txt, .jsonl or .csv file, without repetitions.

    Raises ValueError, in one line, for a missing or empty file, and for a row without image or instruction.
    """
    remedy = "give a .txt of instructions, or a .jsonl or .csv with image and instruction"
    if Path(path).suffix not in (".txt", ".jsonl", ".csv"):
        raise ValueError(f"--instructions_file: {path} has an unknown ending; {remedy}")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--instructions_file: {path} cannot be read ({editing.first_line(error)})") from None
    found: list[tuple[str | None, str]] = []
    if path.endswith(".txt"):
        lines = [line.strip() for line in text.splitlines()]
        found = [(None, line) for line in lines if line and not line.startswith("#")]
    else:
        lines = [line for line in text.splitlines() if line.strip()]
        rows = csv.DictReader(io.StringIO(text)) if path.endswith(".csv") else lines
        for number, row in enumerate(rows, start=1):
            try:
                row = json.loads(row) if isinstance(row, str) else row
                image, instruction = row["image"].strip(), row["instruction"].strip()
            except (ValueError, KeyError, TypeError, AttributeError):
                image = instruction = ""
            if not image or not instruction:
                raise ValueError(
                    f"--instructions_file: {path}, row {number}, lacks a text for image or instruction; "
                    'write {"image": "a.png", "instruction": "..."} or the columns image,instruction'
                )
            found.append((image, instruction))
    if not found:
        raise ValueError(f"--instructions_file: {path} holds no instruction; {remedy}")
    return list(dict.fromkeys(found))


def find_images(inputs: list[str], output_dir: Path) -> list[tuple[Path, str]]:
    """(path, relative name) of every image that files, folders and globs name, each image once.

    A folder is searched to any depth, leaving out hidden files, other files than images, and `output_dir`.
    Raises ValueError, in one line, where an input does not exist or there is no image at all.
    """
    found: dict[Path, str] = {}
    folders = sum(Path(name).is_dir() for name in inputs)

    def add(path: Path, relative: Path) -> None:
        if output_dir.resolve() not in path.resolve().parents:
            found.setdefault(path.resolve(), relative.as_posix())

    for name in inputs:
        path = Path(name).expanduser()
        if path.is_file():
            add(path, Path(path.name))
            continue
        if path.is_dir():
            matches, root = list(path.rglob("*")), path
        elif glob.has_magic(name):
            parts = path.parts
            magic = next(i for i, part in enumerate(parts) if glob.has_magic(part))
            root = Path(*parts[:magic])
            matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
        else:
            raise ValueError(f"{name}: does not exist; give files, folders or quoted globs")
        prefix = Path(path.resolve().name) if path.is_dir() and folders > 1 else Path()
        for match in sorted(matches):
            relative = match.relative_to(root)
            hidden = any(part.startswith(".") for part in relative.parts)
            if match.is_file() and match.suffix.lower() in IMAGE_SUFFIXES and not hidden:
                add(match, prefix / relative)
    if not found:
        endings = " ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError(f"{' '.join(inputs)}: no image found outside --output_dir; looked for {endings}")
    return list(found.items())


def plan_outputs(wanted: list[tuple[Path, str, str]], suffix: str) -> list[Edit]:
    """Give every (image, relative name, instruction) an output name of its own; repetitions are dropped.

    The name is the relative one with `suffix`. If an image has several instructions, each instruction gets a
    folder. Outputs whose names still agree get the ending of their image (a.jpg: a-jpg.png), and at last
    eight digits of a SHA-256 of its path and instruction.
    """
    once = {(image, instruction): relative for image, relative, instruction in reversed(wanted)}
    wanted = [(image, relative, instruction) for (image, instruction), relative in reversed(once.items())]
    by_instruction = len({image for image, _, _ in wanted}) < len(wanted)
    names = []
    for _, relative, instruction in wanted:
        # A path of a row may climb out of its folder or be absolute: then its name alone counts.
        inside = not Path(relative).is_absolute() and ".." not in Path(relative).parts
        name = Path(relative if inside else Path(relative).name).with_suffix(suffix)
        names.append(Path(folder_name(instruction) if by_instruction else "", name))

    endings = [image.suffix[1:] for image, _, _ in wanted]
    hashes = [hashlib.sha256(f"{image} {text}".encode()).hexdigest()[:8] for image, _, text in wanted]
    for distinctions in (endings, hashes):
        # Compared without case: a.png and A.png are one file on some systems.
        count = Counter([str(name).casefold() for name in names] + [CONTACT_SHEET])
        for i, name in enumerate(names):
            if count[str(name).casefold()] > 1:
                names[i] = name.with_stem(f"{name.stem}-{distinctions[i]}")
    assert len(set(names)) == len(names)
    named = zip(wanted, names, strict=True)
    return [Edit(image, instruction, name.as_posix()) for (image, _, instruction), name in named]


def folder_name(instruction: str) -> str:
    """The words of an instruction, at most 60 characters of them, as the name of a folder."""
    return re.sub(r"[\W_]+", "-", instruction.lower()).strip("-")[:60].strip("-") or "instruction"


# What was done before.


def model_fingerprint(model_id: str) -> str:
    """What tells one model from another: the id on the Hub, or a hash over a folder's files.

    Of a large file the size and the first and last megabyte are hashed: quick, and retraining shows in them.
    """
    folder = Path(model_id).expanduser()
    if not folder.exists():
        return model_id
    digest, megabyte = hashlib.sha256(), 1 << 20
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".txt", ".safetensors", ".bin") and path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.relative_to(folder).as_posix()} {size} ".encode())
            with path.open("rb") as file:
                digest.update(file.read(megabyte))
                file.seek(max(size - megabyte, 0))
                digest.update(file.read(megabyte))
    return f"sha256:{digest.hexdigest()}"


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_records(output_dir: Path) -> dict[str, list[dict]]:
    """The records of edits.jsonl by output name, oldest first. A line cut short by a crash is left out."""
    records: dict[str, list[dict]] = {}
    path = output_dir / RECORD
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
            records.setdefault(record["output"], []).append(record)
        except (ValueError, KeyError, TypeError):
            continue
    return records


def append_record(output_dir: Path, record: dict) -> None:
    """Add a line to edits.jsonl and see it on the disk; starts a new line if the last one was cut short."""
    with (output_dir / RECORD).open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def own_record(output_dir: Path, output: str, records: dict) -> dict | None:
    """The record of a file as it lies there, None if there is no such file.

    Raises ValueError, in one line, for a file that has no record or differs from it: somebody else's, or
    changed since, and so not to be lost.
    """
    path = output_dir / output
    if not path.exists():
        return None
    content = file_sha256(path) if path.is_file() else "a folder"
    for record in reversed(records.get(output, [])):
        if record.get("output_sha256") == content:
            return record
    raise ValueError(f"{path}: was not made by this script, or was changed since; move it away or change --output_dir")


def is_finished(output_dir: Path, output: str, settings: dict, records: dict, overwrite: bool) -> bool:
    """Whether `output` is there and of these `settings`; if of others, ValueError unless `overwrite`."""
    record = own_record(output_dir, output, records)
    if record is None:
        return False
    for name in SETTINGS:
        if record.get(name) != settings[name]:
            if overwrite:
                return False
            before, now = str(record.get(name))[:40], str(settings[name])[:40]
            raise ValueError(
                f"{output_dir / output}: was made with {name} {before}, now it is {now}; choose another "
                "--output_dir, or --overwrite to make it again"
            )
    return True


def keep(output_dir: Path, output: str, content: bytes, record: dict) -> None:
    """Write an output and its record.

    The record goes first: if the run dies between the two, the output is missing and will be made, whereas an
    output without a record would look like somebody else's file.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    sha256 = hashlib.sha256(content).hexdigest()
    append_record(output_dir, {"output": output} | record | {"output_sha256": sha256})
    editing.write_atomically(output_dir / output, content)
