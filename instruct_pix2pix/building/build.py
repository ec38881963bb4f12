"""What the dataset builders share: flags, the plan, the parquet shards, the dataset card and the contact sheet.

A build has two steps. First the *plan*: every row of the dataset as one line of `plan.jsonl` (split, source image, its
hash, its size, ...). Then the *shards*, one after the other in this process or, with --ray, many at a time by Ray's
actors (`on_ray.py`). A file appears at its place whole or not at all, so that a build that was killed at any moment
goes on with the next shard when the same command is run again, and since the plan alone decides what each file holds,
the bytes do not depend on interruptions or on who made them.

    OUTPUT_DIR/
      README.md                             the dataset card, written last
      data/<split>-00000-of-0000N.parquet   the rows, images embedded as encoded files
      plan.jsonl                            the settings, then one line a row: where it came from
      skipped.jsonl                         what was left out, with the reason
      preview.png                           a contact sheet
"""

import argparse
import json
import math
import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from instruct_pix2pix.building import on_ray
from instruct_pix2pix.building.plan import SPLITS, Row, by_reason, draw_instruction
from instruct_pix2pix.building.restoration_sets import SETS
from instruct_pix2pix.cli import UserError, first_line, whole_number
from instruct_pix2pix.files import (
    check_folder,
    code_block,
    file_sha256,
    file_system,
    fingerprint,
    folder_or_url,
    for_others,
    is_remote,
    opened,
    write_bytes,
    write_json_lines,
    write_text,
    written_whole,
)
from instruct_pix2pix.images import add_pixel_limit, contact_sheet, encode_image, read_image

# A row group is what is held in memory; a shard is one file, and what is lost at most when a build is killed.
GROUP_ROWS, GROUP_PIXELS = 32, 16_000_000
SHARD_PIXELS = 96_000_000  # an input and a target of so many pixels take about 300 MB as PNG

# Arrow's own allocator keeps what is freed, and memory would creep up from shard to shard. Read when it is imported.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")


def add_photo_flags(add, required: bool = False) -> None:
    # fmt: off
    add("--photos", type=Path, required=required, metavar="DIR",
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
    add("--output_dir", type=folder_or_url, required=True, metavar="DATASET",
        help="the folder to make or go on with; also on an object storage: s3://…, gs://…, hf://datasets/…")
    add("--seed", type=int, default=0, help="decides what is drawn: images, their order, instructions")
    add("--validation_fraction", type=float, default=0.05, metavar="F",
        help="share of the images for validation, where the source has no splits")
    add("--test_fraction", type=float, default=0.05, metavar="F", help="the same for the test split")
    add("--rows_per_shard", type=whole_number(1), default=500, metavar="N",
        help="at most so many rows in a parquet file, which is what a stopped build loses at most")
    add_pixel_limit(add)
    add = parser.add_argument_group("Ray, to build on several cores or machines").add_argument
    add("--ray", nargs="?", const="", metavar="ADDRESS",
        help="make the shards by Ray's actors, on the cluster at ADDRESS; without one on the cluster that this machine "
             "belongs to, or on this machine alone")
    add("--ray_actors", type=whole_number(1), metavar="N", help="so many at a time; left out, all that find room")
    add("--ray_gpus", type=float, metavar="F",
        help="GPUs of each actor, or a share of one; left out, one where --device asks for it and the cluster has it")
    # fmt: on


def check_dataset_flags(args) -> None:
    if is_remote(args.output_dir):
        try:
            system, folder = file_system(args.output_dir)
            system.exists(f"{folder}/plan.jsonl")
        except Exception as error:  # every storage has kinds of its own
            raise UserError(
                f"--output_dir: {args.output_dir}: {first_line(error)}; give a storage that answers"
            ) from None
    else:
        check_folder("--output_dir", args.output_dir)
    if args.ray is None and (args.ray_actors or args.ray_gpus is not None):
        raise UserError(f"--ray_{'actors' if args.ray_actors else 'gpus'}: without --ray; give that too")
    if args.ray_gpus is not None and args.ray_gpus < 0:
        raise UserError(f"--ray_gpus: {args.ray_gpus} is less than none; give 0 or more")
    folders = [(name, getattr(args, name, None)) for name in ("photos", *SETS)]
    folders += [("pairs", folder) for _, *both in getattr(args, "pairs", []) for folder in both]
    for name, folder in folders:
        if folder and not is_remote(args.output_dir) and args.output_dir.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"--output_dir: {args.output_dir} lies inside --{name}; choose a folder elsewhere")
    fractions = args.validation_fraction, args.test_fraction
    if not (min(fractions) >= 0 and sum(fractions) < 1):
        raise UserError(
            f"--validation_fraction: {fractions[0]} and --test_fraction {fractions[1]} leave no training; "
            "give two shares from 0 up that sum to less than 1"
        )


