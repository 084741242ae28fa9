"""Files on a disk of this machine or in a bucket of Google Cloud Storage (gs://BUCKET/...): whole ones, and ones that
grow.

A bucket knows objects, which are put as a whole: whatever happens, an object is the old one or the new one, and a
reader sees what was put before. It has no folders, nothing is appended, and one object takes about one put a second.

    to_path(path)            a path that may be in a bucket, with the methods of `pathlib.Path`
    write_file(path, text)   replaces a file as a whole
    GrowingFile(path)        takes text or bytes bit by bit: rows, events, a program's log
    told(what, path)         a context: what the disk or the bucket refuses inside it becomes one line for a person

Importing this module imports neither jax nor orbax. Buckets need the extra `gcs`, and an account with
roles/storage.objectUser on the bucket, as the machine's own or by `gcloud auth application-default login`.
"""

import contextlib
import errno
import functools
import importlib.util
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqmodels.errors import InputError, UnreachableError

if TYPE_CHECKING:
    from etils import epath

TEMPORARY = ".temporary"
_SCHEME = "gs://"
_RIGHT = "roles/storage.objectUser"


def in_bucket(path: str | os.PathLike) -> bool:
    return os.fspath(path).startswith(_SCHEME)


def to_path(path: str | os.PathLike) -> "epath.Path":
    """The path, in a bucket or not. Raises `InputError` where it is in one and what is needed for that is missing."""
    from etils import epath

    text = os.fspath(path)
    if "://" in text:
        _check_bucket(text)
    return epath.Path(text)


def write_file(path: str | os.PathLike, content: str | bytes) -> None:
    """Replace a file as a whole: after a kill or a full disk it is the old one or the new one."""
    data = content.encode() if isinstance(content, str) else content
    with told(f"cannot write {os.fspath(path)}", path):
        if in_bucket(path):
            _put(path, data)
            return
        path = Path(path)
        temporary = path.with_name(path.name + TEMPORARY)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def list_folder(path: "epath.Path") -> list["epath.Path"]:
    """What is in a folder; nothing where there is none."""
    try:
        return list(path.iterdir())
    except FileNotFoundError:
        return []


