"""Pictures of a KV cache at work."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

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
from selfforcing_ext.library import PageTable
from selfforcing_ext.mask import check_window, visible_past


@in_tutorial_style
def visualize_kv_cache_growth(
    path: str | Path,
    num_blocks: int = 7,
    frames_per_block: int = 3,
    window_frames: int = 9,
    sink_frames: int = 3,
) -> Path:
    """Draws which block lies in which page of memory, turn by turn: everything kept, a window, a window with sink.

    The page table of the package's own cache says so; a page has the size of a block.

    Args:
        path: the PNG.
        num_blocks, frames_per_block: what is generated.
        window_frames, sink_frames: as in ``BlockCausalMask``, in whole blocks.

    Returns:
        The path.

    Raises:
        ValueError: the window or the sink is no whole number of blocks, or they do not fit each other.
    """
    check_window(window_frames, sink_frames, frames_per_block)
    for name, frames in (("window_frames", window_frames), ("sink_frames", sink_frames)):
        if frames % frames_per_block:
            raise ValueError(
                f"{name} is {frames}, but must be a multiple of frames_per_block = {frames_per_block}: a page of the "
                "picture holds a block"
            )
    window, sink = window_frames // frames_per_block, sink_frames // frames_per_block
    panels = (
        ("everything kept", None, 0),
        (f"window of {window_frames} frames: a ring", window, 0),
        (f"window of {window_frames}, sink of {sink_frames}", window, sink),
    )
    figure = new_figure(12, 0.42 * num_blocks + 1.5)
    axes = new_axes(figure, 1, len(panels), sharex=True, sharey=True)[0]
    for axis, (title, window_blocks, sink_blocks) in zip(axes, panels, strict=True):
        history = blocks_by_page(num_blocks, window_blocks, sink_blocks)
        _draw_pages(axis, history, sink_blocks, frames_per_block)
        axis.set_title(f"{title}\n{len(history[-1]) * frames_per_block} frames of memory in the end")
        axis.set(xlabel="turn (block)", xlim=(-0.6, num_blocks - 0.4), ylim=(num_blocks - 0.4, -0.6))
        ticks = range(num_blocks), [str(number + 1) for number in range(num_blocks)]
        axis.set_xticks(*ticks)
        axis.set_yticks(*ticks)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    axes[0].set_ylabel("page of memory")
    return save(
        figure, path, "numbers are frames; red is written in this turn, blue-green is the visible past, yellow the sink"
    )


def blocks_by_page(num_blocks: int, window_blocks: int | None, sink_blocks: int) -> list[dict[int, int]]:
    """For each turn, the block that every page in use holds once the turn's block is written.

    Args:
        num_blocks: turns.
        window_blocks, sink_blocks: how much stays visible, the turn's own block and the sink included in the window.
    """
    table = PageTable(page_size=1)
    table.add_pages(num_blocks if window_blocks is None else window_blocks)
    stream = table.open()
    names: dict[int, int] = {}  # pages are numbered as they come into use
    history = []
    for block in range(num_blocks):
        visible = visible_past(block, block + 1, window_blocks, sink_blocks)
        table.advance([(stream, visible, (block, block + 1), False)])
        kept = [other for span in visible for other in range(*span)] + [block]
        pages = [names.setdefault(page, len(names)) for page in table.row(stream)]
        history.append(dict(zip(pages, kept, strict=True)))
    return history


def _draw_pages(axis: Axes, history: list[dict[int, int]], sink_blocks: int, frames_per_block: int) -> None:
    for turn, pages in enumerate(history):
        for page in range(len(history[-1])):
            block = pages.get(page)
            if block is None:
                colour, text = FAINT, INK
            elif block == turn:
                colour, text = ACCENT, "white"
            elif block < sink_blocks:
                colour, text = SINK, INK
            else:
                colour, text = PAST, "white"
            axis.add_patch(Rectangle((turn - 0.46, page - 0.44), 0.92, 0.88, color=colour, linewidth=0))
            if block is not None:
                first, last = block * frames_per_block, (block + 1) * frames_per_block - 1
                label = str(first) if first == last else f"{first}-{last}"
                axis.text(turn, page + 0.03, label, ha="center", va="center", fontsize=8, color=text)
