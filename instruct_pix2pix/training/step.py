"""How an update is run: in which micro-batches, compiled, with its optimizer in one pass, as a CUDA graph.

Nothing here changes what is computed, but for rounding. What a machine cannot do is said in one line and left out.
"""

import gc
import logging
import warnings

import torch

from instruct_pix2pix.cli import MemoryShortage

logger = logging.getLogger(__name__)

ROOM_BESIDE = 0.1  # of a GPU's memory, left free by a micro-batch that fits: for live encoders, validation, fragments
WARM_UP_PASSES = 3  # before a CUDA graph is recorded: PyTorch's manual, "CUDA Graphs", asks for a few on a side stream


def micro_batch_sizes(args) -> list[int]:
    """Images a forward pass may have, the largest first: they divide what a process does in an update."""
    window = args.train_batch_size * args.gradient_accumulation_steps
    if args.max_micro_batch_size is None:
        return [args.train_batch_size]
    divisors = [size for size in range(window, 0, -1) if window % size == 0]
    if args.max_micro_batch_size == "auto":
        return divisors
    return [size for size in divisors if size <= args.max_micro_batch_size][:1]


def settle(args, accelerator, plan, training, passes) -> None:
    """Before the first update: choose the micro-batch, compile, record the CUDA graph, as far as asked for.

    `passes(accelerator, training, inputs)` runs the forward and backward passes of an update. It is tried on inputs of
    zeros; the gradients of that are thrown away.
    """
    sizes, on_gpu = micro_batch_sizes(args), accelerator.device.type == "cuda"
    fit = on_gpu and len(sizes) > 1
    if not (fit or args.compile):
        return
    inputs = _blank_inputs(args, plan, training)
    if fit:
        training.micro_batch_size = _largest_that_fits(sizes, accelerator, training, passes, inputs)
        logger.info("--max_micro_batch_size auto: %d images in a forward pass", training.micro_batch_size)
    if not args.compile:
        return
    logger.info("compiling the UNet%s", "" if on_gpu else ": on a CPU that takes minutes and gains nothing")
    if on_gpu and training.unet is training.bare_unet:  # not wrapped to exchange gradients
        training.one_pass = _one_pass(args, accelerator, training)
    training.predict = torch.compile(training.eager)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's remarks about the libraries' code
            _try_passes(accelerator, training, passes, inputs)
    except Exception as error:  # a compiler that is missing or fails raises something of its own at every stage
        if is_out_of_memory(error):
            raise
        training.predict = training.eager
        logger.warning("--compile: the compiler failed (%s); going on without it", _first_line(error))
    if training.one_pass is not None and not args.gradient_checkpointing:
        stream, failed = torch.cuda.current_stream(), None
        try:
            training.graph = UpdateGraph(accelerator, training, passes, inputs)
        except Exception as error:  # memory that the recording holds on to, an operation that cannot be recorded
            # The end of a broken recording raises, too, and says nothing of what broke it.
            failed = _first_line(error.__context__ if error.__context__ and "capture" in str(error) else error)
        if failed is not None:
            torch.cuda.set_stream(stream)
            # PyTorch may take a broken recording for one that goes on: memory that two streams have used would not come
            # back until its end.
            training.stream = None
            training.one_pass.recorded = []
            training.drop_gradients()
            gc.collect()
            torch.cuda.empty_cache()
            logger.warning("--compile: no CUDA graph (%s); going on without it", failed)


def _one_pass(args, accelerator, training):
    """The one-pass optimizer, tried on gradients of zeros; None, with a line, where it cannot be had."""
    if args.use_8bit_adam or args.offload_ema:
        logger.info("--compile: neither one-pass optimizer nor CUDA graph with --use_8bit_adam or --offload_ema")
        return None
    if args.gradient_checkpointing:
        logger.info("--compile: no CUDA graph with --gradient_checkpointing, which saves random states underway")
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision)
    if training.micro_batch_size < args.train_batch_size * args.gradient_accumulation_steps:
        half = None
    try:
        from instruct_pix2pix.training.one_pass import OnePass  # needs Triton, as the compiler does

        parts = (training.bare_unet, training.optimizer.optimizer, training.ema, args.max_grad_norm)
        one_pass = OnePass(*parts, half, accelerator.scaler)
        for leaf in one_pass.leaves:
            leaf.grad = torch.zeros_like(leaf)
        one_pass.step(dry=True)
        for leaf in one_pass.leaves:
            leaf.grad = None
        return one_pass
    except Exception as error:  # Triton is missing, or cannot build for this GPU
        logger.warning("--compile: no one-pass optimizer, no CUDA graph (%s); going on without", _first_line(error))
        return None


