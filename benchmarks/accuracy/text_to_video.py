"""Text to video: a small VDiT on captioned clips of moving shapes, and whether motion, colour and shape are as asked.

    python benchmarks/accuracy/text_to_video.py --data shapes.safetensors --seconds 80
    python benchmarks/accuracy/text_to_video.py --smoke                # invented clips, a few steps on the CPU

An accelerated VDiT learns rectified flow on clips of 16 frames of 32 × 32 pixels, conditioned on a sentence encoder's
pooled embedding of "a purple star in vertical motion". Three of the 27 captions are held out, so that each motion,
colour and shape was seen, but not together. A 3-d classifier, trained on real clips in this script (one of five held
out), says for each sample whether motion, colour and shape are the caption's, and all three.

Written to `--out`: accuracy_text_to_video_….json and text_to_video.gif, a clip per caption, the held-out ones last.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor

from benchmarks.accuracy import classifier, files, training
from benchmarks.accuracy.text_to_image import text_loss
from benchmarks.accuracy.training import WAYS, Trainer
from benchmarks.common import RESULTS, write_results
from benchmarks.training import clean_up
from examples.diffusion.sampling import sample
from examples.models.vdit import VDiT

QUESTIONS = ("motion", "colour", "shape")


def main() -> int:
    args = parse()
    device = torch.device("cuda" if torch.cuda.is_available() and not args.smoke else "cpu")
    data = invented() if args.smoke else load(args.data)
    clips, pooled = data["clips"].to(device), data["pooled"].to(device)
    answers = {name: data[name].to(device) for name in QUESTIONS}
    captions: list[str] = data["captions"]
    unique = list(dict.fromkeys(captions))
    first = torch.tensor([captions.index(caption) for caption in unique], device=device)
    # One of each motion, colour and shape.
    held_out = [i for i, at in enumerate(first.tolist()) if len({int(answers[name][at]) for name in QUESTIONS}) == 1]
    seen = torch.tensor([unique.index(caption) not in held_out for caption in captions], device=device)

    torch.manual_seed(args.seed)
    model_arguments = {
        "input_size": clips.shape[-1], "num_frames": clips.shape[1], "patch_size": args.patch, "frame_patch": 2,
        "in_channels": 3, "hidden_size": args.hidden, "depth": args.depth, "num_heads": args.heads,
        "learn_sigma": False, "text_dim": pooled.shape[1],
    }  # fmt: skip
    model = VDiT(**model_arguments).to(device).train()
    trainer = Trainer(
        model, WAYS[args.variant], text_loss(clips[seen], pooled[seen], args.batch, args.seed), lr=args.lr, ema=args.ema
    )
    done = training.train(trainer, args.seconds, 1, args.max_steps)
    print(f"{len(done.losses)} steps in {done.seconds:.1f} s, loss {done.losses[-50:].mean():.4f}", flush=True)
    del trainer, model
    clean_up()

    net = VDiT(**model_arguments).to(device).eval()
    net.load_state_dict(done.snapshots[-1].weights)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    asked = first.repeat_interleave(args.per_caption)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"), torch.no_grad():
        drawn = sample(
            net, {"y": pooled[asked]}, sampler="heun", steps=args.sample_steps, cfg_scale=args.cfg_scale,
            seed=args.seed, batch_size=128,
        ).float()  # fmt: skip

    training_clip = torch.arange(len(clips), device=device) % 5 != 4
    judge = classifier.fit(
        clips[training_clip], {n: v[training_clip] for n, v in answers.items()},
        {n: int(v.max()) + 1 for n, v in answers.items()}, steps=args.classifier_steps, seed=args.seed,
        width=4 if args.smoke else 32, layers=2 if args.smoke else 3,
    )  # fmt: skip
    new = torch.isin(asked, first[held_out])
    row = {
        "variant": args.variant, "batch": args.batch, "steps": len(done.losses), "seconds": done.seconds,
        "start_up_s": done.start_up_s, "clips_per_s": done.steps_per_s * args.batch,
        "curve": training.curve(done.losses), "notes": done.notes, "cfg_scale": args.cfg_scale,
        "captions": {"trained": len(unique) - len(held_out), "held_out": [unique[i] for i in held_out]},
        "per_caption": args.per_caption,
        "real_held_out": score(judge, clips, answers, ~training_clip),
        "drawn_trained": score(judge, drawn, {n: v[asked] for n, v in answers.items()}, ~new),
        "drawn_held_out": score(judge, drawn, {n: v[asked] for n, v in answers.items()}, new),
    }  # fmt: skip
    order = [i for i in range(len(unique)) if i not in held_out] + held_out
    row["shown"] = [unique[i] for i in order]
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = torch.tensor([i * args.per_caption for i in order], device=device)
    files.save_gif(args.out / "text_to_video.gif", drawn[chosen], columns=9, scale=2)
    setting = (
        f"VDiT of {args.depth} blocks of {args.hidden}, patch 2×{args.patch}×{args.patch} on {clips.shape[1]} frames "
        f"of {clips.shape[-1]} px, batch {args.batch}, AdamW at {args.lr:g}, EMA {args.ema:g}, Heun of "
        f"{args.sample_steps} steps, guidance {args.cfg_scale:g}"
    )
    facts = {"setting": setting, "seed": args.seed, "budget_s": args.seconds}
    facts["command"] = files.command()
    path = write_results("accuracy_text_to_video", [row], args.out, **facts)
    print({name: row[name] for name in ("real_held_out", "drawn_trained", "drawn_held_out")}, f"written to {path}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="what prepare.py shapes wrote")
    parser.add_argument("--seconds", type=float, default=80, help="of training")
    parser.add_argument("--max-steps", type=int, help="end sooner, after so many steps")
    parser.add_argument("--variant", choices=list(WAYS), default="opendit")
    parser.add_argument("--per-caption", type=int, default=16, help="clips drawn to be judged")
    parser.add_argument("--sample-steps", type=int, default=16, help="of Heun's method")
    parser.add_argument("--cfg-scale", type=float, default=2.0)
    parser.add_argument("--classifier-steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--patch", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON and the GIF")
    parser.add_argument("--smoke", action="store_true", help="a few steps on invented clips, on the CPU")
    args = parser.parse_args()
    if args.smoke:
        args.max_steps, args.per_caption, args.sample_steps, args.classifier_steps = 12, 2, 2, 2
        args.batch, args.hidden, args.depth, args.heads, args.patch = 4, 16, 1, 2, 4
    elif not args.data:
        parser.error("--data: is needed, the file that benchmarks/accuracy/prepare.py shapes writes")
    return args


def load(path: Path) -> dict[str, Any]:
    """{"clips": [N, F, 3, H, W] in [−1, 1], "pooled": [N, E] of unit variance, a label a question, "captions"}."""
    tensors, lists = files.read(path)
    strips = torch.stack([torch.from_numpy(strip) for strip in files.unpacked(tensors, "clips")])
    side = strips.shape[1]
    clips = strips.unflatten(2, (-1, side)).permute(0, 2, 4, 1, 3).float() / 127.5 - 1
    pooled = torch.nn.functional.normalize(tensors["pooled"].float(), dim=1) * tensors["pooled"].shape[1] ** 0.5
    labels = {name: tensors[f"clips.{name}"] for name in QUESTIONS}
    return {"clips": clips, "pooled": pooled, "captions": lists["captions"], **labels}


def invented() -> dict[str, Any]:
    torch.manual_seed(0)
    number = torch.arange(27).repeat_interleave(2)
    labels = {"motion": number // 9, "colour": number // 3 % 3, "shape": number % 3}
    pooled = torch.randn(27, 8).repeat_interleave(2, dim=0)
    return {
        "clips": torch.rand(54, 4, 3, 8, 8) * 2 - 1, "pooled": pooled, "captions": [f"{i}" for i in number], **labels
    }  # fmt: skip


def score(
    judge: classifier.Classifier, clips: Tensor, answers: dict[str, Tensor], where: Tensor
) -> dict[str, float] | None:
    """None where there are none."""
    if not where.any():
        return None
    return classifier.accuracy(judge, clips[where], {name: values[where] for name, values in answers.items()})


if __name__ == "__main__":
    sys.exit(main())
