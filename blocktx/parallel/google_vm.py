"""Queries to the Google Cloud VM metadata server."""

import os
import pathlib
import urllib.parse
import urllib.request

_PRODUCT_NAME = pathlib.Path("/sys/class/dmi/id/product_name")


def is_google_vm() -> bool:
    """Return whether there is a metadata server. Reads files and variables only.

    The variable GCE_METADATA_HOST (`host` or `host:port`) overrides its address, as in Google's
    libraries.
    """
    if os.environ.get("GCE_METADATA_HOST"):
        return True
    try:
        return "Google" in _PRODUCT_NAME.read_text()
    except OSError:
        return False


def metadata(path: str, *, timeout: float = 10.0, **query: str | int) -> tuple[str, str]:
    """Return a value below `computeMetadata/v1/instance/`, and its ETag.

    Args:
      path: such as `attributes/tpu-env`.
      timeout: seconds to wait for an answer.
      **query: `wait_for_change="true"` waits up to `timeout_sec` seconds for the ETag to differ
        from `last_etag`.

    Raises:
      urllib.error.HTTPError: there is no such value (code 404), or the server fails.
      OSError: there is no answer.
    """
    host = os.environ.get("GCE_METADATA_HOST") or "metadata.google.internal"
    url = f"http://{host}/computeMetadata/v1/instance/{path}?{urllib.parse.urlencode(query)}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    # The server is link-local; a proxy in the environment is for other addresses.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=timeout) as answer:
        return answer.read().decode().strip(), answer.headers.get("ETag", "0")
