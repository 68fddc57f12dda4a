"""Which packets of a video still owe a frame, and which have owed it for too long: those frames are lost.

    python -m mirage_min.data.due             # five packets, of which one gives no frame
"""

import heapq
import math

import av
from av.video.frame import PictureType


class Due:
    """The times of the packets whose frames are still to come."""

    def __init__(self):
        self.heap: list[tuple[int, bool, bool]] = []  # time, whether its packet failed, whether it promises a frame
        self.latest, self.rising, self.begun = -math.inf, True, False
        self.of_decoding = False                      # whether the times are those of decoding, not of showing

    def add(self, time: int, failed: bool, promised: bool) -> None:
        """Note that a packet of this time, in ticks, was decoded, whether that failed, and whether it owes a frame."""
        heapq.heappush(self.heap, (time, failed, promised))
        self.rising &= time > self.latest
        self.latest = max(time, self.latest)

    def take(self, frame: av.VideoFrame) -> tuple[list[int], int | None]:
        """Match a decoded frame with its packet -> the times of frames lost before it, and its own, in ticks."""
        if frame.pts is None:
            return [], None
        # A B-frame follows a frame in the file that it precedes on the screen. Where the times of packets rise all the
        # same, they were made up on the way (AVI has no others): the frames take them in the order in which they come.
        self.of_decoding |= self.rising and frame.pict_type == PictureType.B
        lost = []
        while self.heap and (self.of_decoding or self.heap[0][0] <= frame.pts):
            time, failed, promised = heapq.heappop(self.heap)
            if self.of_decoding and not failed:
                return lost, time
            # A stream may start with packets whose references were cut away, and a field is not a frame: no losses.
            if time < frame.pts and (failed or (promised and self.begun and not frame.interlaced_frame)):
                lost.append(time)
        self.begun = True
        return lost, None if self.of_decoding else frame.pts

    def rest(self) -> list[int]:
        """The times, in ticks and rising, of the frames that never came."""
        return [time for time, failed, promised in sorted(self.heap) if failed or promised]


if __name__ == "__main__":
    from types import SimpleNamespace

    due = Due()
    for time in range(0, 50, 10):
        due.add(time, failed=False, promised=True)
    for time in (0, 10, 30):
        frame = SimpleNamespace(pts=time, pict_type=PictureType.P, interlaced_frame=False)
        lost, time = due.take(frame)
        print(f"frame at {time:2}, lost before it: {lost}")
    print(f"never came: {due.rest()}")
