#!/usr/bin/env python
"""Edit files, folders or globs of images by instruction, in batches, and go on where a run stopped.

    python inference/edit_images.py photos/ --instruction "Derain the image" --model_id MODEL --output_dir out
    python inference/edit_images.py a.jpg "b/**/*.png" --instructions_file lines.txt --model_id MODEL \\
        --output_dir out
    python inference/edit_images.py --instructions_file pairs.jsonl --model_id MODEL --output_dir out
    python inference/edit_images.py --dataset DATASET --split test --model_id MODEL --output_dir out

Instructions: --instruction is one for every image. An --instructions_file that ends in .txt has one a line,
each for every image; one that ends in .jsonl or .csv names its images itself, in rows with "image" (a path,
relative to that file) and "instruction". A --dataset is anything that training reads: each row's source image
is edited by the row's own instruction, or by --instruction. Images that lie inside its files are written to
OUTPUT_DIR/inputs/ first.

Outputs: each has its image's size, its name, and its place in the folder given. Several folders keep their
own names, an image's several instructions get a folder each, and a.jpg beside a.png becomes a-jpg.png. The
noise of an image depends on --seed and on its file's bytes alone, not on the batch, the order or the other
images. Sizes that the model cannot take are padded, and cropped again.

Guidance: the defaults are the published models', or what the model's recommended_settings.json says of an
instruction (evaluation/sweep.py makes it). A restoration is best without (see low_level_image_processing.py):
--guidance_scale 1 --image_guidance_scale 1.

Speed: images of one size are edited together, while the next are read and the last are written. With
--image_guidance_scale 1, or equal to --guidance_scale, the model is asked for two predictions a step instead
of three: the third has no part in the result.

Resuming: OUTPUT_DIR/edits.jsonl says how every output was made, and the same command again makes what is
missing. An output made with other settings stops the run (--overwrite makes it again), and a file that this
script did not make is never overwritten. Images that cannot be read are left out and listed at the end.
"""

import argparse
import sys

from instruct_pix2pix import cli, editing
from instruct_pix2pix.data.sources import add_source_flags, source_of
from instruct_pix2pix.edit_folder import CONTACT_SHEET, edit_folder


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    what = parser.add_argument_group("images and instructions")
    what.add_argument("inputs", nargs="*", help="files, folders (searched to any depth) or quoted globs")
    what.add_argument("--instruction", help="one instruction for all images")
    what.add_argument("--instructions_file", help="several: a .txt, or a .jsonl or .csv that names its images")
    data = parser.add_argument_group("dataset", "instead of images and instructions")
    data.add_argument("--dataset", help="triples: anything that training takes as --dataset_name")
    add_source_flags(data, editing=True)
    what.add_argument("--mask", help="an image, black where nothing is to change, or a folder of them by same names")
    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", required=True, help="folder for the edited images, made if missing")
    output.add_argument("--format", choices=("png", "jpg", "webp"), default="png", help="file type of the outputs")
    output.add_argument(
        "--contact_sheet",
        type=cli.whole_number(0),
        default=24,
        metavar="N",
        help=f"show N edits, evenly chosen, in OUTPUT_DIR/{CONTACT_SHEET}; 0 for none",
    )
    output.add_argument(
        "--overwrite", action="store_true", help="make outputs again that were made with other settings"
    )
    editing.add_sampling_flags(parser)
    speed = parser.add_argument_group("speed")
    speed.add_argument("--batch_size", type=cli.whole_number(1), default=4, help="images of one size edited at a time")
    speed.add_argument(
        "--compile",
        action="store_true",
        help="compile the UNet's transformer blocks with torch.compile: costs up to minutes at the first batch and "
        "at few later ones of another size, so it is for many images; where the compiler fails, editing goes on "
        "without it",
    )
    args = parser.parse_intermixed_args(argv)

    if args.dataset or args.original_dir or args.edited_dir:
        if args.inputs or args.instructions_file:
            other = args.inputs[0] if args.inputs else "--instructions_file"
            raise cli.UserError(f"--dataset: given beside {other}; a dataset names its images and instructions itself")
        source_of(args, "--dataset")
    elif (args.instruction is None) == (args.instructions_file is None):
        raise cli.UserError("--instruction: give either --instruction or --instructions_file")
    if args.instruction is not None and not args.instruction.strip():
        raise cli.UserError("--instruction: the text is empty; say what to do with the images")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if not edit_folder(args):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