class UpdateGraph:
    """A whole update, recorded once as a CUDA graph: the host then launches one thing instead of thousands.

    Inputs are copied to where the recording read them.
    """

    def __init__(self, accelerator, training, passes, inputs: dict[str, torch.Tensor]):
        self.inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        self.one_pass = training.one_pass
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_PASSES):
                passes(accelerator, training, self.inputs)
                self.one_pass.step(dry=True)
                training.drop_gradients()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        gc.collect()
        # What autograd may still hold of the passes so far belongs to another stream, which a recording must not touch.
        torch.autograd.graph.set_override_stale_capture_stream(True)
        try:
            # thread_local: the loader's thread may pin memory meanwhile, which the default mode takes for an error.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.loss = passes(accelerator, training, self.inputs)
                self.norm = self.one_pass.step(recording=True)
        finally:
            torch.autograd.graph.set_override_stale_capture_stream(False)
        self.one_pass.finish_recording()
        training.drop_gradients()

    def replay(self, inputs: dict[str, torch.Tensor], learning_rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        """An update; returns its loss and its gradients' norm before clipping."""
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor)
        self.one_pass.set_rate(learning_rate)
        self.graph.replay()
        return self.loss.clone(), self.norm.clone()


def beside_the_update(stream, make) -> dict[str, torch.Tensor]:
    """make(), launched on a stream of its own: a GPU works on it beside the update before, which the host is ahead of.
    Without a stream, on a CPU, just make()."""
    if stream is None:
        return make()
    with torch.cuda.stream(stream):
        tensors = make()
    current = torch.cuda.current_stream()
    current.wait_stream(stream)
    for tensor in tensors.values():
        tensor.record_stream(current)  # its memory is not given away before the update has read it
    return tensors


def is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU's memory is what is missing: cuBLAS and cuDNN say it in words of their own."""
    signs = ("out of memory", "ALLOC_FAILED", "unable to find an engine")
    told = isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    return told or isinstance(error, torch.OutOfMemoryError)


def out_of_memory(args) -> MemoryShortage:
    """What a GPU that is too small for a run's flags is answered with: the flags that help and are not used yet."""
    helps = {
        f"--train_batch_size below {args.train_batch_size}, with more --gradient_accumulation_steps": (
            args.train_batch_size > 1 and args.max_micro_batch_size is None
        ),
        "--max_micro_batch_size auto": args.max_micro_batch_size not in (None, "auto"),
        "--gradient_checkpointing": not args.gradient_checkpointing,
        "--mixed_precision bf16": args.mixed_precision == "no",
        "--cache_latents": not args.cache_latents,
        "--offload_ema": args.use_ema and not args.offload_ema,
        "--use_8bit_adam": not args.use_8bit_adam,
    }
    remedies = [flag for flag, unused in helps.items() if unused] or ["a smaller --resolution"]
    return MemoryShortage(
        f"--resolution: {args.resolution} pixels with these flags do not fit into the GPU's memory; what helps:"
        f" {', '.join(remedies)}"
    )


def _blank_inputs(args, plan, training) -> dict[str, torch.Tensor]:
    """Zeros of the shapes that the passes of an update get: see trainer.prepare."""
    window = args.train_batch_size * args.gradient_accumulation_steps
    channels = training.vae.config.latent_channels
    device = training.null_embedding.device

    def zeros(*shape, dtype=torch.float32):
        return torch.zeros(window, *shape, dtype=dtype, device=device)

    return {
        "noisy": zeros(2 * channels, plan.latent_side, plan.latent_side),
        "timesteps": zeros(dtype=torch.long),
        "text": training.null_embedding.expand(window, -1, -1).contiguous(),
        "target": zeros(channels, plan.latent_side, plan.latent_side),
        "weights": zeros(),
    }


def _try_passes(accelerator, training, passes, inputs, reserve: int = 0) -> None:
    """Run the passes for nothing, beside `reserve` float32 numbers. Processes exchange nothing: none waits."""
    held = torch.empty(reserve, device=accelerator.device)
    try:
        passes(accelerator, training, inputs, synchronise=False)
    finally:
        del held
        training.drop_gradients()


def _largest_that_fits(sizes: list[int], accelerator, training, passes, inputs) -> int:
    """The first of `sizes` for which the passes run on every process, with room left for the optimizer's state."""
    reserve = 0
    if accelerator.device.type == "cuda":
        reserve = int(ROOM_BESIDE * torch.cuda.get_device_properties(accelerator.device).total_memory / 4)
    if not training.optimizer.optimizer.state:
        moments = 2 if isinstance(training.optimizer.optimizer, torch.optim.AdamW) else 0.5  # float32, or 8 bits each
        reserve += int(moments * sum(p.numel() for p in training.bare_unet.parameters()))
    for size in sizes:
        training.micro_batch_size = size
        fits = torch.ones((), device=accelerator.device)
        try:
            _try_passes(accelerator, training, passes, inputs, reserve)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            fits.zero_()
        torch.cuda.empty_cache()
        if accelerator.gather(fits).min():
            return size
    raise torch.OutOfMemoryError("not even one image fits")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]
