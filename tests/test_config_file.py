"""--config: a file of flags says what the command line would, is checked like it, and gives way to it."""

import contextlib
import io
import json
import subprocess
import sys

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from instruct_pix2pix.cli import Parser, UserError
from instruct_pix2pix.files import write_json
from instruct_pix2pix.training.config import resolved
from instruct_pix2pix.training.options import build_parser, parse_args
from tests.conftest import ROOT, losses, run_script, to_argv

NEEDED = {"pretrained_model_name_or_path": "model", "dataset_name": "data"}


@pytest.fixture
def parse(tmp_path):
    """`parse(text, *argv)`: what the parser of both training scripts makes of a run.yaml and a command line."""

    def parsed(text: str, *argv: str, parser=None):
        (tmp_path / "run.yaml").write_text(text)
        return (parser or build_parser("")).parse_args([f"--config={tmp_path / 'run.yaml'}", *argv])

    return parsed


def test_a_file_says_what_the_command_line_would(parse):
    text = """
        pretrained_model_name_or_path: model   # required, and here is enough
        dataset_name: data
        mixed_precision: no                    # a word, where YAML sees false
        learning_rate: 5e-5
        use_ema: true
        random_flip: off
        cache_latents: false                   # --no-cache_latents
        max_micro_batch_size: auto
        tags: [deblur, 2026-01-01]
        validation_prompt: "-a \\u00e9 'b'"
        revision: null                         # left out
        run_name: "null"
    """
    flags = ["--mixed_precision=no", "--learning_rate=5e-5", "--use_ema", "--no-cache_latents"]
    flags += ["--max_micro_batch_size=auto", "--tags", "deblur", "2026-01-01", "--validation_prompt=-a é 'b'"]
    assert parse(text) == build_parser("").parse_args([*to_argv(NEEDED), *flags, "--run_name=null"])
    assert not hasattr(parse(text), "config")  # a run does not know where its flags came from


def test_the_command_line_wins_and_a_later_file_over_an_earlier(parse, tmp_path):
    text = "resolution: 64\nuse_ema: true\ncache_latents: true\nseed: 1\n"
    (tmp_path / "more.yaml").write_text("seed: 2\nadam_beta1: 0.5\n")
    given = parse(text, *to_argv(NEEDED), "--resolution=128", "--no-cache_latents", "--config", f"{tmp_path}/more.yaml")
    assert (given.resolution, given.cache_latents, given.use_ema) == (128, False, True)
    assert (given.seed, given.adam_beta1) == (2, 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resoluton: 256", "run.yaml: resoluton: no such flag; the nearest is resolution"),
        ("--seed: 1", "run.yaml: --seed: no such flag; the nearest is seed"),
        ("config: other.yaml", "run.yaml: config: no such flag; the nearest is "),
        ("resolution: large", "run.yaml: resolution: 'large' is not a whole number"),
        ("guidance_scale: -1", "run.yaml: guidance_scale: -1 is not a guidance scale"),
        ("image_geometry: stretch", "run.yaml: image_geometry: invalid choice: 'stretch'"),
        ("use_ema: 1", "run.yaml: use_ema: is a switch; give true or false"),
        ("use_ema: [true]", "run.yaml: use_ema: is a switch; give true or false"),
        ("resolution: [64, 128]", "run.yaml: resolution: takes one value, not 2"),
        ("tags: {a: b}", "run.yaml: tags: takes no mapping and no list of lists"),
        ("tags: []", "--tags: expected at least one argument"),
        ("a: b: c", "run.yaml cannot be read (mapping values are not allowed here"),
        ("- resolution", "run.yaml holds no flags; write one a line, such as `resolution: 256`"),
        ("", "run.yaml holds no flags"),
        ("seed: 1", "--pretrained_model_name_or_path: missing"),
    ],
)
def test_a_mistake_is_one_line_that_names_file_and_flag(text, message, parse):
    with pytest.raises(UserError) as caught:
        parse(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there():
    for argv, message in (
        (["--config", "/no/such.yaml"], "--config: /no/such.yaml cannot be read"),
        (["--config"], ""),
    ):
        with pytest.raises(UserError, match=message or "--config: expected one argument"):
            build_parser("").parse_args(argv)


def test_a_command_line_of_nothing():
    assert vars(Parser("").parse_args([])) == {}


def test_nothing_of_a_file_is_run(parse, tmp_path):
    parse(f"run_name: !!python/object/apply:os.mkdir [{tmp_path}/made]\n", *to_argv(NEEDED))
    assert not (tmp_path / "made").exists()


def test_lists_of_a_file_leave_the_command_lines_files_alone(parse):
    parser = Parser("")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--size", nargs="+", type=int)
    given = parse("size: [1, 2]", "a.png", "b.png", parser=parser)
    assert (given.images, given.size) == (["a.png", "b.png"], [1, 2])


@pytest.mark.parametrize(("value", "address"), [("true", "here"), ("false", None), ("null", None), ("a:1", "a:1")])
def test_a_flag_that_needs_no_value(value, address, parse):
    parser = Parser("")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--cluster", nargs="?", const="here")
    assert parse(f"cluster: {value}", "a.png", parser=parser).cluster == address


values = {
    "seed": st.integers(0, 2**40),
    "learning_rate": st.floats(1e-12, 1e3),
    "conditioning_dropout_prob": st.floats(0, 1 / 3),
    "use_ema": st.booleans(),
    "cache_latents": st.sampled_from([None, False]),
    "mixed_precision": st.sampled_from(["no", "bf16", None]),
    "max_micro_batch_size": st.sampled_from([None, "auto", 3]),
    "run_name": st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), min_size=1) | st.none(),
    "tags": st.lists(st.sampled_from(["yes", "null", "1e3", "0o17", "a: b", "ä 😀", "~", "#"]), min_size=1, max_size=3),
}


