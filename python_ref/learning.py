"""Learning-rate schedule, optimizer step and moving average of the weights."""

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from python_ref.config import OptimizerConfig
from python_ref.processes import average_gradients, local_tensors


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Rate of optimizer step `step` (from 0): linear warm-up, then half a cosine from lr to lr * final_lr_ratio."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * cosine)


class Learner:
    """AdamW (arXiv 1711.05101) over a module's trainable weights: one call per optimizer step.

    Where several processes share a batch, each has the gradient of the mean over its own part; the step is that of one
    process on the whole batch.
    """

    def __init__(self, module: nn.Module, config: OptimizerConfig, total_steps: int) -> None:
        self.config = config
        self.total_steps = total_steps
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, config.lr, (config.beta1, config.beta2), weight_decay=config.weight_decay, fused=True
        )

    def step(self, step: int) -> dict[str, float]:
        """Clips the gradients that lie ready, updates the weights, clears the gradients. Returns norm and rate."""
        rate = learning_rate(step, self.total_steps, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        average_gradients(self.parameters)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm, error_if_nonfinite=True)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norm.item(), "lr": rate}


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, decay: float, updates: int) -> None:
    """average = decay average + (1 - decay) module, with a faster start: decay is at most (1 + n) / (10 + n)."""
    decay = min(decay, (1 + updates) / (10 + updates))
    torch._foreach_lerp_(local_tensors(average.parameters()), local_tensors(module.parameters()), 1 - decay)
