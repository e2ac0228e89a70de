"""The length of sound files by their data instead of their headers: WAV, RF64, FLAC, Ogg, MP3, AAC and M4A.

A program that writes to a pipe does not know the length when it writes the header, so it leaves a placeholder: all
bits set, about 2 GiB, or zero. `wav_with_length` and `flac_with_length` put the true length there. `ogg_links` checks
all pages, whose damage decoders skip silently, and separates chained streams; `adts_frames` checks the frames of AAC,
and `flac_links` separates FLAC files. `packet_seconds` is the length of the container's packets, which a decoder must
reach.
"""

import io
import struct
import zlib
from dataclasses import dataclass
from typing import Any

from megamm.common.errors import UnreadableMedia
from megamm.media.mp3_frames import after_id3, id3_size

_PLACEHOLDERS = (range(0x7FFF0000, 0x80010000), range(0xFFFF0000, 0x100000000))
"""Sizes of about 2 and 4 GiB in WAV headers: of sox (0x7FFFF000, 0x7FFFFFFF), arecord (0x80000000), FFmpeg (all
bits), and these with the length of the header added or subtracted."""
_RF64_PLACEHOLDERS = (*_PLACEHOLDERS, range(1 << 62, 1 << 64))
_BEGIN, _END = 2, 4
"""Flags of Ogg pages (RFC 3533, section 6)."""
_PAGE = struct.Struct("<4sBBqIIIB")
_FLAC = b"fLaC\0\0\0\x22"
"""The marker of a FLAC file and the header of its first block, whose size is always 34 (RFC 9639, section 8)."""
_BIT_REVERSED = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))
_DEMUXERS = {"WAV": "wav", "WAVEX": "wav", "RF64": "wav", "FLAC": "flac", "OGG": "ogg", "MP3": "mp3"}
_DEMUXERS |= {"AAC": "aac", "M4A": "mp4"}
_ADTS_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)
_LONGEST_ADTS = 8191


def wav_with_length(data: bytes) -> bytes:
    """A WAV or RF64 file whose header has the length of its data. Raises UnreadableMedia if it is truncated."""
    order = ">" if data.startswith(b"RIFX") else "<"
    position, declared_64, align = 12, None, 1
    while position + 8 <= len(data):
        name, size = struct.unpack_from(f"{order}4sI", data, position)
        start = position + 8
        if name == b"ds64" and start + 16 <= len(data):  # EBU Tech 3306: sizes of the file and of its data
            declared_64 = struct.unpack_from("<Q", data, start + 8)[0]
        if name == b"fmt " and start + 14 <= len(data):
            align = max(1, struct.unpack_from(f"{order}H", data, start + 12)[0])
        if name == b"data":
            break
        position = start + size + size % 2
    else:
        return data  # no data: libsndfile gives the reason
    rest = len(data) - start
    wide = declared_64 is not None and data.startswith(b"RF64") and size in (0xFFFFFFFF, 0)
    declared = declared_64 if wide else size
    assert declared is not None, "wide implies a 64-bit size"
    # An empty file has a consistent size of the whole; where a header was never completed, that is wrong too.
    whole = struct.unpack_from(f"{order}I", data, 4)[0] + 8 == len(data)
    unknown = declared == 0 and rest > 0 and not whole
    if declared <= rest and not unknown:
        return data
    if not unknown and not any(declared in sizes for sizes in (_RF64_PLACEHOLDERS if wide else _PLACEHOLDERS)):
        raise UnreadableMedia(f"truncated: {rest} of {declared} bytes of its data")
    # Without its last, incomplete sample. A 64-bit file in memory fits into 32 bits, and "JUNK" replaces its sizes.
    size = rest - rest % align
    head = bytearray(data[:start])
    head[:4] = b"RIFX" if order == ">" else b"RIFF"
    head[4:8], head[start - 4 :] = struct.pack(f"{order}I", start + size - 8), struct.pack(f"{order}I", size)
    return bytes(head).replace(b"ds64", b"JUNK", 1) + data[start : start + size]


def flac_with_length(data: bytes) -> bytes:
    """A FLAC file that declares as many samples as its packets have, if it declares fewer or none."""
    # STREAMINFO is the first block; 36 bits from the low half of byte 21 are the number of samples.
    if len(data) < 42 or data[4] & 0x7F != 0:
        return data
    declared = int.from_bytes(data[21:26], "big") & 0xFFFFFFFFF
    rate = int.from_bytes(data[18:21], "big") >> 4
    samples = round(_packets(data, "flac")[0] * rate)
    if not declared < samples < 1 << 36:
        return data
    return data[:21] + ((data[21] & 0xF0) << 32 | samples).to_bytes(5, "big") + data[26:]


