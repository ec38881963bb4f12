"""What the dataset builders share: flags, the plan, the parquet shards, the dataset card and the contact sheet.

A build has two steps. First the *plan*: every row of the dataset as one line of `plan.jsonl` (split, source image, its
hash, its size, ...). Then the *shards*: each process makes the shards whose number modulo the number of processes is
its own, a row group at a time. Everything is written to a temporary name and renamed when complete, so that a build
that was killed at any moment goes on where it stopped when the same command is run again, and since the plan alone
decides what each file holds, the bytes do not depend on interruptions or on the number of processes.

    OUTPUT_DIR/
      README.md                             the dataset card, written last
      data/<split>-00000-of-0000N.parquet   the rows, images embedded as encoded files
      plan.jsonl                            the settings, then one line a row: where it came from
      skipped.jsonl                         what was left out, with the reason
      preview.png                           a contact sheet
      parts/                                finished row groups of unfinished shards, gone at the end
"""

import json
import math
import os
import shlex
import shutil
import sys
import time
from collections import Counter
from dataclasses import asdict
from itertools import chain
from pathlib import Path

from instruct_pix2pix.building.plan import SPLITS, Row, by_reason, draw_instruction
from instruct_pix2pix.building.restoration_sets import SETS
from instruct_pix2pix.cli import UserError, whole_number
from instruct_pix2pix.files import (
    check_folder,
    code_block,
    file_sha256,
    fingerprint,
    flush,
    for_others,
    naming,
    write_bytes,
    write_json_lines,
    write_text,
)
from instruct_pix2pix.images import add_pixel_limit, contact_sheet, encode_image, read_image

# A row group is what is held in memory and what is lost when a build is killed; a shard is one file.
GROUP_ROWS, GROUP_PIXELS = 32, 16_000_000
SHARD_PIXELS = 96_000_000  # an input and a target of so many pixels take about 300 MB as PNG

# Arrow's own allocator keeps what is freed, and memory would creep up from shard to shard. Read when it is imported.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")


def add_photo_flags(add) -> None:
    # fmt: off
    add("--photos", type=Path, metavar="DIR",
        help="folder of photos, nested in any way; children train, val or validation, test are its splits")
    add("--photos_license", metavar="TEXT", help="licence of the photos, for the dataset card; left out, it is unknown")
    # fmt: on


def add_dataset_flags(parser, instructions: Path, what: str) -> None:
    # fmt: off
    add = parser.add_argument_group("instructions").add_argument
    add("--instructions", type=Path, default=instructions, metavar=what.split()[0].upper(),
        help=f"{what}, one sentence a line; lines that begin with 'held-out:' are for the test split only")
    add("--all_instructions", action="store_true",
        help="keep the whole list in every row, so that training draws one anew each epoch")
    add = parser.add_argument_group("dataset").add_argument
    add("--output_dir", type=Path, required=True, metavar="DATASET", help="the folder to make or go on with")
    add("--seed", type=int, default=0, help="decides what is drawn: images, their order, instructions")
    add("--validation_fraction", type=float, default=0.05, metavar="F",
        help="share of the images for validation, where the source has no splits")
    add("--test_fraction", type=float, default=0.05, metavar="F", help="the same for the test split")
    add("--rows_per_shard", type=whole_number(1), default=500, metavar="N",
        help="at most so many rows in a parquet file; processes share the work by file")
    add_pixel_limit(add)
    # fmt: on


def check_dataset_flags(args) -> None:
    check_folder("--output_dir", args.output_dir)
    folders = [(name, getattr(args, name, None)) for name in ("photos", *SETS)]
    folders += [("pairs", folder) for _, *both in getattr(args, "pairs", []) for folder in both]
    for name, folder in folders:
        if folder and args.output_dir.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"--output_dir: {args.output_dir} lies inside --{name}; choose a folder elsewhere")
    fractions = args.validation_fraction, args.test_fraction
    if not (min(fractions) >= 0 and sum(fractions) < 1):
        raise UserError(
            f"--validation_fraction: {fractions[0]} and --test_fraction {fractions[1]} leave no training; "
            "give two shares from 0 up that sum to less than 1"
        )


