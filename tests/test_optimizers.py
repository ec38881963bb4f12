"""Optimizers by name: they train, go on to the bit from a checkpoint, and export the weights that count."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from instruct_pix2pix.cli import UserError
from instruct_pix2pix.models import trained
from instruct_pix2pix.training import checkpoint as checkpoints
from instruct_pix2pix.training import optimizers, preparation
from instruct_pix2pix.training.config import Config, resolved
from instruct_pix2pix.training.ema import average_swapped_in
from instruct_pix2pix.training.options import OPTIMIZERS, parse_args
from tests.conftest import assert_same_tensors, copy_tree, losses

UNET = trained.UNET_FILE
NEEDED = ["--pretrained_model_name_or_path=model", "--dataset_name=data"]
RATES = {"prodigy": 1.0}


def configuration(name: str, *flags: str):
    return parse_args("", [*NEEDED, f"--optimizer={name}", f"--learning_rate={RATES.get(name, 0.03)}", *flags])


class Forgetful(torch.optim.SGD):
    """Keeps a number where no checkpoint looks for it."""

    def step(self, closure=None):
        self.scale = 0.5 * getattr(self, "scale", 1.0)
        for parameter in self.param_groups[0]["params"]:
            parameter.data.add_(parameter.grad, alpha=-self.scale)


# ---- in training


@pytest.mark.parametrize("name", ["adafactor", "muon", "prodigy", "schedulefree"])
def test_a_resumed_run_goes_on_to_the_bit(name, small_run, tmp_path):
    flags = {"optimizer": name, "learning_rate": RATES.get(name, 1e-3), "checkpointing_steps": 2}
    whole = small_run(name="whole", **flags)
    copy_tree(whole / "checkpoint-2", tmp_path / "halved" / "checkpoint-2")
    shutil.copy(whole / "training_log.jsonl", tmp_path / "halved")
    halved = small_run(name="halved", resume_from_checkpoint="latest", **flags)
    assert losses(whole) == losses(halved) and len(losses(whole)) == 4
    files = ["optimizer.safetensors", UNET] + [trained.EMA_FILE] * (name == "schedulefree")
    for file in (UNET, *(f"checkpoint-4/{file}" for file in files)):
        assert_same_tensors(whole / file, halved / file)
    ends = [checkpoints.read_state(run / "checkpoint-4")["optimizer"] for run in (whole, halved)]
    assert ends[0] == ends[1]
    changed = ends[0].get("param_groups", [{}])[0]
    expected = {"prodigy": {"d_numerator", "k"}, "schedulefree": {"lr_max", "k"}}
    assert expected.get(name, set()) <= changed.keys()


@pytest.mark.parametrize("schedule", ["linear", "polynomial", "cosine_with_restarts", "constant_with_warmup"])
def test_muon_takes_every_schedule(schedule, small_run):
    assert len(losses(small_run(optimizer="muon", lr_scheduler=schedule, lr_warmup_steps=1, max_train_steps=2))) == 2


def test_a_schedule_free_run_exports_its_average_not_the_weights_that_it_trains(small_run):
    """By hand: x is where y comes from, y = (1 - beta1) z + beta1 x (Defazio et al. 2024)."""
    run = small_run(optimizer="schedulefree", max_train_steps=3)
    last = run / "checkpoint-3"
    exported, average = load_file(run / UNET), load_file(last / trained.EMA_FILE)
    gradients_at, state = load_file(last / UNET), load_file(last / "optimizer.safetensors")
    for name, y in gradients_at.items():
        torch.testing.assert_close(average[name], (y - 0.1 * state[f"{name}/z"]) / 0.9, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(average[name], gradients_at[name]) for name in average)
    assert_same_tensors(run / UNET, last / trained.EMA_FILE)
    edited_with = trained.load_pipeline(last, torch.float32).unet.state_dict()
    assert all(torch.equal(edited_with[name], exported[name]) for name in exported)


def test_looking_at_the_average_changes_no_bit_of_training():
    weights = torch.nn.Parameter(torch.randn(50, generator=torch.Generator().manual_seed(0)))
    optimizer = optimizers.build(configuration("schedulefree"), [weights])
    for _ in range(5):
        weights.grad = weights.detach() - 1
        optimizer.step()
    before = weights.detach().clone()
    with pytest.raises(KeyError), average_swapped_in(None, optimizer):
        assert not torch.equal(weights, before)
        raise KeyError
    assert torch.equal(weights, before) and optimizer.param_groups[0]["train_mode"]


def test_gradients_are_clipped_whatever_the_optimizer(small_run, base_models):
    flags = {"adam_weight_decay": 0, "max_grad_norm": 1e-3, "learning_rate": 1, "max_train_steps": 1}
    run = small_run(optimizer="torch.optim.SGD", **flags)
    before, after = load_file(base_models["finetune"] / UNET), load_file(run / UNET)
    moved = torch.stack([(after[name] - before[name]).norm() for name in after]).norm()
    assert moved.item() == pytest.approx(1e-3, rel=1e-3)


# ---- alone


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_with_a_short_name_learns(name):
    """Least squares with a matrix, a convolution and a bias."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"bias": (8,), "matrix": (8, 6), "convolution": (8, 6, 3, 3)}
    targets = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    parameters = {n: torch.nn.Parameter(torch.zeros(shape)) for n, shape in shapes.items()}
    optimizer = optimizers.build(configuration(name), parameters.values())
    for _ in range(100):
        for n, parameter in parameters.items():
            parameter.grad = parameter.detach() - targets[n]
        optimizer.step()
    with average_swapped_in(None, optimizer):
        for n, parameter in parameters.items():
            assert (parameter - targets[n]).pow(2).mean() < 0.5 * targets[n].pow(2).mean(), n


