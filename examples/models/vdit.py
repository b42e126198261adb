"""VDiT: a DiT whose tokens are patches of space and time, so that every one attends to every other.

    x [B, F, C, I, I] → patches of Q frames by P×P pixels → L = (F/Q)·(I/P)² tokens + pos_embed → blocks → x's shape

B batch, F frames, C channels, I image side. Block, head, condition and keys are DiT's (`dit.py`), except that
`x_embedder.proj` is a convolution over time too, and pos_embed [1, L, D] the sum of a position in space and one in
time.
There are no published weights; the original VDiT is the model of the same name in OpenDiT 1.0.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from examples.models.dit import (
    SIZES,
    DiTBlock,
    FinalLayer,
    TimestepEmbedder,
    condition_embedder,
    initialize,
    sincos_1d,
    sincos_2d,
)


class PatchEmbed3d(nn.Module):
    """Non-overlapping patches of Q frames by P×P, each mapped to D channels, frame by frame and row by row."""

    def __init__(self, patch_size: tuple[int, int, int], in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv3d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x_BFCII: Tensor) -> Tensor:
        return self.proj(x_BFCII.transpose(1, 2)).flatten(2).transpose(1, 2)


class VDiT(nn.Module):
    def __init__(
        self,
        input_size: int = 32,
        num_frames: int = 16,
        patch_size: int = 2,
        frame_patch: int = 1,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        text_dim: int | None = None,
    ):
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"image size {input_size} is not a multiple of patch size {patch_size}")
        if num_frames % frame_patch:
            raise ValueError(f"{num_frames} frames are not a multiple of the {frame_patch} that a patch holds")
        self.input_size, self.num_frames = input_size, num_frames
        self.patch_size, self.frame_patch = patch_size, frame_patch
        self.in_channels, self.learn_sigma = in_channels, learn_sigma
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.num_classes, self.text_dim = num_classes, text_dim

        self.x_embedder = PatchEmbed3d((frame_patch, patch_size, patch_size), in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = condition_embedder(num_classes, text_dim, hidden_size, class_dropout_prob)
        space = sincos_2d(hidden_size, input_size // patch_size)
        time = sincos_1d(hidden_size, num_frames // frame_patch)
        pos_embed = (time[:, None] + space[None]).flatten(0, 1)
        self.pos_embed = nn.Parameter(pos_embed.unsqueeze(0), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, frame_patch * self.out_channels)
        initialize(self)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return (self.num_frames, self.in_channels, self.input_size, self.input_size)

    def null_condition(self, cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"y": self.y_embedder.null(cond["y"])}

    def unpatchify(self, x_BLO: Tensor) -> Tensor:
        """O = Q·P·P·out_channels, in that order, becomes frames of out_channels."""
        Q, P, side = self.frame_patch, self.patch_size, self.input_size // self.patch_size
        x = x_BLO.reshape(len(x_BLO), self.num_frames // Q, side, side, Q, P, P, self.out_channels)
        return x.permute(0, 1, 4, 7, 2, 5, 3, 6).reshape(
            len(x), *self.sample_shape[:1], self.out_channels, side * P, -1
        )

    def forward(self, x_BFCII: Tensor, t_B: Tensor, y: Tensor) -> Tensor:
        if tuple(x_BFCII.shape[1:]) != self.sample_shape:
            raise ValueError(f"this model takes videos of {self.sample_shape}, got {tuple(x_BFCII.shape[1:])}")
        x_BLD = self.x_embedder(x_BFCII) + self.pos_embed
        c_BD = self.t_embedder(t_B) + self.y_embedder(y, self.training)
        for block in self.blocks:
            x_BLD = block(x_BLD, c_BD)
        return self.unpatchify(self.final_layer(x_BLD, c_BD))


VDIT_MODELS = {
    f"VDiT-{size}/{frames}x{patch}x{patch}": {**SIZES[size], "patch_size": patch, "frame_patch": frames}
    for size in SIZES
    for frames in (1, 2)
    for patch in (2, 4, 8)
}
