"""Micro-batches, compilation and memory: faster, and the same numbers."""

import logging
import types
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from instruct_pix2pix.cli import UserError
from instruct_pix2pix.training import checkpoint as checkpoints
from instruct_pix2pix.training import step as speed
from tests.conftest import assert_same_tensors, losses

UNET = "unet/diffusion_pytorch_model.safetensors"


# ---- micro-batches


@pytest.mark.parametrize(
    ("batch", "accumulation", "most", "sizes"),
    [
        (2, 4, None, [2]),
        (2, 4, 8, [8]),
        (2, 4, 7, [4]),
        (2, 4, 1, [1]),
        (3, 2, 4, [3]),
        (2, 4, "auto", [8, 4, 2, 1]),
    ],
)
def test_micro_batches_divide_what_an_update_does(batch, accumulation, most, sizes):
    args = types.SimpleNamespace(
        train_batch_size=batch, gradient_accumulation_steps=accumulation, max_micro_batch_size=most
    )
    assert speed.micro_batch_sizes(args) == sizes


def test_merged_and_split_micro_batches_train_what_the_given_ones_do(small_run):
    flags = {"gradient_accumulation_steps": 3, "use_ema": True, "snr_gamma": 5.0, "conditioning_dropout_prob": 0.3}
    plain = small_run(name="plain", **flags)
    for most in ("auto", 3, 1):
        other = small_run(name=f"at-most-{most}", max_micro_batch_size=most, **flags)
        assert losses(other) == pytest.approx(losses(plain), abs=1e-6)
        theirs, ours = load_file(plain / UNET), load_file(other / UNET)
        # AdamW's first steps are nearly +-1e-3 whatever the gradient, so rounding in tiny ones shows up larger.
        assert max((theirs[name] - ours[name]).abs().max() for name in ours) < 1e-4


def test_the_largest_micro_batch_that_fits_is_found_and_leaves_no_gradient():
    unet = torch.nn.Linear(3, 3)
    optimizer = types.SimpleNamespace(optimizer=torch.optim.AdamW(unet.parameters()))
    config = types.SimpleNamespace(max_grad_norm=1.0, loss_type="mse", optimizer="adamw")
    accelerator = Accelerator(cpu=True)
    tried, made = [], []

    class Greedy(speed.Update):
        def forward_backward(self, inputs, synchronise):
            assert not synchronise  # no process waits for another
            tried.append(self.micro_batch_size)
            self.model(inputs["noisy"]).sum().backward()
            if self.micro_batch_size > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")

    def make_inputs():
        made.append(None)
        return {"noisy": torch.zeros(8, 3)}

    def find(sizes):
        parts = (config, accelerator, unet, optimizer, None)
        return speed.largest_that_fits(sizes, lambda size: Greedy(*parts, size), make_inputs)

    assert find([8, 4, 2, 1]) == 2 and tried == [8, 4, 2]
    assert len(made) == 3  # the encoders work in every trial, too
    assert all(p.grad is None for p in unet.parameters())
    with pytest.raises(torch.OutOfMemoryError):
        find([8, 4])


@pytest.mark.parametrize("cached", [False, True])
def test_a_blank_window_makes_inputs_of_the_shapes_of_training(cached, small_run, monkeypatch):
    from instruct_pix2pix.training import trainer

    run_updates, compared = trainer.run_updates, []

    def compare(run):
        blank = run.make_inputs(run.make_inputs.blank_window(run.latent_side))
        real = run.make_inputs(next(run.windows))
        for name in real:
            compared.append(name)
            assert (blank[name].shape, blank[name].dtype) == (real[name].shape, real[name].dtype), name
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "run_updates", compare)
    with pytest.raises(KeyboardInterrupt):
        small_run(cached_crops=2 if cached else None)
    assert compared == ["noisy", "timesteps", "text", "target", "weights"] and run_updates


def test_micro_batches_that_make_no_sense(small_run):
    with pytest.raises(UserError, match="--max_micro_batch_size: 0 is too small"):
        small_run(max_micro_batch_size=0)
    with pytest.raises(UserError, match="--max_micro_batch_size: 'some' is not a whole number"):
        small_run(max_micro_batch_size="some")


# ---- compilation


@pytest.mark.long
def test_compiled_training_is_uncompiled_training(small_run, monkeypatch, caplog):
    """Traced and differentiated by PyTorch's compiler under autocast, but for the C++ that takes minutes to build."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    flags = {"use_ema": True, "mixed_precision": "bf16", "max_train_steps": 2}
    plain = small_run(name="plain", **flags)
    compiled = small_run(name="compiled", compile=True, **flags)
    assert "going on without it" not in caplog.text
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-3)
    assert load_file(compiled / UNET).keys() == load_file(plain / UNET).keys()
    # Both keep one and the same state: a run goes on with or without the compiler.
    halved = small_run(
        name="compiled", compile=False, resume_from_checkpoint="latest", **flags | {"max_train_steps": 4}
    )
    assert losses(halved) == pytest.approx(losses(small_run(name="whole", **flags | {"max_train_steps": 4})), abs=1e-3)


def test_a_compiler_that_fails_is_one_line_and_training_goes_on(small_run, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("no C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    plain = small_run(name="plain")
    fallen_back = small_run(name="compiled", compile=True)
    assert_same_tensors(plain / UNET, fallen_back / UNET)
    (warning,) = [record.getMessage() for record in caplog.records if "--compile" in record.getMessage()]
    assert "the compiler failed" in warning and "going on without it" in warning and "\n" not in warning


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("most", ["auto", 2])
def test_compiled_updates_on_a_gpu_compute_what_uncompiled_ones_do(precision, most, small_run, caplog):
    caplog.set_level(logging.INFO)
    flags = {"use_ema": True, "mixed_precision": precision, "max_train_steps": 30, "max_micro_batch_size": most}
    plain = small_run(name="plain", **flags)
    compiled = small_run(name="compiled", compile=True, **flags)
    assert "going on without" not in caplog.text
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-3 if precision == "no" else 2e-2)


# ---- memory


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (torch.OutOfMemoryError("not even one image fits"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("FIND was unable to find an engine to execute this computation"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_a_full_gpu_is_told_from_other_errors(error, is_it):
    assert speed.is_out_of_memory(error) is is_it


def test_out_of_memory_names_the_flags_that_help_and_keeps_the_updates(small_run, monkeypatch, tmp_path):
    real, calls = speed.Update.forward_backward, []

    def full_the_third_time(*arguments):
        calls.append(None)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(*arguments)

    monkeypatch.setattr(speed.Update, "forward_backward", full_the_third_time)
    with pytest.raises(UserError) as caught:
        small_run(use_ema=True, gradient_checkpointing=True)
    message = str(caught.value)
    assert message.startswith("--resolution: 64 pixels") and "\n" not in message
    assert "--train_batch_size below 2" in message and "--offload_ema" in message and "--use_8bit_adam" in message
    assert "--gradient_checkpointing" not in message
    (kept,) = checkpoints.list_checkpoints(tmp_path / "run")
    assert kept.name == "checkpoint-2"
    monkeypatch.setattr(speed.Update, "forward_backward", real)
    flags = {"use_ema": True, "gradient_checkpointing": True}
    resumed = small_run(resume_from_checkpoint="latest", **flags)
    assert_same_tensors(resumed / UNET, small_run(name="whole", **flags) / UNET)