@settings(max_examples=40, deadline=None)
@given(st.fixed_dictionaries(values))
def test_what_was_written_down_says_the_same_again(tmp_path_factory, flags):
    path = tmp_path_factory.mktemp("config") / "training_config.json"
    written = resolved(parse_args("", to_argv(NEEDED))) | flags
    write_json(path, written)
    assert resolved(parse_args("", [f"--config={path}"])) == written
    path.write_text(yaml.safe_dump(written, allow_unicode=True), encoding="utf-8")
    assert resolved(parse_args("", [f"--config={path}"])) == written


def test_a_run_its_checkpoint_and_a_dry_run_can_be_given_back(small_run, tmp_path, caplog):
    """Their configurations are equal to the last flag, drawn seed included, and a resume from one is the same run."""
    flags = {"seed": None, "scale_lr": True, "center_crop": True, "validation_prompt": None, "tags": ["é", "no"]}
    whole = small_run(name="whole", **flags, checkpointing_steps=2)
    written = json.loads((whole / "checkpoint-2/state.json").read_text(encoding="utf-8"))["flags"]
    assert written == json.loads((whole / "checkpoint-4/state.json").read_text(encoding="utf-8"))["flags"]
    printed = {}
    for file in (whole / "checkpoint-2/state.json", tmp_path / "printed.json"):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            run_script("finetune", config=file, output_dir=tmp_path / "again", dry_run=True)
        (tmp_path / "printed.json").write_text(out.getvalue(), encoding="utf-8")
        printed[file.name] = json.loads(out.getvalue())["flags"]
    assert printed["state.json"] == printed["printed.json"] == written | {"output_dir": str(tmp_path / "again")}

    run_script("finetune", config=tmp_path / "printed.json", max_train_steps=2)
    assert json.loads((tmp_path / "again/checkpoint-2/state.json").read_text())["flags"]["seed"] == written["seed"]
    run_script("finetune", config=tmp_path / "printed.json", resume_from_checkpoint="latest")
    assert losses(tmp_path / "again") == losses(whole)
    assert not [record for record in caplog.records if "differ from the checkpoint's" in record.message]


def test_yaml_is_imported_only_for_a_file():
    code = """
import sys
from instruct_pix2pix.training.options import build_parser
build_parser("").parse_args(["--pretrained_model_name_or_path=m"])
print("yaml" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_space_is_not_written_with_a_file_it_would_not_have(tmp_path):
    from inference import app

    (tmp_path / "run.yaml").write_text("seed: 3\n")
    with pytest.raises(UserError, match="--config: the Space would not have the file"):
        app.main([f"--config={tmp_path / 'run.yaml'}", f"--write_space={tmp_path / 'space'}"])
