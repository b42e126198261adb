"""Text to image: a small DiT on 1,600 captioned emoji, and whether what it draws is what the caption says.

    python benchmarks/accuracy/text_to_image.py --data emoji.safetensors --seconds 80
    python benchmarks/accuracy/text_to_image.py --smoke                # invented images, a few steps on the CPU

An accelerated DiT learns rectified flow on TAEF2's latents of 128 px images, conditioned on a sentence encoder's pooled
embedding of the caption. Every tenth caption is held out. Judged on pixels of 64 × 64:

    nearest     of samples for captions that were trained on: the share whose nearest real image, among all of them, is
                the caption's own; and is one of the five nearest
    group       the share that a classifier, trained on the real images in this script, takes for the caption's group
                (animals, food, …), for trained and for held-out captions, beside its accuracy on held-out real images

Written to `--out`: accuracy_text_to_image_….json, text_to_image.png (trained captions above, held-out ones below).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy import classifier, files, training
from benchmarks.accuracy.training import WAYS, Draws, Trainer
from benchmarks.common import RESULTS, write_results
from benchmarks.training import clean_up
from examples.diffusion.flow import RectifiedFlow
from examples.diffusion.sampling import sample
from examples.encoders.taef2 import Taef2
from examples.models.dit import DiT

SIDE = 64  # of what is judged
SHOWN = ("Animals & Nature", "Food & Drink", "Travel & Places", "Smileys & Emotion", "Activities", "Objects")


def main() -> int:
    args = parse()
    device = torch.device("cuda" if torch.cuda.is_available() and not args.smoke else "cpu")
    data = Emoji.invented() if args.smoke else Emoji.load(args.data)
    data.to(device)
    latents = data.encode()
    torch.manual_seed(args.seed)
    model_arguments = {
        "input_size": latents.shape[-1], "patch_size": args.patch, "in_channels": latents.shape[1],
        "hidden_size": args.hidden, "depth": args.depth, "num_heads": args.heads, "learn_sigma": False,
        "text_dim": data.pooled.shape[1],
    }  # fmt: skip
    model = DiT(**model_arguments).to(device).train()
    trained = torch.tensor([i for i in range(len(latents)) if i % 10 != 9], device=device)
    held_out = torch.tensor([i for i in range(len(latents)) if i % 10 == 9], device=device)
    way = WAYS[args.variant]
    loss = text_loss(latents[trained], data.pooled[trained], args.batch, args.seed)
    trainer = Trainer(model, way, loss, lr=args.lr, ema=args.ema)
    done = training.train(trainer, args.seconds, 1, args.max_steps)
    print(f"{len(done.losses)} steps in {done.seconds:.1f} s, loss {done.losses[-50:].mean():.4f}", flush=True)
    del trainer, model
    clean_up()

    net = DiT(**model_arguments).to(device).eval()
    net.load_state_dict(done.snapshots[-1].weights)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def draw(captions: Tensor, seed: int) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=way.bf16 and device.type == "cuda"), torch.no_grad():
            drawn = sample(
                net, {"y": data.pooled[captions]}, sampler="heun", steps=args.sample_steps, cfg_scale=args.cfg_scale,
                seed=seed, clip=False, batch_size=256,
            )  # fmt: skip
        return data.decode(drawn.float())

    some = trained[torch.randperm(len(trained), generator=torch.Generator().manual_seed(1))[: args.samples].to(device)]
    ours, theirs = draw(some, args.seed), draw(held_out, args.seed)
    row = {
        "variant": args.variant, "batch": args.batch, "steps": len(done.losses), "seconds": done.seconds,
        "start_up_s": done.start_up_s, "images_per_s": done.steps_per_s * args.batch,
        "curve": training.curve(done.losses), "notes": done.notes, "cfg_scale": args.cfg_scale,
        "captions": {"trained": len(trained), "held_out": len(held_out), "drawn": len(some)},
        "nearest": nearest(small(ours), small(data.images), some),
        "group": group_scores(data, trained, held_out, some, ours, theirs, args),
    }  # fmt: skip
    shown = [data.shown(some, args.shown), data.shown(held_out, args.shown)]
    row["shown"] = {
        name: [data.captions[int(i)] for i in which[places]]
        for name, which, places in zip(("trained", "held_out"), (some, held_out), shown, strict=True)
    }
    pictures = torch.cat([ours[shown[0]], theirs[shown[1]]])
    args.out.mkdir(parents=True, exist_ok=True)
    files.save_grid(args.out / "text_to_image.png", pictures, columns=10)
    setting = (
        f"DiT of {args.depth} blocks of {args.hidden}, patch {args.patch} on TAEF2's latents of 128 px, batch "
        f"{args.batch}, AdamW at {args.lr:g}, EMA {args.ema:g}, Heun of {args.sample_steps} steps, guidance "
        f"{args.cfg_scale:g}"
    )
    facts = {"setting": setting, "seed": args.seed, "budget_s": args.seconds}
    facts["command"] = files.command()
    path = write_results("accuracy_text_to_image", [row], args.out, **facts)
    print(f"nearest {row['nearest']}; group {row['group']}; written to {path}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="what prepare.py emoji wrote")
    parser.add_argument("--seconds", type=float, default=80, help="of training")
    parser.add_argument("--max-steps", type=int, help="end sooner, after so many steps")
    parser.add_argument("--variant", choices=list(WAYS), default="opendit")
    parser.add_argument("--samples", type=int, default=400, help="drawn for trained captions")
    parser.add_argument("--sample-steps", type=int, default=16, help="of Heun's method")
    parser.add_argument("--cfg-scale", type=float, default=3.0)
    parser.add_argument("--classifier-steps", type=int, default=1500)
    parser.add_argument("--shown", type=int, default=30, help="trained captions in the picture, and as many others")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--patch", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON and the picture")
    parser.add_argument("--smoke", action="store_true", help="a few steps on invented images, on the CPU")
    args = parser.parse_args()
    if args.smoke:
        args.max_steps, args.samples, args.sample_steps, args.classifier_steps, args.shown = 12, 8, 2, 2, 4
        args.batch, args.hidden, args.depth, args.heads, args.patch = 4, 16, 1, 2, 2
    elif not args.data:
        parser.error("--data: is needed, the file that benchmarks/accuracy/prepare.py emoji writes")
    return args


class Emoji:
    """Images [N, 3, 128, 128] in [−1, 1], `pooled` [N, E] of unit variance, groups, captions, and the autoencoder."""

    def __init__(
        self, images: Tensor, pooled: Tensor, labels: Tensor, classes: list[str], captions: list[str], vae: Taef2,
        mean: Tensor, std: Tensor,
    ):  # fmt: skip
        self.images, self.labels, self.classes, self.captions, self.vae = images, labels, classes, captions, vae
        self.pooled = F.normalize(pooled.float(), dim=1) * pooled.shape[1] ** 0.5
        self.mean, self.std = mean.float().view(-1, 1, 1), std.float().view(-1, 1, 1)

    @classmethod
    def load(cls, path: Path) -> Emoji:
        tensors, lists = files.read(path)
        images = torch.stack([torch.from_numpy(image) for image in files.unpacked(tensors, "images")])
        vae = Taef2(len(tensors["taef2.mean"]))
        for half in ("encoder", "decoder"):
            prefix = f"taef2.{half}."
            weights = {n.removeprefix(prefix): v.float() for n, v in tensors.items() if n.startswith(prefix)}
            getattr(vae, half).load_state_dict(weights)
        return cls(
            images.permute(0, 3, 1, 2).float() / 127.5 - 1, tensors["pooled"], tensors["images.labels"],
            lists["classes"], lists["captions"], vae, tensors["taef2.mean"], tensors["taef2.std"],
        )  # fmt: skip

    @classmethod
    def invented(cls) -> Emoji:
        torch.manual_seed(0)
        labels, mean = torch.arange(40) % 8, torch.zeros(32)
        captions = [f"thing {i}" for i in range(40)]
        classes = [*SHOWN, "Symbols", "People"]
        return cls(
            torch.rand(40, 3, 32, 32) * 2 - 1, torch.randn(40, 8), labels, classes, captions, Taef2(), mean, mean + 1
        )

    def to(self, device: torch.device) -> None:
        for name in ("images", "pooled", "labels", "mean", "std"):
            setattr(self, name, getattr(self, name).to(device))
        self.vae = self.vae.to(device).eval()

    @torch.no_grad()
    def encode(self) -> Tensor:
        latents = torch.cat([self.vae.encode((part + 1) / 2) for part in self.images.split(64)])
        return (latents - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        parts = [self.vae.decode(part * self.std + self.mean) for part in latents.split(64)]
        return (torch.cat(parts) * 2 - 1).clamp(-1, 1)

    def shown(self, which: Tensor, count: int) -> Tensor:
        """The first `count` places of `which` whose groups make good pictures."""
        wanted = {self.classes.index(name) for name in SHOWN}
        places = [i for i, label in enumerate(self.labels[which].tolist()) if label in wanted]
        return torch.tensor(places[:count], device=which.device)


def text_loss(x0: Tensor, pooled: Tensor, batch: int, seed: int) -> Any:
    """The script's loss of step i, for images and clips."""
    objective, draws = RectifiedFlow().to(x0.device), Draws(x0.device, seed)

    def loss(net: nn.Module, step: int) -> Tensor:
        options: dict[str, Any] = {"device": x0.device, "generator": draws.at(step)}
        chosen = torch.randint(len(x0), (batch,), **options)
        t = objective.times(torch.rand(batch, **options))
        noise = torch.randn(batch, *x0.shape[1:], **options)
        return objective.loss(net, x0[chosen], pooled[chosen], t=t, noise=noise)

    return loss


