"""Prometheus metrics, with the names that dashboards for vLLM know, and two of our own."""

import jax.monitoring
import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_COMPILED = "/jax/core/compile/backend_compile_duration"
_SECONDS = [base * 10**exponent for exponent in range(-3, 3) for base in (1, 2, 5)]  # 1 ms to 500 s
_TOKENS = [base * 10**exponent for exponent in range(5) for base in (1, 2, 5)]


class Metrics:
    """Metrics of one server."""

    def __init__(self, model: str):
        """Create the metrics, labelled with the model's name."""
        self._registry, self._model = CollectorRegistry(), model
        self.running = self._metric(Gauge, "vllm:num_requests_running", "Requests in rows.")
        self.waiting = self._metric(Gauge, "vllm:num_requests_waiting", "Requests in the queue.")
        self.cache_usage = self._metric(
            Gauge, "vllm:kv_cache_usage_perc", "Share of cache slots in use, 0 to 1."
        )
        self.slots_used = self._metric(
            Gauge, "blocktx:slots_used", "Cache slots in use, in blocks."
        )
        self.prompt_tokens = self._metric(Counter, "vllm:prompt_tokens", "Prefilled tokens.")
        self.generation_tokens = self._metric(
            Counter, "vllm:generation_tokens", "Generated tokens."
        )
        self.blocks = self._metric(Counter, "blocktx:blocks_decoded", "Decoded blocks, all rows.")
        self.compilations = self._metric(
            Counter, "blocktx:compilations", "Programs compiled after the start."
        )
        self._finished = Counter(
            "vllm:request_success",
            "Finished requests.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        for reason in ("stop", "length", "abort"):
            self._finished.labels(model, reason)
        seconds = {
            "first_token": ("time_to_first_token_seconds", "Arrival to the first token."),
            "between_tokens": ("time_per_output_token_seconds", "Mean time between tokens."),
            "latency": ("e2e_request_latency_seconds", "Arrival to the last token."),
            "queued": ("request_queue_time_seconds", "Arrival to a row."),
            "prefill": ("request_prefill_time_seconds", "A row to the first token."),
            "decode": ("request_decode_time_seconds", "The first token to the last."),
        }
        for attribute, (name, text) in seconds.items():
            setattr(self, attribute, self._metric(Histogram, f"vllm:{name}", text, _SECONDS))
        for attribute, name in (
            ("prompt_length", "request_prompt_tokens"),
            ("generation_length", "request_generation_tokens"),
        ):
            text = "Tokens of a request."
            setattr(self, attribute, self._metric(Histogram, f"vllm:{name}", text, _TOKENS))

    def finished(self, reason: str) -> None:
        """Count a request that ended with "stop", "length" or "abort"."""
        self._finished.labels(self._model, reason).inc()

    def count_compilations(self) -> None:
        """Count the programs that JAX compiles from now on."""

        def listen(event: str, *_: object, **__: object) -> None:
            if event == _COMPILED:
                self.compilations.inc()

        jax.monitoring.register_event_duration_secs_listener(listen)
        self._listener = listen

    def close(self) -> None:
        """Stop counting."""
        if listener := getattr(self, "_listener", None):
            jax.monitoring.unregister_event_duration_listener(listener)
            self._listener = None

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return prometheus_client.generate_latest(self._registry)

    def _metric(self, kind: type, name: str, text: str, buckets: list | None = None):
        options = {"buckets": buckets} if buckets else {}
        metric = kind(name, text, ["model_name"], registry=self._registry, **options)
        return metric.labels(self._model)
