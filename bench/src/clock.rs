//! Time, CPUs, memory, and what a series of rounds says.

use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};

/// CPU time of this thread: other work on the machine then shows only through the caches.
pub(crate) struct Cpu(Duration);

impl Cpu {
    pub(crate) fn start() -> Self {
        Self(Self::now())
    }

    fn now() -> Duration {
        let now = clock_gettime(ClockId::ThreadCPUTime);
        let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
        Duration::from_secs(seconds) + Duration::from_nanos(u64::try_from(now.tv_nsec).unwrap_or(0))
    }

    pub(crate) fn elapsed(&self) -> Duration {
        Self::now().saturating_sub(self.0)
    }

    /// Nanoseconds for each of `count`, so far.
    pub(crate) fn each(&self, count: u64) -> f64 {
        nanos(self.elapsed()) / count.max(1) as f64
    }
}

pub(crate) fn nanos(time: Duration) -> f64 {
    time.as_secs_f64() * 1e9
}

/// Nanoseconds a call, in CPU time, over about `budget`. The clock is read once in about 50 us: it is a system call.
pub(crate) fn per_call(budget: Duration, mut call: impl FnMut()) -> f64 {
    let probe = Cpu::start();
    for _ in 0..16 {
        call();
    }
    let once = probe.elapsed().as_nanos() / 16;
    let batch = (50_000 / once.max(1)).clamp(1, 4096);
    let start = Cpu::start();
    let mut calls = 0u64;
    while start.elapsed() < budget {
        for _ in 0..batch {
            call();
            calls += 1;
        }
    }
    start.each(calls)
}

/// The `part` (0.999: 99.9 %) of the samples that is at most what is returned.
pub(crate) fn percentile(samples: &mut [u32], part: f64) -> f64 {
    samples.sort_unstable();
    let below = samples.iter().enumerate().take_while(|(at, _)| *at as f64 <= samples.len() as f64 * part);
    below.last().map_or(f64::NAN, |(_, ns)| f64::from(*ns))
}

/// Nanoseconds since `start` as a sample.
pub(crate) fn sample(start: Instant) -> u32 {
    u32::try_from(start.elapsed().as_nanos()).unwrap_or(u32::MAX)
}

/// Two CPUs of those that this process may run on; `None` where there is only one.
pub(crate) fn two_cpus() -> Option<(usize, usize)> {
    let set = sched_getaffinity(None).ok()?;
    let mut cpus = (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu));
    Some((cpus.next()?, cpus.next()?))
}

/// Keeps this thread on one CPU, where that is allowed.
pub(crate) fn pin(cpu: Option<usize>) {
    if let Some(cpu) = cpu {
        let mut set = CpuSet::new();
        set.set(cpu);
        if let Err(error) = sched_setaffinity(None, &set) {
            eprintln!("note: not pinned to CPU {cpu}: {error}");
        }
    }
}

/// Comes before other work on the machine, where that is allowed: what two threads do to each other is wall clock.
pub(crate) fn come_first() {
    let _ = rustix::process::setpriority_process(None, -10);
}

/// Processes that wanted to run in the last minute, on average.
pub(crate) fn load() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/loadavg").ok()?;
    text.split(' ').next()?.parse().ok()
}

/// Bytes of memory that this process has resident.
pub(crate) fn resident() -> f64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = text.split(' ').nth(1).and_then(|pages| pages.parse::<f64>().ok());
    pages.unwrap_or(f64::NAN) * rustix::param::page_size() as f64
}
