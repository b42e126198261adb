"""A training run's housekeeping, the same for images and videos: the progress bar, what is logged, the validation loss,
samples of the averaged weights, checkpoints. The training itself is in image/train.py and video/train.py.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import opendit
from examples.common import (
    Ema,
    Process,
    autocast,
    check_writable,
    gather_lists,
    mean_over_processes,
    stop_if_any,
    stop_process,
)
from examples.diffusion import sample
from examples.encoding import Batch, Encoder
from examples.loading import collate, loader_for
from examples.models.checkpoint import save_checkpoint
from examples.options import precision_of
from examples.watching import Watch, forward_flops, peak_flops

# Counters of opendit's random numbers: what a step draws, and what never is a step's.
POSTERIOR, VALIDATION = 2**31, 2**32 - 1
# Settings that a resumed run may change without being told so: they change nothing that it learns.
OF_NO_EFFECT = {"load", "name", "outputs", "config", "explain", "wandb", "num_workers", "device", "keep", "log_every",
                "val_every", "sample_every", "ckpt_every", "compare_steps"}  # fmt: skip


class Run:
    """Args: `model` is what the script built, `net` what is called in training: the same, or a wrapper around it."""

    def __init__(
        self,
        args: Any,
        process: Process,
        config: dict[str, Any],
        model: nn.Module,
        net: nn.Module,
        optimizer: Optimizer,
        objective: nn.Module,
        encoder: Encoder,
        data: Any,
        held_out: Any,
    ):
        self.args, self.process, self.config, self.device = args, process, config, process.device
        self.model, self.net, self.optimizer, self.objective = model, net, optimizer, objective
        self.encoder, self.data, self.held_out = encoder, data, held_out
        self.precision = precision_of(args, self.device.type == "cuda")
        self.folder: Path = args.outputs / args.name
        self.folder.mkdir(parents=True, exist_ok=True)
        if (
            args.load is None
            and (self.folder / "checkpoints").is_dir()
            and any((self.folder / "checkpoints").iterdir())
        ):
            raise ValueError(
                f"--name {args.name}: {self.folder}/checkpoints holds another run's. Go on with it (--load latest), "
                "take another name, or remove them"
            )
        check_writable(self.folder / "metrics.json")  # better known now; the last run's stays until this one ends

        self.sampler, self.loader = loader_for(
            data, net, batch_size=args.batch_size, seed=args.global_seed, workers=args.num_workers, device=self.device
        )
        self.per_step = self.sampler.batch_size * args.accum
        self.total = args.steps or max(1, args.epochs * len(data) // self.per_step)
        self.schedule = LambdaLR(optimizer, self._lr)
        self.plain_ema = Ema(model, args.ema_decay) if args.no_accelerate else None
        if self.plain_ema is None:
            opendit.schedule(self.schedule)  # stands still when a step is skipped
        opendit.seed(args.global_seed, net)
        self.first = self._load()
        # The first batch is looked at before training, for its condition's shape and what samples are drawn for.
        self.shown = self._shown()
        self.flops = 3 * forward_flops(config, self.shown)
        self.losses = torch.zeros(self.total - self.first, device=self.device)
        self.trouble = ""  # that no loss has shown
        self.watch = Watch(self.folder, _plain(args), writes=process.is_main, resumed_at=self.first, wandb=args.wandb)

    # --- the loop's parts ---

    def steps(self) -> Iterator[int]:
        """The numbers of the steps to come, under a progress bar."""
        self.batches = self.sampler.over(self.loader)
        self.started = self.since = time.perf_counter()
        self.bar = tqdm(
            range(self.first, self.total),
            desc="train",
            unit="step",
            initial=self.first,
            total=self.total,
            mininterval=0.5,
            disable=not self.process.is_main,
        )
        self.net.train()
        yield from self.bar
        self.bar.close()

    def micro_batches(self) -> Iterator[tuple[Batch, contextlib.AbstractContextManager]]:
        """The batches of one step, each with the context that its forward and backward belong in."""
        for i in range(self.args.accum):
            context = opendit.no_sync(self.net) if i + 1 < self.args.accum else contextlib.nullcontext()
            yield next(self.batches), context

    def loss(self, batch: Batch, step: int) -> Tensor:
        """The objective of a batch. Timesteps and noise depend on the seed, the step and the samples, nothing else."""
        seed, ids = self.args.global_seed, self.sampler.ids
        x0 = self.encoder.x0(batch, lambda shape: opendit.noise(shape, seed, POSTERIOR + step, ids, self.device))
        t = self.objective.times(opendit.uniform((), seed, step, ids, self.device))
        noise = opendit.noise(x0.shape[1:], seed, step, ids, self.device)
        with self._autocast():
            return self.objective.loss(self.net, x0, self.encoder.condition(batch), t=t, noise=noise)

    def after(self, step: int, loss: Tensor, norm: Tensor, draw: Callable[[Run, Path], Any]) -> bool:
        """Logs, validates, draws and saves what is due after `step` (from 0); False where training has diverged."""
        if self.plain_ema is not None:
            self.plain_ema.update()
        self.losses[step - self.first] = loss
        done, args = step + 1, self.args
        if done % args.log_every == 0 or done == self.total:
            window = self.losses[max(0, done - self.first - args.log_every) : done - self.first]
            mean = mean_over_processes(window.mean())  # not at every step: it waits for the device
            if not math.isfinite(mean):
                return False
            self._log(done, mean, norm, len(window))
        if self.held_out is not None and args.val_every and done % args.val_every == 0:
            self.watch.log(done, {"val_loss": self.validate()})
        if args.sample_every and done % args.sample_every == 0:
            draw(self, self.folder / "samples" / f"step-{done:06d}")
        if args.ckpt_every and (done % args.ckpt_every == 0 or done == self.total):
            try:
                self._save(done)
            except opendit.CheckpointError as error:
                if "not finite" not in str(error):
                    raise
                self.trouble = f"at step {done}, {error}"
                return False
        return True

    def problem(self) -> str:
        """What is wrong with the losses so far, if anything."""
        for i, loss in enumerate(self.losses.tolist()):
            if not math.isfinite(loss):
                return f"the loss is {loss} at step {self.first + i + 1}"
        return self.trouble

    # --- the averaged weights ---

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with its averaged weights, for evaluation."""
        context = opendit.ema_weights(self.net) if self.plain_ema is None else self.plain_ema.in_model()
        training = self.net.training
        self.net.eval()
        try:
            with context, torch.no_grad():
                yield
        finally:
            self.net.train(training)

    def averaged_state(self) -> dict[str, Tensor]:
        """Whole on the first process; every process calls it."""
        return opendit.ema_state_dict(self.net) if self.plain_ema is None else self.plain_ema.module.state_dict()

    def validate(self, at_most: int = 8) -> float:
        """The loss on held-out samples, or on the first of the data without any, with noise that is always the same."""
        data = self.data if self.held_out is None else self.held_out
        rank, ranks = opendit.data_parallel_rank(self.net), opendit.data_parallel_size(self.net)
        size, losses = self.args.batch_size, []
        with self.averaged(), self._autocast():
            for first in range(0, min(len(data), at_most * size * ranks), size * ranks):
                ids = [(first + rank * size + i) % len(data) for i in range(size)]
                draw = (self.args.global_seed, VALIDATION, ids, self.device)
                batch = collate([data[i] for i in ids])
                x0 = self.encoder.x0(batch, lambda shape, draw=draw: opendit.noise(shape, *draw))
                t, noise = self.objective.times(opendit.uniform((), *draw)), opendit.noise(x0.shape[1:], *draw)
                losses.append(self.objective.loss(self.net, x0, self.encoder.condition(batch), t=t, noise=noise))
        return mean_over_processes(torch.stack(losses).mean())

    def draw(self, cond: dict[str, Tensor], batch_size: int | None = None) -> Tensor:
        """One sample per row of `cond`, in pixels, by the averaged weights; every process draws all of them."""
        with self.averaged(), self._autocast():
            x = sample(
                self.model,
                cond,
                sampler=self.args.sampler,
                objective=self.args.objective,
                steps=self.args.sample_steps,
                cfg_scale=self.args.cfg_scale,
                seed=self.args.global_seed,
                batch_size=batch_size,
                clip=self.encoder.vae_name is None,
            )
            return self.encoder.pixels(x)

    def export(self, settings: dict[str, Any]) -> None:
        """model.safetensors and config.json of the averaged weights."""
        state = self.averaged_state()
        if self.process.is_main:
            save_checkpoint(self.folder, state, {**self.config, **settings})

    def finish(self) -> dict[str, Any]:
        """What metrics.json says of the run. Ends it in one line where it has diverged, or its averages are useless."""
        seconds = time.perf_counter() - self.started
        problem = self.problem()
        if not problem:
            loss = self.validate()  # the last update has no loss of its own yet
            state = self.averaged_state()
            if not math.isfinite(loss) or not all(w.isfinite().all() for w in state.values() if w.is_floating_point()):
                problem = "the averaged weights are useless: they or their loss are not finite"
        opendit.wait()  # for a checkpoint that is still being written
        if problem:
            self.watch.close()
            problem = f"training diverged: {problem}; no weights were exported, try a lower --lr"
        self.stop_if_any(problem)
        history, name = self.losses.tolist(), "averaged_loss" if self.held_out is None else "val_loss"
        self.watch.log(self.total, {name: loss})
        self.watch.close()
        return {
            "arguments": _plain(self.args),
            "versions": {"torch": torch.__version__, "opendit": opendit.__version__},
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "processes": self.process.world,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "steps": self.total,
            "seconds": seconds,
            "images_per_s": len(history) * self.per_step / seconds,
            "loss_first_20": sum(history[:20]) / max(1, len(history[:20])),
            "loss_last_20": sum(history[-20:]) / max(1, len(history[-20:])),
            name: loss,
        }

    # --- ends ---

    def stop_if_any(self, problem: str) -> None:
        """Where any process has a problem, ends all with exit code 1, and says it."""
        if gather_lists([problem] if problem else []):
            self.net = None  # see stop_process
        stop_if_any(problem)

    def stop(self) -> None:
        self.net = None
        stop_process()

    # --- inside ---

    def _autocast(self) -> contextlib.AbstractContextManager:
        """opendit does it inside the model's forward where it is asked for a precision."""
        return autocast(self.device, self.precision if self.args.no_accelerate else "fp32")

    def _lr(self, step: int) -> float:
        """Linear up to 1, then as --schedule says, down to 0 at the end."""
        if step < self.args.warmup:
            return (step + 1) / self.args.warmup
        rest = min(1.0, (step - self.args.warmup) / max(1, self.total - self.args.warmup))
        return {"constant": 1.0, "linear": 1 - rest, "cosine": (1 + math.cos(math.pi * rest)) / 2}[self.args.schedule]

    def _state(self) -> dict[str, Any]:
        ema = {} if self.plain_ema is None else {"ema": self.plain_ema.module}
        return {"scheduler": self.schedule, "sampler": self.sampler, **ema}

    def _save(self, step: int) -> None:
        updates = 0 if self.plain_ema is None else self.plain_ema.updates
        opendit.save(
            self.folder / "checkpoints",
            self.net,
            self.optimizer,
            step=step,
            extra={"updates": updates, "arguments": _plain(self.args)},
            config=self.config,
            keep=self.args.keep,
            background=True,
            **self._state(),
        )

    def _load(self) -> int:
        """The step to go on from."""
        path = self.args.load
        if path == "latest":
            path = self.folder / "checkpoints"
            if not path.is_dir() or opendit.latest_checkpoint(path) is None:
                return 0
        if path is None:
            return 0
        if not Path(path).is_dir():
            raise ValueError(f"--load {path} is no folder of checkpoints")
        loaded = opendit.load(path, self.net, self.optimizer, **self._state())
        if self.plain_ema is not None:
            self.plain_ema.updates = loaded.extra["updates"]
        if loaded.step >= self.total:
            raise ValueError(f"--load {path}: its {loaded.step} steps are all of the {self.total} that were asked for")
        self._take_lr()
        before, now = loaded.extra.get("arguments", {}), _plain(self.args)
        changed = [f"{n} {now[n]} (was {before[n]})" for n in now if n in before and now[n] != before[n]]
        if self.process.is_main and (changed := [c for c in changed if c.split()[0] not in OF_NO_EFFECT]):
            print(f"going on from {loaded.path} with other settings: {', '.join(changed)}", flush=True)
        return loaded.step

    def _take_lr(self) -> None:
        """--lr, where it is not the checkpoint's, which the schedule and the optimizer have taken over."""
        if all(lr == self.args.lr for lr in self.schedule.base_lrs):
            return
        self.schedule.base_lrs = [self.args.lr for _ in self.schedule.base_lrs]
        for group in self.optimizer.param_groups:
            group["initial_lr"] = self.args.lr
            group["lr"] = self.args.lr * self._lr(self.schedule.last_epoch)
        self.schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _shown(self) -> dict[str, Tensor]:
        """The conditions of the samples that are drawn while training."""
        if self.args.sample_prompts:
            return self.encoder.captions(self.args.sample_prompts)
        if self.encoder.text_name is None:
            classes = min(10, self.model.num_classes)
            return self.encoder.labels(torch.arange(classes).tolist())
        batch = collate([self.data[i] for i in range(min(8, len(self.data)))])
        return self.encoder.condition(batch)

    def _log(self, step: int, loss: float, norm: Tensor, steps: int) -> None:
        now = time.perf_counter()
        speed = steps * self.per_step / max(1e-9, now - self.since)
        self.since = now
        values = {
            "loss": loss,
            "lr": self.schedule.get_last_lr()[0],
            "grad_norm": float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm),
            "samples_per_s": speed,
        }
        shown = f"loss {loss:.4f}, {speed:.0f} {'img' if self.args.kind == 'image' else 'clips'}/s"
        if peak := peak_flops(self.device):
            values["mfu"] = self.flops * speed / (peak * self.process.world)
            shown += f", MFU {values['mfu']:.0%}"
        if self.device.type == "cuda":
            values["memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
            shown += f", {values['memory_gib']:.1f} GiB"
        shown += f", |g| {values['grad_norm']:.2f}"
        self.watch.log(step, values)
        self.bar.set_postfix_str(shown, refresh=False)


def write_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")


def _plain(args: Any) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