def build(args, settings: dict, instructions: dict, columns: dict, about: dict, make_plan, make_rows) -> None:
    """Make a dataset folder, or what is missing of it. Every process calls this with the same arguments.

    args: the flags of `add_dataset_flags`.
    settings: what else decides the bytes (JSON values); a folder begun with other settings is refused.
    instructions: of each task, what `read_instructions` returns.
    columns: name -> (what it holds: input, target, instruction or task; a description for the card), in order.
    about: what `card` says of this dataset: title, licence, tags, about, licences and, where counted, sources.
    make_plan() -> (list of Row, list of {"source", "reason"}): called once, by the first process.
    make_rows(rows) -> of each row the encoded input and target (bytes).
    """
    from tqdm import tqdm

    output_dir = args.output_dir
    # This process's number and how many there are, from what `accelerate launch` puts in the environment.
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    settings["instructions"] = fingerprint(instructions)
    for name in ("all_instructions", "seed", "validation_fraction", "test_fraction", "rows_per_shard"):
        settings[name] = getattr(args, name)
    settings = json.loads(json.dumps(settings))  # as it will be read back
    (output_dir / "data").mkdir(parents=True, exist_ok=True)

    def make_columns(rows: list[Row]) -> dict[str, list]:
        inputs, targets = zip(*make_rows(rows), strict=True)
        content = {
            "input": [{"bytes": data, "path": None} for data in inputs],
            "target": [{"bytes": data, "path": None} for data in targets],
            "instruction": [draw_instruction(row, instructions, args) for row in rows],
            "task": [row.task for row in rows],
        }
        return {name: content[role] for name, (role, _) in columns.items()}

    schema = arrow_schema(columns, args.all_instructions)
    rows = get_plan(output_dir, settings, make_plan, rank)
    shards = name_shards(rows, args.rows_per_shard)
    mine = list(shards)[rank::world]
    missing = [name for name in mine if not is_complete(output_dir / "data" / name, len(shards[name]))]
    kept = sum(len(shards[name]) for name in mine if name not in missing)
    total = sum(len(shards[name]) for name in mine)
    label = "rows" if world == 1 else f"rows, process {rank + 1} of {world}"
    with tqdm(total=total, initial=kept, desc=label, unit=" images", position=rank, mininterval=0.5) as bar:
        for name in missing:
            with naming(output_dir / "data" / name):
                write_shard(output_dir, name, shards[name], schema, make_columns, bar)
    if rank != 0:
        return
    others = [name for name in shards if name not in mine]
    for name in tqdm(others, desc="waiting for other processes", unit=" shards", disable=not others):
        while not is_complete(output_dir / "data" / name, len(shards[name])):
            time.sleep(0.5)

    checksums = {}
    for name in tqdm(shards, desc="checksums", unit=" files", leave=False):
        checksums[name] = file_sha256(output_dir / "data" / name)
    skipped_path = output_dir / "skipped.jsonl"
    skipped = [json.loads(line) for line in skipped_path.read_text().splitlines()]
    write_bytes(output_dir / "preview.png", encode_image(preview(output_dir, shards, columns), ".png"))
    write_text(output_dir / "README.md", card(args, columns, instructions, about, rows, skipped, checksums))
    shutil.rmtree(output_dir / "parts", ignore_errors=True)
    for left_by_a_kill in output_dir.glob(".*.partial"):
        left_by_a_kill.unlink()
    counts = ", ".join(f"{number} {split}" for split, number in Counter(row.split for row in rows).items())
    note = f"; {len(skipped)} left out ({by_reason(skipped)}), see {skipped_path}" if skipped else ""
    print(f"{output_dir}: {len(rows)} rows ({counts}) in {len(shards)} shards{note}")


