"""Measure the White-box cartoonizer: PyTorch in batches against the TensorFlow Lite interpreter image by image.

    python -m benchmarks.cartoonizer --cartoonizer_weights FILE --tflite FILE.tflite
    python -m benchmarks.cartoonizer --cartoonizer_weights FILE --device cuda --dtype float16 --size 512

Both sides run the generator and the guided filter, from float32 photos in [-1, 1] to float32 cartoons, in turns in one
process and with the same number of threads; the best of --rounds counts. The tflite file takes 224x224 only; the
interpreter is `pip install ai-edge-litert`. The last line is JSON.
"""

import json
import time
from pathlib import Path

from instruct_pix2pix.cli import Parser, run, whole_number

ROOT = Path(__file__).parent.parent


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
    from instruct_pix2pix.images import read_image

    torch.set_num_threads(args.threads)
    paths = sorted((ROOT / "assets/photos/train").glob("*.webp"))[: args.images]
    photos = np.stack([np.asarray(read_image(path).resize((args.size,) * 2))[..., ::-1] for path in paths])
    photos = (photos / 127.5 - 1).astype(np.float32)  # (N, H, W, 3) BGR
    dtype = getattr(torch, args.dtype)
    generator = load_generator(read_weights(args.cartoonizer_weights), args.device, dtype)

    @torch.inference_mode()
    def run_torch(batch_size: int):
        out = []
        for i in range(0, len(photos), batch_size):
            x = torch.from_numpy(photos[i : i + batch_size]).to(args.device).permute(0, 3, 1, 2).contiguous()
            y = generator(x.to(dtype)).float()
            out.append(guided_filter(x, y).permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(out)

    runs = {f"torch, batch {size}": lambda size=size: run_torch(size) for size in args.batch_sizes}
    if args.tflite:
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(args.tflite, num_threads=args.threads)
        interpreter.allocate_tensors()
        where, to = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

        def run_tflite():
            out = []
            for photo in photos:
                interpreter.set_tensor(where, photo[None])
                interpreter.invoke()
                out.append(interpreter.get_tensor(to))
            return np.concatenate(out)

        runs["tflite, one by one"] = run_tflite

    outputs = {name: function() for name, function in runs.items()}  # a first round to warm up
    seconds = dict.fromkeys(runs, float("inf"))
    for _ in range(args.rounds):
        for name, function in runs.items():  # in turns, so that a busy moment of the machine hits all alike
            start = time.perf_counter()
            function()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    speeds = {name: len(photos) / value for name, value in seconds.items()}
    for name, speed in speeds.items():
        print(f"{name:20} {speed:8.2f} images/s")
    reference = outputs[next(iter(outputs))]
    result = {
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu",
        "dtype": args.dtype,
        "size": args.size,
        "threads": args.threads,
        "torch": torch.__version__,
        "images_per_second": {name: round(speed, 3) for name, speed in speeds.items()},
        "max_difference": {name: float(np.abs(out - reference).max()) for name, out in outputs.items()},
    }
    if args.tflite:
        best = max((name for name in speeds if name.startswith("torch")), key=speeds.get)
        result["ratio"] = {f"{best} / tflite": round(speeds[best] / speeds["tflite, one by one"], 3)}
    print(json.dumps(result))


if __name__ == "__main__":
    run(main)
