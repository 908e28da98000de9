"""Real video files with known content."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def write_video(path: Path, frames: int, rate: int = 10, size: tuple[int, int] = (64, 96), level: int = 0) -> None:
    """A bright square that moves 4 pixels right with every frame, on a background of grey `level`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate), options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for i in range(frames):
            image = np.full((*size, 3), level, dtype=np.uint8)
            image[20:36, 16 + 4 * i : 32 + 4 * i] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
