"""Train the tiny Stable Diffusion: its autoencoder (vae), then its text-to-image UNet and text encoder (base).

    python tools/train_tiny_base.py --work_dir outputs/tiny_base

instruct_pix2pix/training/tiny_base.py describes the two stages, recipes/tiny_base.sh goes on to the InstructPix2Pix. A
stage that has ended stays; one that was stopped starts anew. All is float32 on the CPU.
"""

from pathlib import Path

from instruct_pix2pix.building.photos import find_photos
from instruct_pix2pix.cli import Parser, UserError, run, whole_number
from instruct_pix2pix.files import check_folder


def main(argv: list[str] | None = None) -> None:
    # fmt: off
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--work_dir", type=Path, default=Path("outputs/tiny_base"), help="where the stages are kept")
    add("--photos", type=Path, default=Path("assets/photos"), help="learns from its child train")
    add("--tiles", type=whole_number(1), default=12000, help="64-pixel tiles cut from the photos")
    add("--steps", type=whole_number(1), nargs=2, default=[5000, 1000], metavar=("VAE", "BASE"), help="updates of both")
    add("--seed", type=whole_number(0), default=0, help="fixes the weights, the tiles and the batches")
    # fmt: on
    args = parser.parse_args(argv)
    check_folder("--work_dir", args.work_dir)
    photos = find_photos(args.photos)
    if "train" not in photos.splits:
        raise UserError(f"--photos: {args.photos} has no folder train with photos; name one that does")
    from instruct_pix2pix.training.tiny_base import train

    train(photos, args)


if __name__ == "__main__":
    run(main, stopped="the same command begins the stage that was stopped anew")
