"""What a raw file is, by its name: a medium of a modality, a text, a medium that is not read, or no data at all.

The modalities of `REGISTRY` say which extensions they read. The lists here name what people's folders contain besides.
"""

from pathlib import PurePath

from megamm.modalities import REGISTRY

TEXT_EXTENSIONS = ("txt", "caption", "json", "cls")
ALIASES = {"jpeg": "jpg", "jpe": "jpg", "jfif": "jpg", "mpo": "jpg", "dib": "bmp", "tif": "tiff", "heif": "heic"}
ALIASES |= {"hif": "heic", "apng": "png", "wave": "wav", "oga": "ogg", "m4b": "m4a", "m4v": "mp4"}
"""Other extensions of the same formats."""
_UNREAD = {
    "image": "jxl jp2 j2k jpx psd xcf cr2 cr3 nef arw dng raf orf rw2 exr hdr ico tga pcx ppm pgm pbm pnm qoi dds eps",
    "audio": "wma amr aif aiff aifc caf mka ape wv dsf au ac3 dts mp2 weba spx mid midi",
    "video": "avi wmv flv mpg mpeg mts m2ts vob ogv 3gp 3g2 rm rmvb asf mxf",
    "points": "fbx blend dae 3ds step stp iges igs usd usda usdc usdz gltf off x3d wrl pcd las laz e57 3mf",
}
"""Formats of media that are recognised but not read: a sample must not be trained on without them."""
_NOTES = "md xml yaml yml csv tsv html htm srt vtt log ini toml license md5 sha1 sha256 meta idx index"
"""Extensions of notes about a file, which do not belong to a sample."""
OTHER = "other"
"""Stands for a part whose modality is unknown."""
_SYSTEM = frozenset(("__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information"))


def modality_of(extension: str) -> str | None:
    """The first modality of the registry that accepts files with this extension."""
    if extension == "svg":
        return "image"
    return next((name for name, kind in REGISTRY.items() if ALIASES.get(extension, extension) in kind.extensions), None)


def recognised(extension: str) -> str | None:
    """The modality of a file, whether its format is read or not, by the last extension (`seg.png` is an image).

    None for notes about a file; OTHER for what is unknown.
    """
    last = extension.rpartition(".")[2]
    if last in TEXT_EXTENSIONS:
        return "text" if last in ("txt", "caption") else None
    unread = next((modality for modality, names in _UNREAD.items() if last in names.split()), OTHER)
    return modality_of(last) or (None if last in _NOTES.split() else unread)


def is_system_file(path: PurePath) -> bool:
    """Whether a path is not data: hidden (`._NAME` of macOS, .DS_Store, .git), or made by an operating system."""
    return any((part.startswith(".") and part != "..") or part.lower() in _SYSTEM for part in path.parts)
