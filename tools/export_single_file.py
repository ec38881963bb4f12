#!/usr/bin/env python
"""Make one file of a pipeline, for ComfyUI and the web UIs, or a pipeline of such a file.

    python tools/export_single_file.py outputs/my_run my_model.safetensors --half
    python tools/export_single_file.py my_model.safetensors pipeline --base_config outputs/my_run

What the first argument is decides the direction. The file holds UNet, VAE and text encoder in the layout of Stable
Diffusion's original code; tokenizer, scheduler and configurations do not fit in, and come from --base_config on the way
back, which gives float32. docs/single_file.md says how ComfyUI and the web UI open it.
"""

from pathlib import Path

from instruct_pix2pix.cli import Parser, UserError, run, warn
from instruct_pix2pix.editing import check_model


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("model", help="a pipeline's folder, Hub id or OUTPUT_DIR/checkpoint-N; or a file of a model")
    parser.add_argument("output", type=Path, help="the .safetensors file to make; or the folder to make")
    parser.add_argument("--half", action="store_true", help="write the file in float16, half the size")
    parser.add_argument(
        "--base_config",
        metavar="FOLDER_OR_ID",
        help="on the way back: pipeline whose configurations and tokenizer to take; when left out,"
        " timbrooks/instruct-pix2pix from the Hub",
    )
    args = parser.parse_args(argv)
    output, unpack = args.output.absolute(), Path(args.model).is_file()
    if output.exists():
        raise UserError(f"output: {args.output} exists; name a new {'folder' if unpack else 'file'}")
    if (output.suffix == ".safetensors") == unpack:
        wanted = "a folder" if unpack else "a file that ends in .safetensors"
        raise UserError(f"output: {args.output}, and of {args.model} is made {wanted}; name one")
    if unpack and args.half or not unpack and args.base_config:
        raise UserError(f"{'--half' if unpack else '--base_config'}: not for this direction; see --help")
    try:
        if unpack:
            from instruct_pix2pix import publishing

            publishing.unpack_single_file(args.model, args.base_config, output)
        else:
            check_model(args.model, "model")
            from instruct_pix2pix.models import single_file

            if found := single_file.export(args.model, output, args.half):
                warn(f"{args.output}: ComfyUI and the web UIs take other values for granted than {', '.join(found)}")
    except UserError as error:  # the flags' names in a training
        said = str(error).replace("--pretrained_model_name_or_path", "model").replace("--output_dir", "output")
        raise UserError(said) from error
    print(f"{args.output}: made of {args.model}")


if __name__ == "__main__":
    run(main, stopped="nothing was written; run it again")
