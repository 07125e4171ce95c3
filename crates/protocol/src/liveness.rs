//! How a worker fares, from when its heartbeats arrive: late is not dead.

/// What the time since a worker's last word says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Liveness {
    /// It speaks as often as it used to.
    Green,
    /// It is late by its own measure. Nothing is done about it.
    Yellow,
    /// It was silent for the heartbeat timeout, and counts as lost.
    Red,
}

/// Arrival times of one worker's words, and the pace of its heartbeats, estimated as TCP estimates round trips: mean and mean
/// deviation with gains 1/8 and 1/4, late after the mean and four deviations (RFC 6298, section 2).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pulse {
    last_heard_ms: u64,
    /// The last heartbeat; other words come whenever they come and tell no pace.
    last_beat_ms: Option<u64>,
    /// Mean and mean deviation of the intervals, once there is one.
    pace: Option<(f64, f64)>,
}

impl Pulse {
    /// Of a worker that was heard for the first time.
    pub fn new(now_ms: u64) -> Self {
        Self {
            last_heard_ms: now_ms,
            last_beat_ms: None,
            pace: None,
        }
    }

    /// It said something.
    pub fn heard(&mut self, now_ms: u64) {
        self.last_heard_ms = now_ms;
    }

    /// Its heartbeat arrived.
    pub fn beat(&mut self, now_ms: u64) {
        self.heard(now_ms);
        if let Some(before_ms) = self.last_beat_ms.replace(now_ms) {
            let interval = now_ms.saturating_sub(before_ms) as f64;
            self.pace = Some(match self.pace {
                None => (interval, interval / 2.0),
                Some((mean, deviation)) => (
                    mean + (interval - mean) / 8.0,
                    deviation + ((interval - mean).abs() - deviation) / 4.0,
                ),
            });
        }
    }

    /// When it was last heard.
    pub fn last_heard_ms(&self) -> u64 {
        self.last_heard_ms
    }

    /// When it counts as late, if nothing is heard of it until then: at half of the timeout while its pace is unknown, after
    /// two intervals at least, and never after it counts as lost.
    pub fn late_at_ms(&self, timeout_ms: u64) -> u64 {
        let silence_ms = match self.pace {
            None => timeout_ms / 2,
            Some((mean, deviation)) => (mean + 4.0 * deviation).max(2.0 * mean).ceil() as u64,
        };
        self.last_heard_ms + silence_ms.clamp(1, timeout_ms)
    }

    /// How it fares at `now_ms`, given the silence after which it counts as lost.
    pub fn liveness(&self, now_ms: u64, timeout_ms: u64) -> Liveness {
        if now_ms >= self.last_heard_ms + timeout_ms {
            return Liveness::Red;
        }
        if now_ms >= self.late_at_ms(timeout_ms) {
            return Liveness::Yellow;
        }
        Liveness::Green
    }
}
