"""The decoder's side of reading a video: an index of its frames, then the frames wanted, one at a time, in one thread.

The index comes from one pass over the packets, in which nothing is decoded: the time of every frame, and the keyframes.
With it the decoder jumps, but only to a keyframe that lies ahead of what it has been given, and leaves out frames that
are neither wanted nor a reference for others. Streams without usable times (raw h264, AVI with B-frames) are decoded in
order and counted. Packets that cannot be decoded are skipped and counted; a frame lost with them is replaced by the
next one that decodes.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from mplug2.data.source import MediaError, Source

_MAX_PIXELS = 2**27  # of one picture: 134 million, above 16K video. A header that claims more is taken for damage
_MAX_SECONDS = 1e6  # of a video: 11 days. Times that span more are taken for damage
_OBEYS_PER_PACKET = ("h264", "hevc")  # codecs that take skip_frame for the packet at hand; AV1's is packets behind
_MAX_BAD_READS = 1000  # reads in a row that give no packet before the file counts as ended


@dataclass(frozen=True)
class FrameIndex:
    """Every frame of a video in display order."""

    times: np.ndarray  # float64 (n,): seconds, the first at 0
    duration: float  # seconds
    pts: np.ndarray | None  # int64 (n,): the same in the stream's unit; None where the file has none to be trusted
    keys: np.ndarray  # int64: pts of the keyframes, rising
    unit: float  # seconds of one step of pts


def index_frames(source: Source) -> FrameIndex:
    """One pass over the packets. MediaError: the file cannot be opened, or holds no video or no frames."""
    with _open(source) as container:
        stream = _video_stream(container, source)
        packets = [
            (p.pts, p.dts, p.duration or 0, p.is_keyframe) for p in _packets(container, stream) if not p.is_discard
        ]
        unit = float(stream.time_base)
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        # AVI knows no display times: with reordered frames the ones it seems to give are those of decoding.
        is_reordered_avi = container.format.name == "avi" and stream.codec_context.has_b_frames
    if not packets:
        raise MediaError(source.name, "holds no video frames; it is cut short or damaged: download or copy it again")
    period = 1 / rate if 0.01 <= rate <= 10_000 else 1 / 25
    all_pts, all_dts, durations, is_key = zip(*packets, strict=True)
    dts = [d for d in all_dts if d is not None]
    has_times = None not in all_pts and len(set(all_pts)) == len(all_pts)
    goes_back = any(b <= a for a, b in itertools.pairwise(dts))
    if not has_times or goes_back or (max(all_pts) - min(all_pts)) * unit > _MAX_SECONDS:
        times = np.arange(len(packets)) * period
        return FrameIndex(times, len(packets) * period, None, np.empty(0, np.int64), unit)
    pts = np.array(sorted(all_pts), dtype=np.int64)
    keys = np.array(sorted(p for p, key in zip(all_pts, is_key, strict=True) if key), dtype=np.int64)
    times = (pts - pts[0]) * unit
    last = durations[int(np.argmax(all_pts))] * unit
    last = last if 0 < last <= _MAX_SECONDS else period
    return FrameIndex(times, float(times[-1] + last), None if is_reordered_avi else pts, keys, unit)


def pick_frames(source: Source, index: FrameIndex, wanted: np.ndarray) -> Iterator[tuple[av.VideoFrame, float, int]]:
    """The frames at the rising indices `wanted`: (frame, its time in seconds, packets skipped so far).

    Where nothing decodes there are none. One frame is alive at a time, beside those that the codec itself holds.
    """
    with _Decoder(source) as decoder:
        pick = _pick_by_count if index.pts is None else _pick_by_time
        for frame, time in pick(decoder, index, wanted):
            yield frame, time, decoder.num_skipped


def _pick_by_time(decoder: _Decoder, index: FrameIndex, wanted: np.ndarray) -> Iterator[tuple[av.VideoFrame, float]]:
    targets = index.pts[wanted].tolist()
    decoder.keep_only(targets)
    frame = None
    for pts in targets:
        if frame is None or frame.pts < pts:
            before = int(np.searchsorted(index.keys, pts, side="right"))
            if before:
                decoder.jump_ahead(int(index.keys[before - 1]))
        while frame is None or frame.pts < pts:
            following = decoder.next_frame()
            if following is not None:
                frame = following if following.pts is not None else frame
            elif frame is not None or not decoder.restart():
                break  # the end: the last frame stands for those behind it
        if frame is None:
            return
        yield frame, (frame.pts - int(index.pts[0])) * index.unit


def _pick_by_count(decoder: _Decoder, index: FrameIndex, wanted: np.ndarray) -> Iterator[tuple[av.VideoFrame, float]]:
    frame, number = None, -1
    for target in wanted.tolist():
        while number < target and (following := decoder.next_frame()) is not None:
            frame, number = following, number + 1
        if frame is None:
            return
        yield frame, float(index.times[min(number, len(index.times) - 1)])


class _Decoder:
    """Decoded frames of the first video stream in display order, one at a time."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._kept: frozenset[int] | None = None
        self._start()
        # Program streams give other times after a jump than before.
        self._may_jump = self._container.format.name != "mpeg"

    def __enter__(self) -> _Decoder:
        return self

    def __exit__(self, *exc) -> None:
        self._opened.close()

    def _start(self) -> None:
        self.num_skipped = 0  # packets that could not be decoded
        self._opened = ExitStack()
        self._container = self._opened.enter_context(_open(self.source))
        self._stream = _video_stream(self._container, self.source)
        self._stream.thread_type = "NONE"  # one worker a core does more than threads inside
        self._stream.codec_context.thread_count = 1
        self._packets = _packets(self._container, self._stream)
        self._decoded: deque[av.VideoFrame] = deque()
        self._fed: int | None = None  # greatest pts given to the codec
        self._has_ended = False

    def keep_only(self, pts: list[int]) -> None:
        """Let the codec leave out frames with other pts that no frame refers to: up to a quarter of the whole time."""
        if self._stream.codec_context.name in _OBEYS_PER_PACKET:
            self._kept = frozenset(pts)

    def next_frame(self) -> av.VideoFrame | None:
        """The next frame in display order, None at the end."""
        while not self._decoded and not self._has_ended:
            packet = next(self._packets, None)
            if packet is None:
                self._has_ended = True
            elif packet.pts is not None:
                self._fed = packet.pts if self._fed is None else max(self._fed, packet.pts)
                if self._kept is not None:
                    self._stream.codec_context.skip_frame = "DEFAULT" if packet.pts in self._kept else "NONREF"
            try:
                self._decoded.extend(self._stream.decode(packet))  # None asks for the frames the codec still holds
            except av.error.MemoryError:
                raise
            except av.FFmpegError:
                self.num_skipped += 1
        return self._decoded.popleft() if self._decoded else None

    def jump_ahead(self, key: int) -> None:
        """Go on from the keyframe with this pts, if that saves packets; never again if the file does not lead there."""
        if not self._may_jump or (self._fed is not None and key <= self._fed):
            return
        for early in (0, round(1 / self._stream.time_base)):  # transport streams land behind the place asked for
            try:
                self._container.seek(key - early, stream=self._stream)
            except av.FFmpegError:
                break
            packets = _packets(self._container, self._stream)
            for packet in packets:
                if packet.pts == key:
                    self._packets = itertools.chain([packet], packets)
                    self._decoded.clear()
                    self._has_ended = False
                    return
                if packet.pts is not None and packet.pts > key:
                    break
        self.restart()

    def restart(self) -> bool:
        """Begin again from the first packet and never jump; False if it has been read that way already."""
        if not self._may_jump:
            return False
        self._may_jump = False
        self._opened.close()
        self._start()
        return True


