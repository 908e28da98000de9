"""Self-Forcing in words."""

from __future__ import annotations

EXPLANATION = """\
Self-Forcing in five minutes (arXiv 2506.08009)

THE PROBLEM
An autoregressive video model makes a video block by block. A block of a few frames starts as noise and is denoised in a
few steps; in each step it attends to the blocks before it. In use, those are blocks that the model has made itself. In
training they are real ones (teacher forcing), or real ones plus noise (diffusion forcing), so the model never meets its
own mistakes. In use it does: a small mistake in block 1 is part of the past of block 2, which makes a larger one,
and the video drifts. This gap between training and use is called exposure bias.

THE IDEA
Train on what will happen. Each training step generates a video exactly as inference does, from noise, block by block,
with the same cache; a loss then judges the finished video. The past of each block is what the model itself has made, so
it learns to go on from there.

WHY IT IS AFFORDABLE
1. Few steps. The model starts from one that can already denoise, and takes 4 denoising steps per block, not 50.
2. One random exit. All blocks stop at the same step s, drawn at random, and what that step predicts is the block. Only
   that step gets gradient; the steps before it run without. Over many draws every step is trained.
3. A constant past. A finished block goes through the model once more, as clean input, and its keys and values are
   cached without gradient. Backward therefore never runs from one block into the ones before it.

THE LOSS
Nobody can say which real video a rollout should have become, so frames are not compared with frames. Distributions are:
the generated videos, together, should look like the data. Distribution matching (DMD) noises the generated video and
asks two models for the clean one: a frozen teacher, who knows real videos, and a critic, who learns all along what the
generator makes. The generator moves along the difference: away from what is typical of its own videos, towards what the
teacher expects. SiD and a GAN are other losses on the same rollout. With DMD no real video is needed, only captions.

THE CACHE
A finished block is summed up by its keys and values; nothing of it is computed again. With a window only the newest
frames stay visible, so that memory and time per block do not grow with the video: in a ring, the newest frames take the
place of the oldest. A sink keeps the first frames visible for ever.

ONE TRAINING STEP
    draw captions, noise for every frame, and the exit step s
    for each block:
        x = its noise
        for step = 1 .. s:                                   # gradient in step s only
            flow = generator(x, sigma[step], past = cache)
            x0 = x - sigma[step] flow
            if step < s:  x = (1 - sigma[step + 1]) x0 + sigma[step + 1] fresh noise
        cache the keys and values of a clean pass over x0    # no gradient
    loss(all x0).backward(); update the generator
    update the critic on generated videos                    # several times for each update of the generator

WHAT IT COSTS
Nothing in use: model and inference stay as they are. In training, a rollout for each step, and for DMD a teacher and a
critic. And what lies beyond the rollouts of training is as untrained as ever: a past longer than any that the model has
met makes it drift. A window as long as the videos of training keeps the past short; longer rollouts in training help.
"""


def explain_self_forcing() -> None:
    """Prints what Self-Forcing is and why it works, on one page."""
    print(EXPLANATION)
