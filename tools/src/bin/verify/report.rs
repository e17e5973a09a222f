//! What happens, as one JSON object per line on standard output, for programs and for people.
//!
//! Never decides anything but the exit status: all well means no violation.

use std::io::Write;
use std::time::Duration;

use serde_json::{Value, json};

use crate::load::Load;
use crate::meter::unix_ms;

/// How often progress is told.
const EVERY: Duration = Duration::from_millis(100);

/// Writes the lines.
#[derive(Debug, Clone, Default)]
pub struct Reporter;

impl Reporter {
    /// Writes to standard output.
    pub fn new() -> Reporter {
        Reporter
    }

    fn line(&self, event: &str, mut value: Value) {
        value["event"] = event.into();
        value["unix_ms"] = unix_ms().into();
        let mut out = std::io::stdout().lock();
        // A reader that went away wants no more lines; the load goes on to its end.
        let _ = writeln!(out, "{value}");
        let _ = out.flush();
    }

    /// A connection stands.
    pub fn connected(&self, uri: &str) {
        self.line("connected", json!({ "uri": uri }));
    }

    /// A connection broke.
    pub fn lost(&self, uri: &str, reason: &str) {
        self.line("lost", json!({ "uri": uri, "reason": reason }));
    }

    /// The tool gives up.
    pub fn failed(&self, reason: &str) {
        self.line("failed", json!({ "reason": reason }));
    }

    /// Tells progress for as long as the process lives.
    pub fn watch(&self, load: &Load) {
        loop {
            let (meter, violations) = {
                let state = load.state();
                (state.meter.clone(), state.journal.violations().0)
            };
            let (_, longest) = meter.summary();
            self.line(
                "progress",
                json!({ "writes": meter.writes, "reads": meter.reads, "refused": meter.refused,
                        "longest_stall_ms": longest, "violations": violations }),
            );
            std::thread::sleep(EVERY);
        }
    }

    /// The final word; whether all was well.
    pub fn finish(&self, load: &Load) -> bool {
        let state = load.state();
        let meter = &state.meter;
        let (count, kept) = state.journal.violations();
        let (median, longest) = meter.summary();
        let seconds = meter.elapsed().as_secs_f64();
        let stalls: Vec<Value> = meter
            .stalls
            .iter()
            .map(|stall| json!({ "unix_ms": stall.unix_ms, "ms": stall.ms }))
            .collect();
        self.line(
            "report",
            json!({ "ok": count == 0, "violation_count": count, "violations": kept,
                    "writes": meter.writes, "bytes": meter.bytes, "reads": meter.reads,
                    "unanswered": meter.unanswered, "refused": meter.refused,
                    "longest_us": meter.longest_us, "seconds": seconds, "stalls": stalls,
                    "median_stall_ms": median, "longest_stall_ms": longest }),
        );
        count == 0
    }
}