def mp3_declared_samples(data: bytes) -> int:
    """Samples that an MP3 file declares in a Xing, Info or VBRI header, less the longest delays; 0 without one."""
    position = after_id3(data)
    begin = data.find(b"\xff", position)
    head = data[begin : begin + 200] if 0 <= begin < position + 4096 else b""
    frames = 0
    for name in (b"Xing", b"Info"):
        # Flag 1: the number of frames follows the flags.
        if (at := head.find(name)) >= 0 and at + 12 <= len(head) and head[at + 7] & 1:
            frames = int.from_bytes(head[at + 8 : at + 12], "big")
    if (at := head.find(b"VBRI")) >= 0 and at + 18 <= len(head):
        frames = int.from_bytes(head[at + 14 : at + 18], "big")
    # Bits 3 and 4 of the second byte: MPEG-1 has 1152 samples per frame, MPEG-2 and 2.5 have half (layer 3). Decoders
    # remove the encoder's delay and padding, less than three frames.
    per_frame = 1152 if head[1:2] and head[1] >> 3 & 3 == 3 else 576
    return max(0, (frames - 3) * per_frame)


def flac_links(data: bytes) -> list[bytes]:
    """The FLAC files that stand behind each other, each with its length in the header; usually one."""
    starts, at = [0], 0
    while (at := data.find(_FLAC, at + 1)) >= 0:
        starts.append(at)
    ends = [*starts[1:], len(data)]
    return [flac_with_length(data[start:end]) for start, end in zip(starts, ends, strict=True)]


def adts_frames(data: bytes) -> tuple[bytes, float]:
    """The ADTS frames (ISO/IEC 13818-7, annex B) of an AAC file without the tags around them, and their seconds.

    A recording of a running stream may begin within a frame. Raises UnreadableMedia for anything else between frames,
    which FFmpeg skips silently.
    """
    frames: list[bytes] = []
    seconds, start = 0.0, after_id3(data)
    position = next((at for at in range(start, start + _LONGEST_ADTS) if _adts_chain(data, at)), start)
    skipped = position - start
    while position < len(data):
        # Parts of HLS begin with an ID3v2 tag; an ID3v1 tag is the last 128 bytes of a file.
        if size := id3_size(data, position):
            position += size
            if position > len(data):
                raise UnreadableMedia("truncated: the end of its last tag is missing")
            continue
        if frames and position + 128 == len(data) and data.startswith(b"TAG", position):
            break
        frame = _adts_frame(data, position)
        if frame is None:
            raise UnreadableMedia(f"broken AAC data: no frame at byte {position}")
        size, rate = frame
        if position + size > len(data):
            raise UnreadableMedia("truncated: the end of the last frame is missing")
        if data[position + 6] & 3:
            raise UnreadableMedia("ADTS frames with several blocks are not supported")
        frames.append(data[position : position + size])
        seconds += 1024 / rate
        position += size
    # A frame that was cut is about as long as the others; what is longer was several frames.
    if skipped > 2 * max(map(len, frames), default=0):
        raise UnreadableMedia(f"broken AAC data: no frame at byte {start}")
    return b"".join(frames), seconds


