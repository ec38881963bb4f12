#!/usr/bin/env python
"""Make one file of a pipeline, for ComfyUI and the web UIs (docs/single_file.md), or a pipeline of such a file.

    python tools/export_single_file.py outputs/my_run my_model.safetensors --half
    python tools/export_single_file.py my_model.safetensors pipeline --base_config outputs/my_run

What the first argument is decides. The file holds the weights of UNet, VAE and text encoder alone; a pipeline made of
one is in float32 and gets the rest from --base_config.
"""

from pathlib import Path

from instruct_pix2pix.cli import Parser, UserError, run, warn
from instruct_pix2pix.editing import check_model


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("model", help="a pipeline's folder, Hub id or OUTPUT_DIR/checkpoint-N; or a file of a model")
    parser.add_argument("output", type=Path, help="the .safetensors file to make; or the folder to make")
    parser.add_argument("--half", action="store_true", help="write the file in float16, half the size")
    config = "pipeline whose configurations and tokenizer the folder gets; when left out, timbrooks/instruct-pix2pix's"
    parser.add_argument("--base_config", metavar="FOLDER_OR_ID", help=config)
    args = parser.parse_args(argv)
    output, unpack = args.output.absolute(), Path(args.model).is_file()
    wanted = "folder" if unpack else ".safetensors file"
    if output.exists() or (output.suffix == ".safetensors") == unpack:
        raise UserError(f"output: {args.output} {'exists' if output.exists() else 'is none'}; name a new {wanted}")
    if args.half if unpack else args.base_config:
        raise UserError(f"{'--half' if unpack else '--base_config'}: has no meaning for a {wanted}; leave it out")
    try:
        if not unpack:
            check_model(args.model, "model")
        from instruct_pix2pix import publishing

        if unpack:
            publishing.unpack_single_file(args.model, args.base_config, output)
        elif found := publishing.export_single_file(args.model, output, args.half):
            warn(f"{args.output}: ComfyUI and the web UIs take other values for granted than {', '.join(found)}")
    except UserError as error:  # the flags' names in a training
        said = str(error).replace("--pretrained_model_name_or_path", "model")
        raise UserError(said) from error
    print(f"{args.output}: made of {args.model}")


if __name__ == "__main__":
    run(main, stopped="nothing was written; run it again")
