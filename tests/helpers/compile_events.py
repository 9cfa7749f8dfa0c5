"""Counts what JAX does behind a call."""

import contextlib
from collections.abc import Iterator

import jax.monitoring


@contextlib.contextmanager
def events(name: str) -> Iterator[list[str]]:
    """A list that has an entry for each time JAX reports `name`."""
    seen = []

    def listen(event, *_, **__):
        if event == f"/jax/core/compile/{name}":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def compilations():
    return events("backend_compile_duration")


def traces():
    return events("jaxpr_trace_duration")
