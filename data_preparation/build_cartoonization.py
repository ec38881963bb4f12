"""Build a cartoonization dataset: photos, an instruction, and the cartoon of each photo.

    python data_preparation/build_cartoonization.py --photos DIR --cartoonizer opencv --output_dir DATASET
    accelerate launch --num_processes 8 data_preparation/build_cartoonization.py --output_dir DATASET

Columns: original_image, edit_prompt, cartoonized_image. The folder that comes out is read by
`datasets.load_dataset(DATASET)` and by the training scripts. A build that was stopped goes on when the same
command is run again; the result is the same to the byte, and the same for any number of processes.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

from records import (
    Parser,
    Row,
    UserError,
    build,
    card,
    draw_instruction,
    encode_png,
    read_instructions,
    run,
    split_of,
    unit_hash,
)
from sources import BadImage, Photos, decode_image, find_photos, image_hash, ordered_map

INSTRUCTIONS = Path(__file__).parent / "instructions" / "cartoonize.txt"
THREADS = 8  # decoding and encoding images release the interpreter's lock


def parse_arguments():
    # fmt: off
    parser = Parser(__doc__)
    add = parser.add_argument_group("photos").add_argument
    add("--photos", type=Path, metavar="DIR",
        help="folder of photos, nested in any way; children train, val or validation, test are its splits")
    add("--split", choices=["all", "train", "validation", "test"], default="all",
        help="which of the source's own splits to take; the photos of a single one are divided anew, by hash")
    add("--max_num_samples", type=int, default=5000, metavar="N",
        help="at most so many rows, chosen by --seed; 0 takes every photo")
    add("--max_short_side", type=int, default=720, metavar="PIXELS",
        help="scale larger photos down to this short side; sides are then cropped to multiples of 8")
    add("--photos_license", default="unknown, see where they come from", metavar="TEXT",
        help="licence of the photos, for the dataset card")

    add = parser.add_argument_group("cartoons").add_argument
    add("--cartoonizer", choices=["opencv"], default="opencv", help="opencv is classical filtering")

    add = parser.add_argument_group("instructions").add_argument
    add("--instructions", type=Path, default=INSTRUCTIONS, metavar="FILE",
        help="one sentence a line; lines that begin with 'held-out:' are for the test split only")
    add("--all_instructions", action="store_true",
        help="keep the whole list in every row, so that training draws one anew each epoch")

    add = parser.add_argument_group("dataset").add_argument
    add("--output_dir", type=Path, required=True, metavar="DATASET", help="the folder to make or go on with")
    add("--seed", type=int, default=0, help="decides which photos are taken, their order and instructions")
    add("--validation_fraction", type=float, default=0.05, metavar="F",
        help="share of the photos for validation, where the source has no splits")
    add("--test_fraction", type=float, default=0.05, metavar="F", help="the same for the test split")
    add("--rows_per_shard", type=int, default=500, metavar="N",
        help="at most so many rows in a parquet file; processes share the work by file")
    # fmt: on
    args = parser.parse_args()
    if args.photos is None:
        parser.error("--photos: missing; name a folder of photos")
    for flag, least in (("max_num_samples", 0), ("max_short_side", 8), ("rows_per_shard", 1)):
        if getattr(args, flag) < least:
            parser.error(f"--{flag}: {getattr(args, flag)} is too small; give {least} or more")
    if (
        min(args.validation_fraction, args.test_fraction) < 0
        or args.validation_fraction + args.test_fraction >= 1
    ):
        parser.error(
            "--validation_fraction: with --test_fraction it must leave something to train on; "
            "give two shares from 0 that sum to less than 1"
        )
    return parser, args


def plan(photos: Photos, args) -> tuple[list[Row], list[dict]]:
    """Choose the photos, in an order decided by the seed and their names; look at each for hash and size."""
    from cartoonizer import fitted_size
    from tqdm import tqdm

    rows, skipped, by_hash = [], [], {}

    def look(candidate):
        name, split = candidate
        try:
            image = decode_image(photos.read(name))
            width, height = fitted_size(image.shape[1], image.shape[0], args.max_short_side)
            if min(width, height) < 8:
                raise BadImage(
                    f"{image.shape[1]}x{image.shape[0]} is too small: no side may be under 8 pixels"
                )
            return name, split, image_hash(image), width, height
        except (BadImage, OSError) as error:
            return name, split, str(error)

    candidates = [
        pair for pair in zip(photos.names, photos.splits, strict=True) if args.split in ("all", pair[1])
    ]
    if not candidates:
        raise UserError(f"--split: the photos have no {args.split} split; leave it out to take them all")
    candidates.sort(key=lambda pair: unit_hash(args.seed, pair[0]))
    wanted = args.max_num_samples or len(candidates)
    with tqdm(total=min(wanted, len(candidates)), desc="plan", unit=" images", mininterval=0.5) as bar:
        for name, split, *found in ordered_map(look, candidates, THREADS):
            if len(found) == 1:
                skipped.append({"source": name, "reason": found[0]})
                continue
            digest, width, height = found
            if args.split != "all" or not split:
                split = split_of(digest, args.validation_fraction, args.test_fraction)
            if digest in by_hash:
                twin = by_hash[digest]
                skipped.append({"source": name, "reason": f"the same picture as {twin.source}"})
                # A picture that is also in a held-out split belongs there.
                twin.split = min(twin.split, split, key=["test", "validation", "train"].index)
                continue
            by_hash[digest] = Row(split, name, digest, width, height, task="cartoonize")
            rows.append(by_hash[digest])
            bar.update()
            if len(rows) == wanted:
                break
    return rows, skipped


def main(args) -> None:
    instructions = read_instructions(args.instructions)
    photos = find_photos(args.photos)
    settings = {
        "cartoonizer": args.cartoonizer,
        "photos": photos.digest,
        "instructions": hashlib.sha256(repr(instructions).encode()).hexdigest(),
        **{
            name: getattr(args, name)
            for name in (
                "split",
                "max_num_samples",
                "max_short_side",
                "all_instructions",
                "seed",
                "validation_fraction",
                "test_fraction",
                "rows_per_shard",
            )
        },
    }
    features = {
        "original_image": {"_type": "Image"},
        "edit_prompt": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"}
        if args.all_instructions
        else {"dtype": "string", "_type": "Value"},
        "cartoonized_image": {"_type": "Image"},
    }

    import numpy as np
    from cartoonizer import fit_photo, opencv_cartoonize

    cartoonize, batch_size = opencv_cartoonize, 8
    pool = ThreadPoolExecutor(THREADS)

    def load(row: Row):
        image = decode_image(photos.read(row.source))
        if image_hash(image) != row.image_hash:
            raise UserError(
                f"--photos: {row.source} has changed since the plan was made; remove {args.output_dir}"
            )
        return fit_photo(image, args.max_short_side)

    def make_rows(rows: list[Row]) -> list[dict]:
        made = []
        for _, same_size in groupby(rows, key=lambda row: (row.height, row.width)):
            same_size = list(same_size)
            for i in range(0, len(same_size), batch_size):
                batch = same_size[i : i + batch_size]
                originals = np.stack(list(pool.map(load, batch)))
                encoded = list(pool.map(encode_png, [*originals, *cartoonize(originals)]))
                for row, original, cartoon in zip(batch, encoded, encoded[len(batch) :], strict=False):
                    prompt = draw_instruction(
                        instructions, row.split, args.all_instructions, args.seed, row.image_hash
                    )
                    made.append(
                        {"original_image": original, "edit_prompt": prompt, "cartoonized_image": cartoon}
                    )
        return made

    def write_card(rows, skipped, checksums) -> str:
        return card(
            title="Cartoonization",
            licence="other",
            tags=["image-editing", "instruction-tuning", "cartoonization"],
            about="Photos and their cartoons, with an instruction, to teach an editing model to cartoonize.",
            columns={
                "original_image": "the photo as the cartoonizer saw it: aligned to the pixel",
                "edit_prompt": "the instruction" + (", every wording" if args.all_instructions else ""),
                "cartoonized_image": "the cartoon, of the same size",
            },
            licences=f"Photos: {args.photos_license}.\n\nCartoons: filtered, no licence of their own",
            rows=rows,
            skipped=skipped,
            checksums=checksums,
            seed=args.seed,
        )

    build(
        args.output_dir,
        settings,
        features,
        lambda: plan(photos, args),
        make_rows,
        write_card,
        args.rows_per_shard,
    )


if __name__ == "__main__":
    parser, args = parse_arguments()
    run(parser, lambda: main(args))
