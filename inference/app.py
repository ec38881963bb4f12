#!/usr/bin/env python
"""A web page that edits photos by instruction: both scales, a mask to paint, before and after in one picture.

    python inference/app.py --model_id outputs/quickstart/pipeline --resolution 128
    python inference/app.py --model_id OWNER/MODEL --write_space FOLDER

It answers on this machine alone; GRADIO_SERVER_NAME=0.0.0.0 opens it to the network, GRADIO_SERVER_PORT moves it.
The page starts with the flags' settings, or the model's recommended_settings.json, whose tasks are also the examples
and whose settings follow the instruction. --write_space writes a folder that is a Space of the Hub, with the other
flags in it. Needs gradio: pip install -r requirements-demo.txt
"""

import argparse
import re
import shutil
from pathlib import Path

try:
    import spaces  # where a Space lends a GPU for one call at a time; it has to come before torch
except ImportError:
    spaces = None

from instruct_pix2pix import cli, editing
from instruct_pix2pix.evaluation.settings import SCHEDULERS, Setting
from instruct_pix2pix.files import check_folder, check_new_folder, write_text
from instruct_pix2pix.images import BadImage, read_image

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = ("kingfisher", "animals_panda", "farm_dog", "monument_germany_schwerinpalace", "renewable_windmill5")
PHOTOS = [f"assets/photos/test/{name}.webp" for name in PHOTOS]
# The sentences of the published models.
INSTRUCTIONS = ["Cartoonize the following image", "derain the image", "denoise the noisy image"]
INSTRUCTIONS += ["deblur the blurry image", "enhance the low-light image"]
MAX_MEGABYTES = 20  # of an uploaded file
STYLE = """.gradio-container {max-width: 1200px !important; width: 100%; margin: auto !important}
#photos img {width: 96px; height: 72px; object-fit: cover} footer {display: none !important}"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    space = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    space.add_argument("--write_space", metavar="FOLDER", help="write a Space into this new folder, and no more")
    parser = cli.Parser(__doc__, parents=[space])
    parser.add_argument("--examples", nargs="+", metavar="TEXT", help="instructions to choose from, the first is set")
    editing.add_sampling_flags(parser, "instruction-tuning-sd/cartoonizer")
    parser.set_defaults(max_image_pixels="25000000")  # text, so that the flag's type takes it and sets the limit
    args = parser.parse_args(argv)
    if args.num_variations > 1:
        raise cli.UserError(f"--num_variations: {args.num_variations}, but the page shows one edit; leave it out")
    args.other_flags = space.parse_known_args(argv)[1]
    return args


def write_space(args: argparse.Namespace) -> None:
    """Write the folder of a Space: card, requirements, app.py, and of this project what the page uses."""
    from huggingface_hub import SpaceCardData

    folder, model = Path(args.write_space), args.model_id
    if any(word.startswith("--config") for word in args.other_flags):
        raise cli.UserError("--config: the Space would not have the file; give what it says as flags")
    check_folder("--write_space", folder)
    check_new_folder("--write_space", folder)
    if Path(model).expanduser().exists():
        raise cli.UserError(f"--model_id: {model} is a folder here, which a Space does not see; push it, give its id")
    version = re.search(r"gradio==(\S+)", (ROOT / "requirements-demo.txt").read_text())[1]
    look = {"title": f"{model.split('/')[-1]}: edit photos", "emoji": "🖼️", "colorFrom": "blue", "colorTo": "indigo"}
    start = {"sdk": "gradio", "sdk_version": version, "python_version": "3.11", "app_file": "app.py"}
    card = SpaceCardData(**look, **start, models=[model], license="apache-2.0")
    caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "instruct_pix2pix", folder / "instruct_pix2pix", ignore=caches)
    for name in ("LICENSE", "inference/app.py", "assets/photos/CREDITS.csv", *PHOTOS):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    write_text(folder / "README.md", f"---\n{card}\n---\n\nPhotos edited by instruction, with {model}.\n")
    write_text(folder / "requirements.txt", (ROOT / "requirements.txt").read_text().replace("--editable .\n", ""))
    call = f"cli.run(main, {args.other_flags!r})"
    write_text(folder / "app.py", f"from instruct_pix2pix import cli\nfrom inference.app import main\n\n{call}\n")
    print(f"wrote {folder}: hf upload OWNER/SPACE {folder} --repo-type space")


def build_page(editor, args: argparse.Namespace):
    """The page, a gradio.Blocks: an Editor edits, one photo at a time, with the settings that come with it."""
    import gradio as gr

    # The file as it came, opened by read_image. Not a subclass: for one gradio writes a stub beside this file.
    gr.Image.preprocess = lambda self, payload: payload and payload.path

    def setting_for(instruction: str) -> list:
        setting, _ = editing.sampling_of(args, editor.recommended, instruction)
        return list(setting._replace(scheduler=setting.scheduler or "own"))

    def follow(instruction, last):
        """The setting of the instruction's task, where that is another one than before."""
        setting = setting_for(instruction)
        return gr.skip() if setting == last else (setting, *setting)

    def said(error: cli.UserError) -> str:
        # What a BadImage has behind a semicolon is a flag, for who started this.
        return f"The photo cannot be used: {str(error).split(';')[0]}." if isinstance(error, BadImage) else str(error)

    def choose(path):
        """Show a chosen photo to paint on; take one away that cannot be used."""
        try:
            picture = read_image(path)
        except BadImage as error:
            gr.Warning(said(error))
            return None, None
        picture.thumbnail((1024, 1024))
        return picture, gr.skip()

    def mask_of(painted):
        """What was painted, as a mask for the editor; None for nothing."""
        alpha = painted["layers"][0].getchannel("A") if painted and painted["layers"] else None
        return alpha.point(lambda value: 255 * (value > 0)) if alpha and alpha.getbbox() else None

    @(spaces.GPU if spaces else lambda function: function)
    def edit(path, instruction, painted, steps, image_scale, text_scale, scheduler, seed, bar=gr.Progress()):  # noqa: B008
        """Edit a photo: (before, after). A painted mask says where; nothing painted is everywhere."""
        if not (path and instruction.strip()):
            raise gr.Error("Choose a photo, and say what to do with it.", print_exception=False)
        setting = Setting(steps, image_scale, text_scale, scheduler)
        if warning := editing.guidance_warning(text_scale, image_scale, args.negative_prompt):
            gr.Info(warning.replace("--", ""))
        options = {name: getattr(args, name) for name in ("negative_prompt", "resolution", "tile")}
        options |= {"seed": seed or 0, "mask": mask_of(painted), "on_step": lambda *done: bar(done, desc="Editing")}
        try:
            before = read_image(path)
            after = editor(before, instruction, **setting._asdict(), **options)
        except cli.UserError as error:
            raise gr.Error(said(error), print_exception=False) from None
        return before, after

    tasks = editor.recommended["tasks"].values() if editor.recommended else ()
    examples = args.examples or [task["instructions"][0] for task in tasks if task["instructions"]] or INSTRUCTIONS
    steps, image_scale, text_scale, scheduler = start = setting_for(examples[0])
    with gr.Blocks(title="Edit a photo", analytics_enabled=False, delete_cache=(3600, 3600)) as page:  # seconds
        gr.Markdown("# Edit a photo by instruction")
        with gr.Row():
            with gr.Column():
                ask = f"Drop a photo here\nof up to {MAX_MEGABYTES} MB"
                photo = gr.Image(label="Photo", sources=["upload", "clipboard"], height=400, placeholder=ask)
                photos = [str(ROOT / name) for name in PHOTOS]
                tried = gr.Examples(photos, photo, label="Photos to try", elem_id="photos")
                instruction = gr.Textbox(examples[0], label="Instruction", max_length=500)
                button = gr.Button("Edit", variant="primary")
                gr.Examples(examples, instruction, label="For example")
            with gr.Column():
                tall = {"height": 400, "max_height": 400}
                result = gr.ImageSlider(label="Before and after", format="png", interactive=False, **tall)
                with gr.Accordion("Edit only a part", open=False):
                    brush = gr.Brush(colors=["#f97316"], color_mode="fixed")
                    only = {"sources": (), "transforms": (), "brush": brush}
                    mask = gr.ImageMask(type="pil", label="Paint what may change", **only)
                with gr.Accordion("Settings", open=False):
                    settings = [
                        gr.Slider(1, max(100, steps), steps, step=1, label="Steps"),
                        gr.Slider(0, max(5, image_scale), image_scale, step=0.1, label="Image guidance"),
                        gr.Slider(0, max(20, text_scale), text_scale, step=0.1, label="Text guidance"),
                        gr.Dropdown([("the model's own", "own"), *SCHEDULERS], value=scheduler, label="Scheduler"),
                        gr.Number(args.seed, label="Seed", precision=0, minimum=0, maximum=2**32 - 1),
                    ]
        # In the queue too: what a visitor is told travels there.
        aside = {"concurrency_limit": 4, "show_progress": "hidden", "api_visibility": "private"}
        for event in (photo.upload, tried.load_input_event.then):
            event(choose, photo, [mask, photo], **aside)
        if tasks:
            last = gr.State(start)
            instruction.change(follow, [instruction, last], [last, *settings[:4]], **aside)
        gr.on([button.click, instruction.submit], edit, [photo, instruction, mask, *settings], result, api_name="edit")
    return page.queue(max_size=20)  # a visitor beyond is asked to come back


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.write_space:
        return write_space(args)
    try:
        import gradio as gr
    except ImportError:
        raise cli.UserError("gradio: not installed; pip install -r requirements-demo.txt") from None
    from instruct_pix2pix import Editor

    page = build_page(Editor.from_pretrained(args.model_id, device=args.device, dtype=args.dtype), args)
    theme = gr.themes.Default(primary_hue="blue", font="system-ui")
    page.launch(max_file_size=f"{MAX_MEGABYTES}mb", theme=theme, css=STYLE)


if __name__ == "__main__":
    cli.run(main, stopped="the page is closed")
