"""Self-Forcing in words."""

from __future__ import annotations

EXPLANATION = """\
Self-Forcing in five minutes (arXiv 2506.08009)

THE PROBLEM
An autoregressive video model makes a video block by block. A block starts as noise and is denoised in a few steps; in
each step it attends to the blocks before it. In use those are blocks that the model made itself. In teacher forcing it
trains with real blocks in their place, in diffusion forcing with real blocks plus noise: it never meets its own
mistakes. In use a small mistake in block 1 is part of the past of block 2, which makes a larger one, and the video
drifts. This gap between training and use is called exposure bias.

THE IDEA
Train on what will happen. Each training step generates a video exactly as inference does, from noise, block by block,
with the same cache; a loss then judges the finished video. The past of each block is what the model itself has made, so
it learns to go on from there.

WHY THAT IS AFFORDABLE
1. Few steps. The model starts from one that can already denoise, and takes 4 denoising steps per block, not 50.
2. One random exit. All blocks stop at the same step s, drawn at random, and its prediction of the clean block is the
   block. Only that step gets gradient; the steps before it run without. Over many draws every step is trained.
3. A constant past. A finished block goes through the model once more, as clean input, and its keys and values are
   cached without gradient. Backward therefore never runs from one block into the ones before it.

THE LOSS
Nobody can say which real video a rollout should have become, so frames are not compared with frames. Distributions are:
the generated videos together should look like the data. Distribution matching (DMD) noises the generated video and asks
two models for the clean one: a frozen teacher, which knows real videos, and a critic, which is trained all along on
the generator's own. Where the two differ, the generator moves: away from what is typical of its own videos, towards
what the teacher expects. SiD and a GAN are other losses on the same rollout. With DMD no real video is needed, only
captions.

THE CACHE
A finished block is summed up by its keys and values; nothing of it is computed again. With a window only the newest
frames stay visible, so memory and time per block do not grow with the video: the newest frames take the place of the
oldest in a ring. A sink keeps the first frames visible for ever.

ONE TRAINING STEP
    draw a caption, noise for every frame, and the exit step s
    for each block:
        x = its noise
        for step = 1 .. s:                                   # gradient in step s only
            x0 = generator(x, sigma[step], past = cache)
            if step < s:  x = (1 - sigma[step + 1]) x0 + sigma[step + 1] fresh noise
        cache the keys and values of the clean pass over x0  # no gradient
    loss(all x0).backward(); update the generator
    update the critic on generated videos                    # several times for each update of the generator

WHAT IT COSTS
Nothing in use: model and inference stay as they are. In training, a rollout for each step, and for the DMD loss a teacher
and a critic. And what lies beyond the rollouts of training is as untrained as ever: a longer past than any that the model
has met makes it drift. A window as long as the videos of training keeps the past short; training on long rollouts helps
too.
"""


def explain_self_forcing() -> None:
    """Prints what Self-Forcing is and why it works, on one page."""
    print(EXPLANATION)
