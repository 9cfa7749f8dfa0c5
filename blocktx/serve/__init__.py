"""How is a model served over HTTP?

errors.py      errors that clients see
body.py        request bodies: JSON to checked fields
protocol.py    requests of the OpenAI API
responses.py   answers of the OpenAI API
chat.py        conversations to prompts
scoring.py     log-probabilities of prompts
metrics.py     Prometheus metrics
scheduler.py   the thread that owns the device: queue, rows, time limits
handlers.py    a request from its body to its answer or stream
app.py         HTTP routes
server.py      start, drain and stop

The device part, `ContinuousDecoder`, is in `blocktx.decode`, where `Engine.generate` uses it too.
Needs the extra `serve`.
"""

from blocktx.serve.app import ServeConfig
from blocktx.serve.server import serve

__all__ = ["ServeConfig", "serve"]
