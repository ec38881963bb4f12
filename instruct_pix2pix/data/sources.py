"""What a dataset of triples is called: its flags, the split, and the column of each role.

The command line reads this module for its flags, so nothing heavy is imported here.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from instruct_pix2pix.cli import Parser, UserError, above_zero, nearest, warn, whole_number
from instruct_pix2pix.data.geometry import GEOMETRIES
from instruct_pix2pix.data.pairing import SPLIT_NAMES
from instruct_pix2pix.images import add_pixel_limit

# Names under which published datasets keep the three columns.
COLUMN_NAMES = {
    "original_image": ("input_image", "original_image", "source_image", "source_img", "image", "input"),
    "edit_prompt": ("edit_prompt", "instruction", "prompt", "text", "caption"),
    "edited_image": ("edited_image", "cartoonized_image", "ground_truth_image", "target_image", "target_img", "output"),
}
TASK_COLUMN = "task"  # where rows of several tasks are mixed, the name of each row's


@dataclass(frozen=True)
class Source:
    """One split of a dataset. `str()` is how messages call it."""

    name: str  # a folder, a file, or a Hub id; with `edited_dir` the folder of the originals
    flag: str  # the flag that gave the name, such as --dataset_name
    edited_dir: str | None = None
    config_name: str | None = None
    split: str | None = None  # train when left out, or the only one there is
    original_image_column: str | None = None  # found by name when left out, like the other two
    edit_prompt_column: str | None = None
    edited_image_column: str | None = None
    instruction: str | None = None  # for every row, instead of its own
    on_bad_row: str = "skip"  # or error
    check_all: bool = False  # decode every image before anything else
    cache_dir: str | None = None  # of the `datasets` library; its own place when left out
    streaming: bool = False  # parquet shards that are read where they are, see streaming.StreamedTable
    stream_cache: float = math.inf  # bytes on disk for what is read of them
    token: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"{self.flag}: {self.name}"


def add_source_flags(group, split: str | None = None, editing: bool = False) -> None:
    """Add to a parser, or a group of flags, what `source_of` reads besides the name of the dataset. The flags of
    `editing` a script that edits images has already."""
    add = group.add_argument
    add("--original_dir", metavar="DIR", help="Two folders of equal file names instead of a dataset: the originals.")
    add("--edited_dir", metavar="DIR", help="With --original_dir: the edited images.")
    if not editing:
        add("--instruction", metavar="TEXT_OR_FILE", help="For every row: a text, or a .txt of wordings, one a line.")
        add_pixel_limit(add)
    add("--dataset_config_name", help="Configuration of the dataset, where it has several.")
    absent = "train, or the only one there is, when left out." if split is None else "what has no splits is train."
    add("--split", default=split, help=f"Split of the dataset: {absent}")
    add("--original_image_column", help="Column of the source image; found by name when left out.")
    add("--edit_prompt_column", help="Column of the instruction, a string or a list of wordings; found by name.")
    add("--edited_image_column", help="Column of the edited image; found by name when left out.")
    add(
        "--on_bad_row",
        choices=("skip", "error"),
        default="skip",
        help="What to do about a row that cannot be used (an image missing or cut short, another aspect ratio, no"
        " instruction): let another row stand in for it and list it in OUTPUT_DIR/skipped.jsonl, or stop.",
    )
    add(
        "--check_rows",
        choices=("sample", "all"),
        default="sample",
        help="Before anything else, look at sizes and instructions of up to 10,000 rows, or decode all images of all.",
    )


def source_of(args: argparse.Namespace, *flags: str, **options) -> Source:
    """The Source that parsed flags name: --original_dir with --edited_dir, or the first of `flags` that was given.

    `options` are the fields of Source that `add_source_flags` has no flag for. Raises UserError where none is named.
    """
    if (args.original_dir is None) != (args.edited_dir is None):
        missing = "--original_dir" if args.original_dir is None else "--edited_dir"
        raise UserError(f"{missing}: missing; two folders make pairs")
    given = [flag for flag in flags if getattr(args, flag.removeprefix("--"))]
    if args.original_dir and given:
        raise UserError(f"--original_dir: given beside {given[0]}; name one dataset")
    if not args.original_dir and not given:
        raise UserError(f"{flags[0]}: none given; name a dataset, or two folders with --original_dir and --edited_dir")
    flag = given[0] if given else "--original_dir"
    for name in ("--original_dir", "--edited_dir") if args.original_dir else ():
        if not Path(getattr(args, name.removeprefix("--"))).expanduser().is_dir():
            raise UserError(f"{name}: {getattr(args, name.removeprefix('--'))} is not a folder")
    return Source(
        getattr(args, flag.removeprefix("--")),
        flag,
        edited_dir=args.edited_dir,
        config_name=args.dataset_config_name,
        split=args.split,
        **{f"{role}_column": getattr(args, f"{role}_column") for role in COLUMN_NAMES},
        instruction=args.instruction,
        on_bad_row=args.on_bad_row,
        check_all=args.check_rows == "all",
        **options,
    )


# ---- mixtures

# What a dataset of a mixture may say, most of it by the flag that says it for a single one; and the mixture of all.
OF_ONE = ("dataset_name", "original_dir", "edited_dir", "dataset_config_name", "split", "instruction")
OF_ONE += ("original_image_column", "edit_prompt_column", "edited_image_column", "image_geometry", "max_train_samples")
OF_ONE += ("weight", "cap", "replay")
OF_ALL = ("datasets", "temperature", "cap")


def read_mixture(args: argparse.Namespace, **options) -> list[argparse.Namespace]:
    """The datasets that the file of --dataset_mixture names: of each the flags of a single dataset, those that it
    leaves out as the command line has them, beside weight, cap (None for none), temperature, replay and `source`, a
    Source with these `options`. Raises UserError in one line for what the file has wrong."""
    import yaml

    path, mistake = args.dataset_mixture, f"--dataset_mixture: {args.dataset_mixture}"
    for other in ("dataset_name", "train_data_dir", "original_dir", "edited_dir"):
        if getattr(args, other):
            raise UserError(f"--dataset_mixture: given beside --{other}; name one of them")
    try:
        # Values stay as they are written, for the flags' own types to read.
        content = yaml.load(Path(path).expanduser().read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{mistake} cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict) or not content.get("datasets") or not isinstance(content["datasets"], list):
        raise UserError(f"{mistake} has no list of `datasets`; see docs/mixtures.md")
    parser = Parser("a dataset", add_help=False)
    add_source_flags(parser)
    add = parser.add_argument
    add("--dataset_name")
    add("--image_geometry", choices=GEOMETRIES)
    add("--max_train_samples", type=whole_number(1))
    add("--weight", type=above_zero, default=1.0)
    add("--cap", type=whole_number(1))
    add("--temperature", type=above_zero, default=1.0)
    add("--replay", type=str.lower, choices=("true", "false"), default="false")
    parser.set_defaults(**vars(args))
    common = _read_keys({k: v for k, v in content.items() if k != "datasets"}, OF_ALL, parser, mistake)
    entries = []
    for number, entry in enumerate(content["datasets"], 1):
        where = f"{mistake}: dataset {number}"
        read = _read_keys(entry, OF_ONE, parser, where)
        read.replay, read.cap, read.temperature = read.replay == "true", read.cap or common.cap, common.temperature
        try:
            read.source = source_of(read, "--dataset_name", **options)
        except UserError as error:
            raise UserError(f"{where}: {str(error).removeprefix('--')}") from None
        entries.append(read)
    return entries


def _read_keys(entry: dict | list | str, known: tuple[str, ...], parser: Parser, where: str) -> argparse.Namespace:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: {entry!r} is no dataset; write `- dataset_name: ...`")
    for key, value in entry.items():
        if key not in known:
            raise UserError(f"{where}: {key} is no key; the nearest is {nearest(key, known)}")
        if not isinstance(value, str):
            raise UserError(f"{where}: {key} takes one value")
    try:
        return parser.parse_args([f"--{key}={value}" for key, value in entry.items()])
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('--').removesuffix('; see --help')}") from None


def choose_split(available: Iterable[str], source: Source) -> str:
    """The one of these splits that `source` asks for: by its very name, or another of the same meaning (val for
    validation). Raises UserError where there is none."""
    available = list(available)
    wanted = source.split or "train"
    if wanted in available:
        return wanted
    alike = [name for name in available if same_split(name, wanted)]
    if len(alike) == 1:
        return alike[0]
    if source.split is None and len(available) == 1:
        warn(f"{source}: its only split is {available[0]}, which is taken")
        return available[0]
    remedy = "; choose one with --split" if source.split is None else ""
    raise UserError(f"{source} has no split named {wanted}, only {', '.join(available)}{remedy}")


def same_split(one: str | None, other: str | None) -> bool:
    """Whether two names mean one split, as val and validation do; None is train."""
    one, other = (SPLIT_NAMES.get(name, name) for name in ((one or "train").lower(), (other or "train").lower()))
    return one == other


def find_columns(available: list[str], source: Source) -> dict[str, str]:
    """The column of each role: the one the flag names, or the only known name that is there.

    Where an instruction for all rows is given, edit_prompt is not looked for.
    """
    columns = {}
    for role, names in COLUMN_NAMES.items():
        if role == "edit_prompt" and source.instruction is not None:
            continue
        given = getattr(source, f"{role}_column")
        if given is not None:
            if given not in available:
                raise UserError(f"--{role}_column: {given} is not a column; there are {', '.join(available)}")
            columns[role] = given
            continue
        found = [name for name in names if name in available]
        if len(found) != 1:
            what = f"several columns could be it ({', '.join(found)})" if found else "no column has a known name"
            raise UserError(f"--{role}_column: {what}; name one of {', '.join(available)} ({source})")
        columns[role] = found[0]
    return columns


def wordings_of(source: Source) -> list[str] | None:
    """The wordings of --instruction: the text, or the lines of the .txt file it names; None where it is not given."""
    if source.instruction is None:
        return None
    if source.instruction.endswith(".txt"):
        return read_wordings(Path(source.instruction).expanduser(), "--instruction")
    if not source.instruction.strip():
        raise UserError("--instruction: the text is empty; say what to do with the images")
    return [source.instruction]


def read_wordings(path: Path, what: str) -> list[str]:
    """The lines of a text file, of which there must be some. Raises UserError, beginning with `what`."""
    if lines := read_lines(path, what):
        return lines
    raise UserError(f"{what}: {path.name} is empty; write one wording a line")


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a text file, blank ones left out. Raises UserError, beginning with `what`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{what}: {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{what}: {path.name} cannot be read ({error}); save it as UTF-8") from None
    return [line.strip() for line in text.splitlines() if line.strip()]