@dataclass
class Work:
    """What makes shards of planned rows, here or on another machine (it is pickled on the way).

    columns: name -> (what it holds: input, target, instruction or task; a description for the card), in order.
    instructions: of each task, what `read_instructions` returns.
    open_rows() -> make_rows(rows) -> of each row the encoded input and target (bytes). Opening loads what that needs.
    on_gpu: whether it computes on a GPU where there is one.
    """

    args: argparse.Namespace
    columns: dict
    instructions: dict
    open_rows: Callable[[], Callable[[list[Row]], list[tuple[bytes, bytes]]]]
    on_gpu: bool = False


def build(work: Work, settings: dict, about: dict, make_plan) -> None:
    """Make a dataset folder, or what is missing of it.

    settings: what else decides the bytes (JSON values); a folder begun with other settings is refused.
    about: what `card` says of this dataset: title, licence, tags, about, licences and, where counted, sources.
    make_plan() -> (list of Row, list of {"source", "reason"}).
    """
    from tqdm import tqdm

    args, output_dir = work.args, work.args.output_dir
    settings["instructions"] = fingerprint(work.instructions)
    for name in ("all_instructions", "seed", "validation_fraction", "test_fraction", "rows_per_shard"):
        settings[name] = getattr(args, name)
    settings = json.loads(json.dumps(settings))  # as it will be read back
    if not is_remote(output_dir):
        (output_dir / "data").mkdir(parents=True, exist_ok=True)

    rows = get_plan(output_dir, settings, make_plan)
    shards = name_shards(rows, args.rows_per_shard)
    missing = {name: rows for name, rows in shards.items() if not is_complete(f"{output_dir}/data/{name}", len(rows))}
    kept = len(rows) - sum(map(len, missing.values()))
    with tqdm(total=len(rows), initial=kept, desc="rows", unit=" images", mininterval=0.5) as bar:
        checksums = make_shards(work, missing, bar.update)
    for name in tqdm(shards.keys() - missing, desc="checksums", unit=" files", leave=False):
        checksums[name] = file_sha256(f"{output_dir}/data/{name}")
    with opened(f"{output_dir}/skipped.jsonl") as file:
        skipped = [json.loads(line) for line in file]
    write_bytes(f"{output_dir}/preview.png", encode_image(preview(output_dir, shards, work.columns), ".png"))
    write_text(f"{output_dir}/README.md", card(work, about, rows, skipped, {name: checksums[name] for name in shards}))
    counts = ", ".join(f"{number} {split}" for split, number in Counter(row.split for row in rows).items())
    note = f"; {len(skipped)} left out ({by_reason(skipped)}), see {output_dir}/skipped.jsonl" if skipped else ""
    print(f"{output_dir}: {len(rows)} rows ({counts}) in {len(shards)} shards{note}")


def make_shards(work: Work, shards: dict[str, list[Row]], progress: Callable[[int], None]) -> dict[str, str]:
    """Make shards in this process or, with --ray, by actors -> of each its SHA-256. `progress` gets counts of rows."""
    if work.args.ray is not None:
        return on_ray.make_shards(work, shards, progress)
    make_rows = work.open_rows() if shards else None
    return {name: write_shard(work, name, rows, make_rows, progress) for name, rows in shards.items()}


