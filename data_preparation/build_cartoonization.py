"""Build a cartoonization dataset: photos, an instruction, and the cartoon of each photo.

    python data_preparation/build_cartoonization.py --photos DIR --cartoonizer opencv --output_dir DATASET
    accelerate launch --multi_gpu --num_processes 8 data_preparation/build_cartoonization.py --output_dir DATASET

Columns: original_image, edit_prompt, cartoonized_image. The folder that comes out is read by
`datasets.load_dataset(DATASET)` and by the training scripts. A build that was stopped goes on when the same
command is run again; the result is the same to the byte, and the same for any number of processes.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

from instruct_pix2pix.building import build as records
from instruct_pix2pix.building import photos as sources
from instruct_pix2pix.building.build import Row, UserError
from instruct_pix2pix.building.photos import BadImage, Photos

INSTRUCTIONS = Path(__file__).parent / "instructions" / "cartoonize.txt"
IMAGENETTE = "frgfm/imagenette"
THREADS = 8  # decoding and encoding images release the interpreter's lock
# The network needs about 600 bytes a pixel in float32; on a CPU more than fits its caches is slower.
BATCH_PIXELS = {"cpu": 300_000, "cuda": 8_400_000}


def parse_arguments():
    # fmt: off
    parser = records.Parser(__doc__)
    add = parser.add_argument_group("photos").add_argument
    add("--photos", type=Path, metavar="DIR",
        help="folder of photos, nested in any way; children train, val or validation, test are its splits")
    add("--dataset", default=IMAGENETTE, metavar="NAME",
        help="without --photos: a dataset on the Hub, or a folder, of parquet files with an image column")
    add("--dataset_config", metavar="NAME",
        help="its configuration; for the default dataset full_size (others: 320px, 160px)")
    add("--dataset_revision", metavar="REV", help="its branch, tag or commit on the Hub")
    add("--image_column", default="image", metavar="NAME", help="its column of images")
    add("--split", choices=["all", "train", "validation", "test"], default="all",
        help="which of the source's own splits to take; the photos of a single one are divided anew, by hash")
    add("--max_num_samples", type=int, default=5000, metavar="N",
        help="at most so many rows, chosen by --seed; 0 takes every photo")
    add("--max_short_side", type=int, default=720, metavar="PIXELS",
        help="scale larger photos down to this short side; sides are then cropped to multiples of 8")
    add("--photos_license", metavar="TEXT", help="licence of the photos, for the dataset card")

    add = parser.add_argument_group("cartoons").add_argument
    add("--cartoonizer", choices=["whitebox", "opencv"], default="whitebox",
        help="whitebox: White-box CartoonGAN, whose weights are for non-commercial use; opencv: classical "
             "filtering, no weights")
    add("--cartoonizer_weights", default="sayakpaul/whitebox-cartoonizer", metavar="SOURCE",
        help=".npz, .safetensors, .tflite, a TensorFlow SavedModel (folder, or repository on the Hub)")
    add("--device", default="auto", help="auto takes a GPU where there is one")
    add("--dtype", choices=["auto", "float32", "float16", "bfloat16"], default="auto",
        help="of the network; auto is float16 on a GPU, float32 elsewhere")
    add("--batch_size", type=int, default=16, metavar="N",
        help="at most so many photos of one size at a time; fewer where they are large")

    add = parser.add_argument_group("instructions").add_argument
    add("--instructions", type=Path, default=INSTRUCTIONS, metavar="FILE",
        help="one sentence a line; lines that begin with 'held-out:' are for the test split only")
    add("--all_instructions", action="store_true",
        help="keep the whole list in every row, so that training draws one anew each epoch")

    add = parser.add_argument_group("dataset").add_argument
    records.add_dataset_flags(add)
    # fmt: on
    args = parser.parse_args()
    records.check_dataset_flags(parser, args)
    for flag, least in (("max_num_samples", 0), ("max_short_side", 8), ("batch_size", 1)):
        if getattr(args, flag) < least:
            parser.error(f"--{flag}: {getattr(args, flag)} is too small; give {least} or more")
    return parser, args


def find_photos(args) -> Photos:
    if args.photos is not None:
        return sources.find_photos(args.photos)
    config = args.dataset_config or ("full_size" if args.dataset == IMAGENETTE else None)
    return sources.find_dataset_images(args.dataset, config, args.dataset_revision, args.image_column)


def make_plan(photos: Photos, args) -> tuple[list[Row], list[dict]]:
    """Choose the photos, in an order decided by the seed and their names; look at each for hash and size."""
    from tqdm import tqdm

    from instruct_pix2pix.building.cartoonizer import fitted_size

    def look(candidate):
        name, split = candidate
        try:
            image = sources.decode_image(photos.read(name))
            width, height = fitted_size(image.shape[1], image.shape[0], args.max_short_side)
            if min(width, height) < 8:
                raise BadImage(f"{image.shape[1]}x{image.shape[0]} is too small: sides must be 8 or more")
            return name, split, sources.image_hash(image), width, height
        except (BadImage, OSError) as error:
            return name, split, str(error)

    candidates = list(zip(photos.names, photos.splits, strict=True))
    if args.split != "all":
        candidates = [(name, "") for name, split in candidates if split == args.split]
        if not candidates:
            raise UserError(f"--split: the photos have no split {args.split}; leave the flag out to take all")
    candidates.sort(key=lambda candidate: records.unit_hash(args.seed, candidate[0]))
    wanted = min(args.max_num_samples or len(candidates), len(candidates))
    rows, skipped, by_hash = [], [], {}
    with tqdm(total=wanted, desc="plan", unit=" images", mininterval=0.5) as bar:
        for name, split, *found in sources.ordered_map(look, candidates, THREADS):
            if len(found) == 1:
                skipped.append({"source": name, "reason": found[0]})
                continue
            digest, width, height = found
            split = split or records.split_of(digest, args.validation_fraction, args.test_fraction)
            if twin := by_hash.get(digest):
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


def make_cartoonizer(args):
    """Returns the function from photos to cartoons, its batch size for an image size, and its settings."""
    if args.cartoonizer == "opencv":
        from instruct_pix2pix.building.cartoonizer import opencv_cartoonize

        return opencv_cartoonize, lambda width, height: args.batch_size, {"cartoonizer": "opencv"}
    from instruct_pix2pix.building.whitebox_weights import read_weights

    weights = read_weights(args.cartoonizer_weights)
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(weights[name].tobytes())

    import torch

    from instruct_pix2pix.building.whitebox import whitebox_cartoonizer

    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and (count := torch.cuda.device_count()):
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % count}"
    kind = device.split(":")[0]
    dtype = args.dtype if args.dtype != "auto" else "float16" if kind == "cuda" else "float32"
    try:
        cartoonize = whitebox_cartoonizer(weights, device, dtype)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device: {device}: {str(error).splitlines()[0]}; give cpu or cuda") from None
    settings = {"cartoonizer": "whitebox", "weights": digest.hexdigest(), "device": kind, "dtype": dtype,
                "batch_size": args.batch_size}  # fmt: skip
    limit = BATCH_PIXELS.get(kind, BATCH_PIXELS["cpu"])
    return cartoonize, lambda width, height: max(1, min(args.batch_size, limit // (width * height))), settings


def main(args) -> None:
    instructions = records.read_instructions(args.instructions)
    photos = find_photos(args)
    cartoonize, batch_size, settings = make_cartoonizer(args)
    settings |= {
        "photos": photos.digest,
        "instructions": hashlib.sha256(repr(instructions).encode()).hexdigest(),
        **{name: getattr(args, name) for name in ("split", "max_num_samples", "max_short_side", "all_instructions")},
    }
    text = {"dtype": "string", "_type": "Value"}
    features = {
        "original_image": {"_type": "Image"},
        "edit_prompt": {"feature": text, "_type": "List"} if args.all_instructions else text,
        "cartoonized_image": {"_type": "Image"},
    }

    import numpy as np

    from instruct_pix2pix.building.cartoonizer import fit_photo

    pool = ThreadPoolExecutor(THREADS)

    def load(row: Row):
        image = sources.decode_image(photos.read(row.source))
        if sources.image_hash(image) != row.image_hash:
            raise UserError(f"--photos: {row.source} has changed since the build began; choose another --output_dir")
        return fit_photo(image, args.max_short_side)

    def make_rows(rows: list[Row]) -> list[dict]:
        made = []
        for (width, height), same_size in groupby(rows, key=lambda row: (row.width, row.height)):
            for batch in records.cut(list(same_size), batch_size(width, height)):
                originals = np.stack(list(pool.map(load, batch)))
                encoded = list(pool.map(records.encode_png, [*originals, *cartoonize(originals)]))
                for row, original, cartoon in zip(batch, encoded, encoded[len(batch) :], strict=False):
                    prompt = records.draw_instruction(
                        instructions, row.split, args.all_instructions, args.seed, row.image_hash
                    )
                    made.append({"original_image": original, "edit_prompt": prompt, "cartoonized_image": cartoon})
        return made

    def write_card(rows, skipped, checksums) -> str:
        imagenet = "ImageNet's terms of access: research and education, non-commercial (image-net.org/download)"
        photos_license = args.photos_license or (
            imagenet if args.photos is None and args.dataset == IMAGENETTE else "unknown, see where they come from"
        )
        cartoons = {
            "opencv": "made by classical filtering, which adds no terms of its own",
            "whitebox": "made with White-box CartoonGAN (Wang and Yu, CVPR 2020), whose code and weights are "
            "under CC BY-NC-SA 4.0: commercial use is prohibited",
        }
        return records.card(
            title="Cartoonization",
            licence="cc-by-nc-sa-4.0" if args.cartoonizer == "whitebox" else "other",
            tags=["image-editing", "instruction-tuning", "cartoonization"],
            about="Photos and their cartoons, with an instruction, to teach an editing model to cartoonize. "
            f"Source of the photos: `{records.for_others(args.photos or args.dataset)}`. "
            "No photo is in two splits." + records.about_wordings([instructions]),
            columns={
                "original_image": "the photo as the cartoonizer saw it: scaled and cropped",
                "edit_prompt": "the instruction" + (", every wording" if args.all_instructions else ""),
                "cartoonized_image": "the cartoon, of the same size",
            },
            licences=f"Photos: {photos_license}.\n\nCartoons: {cartoons[args.cartoonizer]}.",
            rows=rows,
            skipped=skipped,
            checksums=checksums,
            seed=args.seed,
        )

    records.build(args, settings, features, lambda: make_plan(photos, args), make_rows, write_card)


if __name__ == "__main__":
    parser, args = parse_arguments()
    records.run(parser, lambda: main(args))
