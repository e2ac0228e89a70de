"""Prometheus metrics of a run: RUN/metrics.prom for node_exporter's textfile collector, and optionally over HTTP.

Input: lines of metrics (megamm/observability/metrics.py), on rank 0. Output: gauges named megamm_*, labelled with the
run's folder name; docs/observability.md lists them with their units. Times are exported as timestamps, as Prometheus
recommends: while a run hangs or restarts, the file is not rewritten, but `time() -
megamm_heartbeat_oldest_timestamp_seconds` is still correct. The file is replaced atomically.
"""

import time
from pathlib import Path
from typing import Any

from megamm.common.errors import UserError
from megamm.config import MetricsConfig
from megamm.elastic import heartbeat

TEXTFILE = "metrics.prom"
GAUGES = {
    "step": ("step", "Steps made."),
    "grad_norm": ("grad_norm", "Norm of the gradient before clipping."),
    "lr": ("learning_rate", "Learning rate of the last step."),
    "tokens_per_s": ("tokens_per_second", "Tokens trained per second, of the whole job, since the last report."),
    "data_wait_share": ("data_wait_ratio", "Share of the time of steps that rank 0 waited for data."),
    "flops_per_s_per_device": ("model_flops_per_second", "Model FLOP/s of a device, of the rows that were read."),
    "mfu": ("model_flops_utilization_ratio", "Model FLOP/s over the peak of the devices."),
    "gpu_memory_allocated": ("gpu_memory_allocated_bytes", "Largest peak of tensors' memory on a GPU of the job."),
    "gpu_memory_reserved": ("gpu_memory_reserved_bytes", "Largest peak of the allocator's memory on a GPU of the job."),
    "gpu_memory_total": ("gpu_memory_total_bytes", "Memory of the smallest GPU of the job."),
    "gpu_alloc_retries": ("gpu_alloc_retries", "Allocations that had to free cached memory, on all GPUs."),
    "padding_share": ("padding_ratio", "Share of padding in the rows."),
    "imbalance": ("imbalance_ratio", "Work of the busiest data-parallel rank over the mean."),
    "store_bytes": ("store_downloaded_bytes", "Downloaded into the cache of rank 0's node since it was created."),
    "store_failures": ("store_failures", "Requests to the store that failed, on rank 0's node."),
    "store_wait": ("store_wait_seconds", "Seconds that rank 0 waited for downloads, of this attempt."),
    "cache_bytes": ("cache_bytes", "Held by the cache of rank 0's node."),
    "goodput": ("goodput_ratio", "Time in steps whose result was kept, over the time since the first launch."),
    "time": ("report_timestamp_seconds", "When this was last reported."),
}
"""Key of a line -> name after "megamm_", help."""
_ON_GPUS = {"mfu", *(key for key in GAUGES if key.startswith("gpu_"))}
"""Those that exist on GPUs only."""
COUNTERS = {
    "step_seconds": ("step_seconds", "Seconds in steps, of this attempt."),
    "data_wait_seconds": ("data_wait_seconds", "Seconds in steps that rank 0 waited for data, of this attempt."),
    "evaluation_seconds": ("evaluation_seconds", "Seconds of evaluation, of this attempt."),
    "checkpoint_stall_seconds": ("checkpoint_stall_seconds", "Seconds that checkpoints stopped it, of this attempt."),
}


class Exporter:
    """Exports the metrics of one run. UserError if the endpoint's port is taken."""

    def __init__(self, run: Path, total_steps: int, step: int, restarts: int, config: MetricsConfig) -> None:
        # Imported here: reading a config does not need it.
        from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

        for left in run.glob(f"{TEXTFILE}.*"):
            left.unlink(missing_ok=True)  # the client's temporary file, left by a run that was killed while writing
        self.run, self.registry, self.label = run, CollectorRegistry(), run.resolve().name
        self.read_cost, self.read_at, self.oldest = 0.0, float("-inf"), float("nan")
        labels: dict[str, Any] = {"labelnames": ["run"], "registry": self.registry}

        def gauge(name: str, what: str) -> Gauge:
            return Gauge(f"megamm_{name}", what, **labels).labels(self.label)

        self.gauges = {key: gauge(name, what) for key, (name, what) in GAUGES.items() if key not in _ON_GPUS}
        self.counters = {
            key: Counter(f"megamm_{name}", what, **labels).labels(self.label) for key, (name, what) in COUNTERS.items()
        }
        what = "Mean cross entropy in nats per token."
        self.loss = Gauge("megamm_loss_nats", what, ["run", "split", "modality"], registry=self.registry)
        gauge("target_steps", "Steps that the run is to make.").set(total_steps)
        gauge("restarts", "Attempts before this one.").set(restarts)
        oldest = gauge("heartbeat_oldest_timestamp_seconds", "Time of the oldest rank's heartbeat; NaN without any.")
        oldest.set_function(self.oldest_heartbeat)
        self.make_gauge = gauge
        self.gauges["step"].set(step)
        self.gauges["time"].set(time.time())
        self.server = None
        if config.prometheus_port:
            try:
                self.server, self.thread = start_http_server(
                    config.prometheus_port, addr=config.prometheus_host, registry=self.registry
                )
            except OSError as error:
                where = f"{config.prometheus_host}:{config.prometheus_port}"
                remedy = "set metrics.prometheus_port to another port, or to 0 for none"
                raise UserError(f"cannot open the metrics endpoint: {error}", where=where, remedy=remedy) from None
        self._write()

    def update(self, line: dict[str, Any]) -> None:
        """Set the gauges from a line of metrics, and rewrite the file. None (a modality without tokens) becomes NaN."""
        # Made at the first value: on a device without a known peak the metric does not exist, instead of being 0.
        for key in _ON_GPUS & line.keys() - self.gauges.keys():
            self.gauges[key] = self.make_gauge(*GAUGES[key])
        for key, given in line.items():
            value = float("nan") if given is None else given
            split, _, modality = key.partition("/")
            if key in self.gauges:
                self.gauges[key].set(value)
            elif key in self.counters:
                self.counters[key].inc(value)
            elif modality:
                split = {"loss": "train"}.get(split, split)
                self.loss.labels(self.label, split, modality).set(value)
        self._write()

    def oldest_heartbeat(self) -> float:
        """Return the result of the function below, cached for 100 times its duration (at most 1 % of the time)."""
        begin = time.monotonic()
        # On a shared file system reading thousands of small files is slow; a scrape must not slow the run down.
        if begin - self.read_at >= 100 * self.read_cost:
            self.oldest = oldest_heartbeat(self.run)
            self.read_at = time.monotonic()
            self.read_cost = self.read_at - begin
        return self.oldest

    def heartbeat_age(self) -> dict[str, float]:
        """Return {"heartbeat_age": seconds} of that rank, or {} without heartbeats."""
        oldest = self.oldest_heartbeat()
        return {} if oldest != oldest else {"heartbeat_age": max(time.time() - oldest, 0.0)}

    def _write(self) -> None:
        from prometheus_client import write_to_textfile

        write_to_textfile(str(self.run / TEXTFILE), self.registry)

    def close(self) -> None:
        """Stop the server; the file stays, with the last figures and their time."""
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
            self.thread.join()


def oldest_heartbeat(run: Path) -> float:
    """Return the oldest heartbeat of the newest attempt's ranks (RUN/heartbeats), in Unix seconds; NaN without any."""
    beats = [(beat.time, beat.attempt) for beat in heartbeat.read(run)]
    newest = max(beats, default=(0.0, 0))[1]
    return min((at for at, attempt in beats if attempt == newest), default=float("nan"))
