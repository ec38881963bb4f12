"""Measure the White-box cartoonizer: PyTorch in batches against the TensorFlow Lite interpreter image by image.

    python -m benchmarks.cartoonizer --cartoonizer_weights FILE --tflite FILE.tflite
    python -m benchmarks.cartoonizer --cartoonizer_weights FILE --device cuda --dtype float16 --size 512

Both sides run the generator and the guided filter, from float32 photos in [-1, 1] to float32 cartoons, in turns in one
process and with the same number of threads; the best of --rounds counts. The tflite file takes 224x224 only; the
interpreter is `pip install ai-edge-litert`. The last line is JSON.
"""

from functools import partial

from benchmarks import machine, models
from instruct_pix2pix.cli import Parser, run, whole_number


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--cartoonizer_weights", required=True, help="as for build_cartoonization.py")
    add("--tflite", help="the same network as a TensorFlow Lite file; left out, PyTorch runs alone")
    add("--device", default="cpu", help="of the PyTorch side")
    add("--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="of the PyTorch generator")
    add("--size", type=whole_number(4), default=224, help="side of the square photos")
    add("--batch_sizes", type=whole_number(1), nargs="+", default=[1, 4, 16], help="for PyTorch")
    add("--images", type=whole_number(1), default=16, help="photos in a round")
    add("--rounds", type=whole_number(1), default=5, help="rounds, of which the best counts")
    add("--threads", type=whole_number(1), default=2, help="for both sides")
    args = parser.parse_args(argv)

    import numpy as np
    import torch

    from instruct_pix2pix.building.whitebox import guided_filter, load_generator
    from instruct_pix2pix.building.whitebox_weights import read_weights

    torch.set_num_threads(args.threads)
    size = (args.size, args.size)
    photos = np.stack([np.asarray(models.fitted(path, size))[..., ::-1] for path in models.PHOTOGRAPHS[: args.images]])
    photos = (photos / 127.5 - 1).astype(np.float32)  # (N, H, W, 3) BGR
    dtype = getattr(torch, args.dtype)
    generator = load_generator(read_weights(args.cartoonizer_weights), args.device, dtype)

    @torch.inference_mode()
    def run_torch(batch_size: int) -> np.ndarray:
        made = []
        for batch in torch.from_numpy(photos).split(batch_size):
            x = batch.to(args.device).permute(0, 3, 1, 2).contiguous()
            y = generator(x.to(dtype)).float()
            made.append(guided_filter(x, y).permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(made)

    sides = {f"torch, batch {batch_size}": partial(run_torch, batch_size) for batch_size in args.batch_sizes}
    if args.tflite:
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(args.tflite, num_threads=args.threads)
        interpreter.allocate_tensors()
        where, to = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

        def run_tflite() -> np.ndarray:
            made = []
            for photo in photos:
                interpreter.set_tensor(where, photo[None])
                interpreter.invoke()
                made.append(interpreter.get_tensor(to))
            return np.concatenate(made)

        sides["tflite, one by one"] = run_tflite

    speeds = {name: len(photos) / min(times) for name, times in machine.seconds_in_turns(sides, args.rounds).items()}
    outputs = {name: function() for name, function in sides.items()}
    first = next(iter(outputs.values()))
    result = {
        "device": args.device,
        "dtype": args.dtype,
        "size": args.size,
        **machine.describe(),
        "images_per_second": {name: round(speed, 3) for name, speed in speeds.items()},
        "max_difference": {name: float(np.abs(made - first).max()) for name, made in outputs.items()},
    }
    if args.tflite:
        best = max((name for name in speeds if name.startswith("torch")), key=speeds.get)
        result["ratio"] = {f"{best} / tflite": round(speeds[best] / speeds["tflite, one by one"], 3)}
    machine.report(result)


if __name__ == "__main__":
    run(main)