def test_muon_steps_matrices_and_hidden_convolutions_and_adamw_the_rest():
    """A convolution is stepped as the matrix of its rows, in whatever layout it lies in memory."""
    shapes = {"matrix": (4, 6), "hidden": (8, 4, 2, 2), "channels last": (8, 4, 2, 2)}
    shapes |= {"few rows": (4, 6, 1, 1), "bias": (6,)}
    ours = {
        name: torch.nn.Parameter(torch.linspace(-1, 1, math.prod(shape)).view(shape)) for name, shape in shapes.items()
    }
    ours["channels last"].data = ours["channels last"].data.contiguous(memory_format=torch.channels_last)
    theirs = {name: torch.nn.Parameter(each.detach().clone().contiguous()) for name, each in ours.items()}
    for name in ("hidden", "channels last"):
        theirs[name] = torch.nn.Parameter(theirs[name].detach().flatten(1))
    config = configuration("muon")
    both, decay = optimizers.build(config, ours.values()), config.adam_weight_decay
    matrices, others = list(theirs.values())[:3], list(theirs.values())[3:]
    muon = torch.optim.Muon(matrices, lr=0.03, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=0.03, weight_decay=decay, fused=True)
    for _ in range(3):
        for parameter in [*ours.values(), *theirs.values()]:
            parameter.grad = parameter.detach() ** 2 - 0.1
        both.step(), muon.step(), adamw.step()
    for name, parameter in ours.items():
        assert parameter.shape == parameter.grad.shape == shapes[name]
        assert torch.equal(parameter, theirs[name].view(shapes[name])), name
    assert ours["channels last"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(4, 6), (6,)])
def test_muon_trains_matrices_alone_and_biases_alone(shape):
    parameter = torch.nn.Parameter(torch.ones(shape))
    parameter.grad = torch.ones(shape)
    optimizers.build(configuration("muon"), [parameter]).step()
    assert (parameter < 1).all()


def test_state_of_the_default_is_written_as_ever():
    parameters = {"weight": torch.nn.Parameter(torch.ones(3))}
    optimizer = optimizers.build(configuration("adamw"), parameters.values())
    parameters["weight"].grad = torch.ones(3)
    optimizer.param_groups[0]["lr"] = 0.5  # as the schedule does
    optimizer.step()
    tensors, rest = checkpoints.flatten_optimizer(optimizer, parameters)
    assert sorted(tensors) == ["weight/exp_avg", "weight/exp_avg_sq", "weight/step"] and rest == {}


