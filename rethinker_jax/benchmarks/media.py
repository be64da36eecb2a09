"""Pictures that rows name: values of an Image column, files below a root, members of a zip archive."""

import dataclasses
import hashlib
import os
import posixpath
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from rethinker_jax.errors import UserError
from rethinker_jax.prompts.rows import BadField, checked_path

MEDIA_CACHE = "~/.cache/rethinker_jax/media"
ARCHIVES = ("data.zip", "images.zip")
MAX_MEMBER_BYTES = 64 * 2**20  # of one picture, unpacked
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")


@dataclasses.dataclass(frozen=True)
class Media:
    """Where paths of a table lead: a resolved folder that none may leave, and the archives in it (MEGA-Bench's
    data.zip), whose members are unpacked into `cache` when they are first named."""

    root: str | None
    cache: str = MEDIA_CACHE

    def image(self, value: Any) -> bytes | str | None:
        """Bytes or the checked path behind the value of an image column, None for "no image". Raises BadField."""
        if isinstance(value, Mapping):
            data = value.get("bytes")
            value = data if data else value.get("path")
        if value is None or value in ("", b""):
            return None
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str):
            raise BadField("bad_image", f"wanted a path or bytes as image, found {type(value).__name__}")
        return self.path(value)

    def path(self, name: str) -> str:
        """The file that a relative path names, unpacked if it must be. Raises BadField."""
        if name.lower().endswith(VIDEO_SUFFIXES):
            raise BadField("video", f"{name!r} is a video, and videos cannot be decoded")
        try:
            return checked_path(name, self.root)
        except BadField as error:
            if error.kind != "image_missing" or self.root is None:
                raise
            member = _member_name(name)
            for archive in ARCHIVES:
                path = Path(self.root) / archive
                if path.is_file():
                    return _unpacked(path, member, Path(self.cache).expanduser())
            raise


def _member_name(name: str) -> str:
    """`./data/x.png` → `data/x.png`. Raises BadField for a path that leads upwards or is absolute."""
    normal = posixpath.normpath(name.replace("\\", "/"))
    if normal.startswith(("/", "../")) or normal in ("..", ".") or ":" in normal.partition("/")[0]:
        raise BadField("image_path", f"{name!r} leads out of the archive")
    return normal


def _unpacked(archive: Path, member: str, cache: Path) -> str:
    """The path of a member, unpacked once into a folder of the cache that is named after the archive's state."""
    state = archive.stat()
    key = f"{archive.resolve()}\0{state.st_size}\0{state.st_mtime_ns}"
    # The name of the file is a hash: nothing that an archive says becomes part of a path.
    suffix = posixpath.splitext(member)[1][:8] if posixpath.splitext(member)[1][1:].isalnum() else ""
    folder = cache / hashlib.sha256(key.encode()).hexdigest()[:16]
    target = folder / (hashlib.sha256(member.encode()).hexdigest()[:32] + suffix)
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        content = read_member(archive, member)
        handle, temporary = tempfile.mkstemp(dir=folder)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, target)
    return str(target)


def read_member(archive: Path, member: str) -> bytes:
    """A regular member's content. Raises BadField for one that is missing, too large, a link or damaged."""
    where = f"{member!r} in {archive.name}"
    try:
        file = _open(str(archive), archive.stat().st_mtime_ns)
        info = _find(file, member)
        if info is None:
            raise BadField("image_missing", f"there is no {where}")
        if info.is_dir() or stat.S_ISLNK(info.external_attr >> 16):
            raise BadField("bad_image", f"{where} is not a regular file")
        # What the directory says may be forged, so the bytes that come out are counted too.
        with file.open(info) as opened:
            content = opened.read(MAX_MEMBER_BYTES + 1) if info.file_size <= MAX_MEMBER_BYTES else b""
        if info.file_size > MAX_MEMBER_BYTES or len(content) > MAX_MEMBER_BYTES:
            raise BadField("bad_image", f"{where} unpacks to more than {MAX_MEMBER_BYTES} bytes")
        return content
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise BadField("bad_image", f"{where} cannot be unpacked: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read the archive {archive}: {error}") from error


@lru_cache(maxsize=2)
def _open(archive: str, mtime_ns: int) -> zipfile.ZipFile:
    """Kept open: the directory of an archive of gigabytes takes long to read. `mtime_ns` is part of the key."""
    return zipfile.ZipFile(archive)


def _find(file: zipfile.ZipFile, member: str) -> zipfile.ZipInfo | None:
    """The member of this name; archives are also packed from inside their `data` folder, without its name."""
    for name in (member, f"./{member}", member.partition("/")[2]):
        try:
            return file.getinfo(name)
        except KeyError:
            continue
    return None
