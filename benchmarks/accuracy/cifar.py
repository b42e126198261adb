"""Class-conditional CIFAR-10: how good a DiT gets, and after how long, as published, compiled, and accelerated.

    python benchmarks/accuracy/cifar.py --data cifar_0.safetensors cifar_1.safetensors --seconds 60
    python benchmarks/accuracy/cifar.py --smoke                    # invented images, a few steps on the CPU

Every variant (benchmarks/accuracy/training.py) trains the same model from the same weights on the same batches, noise
and dropped labels, by rectified flow on pixels, for `--seconds` or `--max-steps`. Snapshots of the averaged weights are
judged afterwards, all by the same network:

    distance    Fréchet distance between the 64 features of a ResNet-56 for CIFAR-10, to the training images
                (it is not FID, whose network is another)
    accuracy    share of samples that the ResNet takes for the class that was asked for

Written to `--out`: accuracy_cifar_….json, and for every variant a grid of samples and, of the last variant, a
checkpoint that examples/image/sample.py draws from.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor, nn

import opendit
from benchmarks.accuracy import files, training
from benchmarks.accuracy.resnet import ResNet
from benchmarks.accuracy.training import WAYS, Draws, Trained, Trainer
from benchmarks.common import RESULTS, write_results
from benchmarks.training import clean_up
from examples.diffusion.flow import RectifiedFlow
from examples.diffusion.sampling import sample
from examples.evaluate.metrics import Moments, frechet_distance
from examples.models.dit import DiT
from examples.models.export import export

GUIDANCE = (1.0, 1.5, 2.0)  # scales that the last snapshot is judged at; the grid's is the best's
BATCH = 1000


def main() -> int:
    args = parse()
    device = torch.device("cuda" if torch.cuda.is_available() and not args.smoke else "cpu")
    data = invented(args.seed) if args.smoke else load(args.data)
    torch.manual_seed(args.seed)
    model_arguments = {
        "input_size": data["train"].shape[-1], "patch_size": args.patch, "in_channels": 3, "num_classes": 10,
        "hidden_size": args.hidden, "depth": args.depth, "num_heads": args.heads, "learn_sigma": False,
    }  # fmt: skip
    start = DiT(**model_arguments).state_dict()
    images = data["train"].to(device).float() / 127.5 - 1
    labels = data["train.labels"].to(device)

    path: Path | None = None
    rows: list[dict[str, Any]] = []
    facts = {"setting": setting_of(args, model_arguments), "seed": args.seed, "budget_s": args.seconds}
    facts["command"] = files.command()
    trained: dict[str, Trained] = {}
    for name in args.variants:
        model = DiT(**model_arguments).to(device).train()
        model.load_state_dict(start)
        trainer = Trainer(model, WAYS[name], flow_loss(images, labels, args), lr=args.lr, ema=args.ema)
        trained[name] = done = training.train(trainer, args.seconds, args.snapshots, args.max_steps)
        rows.append(
            {
                "variant": name, "batch": args.batch, "steps": len(done.losses), "seconds": done.seconds,
                "start_up_s": done.start_up_s, "images_per_s": done.steps_per_s * args.batch,
                "curve": training.curve(done.losses), "notes": done.notes,
            }
        )  # fmt: skip
        print(f"{name}: {len(done.losses)} steps in {done.seconds:.1f} s, loss {done.losses[-50:].mean():.4f}")
        path = write_results("accuracy_cifar", rows, args.out, path, **facts)
        del trainer, model
        clean_up()

    judge = Judge(data, device, model_arguments, args)
    facts |= {"real": judge.real()}
    for row in rows:
        final = trained[row["variant"]].snapshots[-1].weights
        judge.take(final)
        row["final"] = {str(scale): judge.score(scale) for scale in GUIDANCE}
        best = min(GUIDANCE, key=lambda scale, row=row: row["final"][str(scale)]["distance"])
        row["grid_cfg_scale"] = best
        judge.save_grid(args.out / f"cifar_{row['variant']}.png", best)
    path = write_results("accuracy_cifar", rows, args.out, path, **facts)
    last = rows[-1]
    save_model(args, trained[last["variant"]].snapshots[-1].weights, model_arguments, data, last, facts)
    for row in rows:
        row["points"] = []
        for snapshot in trained[row["variant"]].snapshots:
            judge.take(snapshot.weights)
            row["points"].append({"steps": snapshot.steps, "seconds": snapshot.seconds, **judge.score(1.0)})
            path = write_results("accuracy_cifar", rows, args.out, path, **facts)
        print(f"{row['variant']}: {in_words(row['points'][-1])}; guided {in_words(row['final'][str(GUIDANCE[-1])])}")
    print(f"written to {path}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", help="what prepare.py wrote")
    parser.add_argument("--seconds", type=float, default=60, help="of training, for each variant")
    parser.add_argument("--max-steps", type=int, help="end sooner, after so many steps")
    parser.add_argument("--variants", nargs="+", choices=list(WAYS), default=["published", "compile", "opendit"])
    parser.add_argument("--snapshots", type=int, default=6, help="judged for each variant, evenly over its time")
    parser.add_argument("--samples", type=int, default=2000, help="drawn to judge a snapshot")
    parser.add_argument("--sample-steps", type=int, default=10, help="of Heun's method")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--patch", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON, pictures and the checkpoint")
    parser.add_argument("--smoke", action="store_true", help="a few steps on invented images, on the CPU")
    args = parser.parse_args()
    if args.smoke:
        args.seconds, args.max_steps, args.snapshots, args.samples, args.sample_steps = 60, 14, 2, 20, 2
        args.batch, args.hidden, args.depth, args.heads, args.patch = 4, 16, 1, 2, 8
    elif not args.data:
        parser.error("--data: is needed, the files that benchmarks/accuracy/prepare.py cifar writes")
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def setting_of(args: argparse.Namespace, model: dict[str, Any]) -> str:
    return (
        f"DiT of {model['depth']} blocks of {model['hidden_size']}, patch {model['patch_size']}, rectified flow on "
        f"pixels, batch {args.batch}, AdamW at {args.lr:g} after {training.WARM_UP} steps, EMA {args.ema:g}; "
        f"{args.samples} samples, Heun of {args.sample_steps} steps"
    )


def load(paths: list[Path]) -> dict[str, Any]:
    """{"train": uint8 [N, 3, 32, 32], "train.labels", "test", "test.labels", "resnet": weights, "classes": names}."""
    found: dict[str, Tensor] = {}
    lists: dict[str, Any] = {}
    for path in paths:
        tensors, beside = files.read(path)
        found |= tensors
        lists |= beside
    data: dict[str, Any] = {"classes": lists["classes"]}
    for split in ("train", "test"):
        parts = sorted({name.partition(".")[0] for name in found if name.startswith(split)})
        sheets = [torch.from_numpy(sheet) for part in parts for sheet in files.unpacked(found, part)]
        data[split] = torch.cat([sheet.view(-1, 32, 32, 3).permute(0, 3, 1, 2) for sheet in sheets])
        data[f"{split}.labels"] = torch.cat([found[f"{part}.labels"] for part in parts])
    data["resnet"] = {n.removeprefix("resnet."): v.float() for n, v in found.items() if n.startswith("resnet.")}
    return data


def invented(seed: int) -> dict[str, Any]:
    """Images of noise, and a network that has learned nothing."""
    torch.manual_seed(seed)
    data: dict[str, Any] = {"classes": [f"class {i}" for i in range(10)], "resnet": ResNet().state_dict()}
    for split, count in (("train", 80), ("test", 70)):
        data[split] = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
        data[f"{split}.labels"] = torch.arange(count) % 10
    return data


def flow_loss(images: Tensor, labels: Tensor, args: argparse.Namespace) -> Any:
    """The script's loss of step i: a batch, flipped or not, at times of its own."""
    objective, draws = RectifiedFlow().to(images.device), Draws(images.device, args.seed)

    def loss(net: nn.Module, step: int) -> Tensor:
        options: dict[str, Any] = {"device": images.device, "generator": draws.at(step)}
        chosen = torch.randint(len(images), (args.batch,), **options)
        flipped = torch.rand(args.batch, 1, 1, 1, **options) < 0.5
        t = objective.times(torch.rand(args.batch, **options))
        noise = torch.randn(args.batch, *images.shape[1:], **options)
        x0 = torch.where(flipped, images[chosen].flip(-1), images[chosen])
        return objective.loss(net, x0, labels[chosen], t=t, noise=noise)

    return loss


