#!/usr/bin/env python
"""Turn one photograph into a cartoon.

    python inference/cartoonize.py --image photo.jpg --output cartoon.png
    python inference/cartoonize.py --image https://example.org/photo.jpg --model_id outputs/my_cartoonizer

Runs on CUDA in half precision where there is a GPU, otherwise on the CPU in single precision. The output has
the size of the input. Folders of images are for edit_images.py.
"""

from instruct_pix2pix import editing


def main(argv: list[str] | None = None) -> None:
    parser = editing.OneLineParser(__file__, __doc__)
    group = parser.add_argument_group("image and instruction")
    group.add_argument("--image", required=True, help="path or URL of the photograph")
    group.add_argument("--instruction", default="Cartoonize the following image", help="what to do with it")
    group.add_argument("--output", default="cartoonized.png", help="file to write: .png, .jpg or .webp")
    editing.add_sampling_flags(parser, model_id="instruction-tuning-sd/cartoonizer")
    args = parser.parse_args(argv)
    if warning := editing.guidance_warning(args.guidance_scale, args.image_guidance_scale):
        parser.warn(warning)
    try:
        editing.check_output(args.output, args.image)
        editing.check_model(args.model_id)
        image = editing.load_image(args.image)
    except ValueError as error:
        parser.error(str(error))

    import torch
    from diffusers import StableDiffusionInstructPix2PixPipeline

    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    try:
        pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(args.model_id, dtype=dtype)
    except Exception as error:  # a damaged folder fails in many ways
        parser.error(editing.model_error(args.model_id, error))

    edited = pipeline.to(device)(
        args.instruction,
        image=editing.fit_image(image, args.resolution, editing.size_multiple(pipeline)),
        num_inference_steps=args.steps,
        image_guidance_scale=args.image_guidance_scale,
        guidance_scale=args.guidance_scale,
        generator=torch.Generator().manual_seed(args.seed),  # on the CPU: the same noise on every machine
    ).images[0]
    editing.save_image(editing.restore_image(edited, image.size, args.resolution), args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
