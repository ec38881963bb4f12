"""Optimizers by name, each from the library that keeps it."""

import contextlib
import importlib
import inspect
import json
from collections.abc import Iterable

import torch

from instruct_pix2pix.cli import UserError, first_line
from instruct_pix2pix.training.checkpoint import flatten_optimizer, restore_optimizer
from instruct_pix2pix.training.ema import average_swapped_in
from instruct_pix2pix.training.options import OPTIMIZERS

# Adafactor's steps as long as --learning_rate says, like AdamW's; Prodigy as in diffusers' scripts.
SETTINGS = {
    "adafactor": {"scale_parameter": False, "relative_step": False},
    "prodigy": {"use_bias_correction": True, "safeguard_warmup": True},
}
# Bytes of state for each trained number, where it is not two moments; with a schedule-free optimizer's average.
STATE_BYTES = {"adamw8bit": 2.1, "adafactor": 2.2, "muon": 4.1, "schedulefree": 12, "prodigy": 16}


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for matrices and convolutions (Jordan et al. 2024), a convolution as a matrix with a row for each output
    channel, and fused AdamW with `settings` for all else: norms, biases, convolutions to few channels. Muon's steps are
    scaled to be as long as AdamW's, so that one learning rate suits both."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], settings: dict):
        matrices, others = [], []
        for each in parameters:
            hidden = each.ndim > 2 and len(each) >= 8 and each[0].numel() >= 16
            (matrices if each.ndim == 2 or hidden else others).append(each)
        self.parts = []
        if matrices:
            shared = {name: settings[name] for name in ("lr", "weight_decay")}
            with self._as_matrices(matrices):
                self.parts.append(torch.optim.Muon(matrices, **shared, adjust_lr_fn="match_rms_adamw"))
        if others:
            self.parts.append(torch.optim.AdamW(others, fused=True, **settings))
        super().__init__([group for part in self.parts for group in part.param_groups], {"lr": settings["lr"]})

    def step(self, closure: None = None) -> None:
        """One step of both, each with its own group and the state of all."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state
            with self._as_matrices(group["params"] if isinstance(part, torch.optim.Muon) else ()):
                part.step()

    @staticmethod
    @contextlib.contextmanager
    def _as_matrices(parameters: Iterable[torch.nn.Parameter]):
        """While open, convolutions and their gradients are matrices: PyTorch's Muon takes nothing else."""
        convolutions = [(each, each.data, each.grad) for each in parameters if each.ndim > 2]
        for each, whole, grad in convolutions:
            each.grad, each.data = None, whole.flatten(1)
            each.grad = None if grad is None else grad.flatten(1)
        try:
            yield
        finally:
            for each, whole, grad in convolutions:
                whole.copy_(each.data.view_as(whole))  # channels_last was flattened into a copy
                each.grad, each.data = None, whole
                each.grad = grad


def build(config, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of --optimizer, ready to train. It gets the learning rate, and of --adam_... what it takes: epsilon
    only beside betas, as others mean another number by it. Raises UserError where there is no such class."""
    parameters, name = list(parameters), config.optimizer
    settings = {"lr": config.learning_rate, "betas": (config.adam_beta1, config.adam_beta2)}
    settings |= {"weight_decay": config.adam_weight_decay, "eps": config.adam_epsilon}
    if name == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **settings)
    if name == "muon":
        return MuonAndAdamW(parameters, settings)
    module, _, class_name = OPTIMIZERS.get(name, name).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), class_name)
    except (ImportError, AttributeError) as error:
        remedy = f"pip install {module.partition('.')[0]}, or choose another"
        raise UserError(f"--optimizer: {name} cannot be imported ({first_line(error)}); {remedy}") from error
    takes = inspect.signature(found).parameters
    settings = {key: value for key, value in settings.items() if key in takes and (key != "eps" or "betas" in takes)}
    with contextlib.redirect_stdout(None):  # Prodigy prints
        optimizer = found(parameters, **settings, **SETTINGS.get(name, {}))
    if hasattr(optimizer, "train"):  # a schedule-free one, see ema.average_swapped_in
        optimizer.train()
    return optimizer


def check(config) -> None:
    """Raise UserError where --optimizer is not installed, or a class that cannot train a bias, a matrix and a
    convolution, or does not go on, to the bit, from what a checkpoint holds of it; and where --use_ema would average
    an average."""
    shapes = {"bias": (4,), "matrix": (4, 3), "convolution": (4, 3, 3, 3)}
    first, second = ({n: torch.nn.Parameter(torch.ones(s)) for n, s in shapes.items()} for _ in range(2))
    try:
        optimizer, resumed = build(config, first.values()), build(config, second.values())
        _take_steps(optimizer, first)
        with average_swapped_in(None, optimizer):
            pass  # there is a way to it and back
        tensors, rest = flatten_optimizer(optimizer, first)
        restore_optimizer(resumed, second, {n: t.clone() for n, t in tensors.items()}, json.loads(json.dumps(rest)))
        for name, parameter in first.items():
            second[name].data.copy_(parameter.data)
        _take_steps(optimizer, first), _take_steps(resumed, second)
    except UserError:
        raise
    except Exception as error:  # each class has demands of its own
        raise UserError(f"--optimizer: {config.optimizer} fails ({first_line(error)}); choose another") from error
    if not all(torch.equal(first[name], second[name]) for name in first):
        raise UserError(f"--optimizer: {config.optimizer} keeps more than a checkpoint holds; choose another")
    if config.use_ema and hasattr(optimizer, "eval"):
        raise UserError(f"--use_ema: {config.optimizer} keeps an average of its own; give --no-use_ema")


def _take_steps(optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter]) -> None:
    for scale in (1, 2):
        for parameter in parameters.values():
            parameter.grad = scale * torch.linspace(-1, 2, parameter.numel()).view_as(parameter)
        optimizer.step()