class Judge:
    """Draws with weights and looks at what comes: one network for all variants, in bf16 on a GPU."""

    def __init__(self, data: dict[str, Any], device: torch.device, model: dict[str, Any], args: argparse.Namespace):
        self.args, self.device, self.data = args, device, data
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self.resnet = ResNet().to(device).eval()
        self.resnet.load_state_dict(data["resnet"])
        self.net = DiT(**model).to(device).eval()
        opendit.accelerate(self.net)
        self.train, _ = self.moments(data["train"].float() / 127.5 - 1)
        self.test, self.test_logits = self.moments(data["test"].float() / 127.5 - 1)

    def real(self) -> dict[str, float]:
        """What other real images get: the least distance and the best accuracy to hope for."""
        right = (self.test_logits.argmax(1).cpu() == self.data["test.labels"]).double().mean().item()
        return {"distance": self.distance(self.test, self.train), "accuracy": right}

    def take(self, weights: dict[str, Tensor]) -> None:
        self.net.load_state_dict(weights)

    @torch.no_grad()
    def draw(self, count: int, cfg_scale: float, seed: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(count, device=self.device) % 10
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            images = sample(
                self.net, {"y": labels}, sampler="heun", steps=self.args.sample_steps, cfg_scale=cfg_scale, seed=seed,
                batch_size=BATCH,
            )  # fmt: skip
        return images.float(), labels

    def score(self, cfg_scale: float) -> dict[str, float]:
        images, labels = self.draw(self.args.samples, cfg_scale, seed=self.args.seed)
        moments, logits = self.moments(images)
        return {
            "distance": self.distance(moments, self.train),
            "distance_to_test": self.distance(moments, self.test),
            "accuracy": (logits.argmax(1) == labels).double().mean().item(),
        }

    def save_grid(self, path: Path, cfg_scale: float) -> None:
        """A row per class, not chosen: samples 0 … 99."""
        images, _ = self.draw(100, cfg_scale, seed=self.args.seed)
        by_class = images.view(10, 10, *images.shape[1:]).transpose(0, 1).flatten(0, 1)
        files.save_grid(path, by_class, columns=10, scale=2)

    @torch.no_grad()
    def moments(self, images: Tensor) -> tuple[Moments, Tensor]:
        moments, logits = Moments(64, self.device), []
        for part in images.split(BATCH):
            features, found = self.resnet(part.to(self.device))
            moments.add(features)
            logits.append(found)
        return moments, torch.cat(logits)

    @staticmethod
    def distance(one: Moments, other: Moments) -> float:
        return frechet_distance(*one.mean_and_covariance(), *other.mean_and_covariance())


def save_model(
    args: argparse.Namespace,
    weights: dict[str, Tensor],
    model: dict[str, Any],
    data: dict[str, Any],
    row: dict[str, Any],
    facts: dict[str, Any],
) -> None:
    config = {"architecture": "DiT", "model": model, "objective": "flow", "pixels": True, "classes": data["classes"]}
    scale = row["grid_cfg_scale"]
    card = (
        f"Draws 32×32 images of CIFAR-10's ten classes: {', '.join(data['classes'])}.\n\n"
        f"- Training: {facts['setting']}; {row['steps']} steps in {row['seconds']:.0f} s, seed {args.seed}, by "
        f"`benchmarks/accuracy/cifar.py`, variant `{row['variant']}`. Weights are the averaged ones.\n"
        f"- Data: {len(data['train'])} images of CIFAR-10 (Krizhevsky 2009), flipped at random.\n"
        f"- Measured at a guidance of {scale:g}: {in_words(row['final'][str(scale)])}; real test images: "
        f"{in_words(facts['real'])}.\n"
        "- Meant for trying out the scripts. It is small, was trained for minutes, and is no model to rely on.\n"
        "- Licence: Apache-2.0, as the project; CIFAR-10 itself comes without an explicit one."
    )
    export(args.out / "checkpoint", weights, config, "DiT for CIFAR-10", card)


def in_words(score: dict[str, float]) -> str:
    return f"feature distance {score['distance']:.2f}, {score['accuracy']:.1%} of the classes recognised"


if __name__ == "__main__":
    sys.exit(main())
