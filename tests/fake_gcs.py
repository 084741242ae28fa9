"""A bucket of Google Cloud Storage on this machine: its JSON API as far as gcsfs and tensorstore ask for it.

In memory and strongly consistent, as Cloud Storage is: an object is its old bytes or its new ones, and whoever lists
sees what was written before. What needs the right `storage.buckets.get` is refused, since roles/storage.objectUser has
not got it. A test may add a `rule` that refuses, delays or watches any request.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

BUCKET = "bucket"


class Request(NamedTuple):
    """What a rule is asked about. action: "read", "list", "write", "delete", "begin" (an upload in parts, which makes
    nothing yet) or "bucket" (its metadata)."""

    action: str
    bucket: str
    key: str


# None lets a request pass; a number is the HTTP status that it is refused with.
Rule = Callable[[Request], int | None]


class FakeGCS:
    """The objects of a bucket, and a server that speaks for them while it is used as a context.

    Attributes:
        objects: name -> bytes. A test may look at them and change them.
        rule: asked about every request before it is done.
        written: names in the order in which they were written.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.generations: dict[str, int] = {}
        self.written: list[str] = []
        self.rule: Rule = lambda request: None
        self.lock = threading.RLock()
        self._uploads: dict[str, tuple[str, dict, bytes]] = {}
        self._server = _Server(("localhost", 0), _Handler)
        self._server.store = self
        self.url = f"http://localhost:{self._server.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which gcsfs and tensorstore come here, and ask nobody who they are."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "nobody",
            "FSSPEC_GCS_TOKEN": "anon",
        }

    def serve_this_process(self) -> None:
        """Send gcsfs and tensorstore of this process here, from now on to its end."""
        import fsspec

        os.environ.update(self.environment)
        fsspec.config.conf.setdefault("gcs", {})["token"] = "anon"

    def __enter__(self) -> "FakeGCS":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    @contextlib.contextmanager
    def ruled(self, rule: Rule) -> Iterator[None]:
        """With another rule inside."""
        before, self.rule = self.rule, rule
        try:
            yield
        finally:
            self.rule = before

    def below(self, folder: str) -> dict[str, bytes]:
        """The objects of a folder, by their names within it."""
        with self.lock:
            prefix = f"{folder}/"
            return {name[len(prefix) :]: data for name, data in self.objects.items() if name.startswith(prefix)}

    def put(self, key: str, data: bytes) -> dict[str, Any]:
        with self.lock:
            self.objects[key] = data
            self.generations[key] = self.generations.get(key, 0) + 1
            self.written.append(key)
            return self.metadata(key)

    def metadata(self, key: str) -> dict[str, Any]:
        data = self.objects[key]
        return {
            "kind": "storage#object",
            "name": key,
            "bucket": BUCKET,
            "size": str(len(data)),
            "generation": str(self.generations.setdefault(key, 1)),
            "metageneration": "1",
            "md5Hash": b64encode(hashlib.md5(data).digest()).decode(),
            "timeCreated": "2026-01-01T00:00:00.000000Z",
            "updated": "2026-01-01T00:00:00.000000Z",
        }

    def answer(self, method: str, url: str, headers: Any, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a request."""
        parts = urlsplit(url)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        for verbs, pattern, action, reply in _ROUTES:
            match = re.fullmatch(pattern, parts.path)
            if method not in verbs or not match:
                continue
            bucket, key = (unquote(part) for part in (*match.groups(), "")[:2])
            key = key or _key_of_upload(query, headers, body) or (self._uploads.get(query.get("upload_id"), ("",))[0])
            if query.get("uploadType") == "resumable" and "upload_id" not in query:
                action = "begin"
            status = self.rule(Request(action, bucket, key))
            if status:
                return _error(status)
            if bucket != BUCKET:
                return _error(404)
            with self.lock:
                return reply(self, key, query, headers, body)
        return _error(400, f"no such call: {method} {url}")

    def _bucket(self, key, query, headers, body):
        return _error(403, "storage.buckets.get")

    def _list(self, key, query, headers, body):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        names, folders = [], set()
        for name in sorted(self.objects):
            if not name.startswith(prefix) or not query.get("startOffset", "") <= name:
                continue
            if "endOffset" in query and name >= query["endOffset"]:
                continue
            head, found, _ = name[len(prefix) :].partition(delimiter or "\0")
            (folders.add(prefix + head + delimiter) if delimiter and found else names.append(name))
        entries = sorted([*names, *folders])
        first, size = int(query.get("pageToken", 0)), int(query.get("maxResults", 1000))
        page = entries[first : first + size]
        listed = {
            "kind": "storage#objects",
            "items": [self.metadata(name) for name in page if name in names],
            "prefixes": [name for name in page if name in folders],
        }
        if first + size < len(entries):
            listed["nextPageToken"] = str(first + size)
        return _json(listed)

    def _read(self, key, query, headers, body):
        if key not in self.objects:
            return _error(404)
        generation = str(self.generations.setdefault(key, 1))
        if query.get("ifGenerationNotMatch") == generation:
            return 304, {}, b""
        if query.get("ifGenerationMatch", generation) != generation:
            return _error(412)
        if query.get("alt") != "media":
            return _json(self.metadata(key))
        data, told = self.objects[key], {"x-goog-generation": generation}
        if "Range" not in headers:
            return 200, told, data
        first, last = re.fullmatch(r"bytes=(-?\d+)-?(\d*)", headers["Range"]).groups()
        start = max(0, len(data) + int(first)) if first.startswith("-") else int(first)
        end = min(len(data), int(last) + 1) if last else len(data)
        if start >= len(data):
            return _error(416)
        return 206, {**told, "Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}, data[start:end]

    def _upload(self, key, query, headers, body):
        if "upload_id" in query:
            return self._continue_upload(query["upload_id"], headers, body)
        kind = query["uploadType"]
        if kind == "resumable":
            number = str(len(self._uploads) + 1)
            self._uploads[number] = (key, query, b"")
            path = f"/upload/storage/v1/b/{BUCKET}/o?uploadType=resumable&upload_id={number}&name={quote(key)}"
            return 200, {"Location": self.url + path}, b""
        data = _parts(headers, body)[1] if kind == "multipart" else body
        return self._write(key, query, data)

    def _cancel(self, key, query, headers, body):
        self._uploads.pop(query["upload_id"], None)
        return 499, {}, b""

    def _continue_upload(self, number, headers, body):
        key, query, before = self._uploads[number]
        total = headers["Content-Range"].rpartition("/")[2]
        data = before + body
        self._uploads[number] = (key, query, data)
        if total == "*" or len(data) < int(total):
            return 308, {"Range": f"bytes=0-{len(data) - 1}"}, b""
        return self._write(key, query, data)

    def _write(self, key, query, data):
        present = str(self.generations.setdefault(key, 1)) if key in self.objects else "0"
        if query.get("ifGenerationMatch", present) != present:
            return _error(412)
        return _json(self.put(key, data))

    def _delete(self, key, query, headers, body):
        if key not in self.objects:
            return _error(404)
        if query.get("ifGenerationMatch", "") not in ("", str(self.generations.setdefault(key, 1))):
            return _error(412)
        del self.objects[key]
        return 204, {}, b""

    def _copy(self, key, query, headers, body):
        source, _, target = key.partition("/rewriteTo/b/" + BUCKET + "/o/")
        if source not in self.objects:
            return _error(404)
        return _json({"done": True, "resource": self.put(target, self.objects[source])})

    def _move(self, key, query, headers, body):
        source, _, target = key.partition("/moveTo/o/")
        if source not in self.objects:
            return _error(404)
        return _json(self.put(target, self.objects.pop(source)))


# Methods, path, what a rule calls it, who does it.
_ROUTES = (
    (("GET",), r"/storage/v1/b/([^/]+)", "bucket", FakeGCS._bucket),
    (("GET",), r"/storage/v1/b/([^/]+)/o", "list", FakeGCS._list),
    (("GET",), r"(?:/download)?/storage/v1/b/([^/]+)/o/(.+)", "read", FakeGCS._read),
    (("POST", "PUT"), r"/upload/storage/v1/b/([^/]+)/o", "write", FakeGCS._upload),
    (("DELETE",), r"/upload/storage/v1/b/([^/]+)/o", "delete", FakeGCS._cancel),
    (("DELETE",), r"/storage/v1/b/([^/]+)/o/(.+)", "delete", FakeGCS._delete),
    (("POST",), r"/storage/v1/b/([^/]+)/o/(.+/rewriteTo/.+)", "write", FakeGCS._copy),
    (("POST",), r"/storage/v1/b/([^/]+)/o/(.+/moveTo/.+)", "write", FakeGCS._move),
)


def _parts(headers: Any, body: bytes) -> tuple[bytes, bytes]:
    """The metadata and the data of an upload in two parts."""
    boundary = b"--" + re.search(r'boundary="?([^";]+)"?', headers["Content-Type"])[1].encode()
    first, second = body.split(boundary)[1], boundary.join(body.split(boundary)[2:-1])
    return tuple(re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1].removesuffix(b"\n") for part in (first, second))


def _key_of_upload(query: dict[str, str], headers: Any, body: bytes) -> str:
    if query.get("uploadType") == "multipart":
        return json.loads(_parts(headers, body)[0])["name"]
    return query.get("name", "")


def _json(value: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _error(status: int, message: str = "refused by the test") -> tuple[int, dict[str, str], bytes]:
    body = json.dumps({"error": {"code": status, "message": message}}).encode()
    return status, {"Content-Type": "application/json"}, body


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    store: FakeGCS

    def handle_error(self, request, client_address) -> None:
        """Clients that are killed in the middle of a request are what the tests are about; other errors are told."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def _serve(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self._chunk, b""))
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, headers, answer = self.server.store.answer(self.command, self.path, self.headers, body)
        lines = [f"HTTP/1.1 {status} -", *(f"{name}: {value}" for name, value in headers.items())]
        if status != 304:
            lines.append(f"Content-Length: {len(answer)}")
        self.wfile.write("\r\n".join([*lines, "", ""]).encode() + answer)

    do_GET = do_POST = do_PUT = do_DELETE = _serve

    def _chunk(self) -> bytes:
        data = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return data

    def log_message(self, *_) -> None:
        pass
