//! The metrics page: what the node counts, and what the process uses.
//!
//! Counters and gauges are set when the page is asked for, from what the node keeps; so series of
//! volumes that are gone vanish by a timeout. Histograms are fed as things happen. What a shard's
//! thread counts gets the shard's number as a label; what is the process' has none.

use std::sync::Arc;
use std::time::Duration;

use ballast_block::ShardId;
use metrics::{
    Counter, Gauge, Histogram, Key, KeyName, Label, Metadata, Recorder, SharedString, Unit,
    describe_gauge, gauge,
};
use metrics_exporter_prometheus::{
    Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};
use metrics_util::MetricKindMask;

use crate::admin::Access;
use crate::process::Usage;
use crate::settings::Settings;
use crate::shard::{Condition, Shard};

/// Upper bounds of latency histograms, in seconds: doubling from what one disk write costs to what
/// a failover takes, then to what hosts give up at.
const BUCKETS: [f64; 20] = [
    25e-6, 50e-6, 100e-6, 200e-6, 400e-6, 800e-6, 1.6e-3, 3.2e-3, 6.4e-3, 12.8e-3, 25.6e-3,
    51.2e-3, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0, 60.0,
];
/// Series that were not set for this long are gone: their volume or peer is.
const STALE: Duration = Duration::from_secs(5);
/// How often what histograms were fed is folded into their buckets: bounds the memory between two
/// scrapes.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(1);
/// Longest that a scrape waits for the shards.
const COLLECT_MAX: Duration = Duration::from_secs(3);

/// The label that tells shards apart: their numbers.
const SHARD_LABEL: &str = "shard";

/// All metrics of the process. Clones share them.
#[derive(Clone)]
pub struct Metrics {
    handle: PrometheusHandle,
    recorder: Arc<PrometheusRecorder>,
    cluster: String,
    node: String,
}

impl Metrics {
    /// Starts to keep metrics; once per process, before anything counts.
    pub fn install(settings: &Settings) -> Self {
        let builder = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &BUCKETS)
            .expect("there are buckets")
            .idle_timeout(MetricKindMask::COUNTER | MetricKindMask::GAUGE, Some(STALE));
        let recorder = Arc::new(builder.build_recorder());
        let handle = recorder.handle();
        assert!(metrics::set_global_recorder(recorder.clone()).is_ok(), "installed once");
        ballast_node::metrics::describe();
        describe();
        let of = settings.first();
        let (cluster, node) = (of.cluster.to_string(), of.node.0.to_string());
        Self { handle, recorder, cluster, node }
    }

    /// What a shard's thread counts with.
    pub fn of_shard(&self, shard: ShardId) -> ShardRecorder {
        let label = Label::new(SHARD_LABEL, shard.0.to_string());
        ShardRecorder { recorder: self.recorder.clone(), label }
    }

    /// Keeps the memory of histograms bounded from now on.
    pub fn keep_up(&self) {
        let handle = self.handle.clone();
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(UPKEEP_INTERVAL).await;
                handle.run_upkeep();
            }
        });
    }

    /// The page.
    pub async fn render(&self, access: &Access) -> String {
        futures_util::future::join_all(access.shards.iter().map(collect)).await;
        let labels = [
            ("version", env!("CARGO_PKG_VERSION").to_owned()),
            ("cluster", self.cluster.clone()),
            ("node", self.node.clone()),
        ];
        gauge!("ballast_build_info", &labels).set(1.0);
        let mut page = self.handle.render();
        page.push_str(&usage(&Usage::now()));
        page
    }
}

async fn collect(shard: &Shard) {
    let collected = shard.ask(async |node| node.collect_metrics());
    let up = matches!(tokio::time::timeout(COLLECT_MAX, collected).await, Ok(Ok(())));
    let label = || shard.id().0.to_string();
    gauge!("ballast_shard_up", SHARD_LABEL => label()).set(if up { 1.0 } else { 0.0 });
    if matches!(shard.condition(), Condition::Ended(_)) {
        // Its node can't say so any more.
        gauge!("ballast_pool_failed", SHARD_LABEL => label()).set(1.0);
    }
}

/// Records what one shard's thread counts, under its number.
pub struct ShardRecorder {
    recorder: Arc<PrometheusRecorder>,
    label: Label,
}

impl ShardRecorder {
    fn labelled(&self, key: &Key) -> Key {
        key.with_extra_labels(vec![self.label.clone()])
    }
}

impl Recorder for ShardRecorder {
    fn describe_counter(&self, key: KeyName, unit: Option<Unit>, description: SharedString) {
        self.recorder.describe_counter(key, unit, description);
    }

    fn describe_gauge(&self, key: KeyName, unit: Option<Unit>, description: SharedString) {
        self.recorder.describe_gauge(key, unit, description);
    }

    fn describe_histogram(&self, key: KeyName, unit: Option<Unit>, description: SharedString) {
        self.recorder.describe_histogram(key, unit, description);
    }

    fn register_counter(&self, key: &Key, metadata: &Metadata<'_>) -> Counter {
        self.recorder.register_counter(&self.labelled(key), metadata)
    }

    fn register_gauge(&self, key: &Key, metadata: &Metadata<'_>) -> Gauge {
        self.recorder.register_gauge(&self.labelled(key), metadata)
    }

    fn register_histogram(&self, key: &Key, metadata: &Metadata<'_>) -> Histogram {
        self.recorder.register_histogram(&self.labelled(key), metadata)
    }
}

fn describe() {
    describe_gauge!("ballast_shard_up", "Whether the shard answered for this page.");
    describe_gauge!("ballast_build_info", "Always 1; version, cluster and node are its labels.");
}

/// What the process uses, under the names that Prometheus' own client libraries use. Written out
/// here because counters of the library are whole numbers.
fn usage(usage: &Usage) -> String {
    let mut text = String::new();
    for (name, kind, help, value) in [
        ("resident_memory_bytes", "gauge", "Resident memory.", usage.resident_bytes as f64),
        ("virtual_memory_bytes", "gauge", "Virtual memory.", usage.virtual_bytes as f64),
        ("open_fds", "gauge", "Open files and sockets.", usage.open_files as f64),
        ("threads", "gauge", "Threads.", usage.threads as f64),
        ("start_time_seconds", "gauge", "When it started, since 1970.", usage.start_seconds),
        ("cpu_seconds_total", "counter", "User and system time.", usage.cpu_seconds),
    ] {
        text.push_str(&format!(
            "# HELP process_{name} {help}\n# TYPE process_{name} {kind}\nprocess_{name} {value}\n\n"
        ));
    }
    text
}
