"""Our ops in models of other projects: error against the host model's own attention, and the speed ratio.

    python benchmarks/integrations.py [--host NAME ...] [--dtype float32|bfloat16 ...] [--seconds S] [--threads N]

Each row runs the host model's own attention and ours in turns in one process, on a Wan-like shape: 12 heads of 128
channels, 390 tokens a frame, blocks of 3 frames. Times are medians; "ratio" is the host's time over ours; "error" is
||ours - host|| / ||host||, the worst of the outputs and, where there is a backward, of the parameters' gradients.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from timing import median_times
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

DTYPES = ("float32", "bfloat16")


def report(name: str, seconds: float, host: Callable[[], list[Tensor]], **ours: Callable[[], list[Tensor]]) -> None:
    """A row for each of ours against the host; each function runs once and returns its results."""
    functions = {"host": host} | ours
    results = {key: function() for key, function in functions.items()}
    medians = dict(zip(functions, median_times(list(functions.values()), seconds), strict=True))
    for key in ours:
        error = max(
            float((mine.double() - theirs.double()).norm() / theirs.double().norm())
            for mine, theirs in zip(results[key], results["host"], strict=True)
        )
        print(
            f"{name:48s} {key:6s} {1e3 * medians[key]:8.1f} ms  host {1e3 * medians['host']:8.1f} ms"
            f"  ratio {medians['host'] / medians[key]:5.2f}  error {error:.1e}",
            flush=True,
        )


def self_forcing(dtype: torch.dtype, seconds: float) -> None:
    """The published Self-Forcing model's form (tests/published_wan.py), one layer of Wan2.1 1.3B (arXiv 2503.20314).

    "attention" is the self-attention module alone, its projections included. Training is forward and backward of 9
    frames; a cached block is two calls after a full window of 12 frames, the first of which evicts.
    """
    import published_wan

    from selfforcing_ext.integrations.self_forcing import accelerate, make_kv_cache

    rows, columns, block, window = 15, 26, 3, 12
    frame_seqlen = rows * columns
    host = published_wan.CausalWanModel(
        dim=1536, ffn_dim=8960, num_heads=12, num_layers=1, text_len=64, text_dim=64, local_attn_size=window
    ).to(dtype)
    ours = accelerate(copy.deepcopy(host))
    name = f"self_forcing {str(dtype).removeprefix('torch.')}"

    def attention(model: nn.Module, x: Tensor, *arguments: object) -> Tensor:
        frames = x.shape[1] // frame_seqlen
        sizes = torch.tensor([x.shape[1]]), torch.tensor([[frames, rows, columns]])
        return model.blocks[0].self_attn(x, *sizes, host.freqs, *arguments)

    video = torch.randn(1, 9 * frame_seqlen, 1536, dtype=dtype)
    host.num_frame_per_block = ours.num_frame_per_block = block
    mask = host._prepare_blockwise_causal_attn_mask("cpu", 9, frame_seqlen, block, window)

    def train(model: nn.Module, block_mask: object) -> list[Tensor]:
        out = attention(model, video, block_mask)
        parameters = list(model.blocks[0].self_attn.parameters())
        return [out.detach(), *torch.autograd.grad(out.float().square().mean(), parameters)]

    report(f"{name}, attention, training", seconds, lambda: train(host, mask), ours=lambda: train(ours, None))

    tokens = torch.randn(1, block * frame_seqlen, 1536, dtype=dtype)
    latents, t = torch.randn(1, 16, block, 2 * rows, 2 * columns, dtype=dtype), torch.full((1, block), 500.0)
    context = torch.randn(1, 64, 64, dtype=dtype)

    def cached(model: nn.Module, cache: list, whole: bool) -> Callable[[], list[Tensor]]:
        """A function that makes the next block; the window is filled before."""
        start = window * frame_seqlen

        @torch.no_grad()
        def next_block() -> list[Tensor]:
            nonlocal start
            for _ in range(2):
                if whole:
                    out = model(latents, t, context, tokens.shape[1], kv_cache=cache, current_start=start)
                else:
                    out = attention(model, tokens, None, cache[0], start)
            start += tokens.shape[1]
            return [out]

        with torch.no_grad():
            attention(model, tokens.repeat(1, window // block, 1), None, cache[0], 0)
        return next_block

    for whole in (False, True):
        dicts = [published_wan.make_dict_cache(model, 1, window * frame_seqlen) for model in (host, ours)]
        report(
            f"{name}, {'model' if whole else 'attention'}, cached block",
            seconds,
            cached(host, dicts[0], whole),
            dict=cached(ours, dicts[1], whole),
            pages=cached(ours, make_kv_cache(ours, 1, frame_seqlen), whole),
        )


def diffusers(dtype: torch.dtype, seconds: float) -> None:
    """diffusers' Wan transformer, two layers of Wan2.1 1.3B (arXiv 2503.20314).

    "model" is all of it on 3 frames, "attention" a self-attention module alone, its projections included. Training is
    forward and backward, of 3 frames or, block-causal, of 9, where the host gets a dense mask. A cached block is 3
    frames after 6 others; the host, which has no cache, computes all 9 under a dense mask.
    """
    from diffusers import WanTransformer3DModel

    from selfforcing_ext import BlockCausalMask, PagedKVCache
    from selfforcing_ext.integrations.diffusers import Positions, accelerate

    rows, columns, block, video = 15, 26, 3, 9
    frame_seqlen = rows * columns
    host = WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=2).to(dtype)
    ours = accelerate(copy.deepcopy(host))
    name = f"diffusers {str(dtype).removeprefix('torch.')}"
    latents = torch.randn(1, 16, video, 2 * rows, 2 * columns, dtype=dtype)
    text, t = torch.randn(1, 512, 4096, dtype=dtype), torch.tensor([500.0])

    @torch.no_grad()
    def predict(model: nn.Module) -> list[Tensor]:
        return [model(latents[:, :, :block], t, text).sample]

    report(f"{name}, model", seconds, lambda: predict(host), ours=lambda: predict(ours))

    tokens = torch.randn(1, video * frame_seqlen, 1536, dtype=dtype)

    def train(model: nn.Module, frames: int, visible: Tensor | None = None) -> Callable[[], list[Tensor]]:
        attention, where = model.blocks[0].attn1, model.rope(latents[:, :, :frames])

        def forward_and_backward() -> list[Tensor]:
            out = attention(tokens[:, : frames * frame_seqlen], None, visible, where)
            return [out.detach(), *torch.autograd.grad(out.float().square().mean(), list(attention.parameters()))]

        return forward_and_backward

    report(f"{name}, attention, training", seconds, train(host, block), ours=train(ours, block))
    mask = BlockCausalMask(video, frame_seqlen, block)
    visible = mask.dense()
    accelerate(ours, mask)
    causal = train(host, video, visible), train(ours, video)
    report(f"{name}, attention, causal training", seconds, causal[0], ours=causal[1])

    cache, newest = PagedKVCache(1, 12, 128, frame_seqlen, dtype=dtype), (block, rows, columns)
    where = host.rope(latents)

    @torch.no_grad()
    def without_cache() -> list[Tensor]:
        return [host.blocks[0].attn1(tokens, None, visible, where)[:, -block * frame_seqlen :]]

    @torch.no_grad()
    def next_block(x: Tensor, writes_to: PagedKVCache | None = None) -> list[Tensor]:
        return [ours.blocks[0].attn1(x, None, None, Positions(newest, cache.position, past=cache, writes_to=writes_to))]

    *past, last = tokens.split(block * frame_seqlen, dim=1)
    for x in past:
        next_block(x, writes_to=cache)
        cache.commit(block)
    report(f"{name}, attention, cached block", seconds, without_cache, ours=lambda: next_block(last))


def flex_attention(dtype: torch.dtype, seconds: float) -> None:
    """torch's FlexAttention, compiled, and ours with the same BlockMask: 9 frames; 9 clean and 9 noisy ones.

    Forward alone, since FlexAttention has no backward on the CPU. What both pay once is outside: the
    host's compilation, and the conversion of the mask.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from selfforcing_ext.integrations.flex_attention import flex_attention_compatible, span_table_of

    block, length = 3 * 390, 9 * 390

    def teacher_forcing(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        block_q, block_k = q % length // block, k % length // block
        clean = (k < length) & torch.where(q < length, block_k <= block_q, block_k < block_q)
        return clean | ((q >= length) & (k >= length) & (block_q == block_k))

    masks = {
        "block-causal": (length, lambda b, h, q, k: k < (q // block + 1) * block),
        "teacher forcing": (2 * length, teacher_forcing),
        "token-causal": (length, lambda b, h, q, k: k <= q),
    }
    compiled = torch.compile(flex_attention)
    for name, (tokens, mask_mod) in masks.items():
        mask = create_block_mask(mask_mod, None, None, tokens, tokens, device="cpu")
        span_table_of(mask)
        qkv = [torch.randn(1, tokens, 12, 128, dtype=dtype).transpose(1, 2) for _ in range(3)]

        def run(attention: Callable[..., Tensor], qkv: list[Tensor] = qkv, mask: object = mask) -> list[Tensor]:
            return [attention(*qkv, block_mask=mask)]

        report(
            f"flex_attention {str(dtype).removeprefix('torch.')}, {name}",
            seconds,
            partial(run, compiled),
            ours=partial(run, flex_attention_compatible),
        )


def transformers(dtype: torch.dtype, seconds: float) -> None:
    """A layer with Wan2.1 1.3B's attention in transformers' Llama, on 9 frames, and in its ViT, on the patches of 3.

    The host's attention is its own "sdpa"; for the block-causal mask it gets a dense one. Projections are in the times,
    the feed-forward part is left small. Training is forward and backward.
    """
    import transformers

    from selfforcing_ext import BlockCausalMask
    from selfforcing_ext.integrations.transformers import block_causal, register

    register()
    size = {"hidden_size": 1536, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 12}
    mask = BlockCausalMask(9, 390, 3)
    dense = mask.dense()[None, None]
    tokens = torch.randn(1, mask.seqlen, 1536, dtype=dtype)
    image = torch.randn(1, 3, 480, 624, dtype=dtype)

    def block_by_block(model: nn.Module) -> Tensor:
        if model.config._attn_implementation == "sdpa":
            return model(inputs_embeds=tokens, attention_mask=dense).last_hidden_state
        with block_causal(mask):
            return model(inputs_embeds=tokens).last_hidden_state

    @torch.no_grad()
    def predict(run: Callable[[nn.Module], Tensor], model: nn.Module) -> list[Tensor]:
        return [run(model)]

    def train(run: Callable[[nn.Module], Tensor], weight: Tensor, model: nn.Module) -> list[Tensor]:
        out = run(model)
        unused = ("embed_tokens", "pooler")
        used = [parameter for name, parameter in model.named_parameters() if not name.startswith(unused)]
        return [out.detach(), *torch.autograd.grad(out, used, weight)]

    llama = transformers.LlamaConfig(vocab_size=16, use_cache=False, **size)
    # A bias of keys has no gradient but rounding: it cancels in the softmax.
    vit = transformers.ViTConfig(image_size=(480, 624), patch_size=16, qkv_bias=False, **size)
    rows: dict[str, tuple[object, Callable[[nn.Module], Tensor]]] = {
        "Llama block-causal": (llama, block_by_block),
        "ViT": (vit, lambda model: model(image).last_hidden_state),
        "Llama token-causal": (llama, lambda model: model(inputs_embeds=tokens).last_hidden_state),
    }
    for row, (config, run) in rows.items():
        host = transformers.AutoModel.from_config(config, attn_implementation="sdpa", dtype=dtype)
        ours = copy.deepcopy(host)
        ours.set_attn_implementation("selfforcing")
        weight = torch.randn(*run(host).shape, dtype=dtype)
        for kind, function in {"": partial(predict, run), ", training": partial(train, run, weight)}.items():
            name = f"transformers {str(dtype).removeprefix('torch.')}, {row}{kind}"
            report(name, seconds, partial(function, host), ours=partial(function, ours))


HOSTS = {
    "diffusers": diffusers,
    "flex_attention": flex_attention,
    "self_forcing": self_forcing,
    "transformers": transformers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", nargs="+", choices=HOSTS, default=list(HOSTS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each comparison, at least")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads")
    for host in arguments.host:
        for dtype in arguments.dtype:
            torch.manual_seed(0)
            HOSTS[host](getattr(torch, dtype), arguments.seconds)


if __name__ == "__main__":
    main()