class RGBConverter:
    """Decoded frames to uint8 (H, W, 3), turned upright, by one scaler for the whole clip."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        rgb = self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        # The container gives the angle counter-clockwise, as rot90 turns.
        return np.ascontiguousarray(np.rot90(rgb, round(frame.rotation / 90)))


@contextmanager
def _open(source: Source) -> Iterator[InputContainer]:
    # No protocol: a playlist cannot reach other files or the network.
    options = {"protocol_whitelist": "none", "max_pixels": str(_MAX_PIXELS)}
    with source.opened() as file:
        try:
            # Titles in another encoding than UTF-8 would be an error without metadata_errors.
            container = av.open(file, options=options, metadata_errors="replace")
        except av.FFmpegError as e:
            reason = f"is not a video that can be read ({e.strerror}): cut short, damaged or of another kind"
            raise MediaError(source.name, f"{reason}; download or convert it again") from None
        with container:
            yield container


def _video_stream(container: InputContainer, source: Source) -> VideoStream:
    """The first stream of pictures that is not the cover of a piece of music."""
    covers = [s for s in container.streams.video if s.disposition & Disposition.attached_pic]
    streams = [s for s in container.streams.video if s not in covers]
    if not streams:
        kinds = ", ".join(sorted({"cover" if s in covers else s.type for s in container.streams})) or "no"
        raise MediaError(source.name, f"holds no video, only {kinds} streams; pass a file with pictures")
    if streams[0].codec_context is None:
        raise MediaError(source.name, "its video codec is unknown; convert it to h264")
    return streams[0]


def _packets(container: InputContainer, stream: VideoStream) -> Iterator[av.Packet]:
    """The packets that hold data. Reading goes on behind damage, and ends where only errors come."""
    packets, num_bad = container.demux(stream), 0
    while num_bad < _MAX_BAD_READS:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except (av.FFmpegError, IndexError):  # IndexError: a packet of a stream that the header did not announce
            packets, num_bad = container.demux(stream), num_bad + 1
            continue
        num_bad = 0
        if packet.size:
            yield packet