def _adts_frame(data: bytes, position: int) -> tuple[int, int] | None:
    """Bytes and rate (Hz) of the ADTS frame at a position; None if there is none."""
    head = data[position : position + 7]
    # 12 set bits, one for the version, and two of the layer, which are 0.
    if len(head) < 7 or head[0] != 0xFF or head[1] & 0xF6 != 0xF0:
        return None
    rate, size = head[2] >> 2 & 15, (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
    return (size, _ADTS_RATES[rate]) if rate < len(_ADTS_RATES) and size > 7 else None


def _adts_chain(data: bytes, position: int) -> bool:
    """Whether a frame is at this position and another one, or the end of the file, behind it."""
    frame = _adts_frame(data, position)
    return frame is not None and (position + frame[0] >= len(data) or bool(_adts_frame(data, position + frame[0])))


def ogg_links(data: bytes) -> list[bytes]:
    """The chained streams of an Ogg file (RFC 3533), each a complete file; usually one.

    A last page without the flag for the end is accepted, and gets it: recorders that are stopped leave it away, and
    libsndfile calls an Opus file without it malformed. Raises UnreadableMedia if a page is damaged, missing or
    incomplete.
    """
    links: list[_OggLink] = []
    position = 0
    while data.startswith(b"OggS", position):
        if position + _PAGE.size > len(data):
            raise UnreadableMedia("truncated: the end of the OGG file is missing")
        _, _, flags, granule, serial, number, checksum, segments = _PAGE.unpack_from(data, position)
        lengths = data[position + _PAGE.size : position + _PAGE.size + segments]
        end = position + _PAGE.size + segments + sum(lengths)
        if len(lengths) < segments or end > len(data):
            raise UnreadableMedia("truncated: the end of the OGG file is missing")
        page = _OggPage(position, end, flags, granule, number, lengths.endswith(b"\xff"))
        if _ogg_checksum(data[position : position + 22] + bytes(4) + data[position + 26 : end]) != checksum:
            raise UnreadableMedia(f"broken OGG data: the page at byte {position} is damaged")
        if not links or (flags & _BEGIN and links[-1].in_data):
            links.append(_OggLink(position))
        links[-1].add(page, serial)
        position = end
    if data.find(b"OggS", position) >= 0:
        raise UnreadableMedia(f"broken OGG data: no page at byte {position}")
    if any(page.continues for link in links for page in link.last.values()):
        raise UnreadableMedia("truncated: the end of the OGG file is missing")
    ends = [*(link.start for link in links[1:]), position]
    return [link.ended(data[link.start : end]) for link, end in zip(links, ends, strict=True)]


@dataclass(frozen=True)
class _OggPage:
    """A page at bytes start to end; continues: whether its last packet continues in the stream's next page."""

    start: int
    end: int
    flags: int
    granule: int
    number: int
    continues: bool


class _OggLink:
    """A stream, or several multiplexed ones, of a chain; starts at a byte of the file."""

    def __init__(self, start: int) -> None:
        self.start, self.in_data = start, False
        self.last: dict[int, _OggPage] = {}
        """The last page so far of each serial number."""

    def add(self, page: _OggPage, serial: int) -> None:
        """Add the next page. Raises UnreadableMedia if one is missing before it."""
        before = self.last.get(serial)
        self.in_data = self.in_data or not page.flags & _BEGIN
        # Recordings of a running stream begin with its headers, whose granule position is 0.
        if before and page.number != before.number + 1 and before.granule != 0:
            raise UnreadableMedia(f"broken OGG data: pages {before.number + 1} to {page.number - 1} are missing")
        self.last[serial] = page

    def ended(self, data: bytes) -> bytes:
        """The link's bytes with the flag for the end on the last page of each stream."""
        for page in self.last.values():
            if not page.flags & _END:
                start, end = page.start - self.start, page.end - self.start
                head = data[start : start + 5] + bytes([page.flags | _END]) + data[start + 6 : start + 22]
                checksum = _ogg_checksum(head + bytes(4) + data[start + 26 : end])
                data = data[:start] + head + checksum.to_bytes(4, "little") + data[start + 26 :]
        return data


def _ogg_checksum(page: bytes) -> int:
    """CRC-32 with the polynomial 0x04C11DB7, not reflected, without initial and final inversion (RFC 3533)."""
    # zlib's is the reflected form of the same polynomial, so the bits of all bytes are reversed before and after.
    reflected = zlib.crc32(page.translate(_BIT_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(reflected.to_bytes(4, "little").translate(_BIT_REVERSED), "big")


def packet_seconds(data: bytes, container: str) -> float:
    """Seconds that a decoder of the file must reach: the packets' without what may be trimmed at both ends."""
    seconds, longest = _packets(data, _DEMUXERS[container])
    return max(0.0, seconds - max(0.2, 3 * longest))


def _packets(data: bytes, demuxer: str) -> tuple[float, float]:
    """Seconds of all packets of the sound, and of the longest one; 0 if FFmpeg cannot read the container."""
    import av

    seconds, longest = 0.0, 0.0
    try:
        # The text of tags is not needed, and often in another encoding than UTF-8.
        with av.open(io.BytesIO(data), mode="r", format=demuxer, metadata_errors="replace") as container:
            stream: Any = container.streams.best("audio")
            for packet in container.demux(stream) if stream else ():
                # Edit lists mark the packets of the encoder's delay.
                duration = 0.0 if packet.is_discard else float((packet.duration or 0) * stream.time_base)
                seconds, longest = seconds + duration, max(longest, duration)
    except (av.FFmpegError, ValueError):
        # libsndfile reads some variants that FFmpeg does not; then only its own checks hold.
        return 0.0, 0.0
    return seconds, longest
