#!/usr/bin/env python
"""Remove rain, noise or blur from one image, or light up a dark one.

    python inference/low_level_image_processing.py --image in.png --instruction "Derain the image"
    python inference/low_level_image_processing.py --image in.png --instruction "Denoise the image"

The published model knows deraining, denoising, deblurring and low-light enhancement.
Without guidance, unless both scales say otherwise: a restoration has one right answer, and guidance overshoots it, by
0.7 to 3.4 dB in this project's measurements. A model's recommended_settings.json goes before these defaults.
Runs on CUDA in half precision, else on Apple's GPU or the CPU in single precision. The output has the size of the
input. Folders of images are for edit_images.py.
"""

from instruct_pix2pix import cli, editor


def main(argv: list[str] | None = None) -> None:
    editor.edit_one_image(
        argv,
        __doc__,
        model_id="instruction-tuning-sd/low-level-img-proc",
        instruction="Derain the image",
        output="processed.png",
        guidance_scale=1.0,
        image_guidance_scale=1.0,
    )


if __name__ == "__main__":
    cli.run(main, stopped="nothing was written")
