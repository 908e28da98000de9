"""The cases that tests and benchmarks share: what is computed, and inputs that lie in memory as oddly as they may."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from selfforcing_ext.attention import Past, span_records
from selfforcing_ext.mask import BlockCausalMask

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def strided(shape: tuple[int, ...], layout: str, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal random numbers [B, L, H, D] with a contiguous last dimension, as a view of something larger or permuted.

    ``layout``: "contiguous"; "heads_first" (memory is [B, H, L, D]); "packed" (one of three in a [B, L, 3, H, D]);
    "sliced" (every second token of a longer and wider tensor, NaN around it); "expanded" (batch stride 0).
    """
    batch, length, heads, dim = shape

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    match layout:
        case "contiguous":
            return draw(*shape)
        case "heads_first":
            return draw(batch, heads, length, dim).transpose(1, 2)
        case "packed":
            return draw(batch, length, 3, heads, dim)[:, :, 1]
        case "sliced":
            whole = torch.full((batch, 2 * length + 3, heads + 1, dim + 8), torch.nan, dtype=dtype)
            view = whole[:, 3 : 3 + 2 * length : 2, 1:, :dim]
            view.copy_(draw(*shape))
            return view
        case "expanded":
            return draw(1, length, heads, dim).expand(shape)
    raise ValueError(f"layout is {layout!r}, which is none that strided knows")