def get_plan(output_dir: Path, settings: dict, make_plan, rank: int) -> list[Row]:
    """Read the plan, or make it. Processes other than the first wait for it."""
    path = output_dir / "plan.jsonl"
    while not path.exists() and rank != 0:
        time.sleep(0.2)
    if not path.exists():
        if any((output_dir / name).exists() for name in ("README.md", "preview.png")) or any(output_dir.glob("data/*")):
            raise UserError(f"--output_dir: {output_dir} holds something else; choose a new folder")
        rows, skipped = make_plan()
        if not rows:
            reason = f"{skipped[0]['source']}: {skipped[0]['reason']}" if skipped else "none was found"
            raise UserError(f"no image can be used ({reason}); give others")
        rows.sort(key=lambda row: SPLITS.index(row.split))  # stable: within a split the order of make_plan
        write_json_lines(output_dir / "skipped.jsonl", skipped)
        write_json_lines(path, chain([{"settings": settings}], map(asdict, rows)))
        del rows, skipped  # the plan is what grows with the number of images: do not hold it twice
    with open(path) as file:
        found = json.loads(file.readline())["settings"]
        for name in [*settings, *found]:
            if found.get(name) != settings.get(name):
                then, now = found.get(name), settings.get(name)
                raise UserError(
                    f"--output_dir: {output_dir} was begun with another {name} ({str(then)[:60]}, now "
                    f"{str(now)[:60]}); run the command it was begun with or choose another folder"
                )
        rows = [Row(**json.loads(line)) for line in file]
    for row in rows:  # one string object per split and task: the plan is the only thing that grows with the images
        row.split, row.task, row.input = sys.intern(row.split), sys.intern(row.task), sys.intern(row.input)
    return rows


def cut(rows: list[Row], max_rows: int, max_pixels: float = math.inf) -> list[list[Row]]:
    """Consecutive runs of at most `max_rows` rows and `max_pixels` pixels (a larger row stands alone)."""
    runs, pixels = [], 0
    for row in rows:
        size = row.width * row.height
        if not runs or len(runs[-1]) == max_rows or pixels + size > max_pixels:
            runs.append([])
            pixels = 0
        runs[-1].append(row)
        pixels += size
    return runs


def name_shards(rows: list[Row], rows_per_shard: int) -> dict[str, list[Row]]:
    """File name -> rows. Inside a shard rows of one size come together, to be worked on in batches."""
    shards = {}
    for split in SPLITS:
        runs = cut([row for row in rows if row.split == split], rows_per_shard, SHARD_PIXELS)
        for i, run in enumerate(runs):
            name = f"{split}-{i:05d}-of-{len(runs):05d}.parquet"
            shards[name] = sorted(run, key=lambda row: (row.height, row.width))
    return shards


def is_complete(path: Path, count: int) -> bool:
    """Whether a file is there with all its rows. A renamed file is whole; a damaged one is made again."""
    import pyarrow.parquet as pq

    try:
        return path.exists() and pq.read_metadata(path).num_rows == count
    except (OSError, ValueError):
        return False