def copy_folder(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copy all files below a folder, where at least one of the two is in a bucket. What goes from bucket to bucket does
    not come to this machine."""
    system = _buckets()
    ways = {(False, True): system.put, (True, False): system.get, (True, True): system.copy}
    # With a slash behind them: what is in the folder, not the folder.
    ways[in_bucket(source), in_bucket(target)](f"{os.fspath(source)}/", f"{os.fspath(target)}/", recursive=True)


@contextlib.contextmanager
def on_disk(path: str | os.PathLike) -> Iterator[Path]:
    """A file or folder as one of this machine: itself, or a copy while the context lasts; nothing is there of what is
    not in the bucket."""
    if not in_bucket(path):
        yield Path(path)
        return
    path = to_path(path)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        with told(f"cannot read {path}", path):
            if path.is_dir():
                copy_folder(path, copy)
            elif path.exists():
                copy.write_bytes(path.read_bytes())
        yield copy


class GrowingFile:
    """A file that grows while a program runs. What was there before stays, and what is written comes behind it.

        with GrowingFile("gs://bucket/runs/a/logs/host-0.log") as log:
            log.write("a line\\n")

    On a disk, what was written is in the file once `write` returns: no kill of this process can lose it. In a bucket
    the file grows in a temporary one on this machine, which is put as a whole by `flush`, by `close`, and by a thread
    of its own, at most every `seconds` (more rarely where that takes long) and only if something was written. A put has
    whole writes only, in their order.

    What a bucket refuses never loses what is on this machine. The thread is silent about it and tries again; `flush`
    and `close` raise it, an `InputError` or, for what may pass by itself, an `UnreachableError`, and may be called
    again. Where `close` raises, the temporary file stays, and the message names it.

    Any thread may call any method. One process has the file at a time.

    Args:
        path: of the file. On a disk its folder must be there; buckets have none.
        seconds: in a bucket, between two puts that nobody asked for.
    """

    def __init__(self, path: str | os.PathLike, *, seconds: float = 30.0):
        self.path = to_path(path)
        self._seconds = seconds
        self._bucket = in_bucket(self.path)
        self._local: Path | None = None if self._bucket else Path(path)
        self._writing, self._putting = threading.Lock(), threading.Lock()
        self._written = self._stored = 0
        self._closing = threading.Event()

    def __enter__(self) -> "GrowingFile":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.close()
        except InputError as lost:
            if error is None:
                raise
            error.add_note(str(lost))

    def write(self, content: str | bytes) -> None:
        """Append. Text becomes UTF-8. Raises `InputError` where the disk of this machine refuses it."""
        data = content.encode() if isinstance(content, str) else content
        with self._writing:
            if self._local is None:
                self._begin()
            with told(f"cannot write {self._local}", self._local), self._local.open("ab") as file:
                file.write(data)
            self._written += len(data)

    def flush(self) -> None:
        """Return once all that was written is where it belongs."""
        if not self._bucket:
            return
        with self._putting:
            with self._writing:
                if self._written == self._stored:
                    return
                data, written = self._local.read_bytes(), self._written
            with told(f"cannot write {self.path}", self.path):
                _put(self.path, data)
            self._stored = written

    def close(self) -> None:
        """Flush, and take the temporary file away. A closed file may be written again."""
        self._closing.set()
        try:
            self.flush()
        except InputError as error:
            raise type(error)(f"{error}; what is not stored there is in {self._local}") from error
        with self._writing:
            if self._bucket and self._local is not None and self._written == self._stored:
                self._local.unlink(missing_ok=True)
                self._local, self._written, self._stored = None, 0, 0

    def _begin(self) -> None:
        """Begin a temporary file with what the bucket has, and the thread that puts it."""
        with told(f"cannot read {self.path}", self.path):
            try:
                before = self.path.read_bytes()
            except FileNotFoundError:
                before = b""
        descriptor, name = tempfile.mkstemp(prefix=f"{self.path.name}.")
        with open(descriptor, "wb") as file:
            file.write(before)
        self._local = Path(name)
        self._closing = threading.Event()
        threading.Thread(target=self._put_now_and_then, args=(self._closing,), daemon=True).start()

    def _put_now_and_then(self, closing: threading.Event) -> None:
        pause = self._seconds
        while not closing.wait(pause):
            began = time.monotonic()
            with contextlib.suppress(Exception):
                self.flush()
            pause = max(self._seconds, 20 * (time.monotonic() - began))


@contextlib.contextmanager
def told(what: str, path: str | os.PathLike, *, expected: str = "") -> Iterator[None]:
    """What the disk or the bucket of `path` refuses inside becomes an `InputError`: `what`, why, and for a disk what
    was `expected`; where it may pass by itself, an `UnreachableError`. Other errors pass through."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if not in_bucket(path) and isinstance(error, OSError):
            rest = f"; expected {expected}" if expected else ""
            raise InputError(f"{what}: {error.strerror or error}{rest}") from error
        refused = refusal(error, path)
        if refused is None:
            raise
        raise type(refused)(f"{what}: {refused}") from error


def refusal(error: BaseException, path: str | os.PathLike) -> InputError | None:
    """Why the disk (full, read-only, not allowed) or the bucket of `path` refused to read or write, out of an error of
    any library that does so for us; None where it did not refuse."""
    reason = _refusal_of_disk(error)
    if reason or not in_bucket(path):
        return InputError(reason) if reason else None
    status, bucket = _status(error), f"{_SCHEME}{_bucket(path)}"
    if status is None or (status == 404 and _has_bucket(path)):
        return None
    if status == 404:
        return InputError(f"there is no bucket {bucket} (404)")
    if status == 401 and _is_googles_machine():
        # It has an account, which its metadata server sometimes does not speak for; gcsfs then goes on as nobody.
        return UnreachableError(f"{bucket} does not know who this is (401): the machine gave no credentials")
    if status == 401:
        return InputError(
            f"{bucket} does not know who this is (401); expected the machine's service account, or that of "
            "`gcloud auth application-default login`"
        )
    if status == 403:
        return InputError(
            f"{bucket} does not let this account do so (403); expected an account with {_RIGHT} on the bucket"
        )
    if status in (0, 408, 429) or status >= 500:
        return UnreachableError(f"{bucket} cannot be reached ({status or type(error).__name__})")
    return None


def _refusal_of_disk(error: BaseException) -> str | None:
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
    if isinstance(error, OSError) and error.errno in codes:
        return os.strerror(error.errno)
    # The storage library under orbax raises ValueErrors that carry the system's message.
    return next((os.strerror(code) for code in codes if os.strerror(code) in str(error)), None)


# What the storage library under orbax begins its messages with; 0 where no answer came.
_CODES = {
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "UNAVAILABLE": 0,
    "DEADLINE_EXCEEDED": 0,
    "ABORTED": 0,
}


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error of gcsfs or of tensorstore, 0 where no answer came; None for other errors."""
    text = str(error)
    if isinstance(error, FileNotFoundError):
        return 404
    if isinstance(error, OSError) and text.startswith("Forbidden"):
        return 403
    library = type(error).__module__.partition(".")[0]
    code = str(getattr(error, "code", None))
    if library == "gcsfs" and code.isdecimal():
        return int(code)
    if type(error).__name__ == "DefaultCredentialsError":
        return 401
    if library in ("aiohttp", "requests", "google") or isinstance(error, ConnectionError | TimeoutError):
        return 0
    return next((_CODES[word] for word in re.findall(r"\b[A-Z_]{7,}\b", text) if word in _CODES), None)


def _is_googles_machine() -> bool:
    try:
        return Path("/sys/class/dmi/id/product_name").read_text().startswith("Google")
    except OSError:
        return False


def _bucket(path: str | os.PathLike) -> str:
    return os.fspath(path).removeprefix(_SCHEME).partition("/")[0]


def _has_bucket(path: str | os.PathLike) -> bool:
    try:
        _buckets().ls(_bucket(path))
    except FileNotFoundError:
        return False
    except Exception:
        return True
    return True


def _put(path: str | os.PathLike, data: bytes) -> None:
    """One request, or for much data one session, that makes the object as a whole."""
    _check_bucket(os.fspath(path))
    _buckets().pipe_file(os.fspath(path), data)


def _buckets() -> Any:
    _set_up_buckets()
    import fsspec

    return fsspec.filesystem("gs")


def _check_bucket(path: str) -> None:
    # gcsfs finds patterns and generations in names.
    if not re.fullmatch(_SCHEME + r"[a-z0-9][a-z0-9._-]+[a-z0-9](/[^*?#\[\]]*)?", path):
        raise InputError(f"{path!r}: expected gs://BUCKET/FOLDER without any of * ? # [ ], or a folder of this machine")
    if importlib.util.find_spec("gcsfs") is None:
        raise InputError(f"{path} is in a bucket, which needs gcsfs: pip install -e '.[gcs]'")
    _set_up_buckets()


@functools.cache
def _set_up_buckets() -> None:
    import fsspec

    # What it takes by itself asks for a bucket's kind, by another protocol, and takes ways that are not tested here.
    for name in ("gs", "gcs"):
        fsspec.register_implementation(name, "gcsfs.core.GCSFileSystem", clobber=True)
    # It remembers listings, and does not see what other processes and libraries have written since.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    # What it logs it raises as well.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