def test_flags_win_over_a_checkpoint_in_what_training_does_not_change():
    parameters = {"weight": torch.nn.Parameter(torch.ones(3))}
    runs = [optimizers.build(configuration("prodigy", f"--adam_beta2={b}"), parameters.values()) for b in (0.9, 0.99)]
    for _ in range(2):
        parameters["weight"].grad = torch.ones(3)
        runs[0].step()
    checkpoints.restore_optimizer(runs[1], parameters, *checkpoints.flatten_optimizer(runs[0], parameters))
    before, after = (run.param_groups[0] for run in runs)
    assert after["betas"] == (0.9, 0.99) and after["d"] == before["d"] > 1e-6 and after["k"] == 2


# ---- names


def test_names_and_classes_are_one():
    for short, path in OPTIMIZERS.items():
        assert configuration(short).optimizer == configuration(path).optimizer == short
    assert parse_args("", [*NEEDED, "--use_8bit_adam"]).optimizer == "adamw8bit"
    assert parse_args("", NEEDED).optimizer == "adamw"


@pytest.mark.parametrize(
    "name", [*OPTIMIZERS, "torch.optim.RAdam", "torch.optim.Adafactor", "schedulefree.RAdamScheduleFree"]
)
def test_what_trains_and_goes_on_exactly_passes_the_check(name):
    """Here Prodigy's d has grown when the checkpoint is made."""
    optimizers.check(configuration(name))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["adamx"], "--optimizer: 'adamx' is unknown; give adamw, adamw8bit, "),
        (["nolibrary.Adam"], "--optimizer: nolibrary.Adam .*nolibrary.*; pip install nolibrary"),
        (["torch.optim.Adamx"], "--optimizer: torch.optim.Adamx cannot be imported"),
        (["torch.nn.Linear"], "--optimizer: torch.nn.Linear fails"),
        (["torch.optim.LBFGS"], "--optimizer: torch.optim.LBFGS fails .*closure"),
        (["torch.optim.SparseAdam"], "--optimizer: torch.optim.SparseAdam fails"),
        (["tests.test_optimizers.Forgetful"], "--optimizer: .*Forgetful keeps more than a checkpoint holds"),
        (["schedulefree", "--use_ema"], "--use_ema: schedulefree keeps an average of its own"),
        (["schedulefree", "--adam_beta1=0"], "--optimizer: schedulefree fails .*zero"),
    ],
)
def test_what_cannot_train_or_be_resumed_is_refused_in_a_line(flags, message):
    with pytest.raises(UserError, match=message) as caught:
        optimizers.check(configuration(*flags))
    assert "\n" not in str(caught.value)


def test_the_optimizer_cannot_change_on_resume(small_run):
    small_run(max_train_steps=1)
    with pytest.raises(UserError, match="--optimizer: the checkpoint was made with adamw; give the flag as it was"):
        small_run(optimizer="muon", resume_from_checkpoint="latest")


def test_checkpoints_of_before_there_was_a_choice_say_which_it_was():
    for flags, before in (([], {"use_8bit_adam": False}), (["--use_8bit_adam"], {"use_8bit_adam": True})):
        config = Config(vars(parse_args("", [*NEEDED, *flags])))
        state = {"flags": {n: v for n, v in resolved(config).items() if n != "optimizer"} | before}
        preparation._say_what_changed(config, state)
    with pytest.raises(UserError, match="--optimizer: the checkpoint was made with adamw8bit"):
        preparation._say_what_changed(Config(vars(parse_args("", NEEDED))), state)


def test_prodigy_with_a_rate_of_adamw_is_remarked_on(caplog):
    config = configuration("prodigy", "--learning_rate=1e-4")
    preparation._say_what_is_unusual(config)
    assert "--learning_rate: prodigy multiplies its own step by 0.0001" in caplog.text