def small(images: Tensor) -> Tensor:
    return F.interpolate(images, size=(SIDE, SIDE), mode="area")


def nearest(drawn: Tensor, real: Tensor, asked: Tensor) -> dict[str, float]:
    """How often the real image of the caption is the nearest one, or among the five nearest; and what chance gives."""
    order = torch.cdist(drawn.flatten(1), real.flatten(1)).topk(5, largest=False).indices
    hits = order == asked[:, None]
    return {
        "first": hits[:, 0].double().mean().item(),
        "of_five": hits.any(1).double().mean().item(),
        "chance": 1 / len(real),
    }


def group_scores(
    data: Emoji, trained: Tensor, held_out: Tensor, some: Tensor, ours: Tensor, theirs: Tensor, args: argparse.Namespace
) -> dict[str, float]:
    real, labels = small(data.images), data.labels
    judge = classifier.fit(
        real[trained], {"group": labels[trained]}, {"group": len(data.classes)}, steps=args.classifier_steps,
        flip=True, seed=args.seed, width=8 if args.smoke else 32, layers=2 if args.smoke else 4,
    )  # fmt: skip

    def right(images: Tensor, which: Tensor) -> float:
        return classifier.accuracy(judge, images, {"group": labels[which]})["group"]

    return {
        "real_held_out": right(real[held_out], held_out),
        "drawn_trained": right(small(ours), some),
        "drawn_held_out": right(small(theirs), held_out),
        "largest_group": (labels[held_out].bincount().max() / len(held_out)).item(),
    }


if __name__ == "__main__":
    sys.exit(main())