def write_shard(output_dir: Path, name: str, rows: list[Row], schema, make_columns, bar) -> None:
    """Make a shard's row groups, each a file in parts/ as soon as it is done, then join them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # PNG does not compress further, and a dictionary of images only costs time.
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    parts = output_dir / "parts" / name.removesuffix(".parquet")
    parts.mkdir(parents=True, exist_ok=True)
    # Not files.written_whole: a killed build goes on with the same names and leaves nothing behind.
    temporary = parts / "unfinished"
    paths = []
    for i, group in enumerate(cut(rows, GROUP_ROWS, GROUP_PIXELS)):
        paths.append(parts / f"{i:05d}.parquet")
        if not is_complete(paths[-1], len(group)):
            pq.write_table(pa.table(make_columns(group), schema=schema), temporary, **options)
            os.replace(temporary, paths[-1])
        bar.update(len(group))
    with pq.ParquetWriter(temporary, schema, **options) as writer:
        for path in paths:
            writer.write_table(pq.read_table(path, schema=schema))
    flush(temporary)
    os.replace(temporary, output_dir / "data" / name)
    shutil.rmtree(parts, ignore_errors=True)


def arrow_schema(columns: dict, all_instructions: bool):
    """The Arrow schema of `columns`, with the metadata by which `datasets` and the Hub know images."""
    import pyarrow as pa

    image = {"_type": "Image"}, pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    text = {"dtype": "string", "_type": "Value"}, pa.string()
    texts = {"feature": text[0], "_type": "List"}, pa.list_(pa.string())
    types = {"input": image, "target": image, "task": text, "instruction": texts if all_instructions else text}
    features = {name: types[role][0] for name, (role, _) in columns.items()}
    fields = [(name, types[role][1]) for name, (role, _) in columns.items()]
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def preview(output_dir: Path, shards: dict[str, list[Row]], columns: dict):
    """A contact sheet: rows of every task, input left, target right, instruction below."""
    import pyarrow.parquet as pq

    by_task: dict[str, list[tuple[str, int]]] = {}
    for name, rows in shards.items():
        for i, row in enumerate(rows):
            places = by_task.setdefault(row.task, [])
            if len(places) < 1000:
                places.append((name, i))
    each = -(-12 // len(by_task))  # twelve pairs in all; rows lie by size: take them from all over the shards
    chosen = [place for _, places in sorted(by_task.items()) for place in places[:: -(-len(places) // each)]]

    column = {role: name for name, (role, _) in columns.items()}
    entries = []
    for name, i in chosen:
        file = pq.ParquetFile(output_dir / "data" / name)
        group = 0
        while i >= file.metadata.row_group(group).num_rows:
            i -= file.metadata.row_group(group).num_rows
            group += 1
        row = file.read_row_group(group).slice(i, 1).to_pylist()[0]
        text = row[column["instruction"]]
        caption = text if isinstance(text, str) else f"{text[0]} (1 of {len(text)})"
        entries.append(([read_image(row[column[role]]["bytes"]) for role in ("input", "target")], [caption]))
    return contact_sheet(entries, columns=2)


def shown(argument: str) -> str:
    """An argument of the command line as it is published; TASK=DEGRADED_DIR:CLEAN_DIR holds two paths."""
    return ":".join(map(for_others, argument.split(":"))) if "=" in argument else for_others(argument)


def card(
    args,
    columns: dict,
    instructions: dict,
    about: dict,
    rows: list[Row],
    skipped: list[dict],
    checksums: dict[str, str],
) -> str:
    """The dataset card: front matter that `datasets.load_dataset` reads, then what a reader needs to know."""
    splits = [split for split in SPLITS if any(row.split == split for row in rows)]
    counts = Counter((row.task, row.split) for row in rows)
    tasks = list(dict.fromkeys(row.task for row in rows))
    table = [[task, *(counts[task, split] for split in splits)] for task in tasks]
    if len(tasks) > 1:
        table.append(["all", *(sum(counts[task, split] for task in tasks) for split in splits)])
    text = about["about"] + " No picture is in two splits."
    if any(training != testing for training, testing in instructions.values()):
        text += " The test split has wordings of the instructions that the other splits do not have."
    wording = ", every wording" if args.all_instructions else ""
    meanings = {name: held + (wording if role == "instruction" else "") for name, (role, held) in columns.items()}

    from huggingface_hub import DatasetCardData

    lines = "\n".join
    sources = f"Found:\n\n{about['sources']}\n\n" if about.get("sources") else ""
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits]
    metadata = DatasetCardData(
        license=about["licence"],
        task_categories=["image-to-image"],
        tags=about["tags"],
        configs=[{"config_name": "default", "data_files": files}],
    )
    return f"""---
{metadata.to_yaml()}
---

# {about["title"]}

{text}

![preview](preview.png)

## Columns

| column | content |
|---|---|
{lines(f"| `{name}` | {meaning} |" for name, meaning in meanings.items())}

## Rows

| task | {" | ".join(splits)} |
|---|{"---:|" * len(splits)}
{lines(f"| {' | '.join(map(str, line))} |" for line in table)}

{sources}Left out: {len(skipped)} (`skipped.jsonl` says which and why){f": {by_reason(skipped)}" if skipped else ""}.

## Licences

{about["licences"]}

## How it was made

{code_block("bash", shlex.join(["python", *map(shown, sys.argv)]))}

Seed {args.seed}. SHA-256 of the files:

```
{lines(f"{digest}  data/{name}" for name, digest in checksums.items())}
```
"""
