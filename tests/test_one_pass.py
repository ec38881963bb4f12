"""The one-pass optimizer against PyTorch's own parts. Where there is no GPU, Triton's interpreter runs the kernel."""

import logging
import re
import types
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from instruct_pix2pix.training import step as speed
from instruct_pix2pix.training.ema import EMA
from tests.conftest import assert_same_tensors, losses

pytest.importorskip("triton", reason="needs Triton, which is for Linux")

# A dry step divides by a bias correction of zero and throws the result away.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1, "eps": 1e-8}
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def one_pass(monkeypatch):
    from instruct_pix2pix.training import one_pass

    if DEVICE == "cpu":
        from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

        monkeypatch.setattr(one_pass, "update_chunk", InterpretedFunction(one_pass.update_chunk.fn))
        monkeypatch.setattr(InterpreterBuilder, "create_fp_trunc", _rounded)
    return one_pass


def _rounded(builder, source, target_type):
    """float32 to a half type as a GPU does it: to the nearest. The interpreter cuts bfloat16 off."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    if target_type.scalar != tl.bfloat16:
        return builder.cast_impl(source, target_type)
    values = torch.from_numpy(source.data).bfloat16()
    return TensorHandle(values.view(torch.uint16).numpy(), tl.bfloat16)


def net(layout=torch.contiguous_format) -> torch.nn.Module:
    """Tensors of less than a chunk, of several, and of whole ones."""
    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(3, 32, 3), torch.nn.GroupNorm(4, 32), torch.nn.Conv2d(32, 64, 1), torch.nn.Linear(62, 63))
    return torch.nn.Sequential(*layers).to(DEVICE, memory_format=layout)


def gradients(step: int, size: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [size * torch.randn(p.shape, generator=generator).to(DEVICE) for p in net().parameters()]


def give(model, values) -> None:
    for parameter, value in zip(model.parameters(), values, strict=True):
        parameter.grad = torch.empty_like(parameter).copy_(value)


def assert_close(one: list, other: list, **tolerance) -> None:
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("averaged", [True, False])
def test_one_pass_is_clipping_adamw_and_average(one_pass, layout, averaged):
    ours, theirs = net(layout), net(layout)
    optimizer = torch.optim.AdamW(ours.parameters(), fused=True, **SETTINGS)
    reference = torch.optim.AdamW(theirs.parameters(), fused=True, **SETTINGS)
    ema = EMA(ours.parameters(), 0.99) if averaged else None
    reference_ema = EMA(theirs.parameters(), 0.99)
    step = one_pass.OnePass(ours, optimizer, ema, max_grad_norm=1.0)
    for number, size in enumerate((1.0, 1e-3, 0.1, 1e-8)):  # clipped and not
        rate = 1e-3 / (number + 1)
        give(ours, gradients(number, size))
        step.set_rate(rate)
        norm = step.step()
        give(theirs, gradients(number, size))
        assert norm.item() == pytest.approx(torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0).item(), rel=1e-6)
        reference.param_groups[0]["lr"] = rate
        reference.step()
        reference_ema.update()
        assert_close(list(ours.parameters()), list(theirs.parameters()), rtol=1e-6, atol=1e-7)
        if averaged:
            assert_close(ema.shadow, reference_ema.shadow, rtol=1e-6, atol=1e-7)
            assert ema.updates == reference_ema.updates
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        state, expected = optimizer.state[mine], reference.state[other]
        assert state["step"] == expected["step"] == 4
        assert_close([state["exp_avg"]], [expected["exp_avg"]], rtol=1e-5, atol=1e-9)
        assert_close([state["exp_avg_sq"]], [expected["exp_avg_sq"]], rtol=1e-5, atol=1e-12)


def test_the_copies_are_the_weights_rounded(one_pass):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **SETTINGS)
    step = one_pass.OnePass(model, optimizer, None, max_grad_norm=1.0, half=torch.bfloat16)
    halved = [leaf.dtype == torch.bfloat16 for leaf in step.leaves]
    assert halved == [True, True, False, False, True, True, True, True]  # all but the norm's
    assert step.leaves[2] is model[1].weight
    before = [p.detach().clone() for p in model.parameters()]
    give(step.unet, gradients(0, 1.0))
    step.set_rate(0.1)
    step.step()
    for leaf, weight, old in zip(step.leaves, model.parameters(), before, strict=True):
        assert torch.equal(leaf, weight.to(leaf.dtype)) and not torch.equal(weight, old)


def test_a_dry_step_changes_nothing(one_pass):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **SETTINGS)
    scaler = torch.amp.GradScaler(DEVICE)
    ema = EMA(model.parameters(), 0.99)
    step = one_pass.OnePass(model, optimizer, ema, max_grad_norm=1.0, scaler=scaler)
    give(model, gradients(0, float("nan")))
    step.step(dry=True)
    assert_close(list(model.parameters()), list(net().parameters()), rtol=0, atol=0)
    assert_close(ema.shadow, list(net().parameters()), rtol=0, atol=0)
    assert not any(tensor.any() for state in optimizer.state.values() for tensor in state.values())
    assert ema.updates == 0 and scaler.state_dict() == torch.amp.GradScaler(DEVICE).state_dict()


def test_a_loss_scale_comes_and_goes_as_with_a_grad_scaler(one_pass):
    """Gradients that overflow change nothing and halve the scale; finite ones raise it after a while."""
    ours, theirs = net(), net()
    scalers = [torch.amp.GradScaler(DEVICE, init_scale=2.0**10, growth_interval=2) for _ in range(2)]
    optimizer = torch.optim.AdamW(ours.parameters(), fused=True, **SETTINGS)
    reference = torch.optim.AdamW(theirs.parameters(), fused=True, **SETTINGS)
    step = one_pass.OnePass(ours, optimizer, None, max_grad_norm=1.0, scaler=scalers[0])
    scalers[1].scale(torch.ones((), device=DEVICE))  # it is made when first used
    scales = []
    for number, size in enumerate((1.0, float("inf"), 1.0, 1e-3, 1e-3)):
        scales.append(scalers[1].get_scale())
        assert scalers[0].state_dict() == scalers[1].state_dict()
        scaled = [value * scales[-1] for value in gradients(number, size)]
        give(ours, scaled)
        step.set_rate(1e-3)
        step.step()
        give(theirs, scaled)
        scalers[1].unscale_(reference)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        scalers[1].step(reference)
        scalers[1].update()
        assert_close(list(ours.parameters()), list(theirs.parameters()), rtol=1e-6, atol=1e-7)
    assert scales == [1024, 1024, 512, 512, 1024]
    assert optimizer.state[ours[0].weight]["step"] == 4


def test_gradients_that_lie_otherwise_are_laid_out_as_their_weights(one_pass):
    model, other = net(torch.channels_last), net()
    for number, m in enumerate((model, other)):
        optimizer = torch.optim.AdamW(m.parameters(), fused=True, **SETTINGS)
        step = one_pass.OnePass(m, optimizer, None, max_grad_norm=1.0)
        for parameter, value in zip(m.parameters(), gradients(0, 1.0), strict=True):
            parameter.grad = None
            # An address that is no multiple of 16 bytes in one of the two.
            shifted = torch.cat([value.new_zeros(number), value.flatten()])[number:]
            parameter.grad = shifted.view(value.shape)
        step.set_rate(1e-3)
        step.step()
    assert_close(list(model.parameters()), list(other.parameters()), rtol=0, atol=0)


@pytest.mark.skipif(DEVICE == "cuda", reason="the other tests compile it there")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("half", [True, False])
def test_the_kernel_compiles_for_gpus_with_wide_loads(capability, half, monkeypatch):
    """By Triton's own compiler, which needs no GPU. Whole chunks are read and written 16 bytes at a time."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from instruct_pix2pix.training import one_pass

    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton 3.9 warns about when it is left out
    constants = {
        **{"BETA1": 0.9, "BETA2": 0.999, "EPSILON": 1e-8, "WEIGHT_DECAY": 1e-2, "HAS_AVERAGE": True, "WHOLE": True},
        **{"GRADIENT": tl.bfloat16 if half else tl.float32, "HAS_COPY": half},
        **{"CHUNK": one_pass.CHUNK, "ALIGNMENT": one_pass.ALIGNMENT},
    }
    names = one_pass.update_chunk.arg_names
    pointers = {"tensors": "*i64", "gradients": "*i64", "chunks": "*i32", "numbers": "*fp32"}
    source = ASTSource(
        fn=one_pass.update_chunk,
        signature={name: pointers.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    code = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
    read, written = (len(re.findall(rf"{what}\.global\.v4", code)) for what in ("ld", "st"))
    # For a thread's 8 numbers: two of each float32 tensor, one of each half-precision one.
    assert (read, written) == ((9, 9) if half else (10, 8))


# ---- in training


@pytest.fixture
def with_one_pass(one_pass, monkeypatch):
    """Training as --compile has it on a GPU, but for the CUDA graph. Returns what stands in for the compiler."""
    stand_in = {"compile": lambda module: module}
    if DEVICE == "cpu":
        monkeypatch.setattr(one_pass, "CHUNK", 2**13)  # the interpreter's time goes by programs

    def settle(args, accelerator, plan, training, passes):
        for parameter in training.bare_unet.parameters():
            parameter.data = parameter.data.clone()  # mapped from a file they are not aligned as a GPU aligns them
        training.micro_batch_size = speed.micro_batch_sizes(args)[0]
        training.one_pass = speed._one_pass(args, accelerator, training)
        assert training.one_pass is not None
        training.predict = stand_in["compile"](training.eager)

    monkeypatch.setattr(speed, "settle", settle)
    return stand_in


def weights(run) -> list[torch.Tensor]:
    return list(load_file(run / UNET).values())


FLAGS = {"use_ema": True, "max_train_steps": 2, "checkpointing_steps": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "most", "compiled"), [("no", 4, False), ("bf16", 4, False), ("bf16", 2, False), ("bf16", 4, True)]
)
def test_training_in_one_pass_is_training(precision, most, compiled, small_run, request):
    """With half-precision copies where the update is one micro-batch, without them where it is two; and with those
    compiled as far as goes without a GPU, up to where code would be generated."""
    flags = {"mixed_precision": precision, "max_micro_batch_size": most, **FLAGS}
    plain = small_run(name="plain", **flags)
    stand_in = request.getfixturevalue("with_one_pass")
    if compiled:
        stand_in["compile"] = partial(torch.compile, backend="aot_eager")
    ours = small_run(name="ours", **flags)
    assert losses(ours) == pytest.approx(losses(plain), rel=1e-5 if precision == "no" else 2e-3)
    # A rounding decides the sign of AdamW's first steps, of 1e-3 each, for gradients that are nothing but rounding.
    apart = torch.cat([(a - b).abs().flatten() for a, b in zip(weights(ours), weights(plain), strict=True)])
    assert apart.quantile(0.99) < (1e-6 if precision == "no" else 2e-4)


@pytest.mark.slow
def test_training_in_one_pass_resumes_exactly(with_one_pass, small_run):
    flags = {"mixed_precision": "bf16", "max_micro_batch_size": 4, **FLAGS}
    whole = small_run(name="whole", **flags)
    small_run(name="halves", **{**flags, "max_train_steps": 1})
    halves = small_run(name="halves", resume_from_checkpoint="latest", **flags)
    for file in (UNET, "ema.safetensors", "optimizer.safetensors"):
        assert_same_tensors(whole / "checkpoint-2" / file, halves / "checkpoint-2" / file)


def test_autocast_and_the_half_twin_give_the_same_gradients(base_models):
    """The gradients that the copies get are those that autocast casts to float32 afterwards, bit by bit."""
    from diffusers import UNet2DConditionModel

    from instruct_pix2pix.training.one_pass import half_twin

    unet = UNet2DConditionModel.from_pretrained(base_models["finetune"], subfolder="unet").to(DEVICE)
    twin = half_twin(unet, torch.bfloat16)
    assert len({id(p) for p in (*unet.parameters(), *twin.parameters())}) > len(list(unet.parameters()))
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 8, 8, 8, generator=generator).to(DEVICE)
    text = torch.randn(2, 7, unet.config.cross_attention_dim, generator=generator).to(DEVICE)
    found = []
    for model in (unet, twin):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            prediction = model(noisy, torch.tensor([3, 500], device=DEVICE), text, return_dict=False)[0]
        prediction.float().square().mean().backward()
        found.append([p.grad.float() for p in model.parameters()])
        for p in model.parameters():
            p.grad = None
    assert_close(*found, rtol=0, atol=0)


def test_flags_that_leave_no_room_for_it_are_said_in_one_line(caplog):
    caplog.set_level(logging.INFO)
    args = types.SimpleNamespace(use_8bit_adam=False, offload_ema=True)
    assert speed._one_pass(args, None, None) is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert "--offload_ema" in line and "\n" not in line
