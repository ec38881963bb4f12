"""The cartoonization dataset: photos as the cartoonizer saw them, an instruction, and the cartoons."""

import hashlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby

from instruct_pix2pix.building.build import Work, build, cut
from instruct_pix2pix.building.on_ray import there
from instruct_pix2pix.building.photos import UNKNOWN_LICENCE, Photos, encode_png, find_dataset_images, find_photos
from instruct_pix2pix.building.plan import Row, read_again, read_instructions, take_photos
from instruct_pix2pix.cli import UserError, first_line
from instruct_pix2pix.data.geometry import fit_photo, whitebox_size
from instruct_pix2pix.devices import choose_device
from instruct_pix2pix.files import as_code, as_text, fingerprint, for_others

IMAGENETTE = "frgfm/imagenette"
WHITEBOX = "sayakpaul/whitebox-cartoonizer"
THREADS = 8  # decoding and encoding images release the interpreter's lock
# The network needs about 600 bytes a pixel in float32; on a CPU more than fits its caches is slower.
BATCH_PIXELS = {"cpu": 300_000, "cuda": 8_400_000}


def build_cartoonization(args) -> None:
    """Make the dataset that the flags of build_cartoonization.py ask for."""
    instructions = {"cartoonize": read_instructions(args.instructions)}
    photos = choose_photos(args)
    on_gpu = args.cartoonizer == "whitebox" and args.device in ("auto", "cuda")
    settings = there(args, lambda: make_cartoonizer(args)[2], on_gpu) | {"photos": photos.digest}
    settings |= {name: getattr(args, name) for name in ("split", "max_num_samples", "max_short_side")}
    columns = {
        "original_image": ("input", "the photo as the cartoonizer saw it: scaled and cropped"),
        "edit_prompt": ("instruction", "the instruction"),
        "cartoonized_image": ("target", "the cartoon, of the same size"),
    }
    imagenet = "ImageNet's terms of access: research and education, non-commercial (image-net.org/download)"
    of_imagenet = args.photos is None and args.dataset == IMAGENETTE
    photos_license = as_text(args.photos_license or (imagenet if of_imagenet else UNKNOWN_LICENCE))
    cartoons = {
        "opencv": "made by classical filtering, which adds no terms of its own",
        "whitebox": "made with White-box CartoonGAN (Wang and Yu, CVPR 2020), whose code and weights are "
        "under CC BY-NC-SA 4.0: commercial use is prohibited",
    }
    about = {
        "title": "Cartoonization",
        "licence": "cc-by-nc-sa-4.0" if args.cartoonizer == "whitebox" else "other",
        "tags": ["image-editing", "instruction-tuning", "cartoonization"],
        "about": "Photos and their cartoons, with an instruction, to teach an editing model to cartoonize. "
        f"Source of the photos: {as_code(for_others(args.photos or args.dataset))}.",
        "licences": f"Photos: {photos_license}.\n\nCartoons: {cartoons[args.cartoonizer]}.",
    }

    def make_plan() -> tuple[list[Row], list[dict]]:
        def fitted(width: int, height: int) -> tuple[int, int]:
            return whitebox_size(width, height, args.max_short_side)[1]

        skipped: list[dict] = []
        with ThreadPoolExecutor(THREADS) as pool:
            rows = take_photos(photos, skipped, fitted, 8, args.max_num_samples, args, pool)
        for row in rows:
            row.task = "cartoonize"
        return rows, skipped

    work = Work(args, columns, instructions, partial(cartoon_rows, args, photos.read), on_gpu)
    build(work, settings, about, make_plan)


def cartoon_rows(args, read: Callable[[str], bytes]) -> Callable[[list[Row]], list[tuple[bytes, bytes]]]:
    """Open the cartoonizer -> what makes rows: of each the fitted photo and its cartoon, as PNG files."""
    cartoonize, max_pixels, _ = make_cartoonizer(args)
    pool = ThreadPoolExecutor(THREADS)

    def load(row: Row):
        return fit_photo(read_again(row.source, read, row.image_hash)[1], args.max_short_side)

    def make_rows(rows: list[Row]) -> list[tuple[bytes, bytes]]:
        import numpy as np

        made = []
        for _, of_one_size in groupby(rows, key=lambda row: (row.width, row.height)):
            for batch in cut(list(of_one_size), args.batch_size, max_pixels):
                originals = np.stack(list(pool.map(load, batch)))
                encoded = list(pool.map(encode_png, [*originals, *cartoonize(originals)]))
                made += zip(encoded[: len(batch)], encoded[len(batch) :], strict=True)
        return made

    return make_rows


def choose_photos(args) -> Photos:
    """The photos that --photos or --dataset name, of the split that --split names."""
    if args.photos is not None:
        photos = find_photos(args.photos)
    else:
        config = args.dataset_config or ("full_size" if args.dataset == IMAGENETTE else None)
        photos = find_dataset_images(args.dataset, config, args.dataset_revision, args.image_column)
    if args.split == "all":
        return photos
    names = [name for name, split in zip(photos.names, photos.splits, strict=True) if split == args.split]
    if not names:
        raise UserError(f"--split: the photos have no split {args.split}; leave the flag out to take all")
    return photos._replace(names=names, splits=[""] * len(names))


def make_cartoonizer(args, flag: str = "--cartoonizer_weights"):
    """Returns the function from photos to cartoons, the most pixels it takes at a time, and its settings. `flag` gave
    the weights."""
    if args.cartoonizer == "opencv":
        from instruct_pix2pix.building.cartoonizer import opencv_cartoonize

        return opencv_cartoonize, math.inf, {"cartoonizer": "opencv"}
    from instruct_pix2pix.building.whitebox import whitebox_cartoonizer
    from instruct_pix2pix.building.whitebox_weights import read_weights

    weights = read_weights(args.cartoonizer_weights, flag)
    device, dtype = choose_device(args.device, args.dtype)
    try:
        cartoonize = whitebox_cartoonizer(weights, device, dtype)
    except RuntimeError as error:
        raise UserError(f"--device: {device}: {first_line(error)}; give cpu or cuda") from None
    arrays = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in weights.items()}
    settings = {
        "cartoonizer": "whitebox",
        "weights": fingerprint(arrays),
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "batch_size": args.batch_size,
    }
    return cartoonize, BATCH_PIXELS.get(device.type, BATCH_PIXELS["cpu"]), settings
