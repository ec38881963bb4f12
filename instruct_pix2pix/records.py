"""What a folder of edits keeps of itself: how each file was made, and whole batches of them or none.

A folder of edit_images.py and one of evaluate.py are both of this kind. Nothing heavy is imported at the top.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from instruct_pix2pix.cli import UserError
from instruct_pix2pix.evaluation.settings import SETTINGS_FILE
from instruct_pix2pix.files import file_sha256, flush, read_json_lines, write_json_lines
from instruct_pix2pix.models.trained import SKIPS_FOLDER, configuration, needs_base

RECORD = "edits.jsonl"
# Settings that came later, and what they are where a record does not name them.
DEFAULTS = {"negative_prompt": "", "variation": 1, "tile": 0}
READY = ".ready"  # a folder: outputs that are written, and not yet all in their places


def model_fingerprint(model_id: str) -> str:
    """What tells one model from another: the id on the Hub, or a hash over a folder's files, and of a checkpoint or
    an adapter over its base model's as well.

    Of a large file the size and the first and last megabyte are hashed: quick, and retraining shows in them. Beside a
    pipeline's parts may lie checkpoints and evaluations, which are not the model.
    """
    folder = Path(model_id).expanduser()
    if not folder.exists():
        return model_id
    digest, megabyte, index = hashlib.sha256(), 1 << 20, folder / "model_index.json"
    parts = {*json.loads(index.read_text()), SKIPS_FOLDER} if index.is_file() else None
    for path in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
        if path.name == SETTINGS_FILE:
            continue  # what a sweep of the model found
        if parts and path.parent != folder and path.relative_to(folder).parts[0] not in parts:
            continue
        if path == folder or (path.suffix in (".json", ".txt", ".safetensors", ".bin") and path.is_file()):
            size = path.stat().st_size
            digest.update(f"{path.relative_to(folder).as_posix()} {size} ".encode())
            with path.open("rb") as file:
                digest.update(file.read(megabyte))
                file.seek(max(size - megabyte, 0))
                digest.update(file.read(megabyte))
    if needs_base(folder):
        digest.update(model_fingerprint(configuration(folder).pretrained_model_name_or_path).encode())
    return f"sha256:{digest.hexdigest()}"


def read_records(output_dir: Path) -> dict[str, list[dict]]:
    """The records of edits.jsonl by output name, oldest first. A line cut short by a crash is left out."""
    records: dict[str, list[dict]] = {}
    for record in read_json_lines(output_dir / RECORD):
        if isinstance(record, dict) and "output" in record:
            records.setdefault(record["output"], []).append(record)
    return records


def append_records(output_dir: Path, records: list[dict]) -> None:
    """Add lines to edits.jsonl and see them on the disk; starts a new line if the last one has no end."""
    with (output_dir / RECORD).open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.writelines(json.dumps(record).encode() + b"\n" for record in records)
        file.flush()
        os.fsync(file.fileno())


def own_record(output_dir: Path, output: str, records: dict) -> dict | None:
    """The record of a file as it lies there, None if there is no such file.

    Raises UserError for a file that has no record or differs from it: somebody else's, or
    changed since, and so not to be lost.
    """
    path = output_dir / output
    if not path.exists():
        return None
    content = file_sha256(path) if path.is_file() else "a folder"
    for record in reversed(records.get(output, [])):
        if record.get("output_sha256") == content:
            return record
    raise UserError(f"{path}: was not made by this script, or was changed since; move it away or change --output_dir")


def is_finished(output_dir: Path, output: str, settings: dict, records: dict, overwrite: bool) -> bool:
    """Whether `output` is there and of these `settings`; if of others, UserError unless `overwrite`."""
    record = own_record(output_dir, output, records)
    if record is None:
        return False
    record = DEFAULTS | {"dtype": "float16" if record.get("device") == "cuda" else "float32"} | record
    for name, setting in settings.items():
        if record.get(name) != setting:
            if overwrite:
                return False
            before, now = str(record.get(name))[:40], str(setting)[:40]
            raise UserError(
                f"{output_dir / output}: was made with {name} {before}, now it is {now}; choose another "
                "--output_dir, or --overwrite to make it again"
            )
    return True


def keep(output_dir: Path, outputs: list[tuple[dict, bytes]]) -> None:
    """Write outputs, each a record that names the "output" and the bytes of the file: all of them, or none.

    What a killed run had ready, the next one puts in place. So a batch is never split, and those after it go through
    the model in the same company as without the kill: in another, their last bits would differ.
    """
    partial, records = output_dir / f"{READY}.partial", []
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for number, (record, content) in enumerate(outputs):
            (partial / str(number)).write_bytes(content)
            records.append(record | {"output_sha256": hashlib.sha256(content).hexdigest()})
        write_json_lines(partial / RECORD, records)
        for path in (*partial.iterdir(), partial):
            flush(path)
        os.replace(partial, output_dir / READY)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # there only where something went wrong, such as a full disk
    put_in_place(output_dir, {})


def put_in_place(output_dir: Path, known: dict[str, list[dict]]) -> None:
    """Move what is ready to where it belongs, after its records: an output without one would look like somebody else's.
    Those that are `known` are there already."""
    ready = output_dir / READY
    records = read_json_lines(ready / RECORD)
    append_records(output_dir, [record for record in records if record not in known.get(record["output"], [])])
    for number, record in enumerate(records):
        if (ready / str(number)).exists():
            path = output_dir / record["output"]
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(ready / str(number), path)
    os.replace(ready, ready.with_suffix(".partial"))
    shutil.rmtree(ready.with_suffix(".partial"))


def finish_writes(output_dir: Path) -> None:
    """After a kill: sweep up what was half written, and put in place what was ready. Raises UserError where another
    file has come to lie there."""
    shutil.rmtree(output_dir / f"{READY}.partial", ignore_errors=True)
    record_file, ready = output_dir / RECORD, output_dir / READY
    content = record_file.read_bytes() if record_file.exists() else b""
    last_line = content.rpartition(b"\n")[2]
    if last_line and not last_line.endswith(b"}"):
        os.truncate(record_file, len(content) - len(last_line))
    if ready.exists():
        known = read_records(output_dir)
        for record in read_json_lines(ready / RECORD):
            own_record(output_dir, record["output"], known)
        put_in_place(output_dir, known)


def noise_seed(seed: int, input_sha256: str) -> int:
    """The seed of one image's noise, 32 bits of a hash of --seed and the image file's own hash.

    The snippets give the same output with `--seed` set to this number.
    """
    digest = hashlib.sha256(f"{seed} {input_sha256}".encode()).digest()
    return int.from_bytes(digest[:4], "big")
