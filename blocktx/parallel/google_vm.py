"""What a virtual machine of Google Cloud can ask about itself."""

import os
import pathlib
import urllib.parse
import urllib.request

_PRODUCT_NAME = pathlib.Path("/sys/class/dmi/id/product_name")


def is_google_vm() -> bool:
    """Whether there is a metadata server to ask. Looks at files and variables only, so is instant.

    The variable GCE_METADATA_HOST (`host` or `host:port`), which Google's own libraries know too,
    says that there is one and where.
    """
    if os.environ.get("GCE_METADATA_HOST"):
        return True
    try:
        return "Google" in _PRODUCT_NAME.read_text()
    except OSError:
        return False


def metadata(path: str, *, timeout: float = 10.0, **query: str | int) -> tuple[str, str]:
    """The value below `computeMetadata/v1/instance/`, and the ETag that it has now.

    Args:
      path: such as `attributes/tpu-env`.
      timeout: seconds without an answer after which to give up.
      **query: `wait_for_change="true"` waits for the ETag to differ from `last_etag`, for
        `timeout_sec` seconds.

    Raises:
      urllib.error.HTTPError: the server knows no such value (code 404), or fails.
      OSError: there is no answer.
    """
    host = os.environ.get("GCE_METADATA_HOST") or "metadata.google.internal"
    url = f"http://{host}/computeMetadata/v1/instance/{path}?{urllib.parse.urlencode(query)}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    # The server is on the machine's own link, whatever proxy the environment has for the rest.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=timeout) as answer:
        return answer.read().decode().strip(), answer.headers.get("ETag", "0")
