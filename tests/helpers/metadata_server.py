"""What a Google VM is told about itself, served on this machine."""

import contextlib
import http.server
import threading


@contextlib.contextmanager
def metadata_server(values):
    """Serves `{path: text}`, which may change, as the metadata server of a Google VM does."""
    ended = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path, _, query = self.path.partition("?")
            path = path.removeprefix("/computeMetadata/v1/instance/")
            # This server's ETags are the values.
            while f"last_etag={values.get(path)}&" in query and not ended.wait(0.01):
                pass
            known = path in values and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.send_header("ETag", values.get(path, ""))
            self.end_headers()
            self.wfile.write(values.get(path, "").encode() if known else b"")

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        ended.set()
        server.shutdown()
        server.server_close()