@dataclass(frozen=True)
class AttentionCase:
    """One call of block_causal_attention."""

    mask: BlockCausalMask | None = None
    num_queries: int = 0  # without a mask
    num_keys: int = 0
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 64
    layout: str = "contiguous"
    softmax_scale: float | None = None

    def __str__(self) -> str:
        m = self.mask
        seen = f"full{self.num_queries}x{self.num_keys}"
        if m is not None:
            seen = f"{m.num_frames}x{m.frame_seqlen}by{m.frames_per_block}"
            seen += f"-window{m.window_frames}" if m.window_frames else ""
            seen += f"-sink{m.sink_frames}" if m.sink_frames else ""
            seen += "-alone" if m.first_frame_alone else ""
            seen += "-forcing" if m.teacher_forcing else ""
        return f"{seen}-b{self.batch}-h{self.heads}of{self.kv_heads}-d{self.head_dim}-{self.layout}"

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v."""
        generator = torch.Generator().manual_seed(seed)
        queries = self.mask.seqlen if self.mask else self.num_queries
        keys = self.mask.seqlen if self.mask else self.num_keys
        q = strided((self.batch, queries, self.heads, self.head_dim), self.layout, dtype, generator)
        k, v = (
            strided((self.batch, keys, self.kv_heads, self.head_dim), self.layout, dtype, generator) for _ in range(2)
        )
        return q, k, v


MASKS = (
    BlockCausalMask(6, 20, 3),
    BlockCausalMask(5, 33, 1, window_frames=2),
    BlockCausalMask(7, 13, 2, first_frame_alone=True, window_frames=4, sink_frames=1),
    BlockCausalMask(8, 16, 2, window_frames=5, sink_frames=3),
    BlockCausalMask(4, 17, 2, teacher_forcing=True),
    BlockCausalMask(6, 9, 2, window_frames=3, sink_frames=1, teacher_forcing=True),
    BlockCausalMask(3, 130, 1),
)
LAYOUTS = ("contiguous", "heads_first", "packed", "sliced", "expanded")

ATTENTION_CASES = (
    *(AttentionCase(mask, batch=2) for mask in MASKS),
    *(AttentionCase(MASKS[3], batch=2, heads=4, kv_heads=2, layout=layout) for layout in LAYOUTS),
    *(AttentionCase(MASKS[2], head_dim=dim) for dim in (8, 16, 24, 40, 72, 80, 96, 128, 136, 192, 248, 256)),
    AttentionCase(MASKS[0], heads=6, kv_heads=1, head_dim=32),
    AttentionCase(MASKS[0], heads=6, kv_heads=2, head_dim=32, layout="packed"),
    AttentionCase(MASKS[1], softmax_scale=0.5),
    AttentionCase(num_queries=1, num_keys=300, batch=2),
    AttentionCase(num_queries=70, num_keys=1),
    AttentionCase(num_queries=65, num_keys=129, heads=4, kv_heads=2, head_dim=128, layout="heads_first"),
    AttentionCase(num_queries=5, num_keys=3, batch=3, head_dim=8),
)

# Large enough that errors average out and can be compared with torch's to a few percent.
LARGE_ATTENTION_CASES = (
    *(AttentionCase(BlockCausalMask(6, 200, 3), head_dim=dim) for dim in (32, 64, 128)),
    AttentionCase(BlockCausalMask(12, 100, 3, window_frames=7, sink_frames=1), heads=4, kv_heads=2),
    AttentionCase(BlockCausalMask(4, 150, 2, teacher_forcing=True), batch=2, layout="packed"),
    AttentionCase(num_queries=400, num_keys=2000),
)


@dataclass(frozen=True)
class PagedCase:
    """One attention call with a past in pages. Pages hold NaN wherever nothing visible lies."""

    num_queries: int
    past_spans: tuple[tuple[tuple[int, int], ...], ...]  # per stream: visible positions
    page_size: int
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 64

    def __str__(self) -> str:
        spans = "_".join("+".join(f"{start}to{end}" for start, end in stream) for stream in self.past_spans)
        return f"{self.num_queries}on{spans}-page{self.page_size}-h{self.heads}of{self.kv_heads}-d{self.head_dim}"

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[tuple[Tensor, Tensor, Tensor], Past]:
        """(q, k, v) of the block, and its past, pages in random order."""
        generator = torch.Generator().manual_seed(seed)
        batch = len(self.past_spans)
        block = AttentionCase(
            None, self.num_queries, self.num_queries, batch, self.heads, self.kv_heads, self.head_dim, "packed"
        ).inputs(dtype, seed)
        row = max(max(end for _, end in stream) for stream in self.past_spans) // self.page_size + 2
        order = torch.randperm(batch * row + 3, generator=generator)[: batch * row]
        page_table = order.reshape(batch, row).to(torch.int32)
        shape = (batch * row + 3, self.page_size, self.kv_heads, self.head_dim)
        pools = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)]
        for stream, spans in enumerate(self.past_spans):
            for start, end in spans:
                for position in range(start, end):
                    page = page_table[stream, position // self.page_size]
                    for pool in pools:
                        pool[page, position % self.page_size] = torch.randn(shape[2:], generator=generator).to(dtype)
        return block, Past(*pools, page_table, span_records(torch.tensor(self.past_spans).unsqueeze(1)))

    def gathered(self, block: tuple[Tensor, Tensor, Tensor], past: Past) -> list[tuple[Tensor, ...]]:
        """Per stream: q, and the visible keys and values in one piece, past first; all [1, L, H, D]."""
        q, k, v = block
        streams = []
        for stream in range(q.shape[0]):
            positions = [p for start, end, *_ in past.spans[stream, 0].tolist() for p in range(start, end)]
            at = torch.tensor(positions, dtype=torch.long)
            pages, offsets = past.page_table[stream].long()[at // self.page_size], at % self.page_size
            keys = torch.cat([past.k_pages[pages, offsets], k[stream]])
            values = torch.cat([past.v_pages[pages, offsets], v[stream]])
            streams.append((q[stream : stream + 1], keys[None], values[None]))
        return streams


PAGED_CASES = (
    PagedCase(20, (((0, 10), (17, 60)), ((0, 10), (12, 55))), page_size=16),
    PagedCase(33, (((0, 0), (5, 70)),), page_size=7),
    PagedCase(9, (((0, 0), (0, 0)), ((0, 3), (3, 3))), page_size=4),
    PagedCase(12, (((0, 1), (2, 3)),), page_size=1, head_dim=8),
    PagedCase(40, (((0, 64), (128, 300)),), page_size=64, heads=4, kv_heads=2, head_dim=128),
    PagedCase(65, (((3, 63), (65, 191)), ((0, 0), (100, 200))), page_size=128, head_dim=80),
    PagedCase(16, (((0, 500), (500, 500)),), page_size=1000, heads=3, kv_heads=1, head_dim=256),
)


@dataclass(frozen=True)
class RolloutCase:
    """A cache that is filled block by block."""

    block_frames: tuple[int, ...]
    frame_seqlen: int = 6
    window_frames: int | None = None
    sink_frames: int = 0
    max_frames: int | None = None
    page_size: int | None = None
    batch: int = 1
    num_layers: int = 2
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16

    def __str__(self) -> str:
        blocks = "".join(map(str, self.block_frames))
        return (
            f"{blocks}x{self.frame_seqlen}-window{self.window_frames}-sink{self.sink_frames}-max{self.max_frames}"
            f"-page{self.page_size}-b{self.batch}-h{self.heads}of{self.kv_heads}-d{self.head_dim}"
        )

    def cache_arguments(self) -> dict[str, object]:
        return {
            "num_layers": self.num_layers,
            "num_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "frame_seqlen": self.frame_seqlen,
            "batch_size": self.batch,
            "window_frames": self.window_frames,
            "sink_frames": self.sink_frames,
            "max_frames": self.max_frames,
            "page_size": self.page_size,
        }

    def block(
        self, num_frames: int, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """q, k, v of a block, per layer."""
        tokens = num_frames * self.frame_seqlen
        case = AttentionCase(None, tokens, tokens, self.batch, self.heads, self.kv_heads, self.head_dim, "packed")
        return [case.inputs(dtype, 1000 * seed + layer) for layer in range(self.num_layers)]


ROLLOUT_CASES = (
    RolloutCase((3, 3, 3, 3)),
    RolloutCase((3, 3, 3, 3), max_frames=12, page_size=5),
    RolloutCase((1, 3, 3, 3, 3, 3), window_frames=7, sink_frames=1, page_size=4, batch=2),
    RolloutCase((2,) * 9, window_frames=4, page_size=6),
    RolloutCase((2,) * 9, window_frames=4, page_size=64),
    RolloutCase((1,) * 20, window_frames=3, sink_frames=2, page_size=1, frame_seqlen=3, heads=4),
    RolloutCase((1,) * 20, window_frames=3, sink_frames=2, page_size=7, frame_seqlen=3, batch=3),
    RolloutCase((1, 2, 3, 1, 3, 2, 1), window_frames=5, sink_frames=2, page_size=8, batch=2),
    RolloutCase((3,) * 8, window_frames=6, sink_frames=3, max_frames=24, page_size=10, head_dim=64),
)
