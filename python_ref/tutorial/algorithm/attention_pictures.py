"""Pictures of who may see whom, and of who looks at whom."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from torch import Tensor

from python_ref.models.wan import CausalWanModel
from python_ref.models.wan_layers import Attend, Positions
from python_ref.tutorial.algorithm.style import (
    ACCENT,
    FAINT,
    INK,
    PAST,
    SINK,
    in_tutorial_style,
    new_axes,
    new_figure,
    save,
)
from selfforcing_ext.mask import BlockCausalMask

HIDDEN, PAST_SEEN, OWN_BLOCK, SINK_SEEN = range(4)


@in_tutorial_style
def visualize_attention_masks(path: str | Path) -> Path:
    """Draws the masks of autoregressive video models, one cell for a frame. Returns the path of the PNG."""
    panels = {
        "causal, frame by frame": BlockCausalMask(9, 1),
        "block-causal, 3 frames": BlockCausalMask(9, 1, 3),
        "window of 6": BlockCausalMask(9, 1, 3, window_frames=6),
        "window of 6, sink of 1": BlockCausalMask(9, 1, 3, window_frames=6, sink_frames=1),
        "first frame alone": BlockCausalMask(10, 1, 3, first_frame_alone=True),
        "teacher forcing: [clean; noisy]": BlockCausalMask(9, 1, 3, teacher_forcing=True),
    }
    figure = new_figure(10, 7.2)
    for axis, (title, mask) in zip(new_axes(figure, 2, 3).flat, panels.items(), strict=True):
        _draw_mask(axis, mask)
        axis.set_title(title)
    return save(
        figure,
        path,
        "rows look, columns are seen, a cell is a frame: red the own block, blue-green the past, yellow the sink",
    )


def attention_by_frame(
    generator: CausalWanModel,
    video: Tensor,  # [B, F, C, H, W]
    context: Tensor,  # [B, text_len, text_dim]
    mask: BlockCausalMask,
) -> Tensor:  # [layers, F, F]
    """How much of its attention each frame gives to each frame, in a clean pass over a whole video.

    Args:
        generator: the model; a pre-hook on its self-attention layers sees their queries and keys.
        video: clean latents.
        context: text embeddings.
        mask: not of teacher forcing.

    Returns:
        Means over videos, heads and the queries of a frame, in float32; every row sums to 1.
    """
    layers = []

    def watch(_module: torch.nn.Module, arguments: tuple[Tensor, Positions, Attend, None]) -> tuple:
        x, positions, attend, write_keys = arguments

        def attend_and_record(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = attend(q, k, v)  # first: it checks that the mask fits
            scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * q.shape[-1] ** -0.5
            weights = scores.masked_fill(~mask.dense(q.device), -torch.inf).softmax(-1)
            size = (mask.num_frames, mask.frame_seqlen)
            layers.append(weights.unflatten(3, size).sum(4).unflatten(2, size).mean((0, 1, 3)))
            return out

        return x, positions, attend_and_record, write_keys

    hooks = [block.self_attn.register_forward_pre_hook(watch) for block in generator.blocks]
    try:
        with torch.no_grad():
            generator(video, video.new_zeros(video.shape[:2]), context, mask=mask)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(layers)


@in_tutorial_style
def visualize_attention_by_frame(
    generator: CausalWanModel,
    video: Tensor,  # [B, F, C, H, W]
    context: Tensor,  # [B, text_len, text_dim]
    mask: BlockCausalMask,
    path: str | Path,
) -> Path:
    """Draws ``attention_by_frame``, one panel for a layer. Returns the path of the PNG."""
    shares = attention_by_frame(generator, video, context, mask)
    visible = mask.dense()[:: mask.frame_seqlen, :: mask.frame_seqlen]
    figure = new_figure(2.9 * len(shares) + 0.8, 3.5)
    axes = new_axes(figure, 1, len(shares))[0]
    for layer, (axis, share) in enumerate(zip(axes, shares, strict=True)):
        image = axis.imshow(share.where(visible, torch.nan).numpy(), cmap="YlGnBu", vmin=0, vmax=float(shares.max()))
        axis.set_facecolor(FAINT)
        for _, end in mask.frame_blocks[:-1]:
            axis.axhline(end - 0.5, color="white", lw=1.2)
            axis.axvline(end - 0.5, color="white", lw=1.2)
        starts = [start for start, _ in mask.frame_blocks]
        axis.set(xticks=starts, yticks=starts)
        axis.set_title(f"layer {layer + 1}")
        axis.set_xlabel("seen frame")
    axes[0].set_ylabel("looking frame")
    figure.colorbar(image, ax=axes, label="share of attention", shrink=0.75)
    return save(figure, path, "each row sums to 1; grey is hidden by the mask; white lines are block borders")


def _draw_mask(axis: Axes, mask: BlockCausalMask) -> None:
    visible = mask.dense()
    frame = torch.arange(mask.seqlen) % mask.num_frames
    noisy = torch.arange(mask.seqlen) >= mask.num_frames
    block = torch.bucketize(frame, torch.tensor([end for _, end in mask.frame_blocks]), right=True)
    own = (block[:, None] == block) & (noisy[:, None] == noisy)
    sink = frame < mask.sink_frames
    kind = torch.where(own, OWN_BLOCK, torch.where(sink, SINK_SEEN, PAST_SEEN)).where(visible, HIDDEN)
    colours = ListedColormap([FAINT, PAST, ACCENT, SINK])
    axis.pcolormesh(kind.numpy(), cmap=colours, vmin=0, vmax=3, edgecolors="white", linewidth=1)
    axis.set(aspect="equal", xlim=(0, mask.seqlen), ylim=(mask.seqlen, 0))
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    if mask.teacher_forcing:
        middle = mask.num_frames
        axis.axhline(middle, color=INK, lw=1)
        axis.axvline(middle, color=INK, lw=1)
        axis.set_xticks([middle / 2, 1.5 * middle], ["clean", "noisy"])
        axis.set_yticks([middle / 2, 1.5 * middle], ["clean", "noisy"], rotation=90, va="center")
    else:
        ticks = range(0, mask.num_frames, 3)
        axis.set_xticks([tick + 0.5 for tick in ticks], [str(tick) for tick in ticks])
        axis.set_yticks([tick + 0.5 for tick in ticks], [str(tick) for tick in ticks])
