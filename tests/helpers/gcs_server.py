"""A bucket of Google Cloud on this machine: as much of its JSON API as gcsfs and tensorstore use.

https://cloud.google.com/storage/docs/json_api/v1. Objects live in memory; every write of one makes
a new generation, and reads, writes and deletions can be told which one they mean.
"""

import contextlib
import email
import http.server
import itertools
import json
import os
import threading
import urllib.parse


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """Clients cut connections that they no longer need."""


@contextlib.contextmanager
def gcs_server():
    """Serves `gs://bucket`, and tells this process and its children where."""

    class Handler(_Handler):
        objects, uploads = {}, {}
        generations, lock = itertools.count(1), threading.Lock()

    server = _Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    variables = {
        "STORAGE_EMULATOR_HOST": url,  # gcsfs
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",  # tensorstore
        # Nobody is to look for credentials, which takes seconds each time.
        "NO_GCE_CHECK": "true",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        path, query = self._parse()
        if path == ["b", "bucket"]:
            self._json({"kind": "storage#bucket", "name": "bucket", "id": "bucket"})
        elif path == ["b", "bucket", "o"]:
            self._json(self._list(query))
        elif path[:3] != ["b", "bucket", "o"] or (found := self._find(path[3], query)) is None:
            self._error(404)
        elif query.get("ifGenerationNotMatch") == found["generation"]:
            self._answer(304)
        elif query.get("alt") == "media":
            self._media(found)
        else:
            self._json(_resource(path[3], found))

    def do_POST(self):
        path, query = self._parse()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == ["batch"]:
            self._batch(body)
        elif len(path) == 3:
            self._upload(query, body)
        else:
            self._error(501)

    def do_DELETE(self):
        path, query = self._parse()
        self._answer(self._delete(path[3], query))

    def log_message(self, *_):
        pass

    def _parse(self):
        url = urllib.parse.urlsplit(self.path)
        path = url.path.removeprefix("/upload").removeprefix("/download")
        if path.startswith("/batch"):
            return ["batch"], {}
        path = path.removeprefix("/storage/v1/").split("/")
        return [urllib.parse.unquote(part) for part in path], dict(
            urllib.parse.parse_qsl(url.query, keep_blank_values=True)
        )

    def _find(self, name, query):
        found = self.objects.get(name)
        if found and query.get("generation", found["generation"]) != found["generation"]:
            return None
        return found

    def _list(self, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        names, prefixes = [], set()
        with self.lock:
            objects = dict(self.objects)
        for name in sorted(objects):
            if not name.startswith(prefix) or name < query.get("startOffset", ""):
                continue
            if query.get("endOffset") and name >= query["endOffset"]:
                continue
            head, found, _ = name[len(prefix) :].partition(delimiter or "\0")
            if delimiter and found:
                prefixes.add(prefix + head + delimiter)
            else:
                names.append(name)
        return {"items": [_resource(n, objects[n]) for n in names], "prefixes": sorted(prefixes)}

    def _holds(self, name, query):
        """Whether the object is of the generation that the request says; 0: not there."""
        wanted = query.get("ifGenerationMatch")
        now = self.objects[name]["generation"] if name in self.objects else "0"
        return wanted is None or wanted == now

    def _write(self, name, data, query):
        with self.lock:
            holds = self._holds(name, query)
            if holds:
                written = {"data": data, "generation": str(next(self.generations))}
                self.objects[name] = written
        if holds:
            self._json(_resource(name, written))
        else:
            self._error(412)

    def _upload(self, query, body):
        if "upload_id" in query:  # a chunk of one; `bytes 0-9/*` says that there are more
            so_far = self.uploads[query["upload_id"]]
            so_far += body
            if self.headers["Content-Range"].endswith("/*"):
                self._answer(308, b"", {"Range": f"bytes=0-{len(so_far) - 1}"})
            else:
                self._write(query["name"], bytes(so_far), query)
            return
        if query["uploadType"] == "resumable":
            name = query.get("name") or json.loads(body)["name"]
            upload_id = str(next(self.generations))
            self.uploads[upload_id] = bytearray()
            query |= {"name": name, "upload_id": upload_id}
            path = self.path.partition("?")[0]
            url = f"http://{self.headers['Host']}{path}?{urllib.parse.urlencode(query)}"
            self._answer(200, b"", {"Location": url})
            return
        if query["uploadType"] == "multipart":
            meta, body = _parts(self.headers["Content-Type"], body)
            query |= {"name": json.loads(meta)["name"]}
        self._write(query["name"], body, query)

    def _delete(self, name, query):
        with self.lock:
            if name not in self.objects:
                return 404
            if not self._holds(name, query):
                return 412
            del self.objects[name]
            return 204

    def _batch(self, body):
        message = _message(self.headers["Content-Type"], body)
        answer = b""
        for part in message.get_payload():
            line = part.get_payload().strip().splitlines()[0]
            name = urllib.parse.unquote(urllib.parse.urlsplit(line.split()[1]).path.split("/")[-1])
            code = self._delete(name, {})
            answer += (
                f"--part\r\nContent-Type: application/http\r\nContent-ID: "
                f"<response-{(part['Content-ID'] or '').strip('<>')}>\r\n\r\n"
                f"HTTP/1.1 {code} -\r\n\r\n\r\n"
            ).encode()
        self._answer(
            200, answer + b"--part--\r\n", {"Content-Type": "multipart/mixed; boundary=part"}
        )

    def _media(self, found):
        data, code, headers = found["data"], 200, {"x-goog-generation": found["generation"]}
        if self.headers.get("Range"):
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            size = len(data)
            begin = int(first) if first else size - int(last)
            end = min(int(last) + 1, size) if first and last else size
            if begin >= size:
                self._answer(416, b"", {"Content-Range": f"bytes */{size}"})
                return
            data, code = data[begin:end], 206
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        self._answer(code, data, headers)

    def _json(self, value):
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, code):
        error = {"error": {"code": code, "message": f"{code}: {self.path}"}}
        self._answer(code, json.dumps(error).encode(), {"Content-Type": "application/json"})

    def _answer(self, code, body=b"", headers=None):
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if code not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if code not in (204, 304):
            self.wfile.write(body)


def _resource(name, found):
    return {
        "kind": "storage#object",
        "bucket": "bucket",
        "name": name,
        "size": str(len(found["data"])),
        "generation": found["generation"],
        "metageneration": "1",
        "timeCreated": "2026-01-01T00:00:00.000Z",
        "updated": "2026-01-01T00:00:00.000Z",
    }


def _message(content_type, body):
    return email.message_from_bytes(f"Content-Type: {content_type}\r\n\r\n".encode() + body)


def _parts(content_type, body):
    """The two parts of an upload: what it says of the object, and its bytes."""
    boundary = b"--" + _message(content_type, b"").get_boundary().encode()
    head, data = body.split(boundary, 2)[1:]
    data = data[: data.rindex(boundary)]
    separator = b"\r\n\r\n" if b"\r\n\r\n" in data else b"\n\n"
    data = data.partition(separator)[2].removesuffix(b"\n").removesuffix(b"\r")
    return head[head.index(b"{") : head.rindex(b"}") + 1], data