def get_plan(output_dir: Path | str, settings: dict, make_plan) -> list[Row]:
    """Read the plan, or make it."""
    path = f"{output_dir}/plan.jsonl"
    system, folder = file_system(output_dir)
    if not system.exists(f"{folder}/plan.jsonl"):
        names = [path.rstrip("/").rpartition("/")[2] for path in system.glob(f"{folder}/*")]
        ours = ("data", "skipped.jsonl")  # of a build that was killed before there was a plan
        if any(name not in ours and not name.startswith(".") for name in names) or system.glob(f"{folder}/data/*"):
            raise UserError(f"--output_dir: {output_dir} holds something else; choose a new folder")
        if is_remote(output_dir):  # a storage that takes nothing is noticed before the images are looked at
            write_json_lines(f"{output_dir}/skipped.jsonl", [])
        rows, skipped = make_plan()
        if not rows:
            reason = f"{skipped[0]['source']}: {skipped[0]['reason']}" if skipped else "none was found"
            raise UserError(f"no image can be used ({reason}); give others")
        rows.sort(key=lambda row: SPLITS.index(row.split))  # stable: within a split the order of make_plan
        write_json_lines(f"{output_dir}/skipped.jsonl", skipped)
        write_json_lines(path, chain([{"settings": settings}], map(asdict, rows)))
        del rows, skipped  # the plan is what grows with the number of images: do not hold it twice
    with opened(path) as file:
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


def is_complete(path: str, count: int) -> bool:
    """Whether a file is there with all its rows. A damaged one is made again."""
    import pyarrow.parquet as pq

    try:
        with opened(path) as file:
            return pq.read_metadata(file).num_rows == count
    except (OSError, ValueError):
        return False


def write_shard(work: Work, name: str, rows: list[Row], make_rows, progress=lambda count: None) -> str:
    """Make a shard, row group by row group, and put it at its place -> its SHA-256. What is there is replaced by the
    same bytes, so that a shard may be made again at any time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = arrow_schema(work.columns, work.args.all_instructions)
    # PNG does not compress further, and a dictionary of images only costs time.
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    with written_whole(f"{work.args.output_dir}/data/{name}") as temporary:
        with pq.ParquetWriter(temporary, schema, **options) as writer:
            for group in cut(rows, GROUP_ROWS, GROUP_PIXELS):
                writer.write_table(pa.table(make_columns(work, group, make_rows), schema=schema))
                progress(len(group))
        return file_sha256(temporary)


def make_columns(work: Work, rows: list[Row], make_rows) -> dict[str, list]:
    inputs, targets = zip(*make_rows(rows), strict=True)
    content = {
        "input": [{"bytes": data, "path": None} for data in inputs],
        "target": [{"bytes": data, "path": None} for data in targets],
        "instruction": [draw_instruction(row, work.instructions, work.args) for row in rows],
        "task": [row.task for row in rows],
    }
    return {name: content[role] for name, (role, _) in work.columns.items()}


def arrow_schema(columns: dict, all_instructions: bool):
    """The Arrow schema of `columns`, with the metadata by which `datasets` and the Hub know images."""
    from datasets import Features, Image, List, Value

    text = Value("string")
    types = {"input": Image(), "target": Image(), "task": text, "instruction": List(text) if all_instructions else text}
    return Features({name: types[role] for name, (role, _) in columns.items()}).arrow_schema


def preview(output_dir: Path | str, shards: dict[str, list[Row]], columns: dict):
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
        with pq.ParquetFile(opened(f"{output_dir}/data/{name}")) as file:
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
    of_two = "=" in argument and not is_remote(argument)
    return ":".join(map(for_others, argument.split(":"))) if of_two else for_others(argument)


def card(work: Work, about: dict, rows: list[Row], skipped: list[dict], checksums: dict[str, str]) -> str:
    """The dataset card: front matter that `datasets.load_dataset` reads, then what a reader needs to know."""
    splits = [split for split in SPLITS if any(row.split == split for row in rows)]
    counts = Counter((row.task, row.split) for row in rows)
    tasks = list(dict.fromkeys(row.task for row in rows))
    table = [[task, *(counts[task, split] for split in splits)] for task in tasks]
    if len(tasks) > 1:
        table.append(["all", *(sum(counts[task, split] for task in tasks) for split in splits)])
    text = about["about"] + " No picture is in two splits."
    if any(training != testing for training, testing in work.instructions.values()):
        text += " The test split has wordings of the instructions that the other splits do not have."
    wording = ", every wording" if work.args.all_instructions else ""
    meanings = {name: held + (wording if role == "instruction" else "") for name, (role, held) in work.columns.items()}

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

Seed {work.args.seed}. SHA-256 of the files:

```
{lines(f"{digest}  data/{name}" for name, digest in checksums.items())}
```
"""
