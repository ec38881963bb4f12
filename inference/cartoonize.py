#!/usr/bin/env python
"""Turn one photograph into a cartoon.

    python inference/cartoonize.py --image photo.jpg --output cartoon.png
    python inference/cartoonize.py --image https://example.org/photo.jpg --model_id outputs/my_cartoonizer

Runs on CUDA in half precision, else on Apple's GPU or the CPU in single precision. The output has the size of the
input. Folders of images are for edit_images.py.
"""

from instruct_pix2pix import cli, editor


def main(argv: list[str] | None = None) -> None:
    editor.edit_one_image(
        argv,
        __doc__,
        model_id="instruction-tuning-sd/cartoonizer",
        instruction="Cartoonize the following image",
        output="cartoonized.png",
    )


if __name__ == "__main__":
    cli.run(main, stopped="nothing was written")
