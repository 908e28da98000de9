"""Checks that every op of csrc/ops.cpp has a CPU and a CUDA kernel in a built package, and that CPU kernels run.

python scripts/check_registration.py FOLDER   (the folder that holds the built selfforcing_ext)
"""

import re
import sys
from pathlib import Path

import torch

SCHEMAS = Path(__file__).resolve().parent.parent / "csrc" / "ops.cpp"


def op_names() -> list[str]:
    """Names of the ops, from their schemas: the first word of every string that follows m.def(."""
    names = re.findall(r'm\.def\(\s*"(\w+)\(', SCHEMAS.read_text())
    if not names:
        raise SystemExit(f"no schema was found in {SCHEMAS}")
    return names


def registered(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"selfforcing::{name}", key)


def main(folder: str) -> None:
    sys.path.insert(0, folder)
    from selfforcing_ext import BlockCausalMask, PagedKVCache, add_noise, block_causal_attention, rope_3d
    from selfforcing_ext.library import HAS_CUDA

    if not HAS_CUDA:
        raise SystemExit("selfforcing_ext was built without CUDA ops, or this torch cannot load them")
    # Ops that only keep the cache's books are Python, the same on every device.
    bookkeeping = [name for name in op_names() if registered(name, "CompositeExplicitAutograd")]
    with_kernels = [name for name in op_names() if name not in bookkeeping]
    missing = [
        f"{name} on {device}" for name in with_kernels for device in ("CPU", "CUDA") if not registered(name, device)
    ]
    if missing:
        raise SystemExit(f"ops without a kernel: {', '.join(missing)}")

    mask = BlockCausalMask(4, 6, 2)
    q, k, v = (rope_3d(torch.randn(1, mask.seqlen, 2, 16), (4, 2, 3)).requires_grad_() for _ in range(3))
    out = block_causal_attention(q, k, v, mask)
    out.sum().backward()
    cache = PagedKVCache(num_layers=1, num_heads=2, head_dim=16, frame_seqlen=6)
    with torch.no_grad():
        for block in range(2):
            rows = slice(block * 12, (block + 1) * 12)
            cached = cache.attend(0, q[:, rows], k[:, rows], v[:, rows])
            torch.testing.assert_close(cached, out[:, rows])
            cache.write(0, k[:, rows], v[:, rows])
            cache.commit(2)
        x = torch.randn(1, 2, 3, 4, 4)
        torch.testing.assert_close(add_noise(x, -x, torch.full((1, 2), 0.25)), 0.5 * x)
    print(
        f"{len(with_kernels)} ops have CPU and CUDA kernels under torch {torch.__version__}, CPU ones run there; "
        f"{len(bookkeeping)} are Python: {', '.join(bookkeeping)}"
    )


if __name__ == "__main__":
    main(sys.argv[1])
