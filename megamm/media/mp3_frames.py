"""The frames of MP3 files without what stands around them: tags, zeros, and a part of a frame of a running stream.

Decoders disagree about these bytes: libsndfile does not open a recording that begins within a frame, and FFmpeg reports
tags and zeros at the end as damage. A frame has its version, layer, bit rate and sample rate in its first four bytes
(ISO/IEC 11172-3, section 2.4.1.3; ISO/IEC 13818-3 for MPEG-2), which give its length.
"""

_BIT_RATES = (
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
)
"""kbit/s of layer 3 by index, of MPEG-1 and of MPEG-2 and 2.5."""
_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
"""Hz by the bits of the version (MPEG-1, 2 and 2.5) and by index."""
_LONGEST = 1441
_CHAIN = 3
"""Frames behind each other that are not there by chance."""
_ID3V1, _LYRICS, _APE = 128, b"LYRICS200", b"APETAGEX"


def id3_size(data: bytes, position: int) -> int:
    """Bytes of the ID3v2 tag at a position; 0 if there is none."""
    if data[position : position + 3] != b"ID3" or position + 10 > len(data):
        return 0
    size = 0
    for byte in data[position + 6 : position + 10]:
        size = size << 7 | byte & 0x7F  # 7 bits per byte
    return 10 + size


def after_id3(data: bytes) -> int:
    """The position behind the ID3v2 tags at the beginning of a file."""
    position = 0
    while size := id3_size(data, position):
        position += size
    return position


def mp3_frames(data: bytes) -> bytes:
    """The file from its first whole frame to its last; unchanged if it does not consist of frames.

    Left away: zeros and less than two frames at the beginning; tags and zeros at the end. Bytes between frames stay,
    for the decoder to judge.
    """
    start = after_id3(data)
    zeros = len(data) - start - len(data[start:].lstrip(b"\0"))
    first = next((at for at in range(start + zeros, start + zeros + 2 * _LONGEST) if _is_chain(data, at)), None)
    if first is None:
        return data
    end = _before_tags(data, first)
    position = first
    while size := _frame_size(data, position):
        position += size
    if position < end and not data[position:end].strip(b"\0"):
        end = position
    # With its ID3v2 tag, if that is all there is: libsndfile and FFmpeg know it.
    return data[(0 if first == start else first) : end]


def _before_tags(data: bytes, start: int) -> int:
    """Where the tags at the end begin: ID3v1, Lyrics3 (id3.org) and APE, in any order."""
    end = len(data)
    while True:
        if end - start > _ID3V1 and data.startswith(b"TAG", end - _ID3V1):
            size = _ID3V1
        elif data.endswith(_LYRICS, start, end) and data[end - 15 : end - 9].isdigit():
            size = int(data[end - 15 : end - 9]) + 15  # six digits: the bytes before them
        elif end - start > 32 and data.startswith(_APE, end - 32):
            # The size in the footer includes the footer; the highest bit of the flags says that there is a header.
            size = int.from_bytes(data[end - 20 : end - 16], "little") + 32 * (data[end - 9] >> 7)
        else:
            return end
        if not 0 < size <= end - start:
            return end
        end -= size


def _is_chain(data: bytes, position: int) -> bool:
    """Whether frames of one kind stand behind each other at this position, up to the end of a short file."""
    head = data[position : position + 4]
    for _ in range(_CHAIN):
        size = _frame_size(data, position)
        # The same version, layer and sample rate.
        if not size or data[position + 1] & 0xFE != head[1] & 0xFE or data[position + 2] & 0x0C != head[2] & 0x0C:
            return False
        position += size
        if position == len(data):
            break
    return True


def _frame_size(data: bytes, position: int) -> int:
    """Bytes of the layer 3 frame at a position; 0 if there is none, or one of the free format."""
    if position + 4 > len(data) or data[position] != 0xFF or data[position + 1] & 0xE6 != 0xE2:
        return 0
    version, flags = data[position + 1] >> 3 & 3, data[position + 2]
    bits, rate = flags >> 4, flags >> 2 & 3
    if version not in _RATES or bits == 15 or rate == 3:
        return 0
    is_first = version == 3
    kilobits = _BIT_RATES[0 if is_first else 1][bits]
    return kilobits and (144 if is_first else 72) * 1000 * kilobits // _RATES[version][rate] + (flags >> 1 & 1)
