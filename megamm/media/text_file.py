"""Text files: UTF-8 bytes -> str; refuses what is not text."""

from megamm.common.errors import UnreadableMedia


def to_text(data: bytes) -> str:
    """UTF-8 bytes to str. Raises UnreadableMedia unless it is UTF-8 with a visible character and without NUL."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableMedia(f"not UTF-8: {error.reason} at byte {error.start}") from error
    if "\0" in text:
        raise UnreadableMedia("contains NUL characters: binary data, not text")
    if not text.strip():
        raise UnreadableMedia("contains no text")
    return text
