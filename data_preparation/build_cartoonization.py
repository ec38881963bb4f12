"""Build a cartoonization dataset: photos, an instruction, and the cartoon of each photo.

    python data_preparation/build_cartoonization.py --photos DIR --cartoonizer opencv --output_dir DATASET
    python data_preparation/build_cartoonization.py --ray --output_dir s3://BUCKET/DATASET

Columns: original_image, edit_prompt, cartoonized_image. The folder that comes out is read by
`datasets.load_dataset(DATASET)` and by the training scripts. A build that was stopped goes on when the same
command is run again; the result is the same to the byte, and the same on Ray (`--ray`).
"""

from pathlib import Path

from instruct_pix2pix.building.build import add_dataset_flags, add_photo_flags, check_dataset_flags
from instruct_pix2pix.building.cartoonization import IMAGENETTE, WHITEBOX, build_cartoonization
from instruct_pix2pix.cli import Parser, run, whole_number
from instruct_pix2pix.devices import add_device_flags

INSTRUCTIONS = Path(__file__).parent / "instructions" / "cartoonize.txt"


def main(argv: list[str] | None = None) -> None:
    # fmt: off
    parser = Parser(__doc__)
    add = parser.add_argument_group("photos").add_argument
    add_photo_flags(add)
    add("--dataset", default=IMAGENETTE, metavar="NAME",
        help="without --photos: a dataset on the Hub, or a folder, of parquet files with an image column")
    add("--dataset_config", metavar="NAME",
        help="its configuration; for the default dataset full_size (others: 320px, 160px)")
    add("--dataset_revision", metavar="REV", help="its branch, tag or commit on the Hub")
    add("--image_column", default="image", metavar="NAME", help="its column of images")
    add("--split", choices=["all", "train", "validation", "test"], default="all",
        help="which of the source's own splits to take; the photos of a single one are divided anew, by hash")
    add("--max_num_samples", type=whole_number(0), default=5000, metavar="N",
        help="at most so many rows, chosen by --seed; 0 takes every photo")
    add("--max_short_side", type=whole_number(8), default=720, metavar="PIXELS",
        help="scale larger photos down to this short side; sides are then cropped to multiples of 8")

    add = parser.add_argument_group("cartoons").add_argument
    add("--cartoonizer", choices=["whitebox", "opencv"], default="whitebox",
        help="whitebox: White-box CartoonGAN, whose weights are for non-commercial use; opencv: classical "
             "filtering, no weights")
    add("--cartoonizer_weights", default=WHITEBOX, metavar="SOURCE",
        help=".npz, .safetensors, .tflite, a TensorFlow SavedModel (folder, or repository on the Hub)")
    add_device_flags(add)
    add("--batch_size", type=whole_number(1), default=16, metavar="N",
        help="at most so many photos of one size at a time; fewer where they are large")

    add_dataset_flags(parser, INSTRUCTIONS, "file")
    # fmt: on
    args = parser.parse_args(argv)
    check_dataset_flags(args)
    build_cartoonization(args)


if __name__ == "__main__":
    run(main)
