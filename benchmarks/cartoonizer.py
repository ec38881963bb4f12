"""Measure the White-box cartoonizer: PyTorch in batches against the TensorFlow Lite interpreter image by image.

    PYTHONPATH=data_preparation python benchmarks/cartoonizer.py --cartoonizer_weights FILE --tflite FILE.tflite
    PYTHONPATH=data_preparation python benchmarks/cartoonizer.py --cartoonizer_weights FILE --device cuda \\
        --dtype float16 --size 512

Both sides run the generator and the guided filter, from float32 photos in [-1, 1] to float32 cartoons, in turns in one
process and with the same number of threads; the best of --rounds counts. The tflite file takes 224x224 only; the
interpreter is `pip install ai-edge-litert`. The last line is JSON.
"""

import argparse
import json
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cartoonizer_weights", required=True, help="as for build_cartoonization.py")
    add("--tflite", help="the same network as a TensorFlow Lite file (default: leave it out)")
    add("--device", default="cpu", help="of the PyTorch side (default: %(default)s)")
    add("--dtype", default="float32", help="of the PyTorch generator (default: %(default)s)")
    add("--size", type=int, default=224, help="side of the square photos (default: %(default)s)")
    add("--batch_sizes", type=int, nargs="+", default=[1, 4, 16], help="for PyTorch (default: 1 4 16)")
    add("--images", type=int, default=16, help="photos in a round (default: %(default)s)")
    add("--rounds", type=int, default=5, help="rounds, of which the best counts (default: %(default)s)")
    add("--threads", type=int, default=2, help="for both sides (default: %(default)s)")
    args = parser.parse_args()

    import numpy as np
    import torch
    from PIL import Image

    from instruct_pix2pix.building.whitebox import Generator, guided_filter
    from instruct_pix2pix.building.whitebox_weights import read_weights

    torch.set_num_threads(args.threads)
    paths = sorted((ROOT / "assets/photos/train").glob("*.webp"))[: args.images]
    photos = np.stack([np.asarray(Image.open(p).convert("RGB").resize((args.size,) * 2))[..., ::-1] for p in paths])
    photos = (photos / 127.5 - 1).astype(np.float32)  # (N, H, W, 3) BGR

    generator = Generator()
    generator.load_state_dict({k: torch.from_numpy(v) for k, v in read_weights(args.cartoonizer_weights).items()})
    dtype = getattr(torch, args.dtype)
    generator = generator.eval().requires_grad_(False).to(args.device, dtype, memory_format=torch.channels_last)

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

    outputs = {name: run() for name, run in runs.items()}  # a first round to warm up
    seconds = dict.fromkeys(runs, float("inf"))
    for _ in range(args.rounds):
        for name, run in runs.items():  # in turns, so that a busy moment of the machine hits all alike
            start = time.perf_counter()
            run()
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
    main()
