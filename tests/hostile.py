"""A transform by which a decoding process dies or hangs, as the width of a video says; processes import it by name."""

import os
import signal
import time

from mplug2.data import Transform

DIES, HANGS = 98, 100  # pixels wide


class HostileTransform(Transform):
    def resize(self, frames):
        width = frames.shape[2]
        if width == DIES:
            os.kill(os.getpid(), signal.SIGKILL)
        if width == HANGS:
            time.sleep(1000)
        return super().resize(frames)
