//! Readers beside a churner, each on its own CPU.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use viommu::{Domain, Endpoint};

use crate::clock::{come_first, percentile, pin, sample, two_cpus};
use crate::load::{Effort, PAGE, Random, gpa, iova};
use crate::ours::{self, BATCH, Ours};
use crate::table::Table;
use crate::work::{Figures, dense};

/// Rounds: the middle one counts, since other work on the machine only ever disturbs.
const ROUNDS: usize = 3;

fn push(figures: &mut Figures, name: &str, value: f64) {
    figures.entry(name.to_owned()).or_default().push(value);
}

/// The churner's loop for `time`: calls `burst`, which says how many pairs it made, and gives pairs a second.
fn churn(time: Duration, mut burst: impl FnMut() -> u64) -> f64 {
    let start = Instant::now();
    let mut pairs = 0;
    while start.elapsed() < time {
        for _ in 0..16 {
            pairs += burst();
        }
    }
    pairs as f64 / start.elapsed().as_secs_f64()
}

/// Runs `read` on the first CPU (on any, when `readers` are many) until `churner`, on the second, is done.
fn beside<R: Send>(
    readers: usize,
    read: impl Fn(&AtomicBool) -> R + Sync,
    churner: impl FnOnce() -> anyhow::Result<f64> + Send,
) -> anyhow::Result<(f64, Vec<R>)> {
    let stop = AtomicBool::new(false);
    let ready = AtomicU64::new(0);
    let cpus = if readers == 1 { two_cpus() } else { None };
    std::thread::scope(|scope| {
        let hands: Vec<_> = (0..readers)
            .map(|_| {
                scope.spawn(|| {
                    pin(cpus.map(|cpus| cpus.0));
                    ready.fetch_add(1, Ordering::Release);
                    read(&stop)
                })
            })
            .collect();
        let writer = scope.spawn(|| {
            pin(cpus.map(|cpus| cpus.1));
            while ready.load(Ordering::Acquire) < readers as u64 {
                std::thread::yield_now();
            }
            let pairs = churner();
            stop.store(true, Ordering::Relaxed);
            pairs
        });
        let pairs = writer.join().ok().context("the churner panicked")??;
        let mut answers = Vec::new();
        for hand in hands {
            answers.push(hand.join().ok().context("a reader panicked")?);
        }
        Ok((pairs, answers))
    })
}

/// How a reader spends its time.
#[derive(Clone, Copy, PartialEq)]
enum Reading {
    /// Flat out; each 16th batch is timed.
    Batches,
    /// Each lookup is timed, the clock included.
    Lookups,
}

/// What a reader did: lookups a second, and nanoseconds of what was timed.
struct Read {
    rate: f64,
    samples: Vec<u32>,
}

fn read_ours(endpoint: &Endpoint, count: u64, reading: Reading, stop: &AtomicBool) -> Read {
    let mut samples = Vec::with_capacity(1 << 23);
    let Some(mut reader) = endpoint.reader("busy") else { return Read { rate: 0.0, samples } };
    let mut random = Random(99);
    let start = Instant::now();
    let mut batches = 0u64;
    while !stop.load(Ordering::Relaxed) {
        let timed = (reading == Reading::Batches && batches.is_multiple_of(16)).then(Instant::now);
        let guard = reader.enter();
        for _ in 0..BATCH {
            let address = random.address(count);
            let once = (reading == Reading::Lookups).then(Instant::now);
            std::hint::black_box(ours::look(&guard, address));
            samples.extend(once.map(sample));
        }
        drop(guard);
        samples.extend(timed.map(sample));
        batches += 1;
    }
    Read { rate: (batches * BATCH) as f64 / start.elapsed().as_secs_f64(), samples }
}

/// Unmaps `group` pages, waits once, maps them again; each 16th time the unmaps and the wait are timed.
struct Churn<'a> {
    domain: &'a Domain,
    random: Random,
    count: u64,
    group: u64,
    turn: u64,
    samples: Vec<u32>,
}

impl Churn<'_> {
    fn pages(&mut self) -> impl Iterator<Item = u64> + use<> {
        let (first, count) = (self.random.next() >> 20, self.count);
        (0..self.group).map(move |k| (first.wrapping_add(k * 977)) & (count - 1))
    }

    /// One page, and a Completion of its own for each step.
    fn single(&mut self) -> u64 {
        let page = self.random.page(self.count);
        let timed = self.turn.is_multiple_of(16).then(Instant::now);
        ours::unmap(self.domain, page, PAGE);
        self.samples.extend(timed.map(sample));
        ours::map(self.domain, page, PAGE, gpa(page / PAGE, self.count));
        self.turn += 1;
        1
    }

    /// Several pages, whose unmaps share a lock and a Completion, as do their maps.
    fn burst(&mut self) -> u64 {
        let pages = self.pages();
        let timed = self.turn.is_multiple_of(16).then(Instant::now);
        let mut burst = self.domain.burst().expect("a burst");
        let mut list = [0; 16];
        for (slot, page) in list.iter_mut().zip(pages) {
            *slot = page;
            burst.unmap(ours::range(iova(page), PAGE)).expect("an unmap");
        }
        burst.finish().wait().expect("nobody holds on");
        self.samples.extend(timed.map(sample));
        let mut burst = self.domain.burst().expect("a burst");
        for page in list {
            burst.map(ours::mapping(iova(page), PAGE, gpa(page, self.count))).expect("a map");
        }
        burst.finish().wait().expect("nothing to wait for");
        self.turn += 1;
        self.group
    }
}

/// Ours: each unmap waits by itself, then 16 share a Completion, then a round in which lookups are timed.
pub(crate) fn ours(effort: Effort) -> anyhow::Result<Figures> {
    come_first();
    let mut figures = Figures::new();
    let mut unit = Ours::new()?;
    let count = effort.small();
    dense::fill(&mut unit, count)?;
    let (domain, endpoint) = (&unit.domain, &unit.endpoint);
    for _ in 0..ROUNDS {
        for (name, group) in [("single", 1), ("burst", BATCH)] {
            let mut churner = Churn {
                domain,
                random: Random(1234),
                count,
                group,
                turn: 0,
                samples: Vec::with_capacity(1 << 20),
            };
            let (pairs, read) = beside(
                1,
                |stop| read_ours(endpoint, count, Reading::Batches, stop),
                || {
                    let step = |churner: &mut Churn<'_>| {
                        if group == 1 { churner.single() } else { churner.burst() }
                    };
                    Ok(churn(effort.contended(), || step(&mut churner)))
                },
            )?;
            let samples = &mut churner.samples;
            push(&mut figures, &format!("{name} pairs"), pairs / 1e6);
            push(&mut figures, &format!("{name} wait p50"), percentile(samples, 0.5));
            push(&mut figures, &format!("{name} wait p99.9"), percentile(samples, 0.999));
            for mut one in read {
                push(&mut figures, &format!("{name} reads"), one.rate / 1e6);
                push(&mut figures, &format!("{name} batch p99.9"), percentile(&mut one.samples, 0.999));
            }
        }
        let mut random = Random(1234);
        let (_, read) = beside(
            1,
            |stop| read_ours(endpoint, count, Reading::Lookups, stop),
            || {
                Ok(churn(effort.contended(), || {
                    let page = random.page(count);
                    ours::unmap(domain, page, PAGE);
                    ours::map(domain, page, PAGE, gpa(page / PAGE, count));
                    1
                }))
            },
        )?;
        for mut one in read {
            push(&mut figures, "lookup p99.9", percentile(&mut one.samples, 0.999));
        }
    }
    Ok(figures)
}

/// A peer whose lock lets both threads in by turns.
pub(crate) fn locked<T: Table + Clone + Send + Sync>(effort: Effort) -> anyhow::Result<Figures> {
    come_first();
    let mut figures = Figures::new();
    let mut table = T::new()?;
    let count = effort.small();
    dense::fill(&mut table, count)?;
    for _ in 0..ROUNDS {
        for reading in [Reading::Batches, Reading::Lookups] {
            let mut churned = table.clone();
            let mut random = Random(1234);
            let (pairs, read) = beside(
                1,
                |stop| read_locked(table.clone(), count, reading, stop),
                || {
                    Ok(churn(effort.contended(), || {
                        let page = random.page(count);
                        churned.unmap(page, PAGE);
                        churned.map(page, PAGE, gpa(page / PAGE, count));
                        1
                    }))
                },
            )?;
            for mut one in read {
                if reading == Reading::Batches {
                    push(&mut figures, "single pairs", pairs / 1e6);
                    push(&mut figures, "single reads", one.rate / 1e6);
                } else {
                    push(&mut figures, "lookup p99.9", percentile(&mut one.samples, 0.999));
                }
            }
        }
    }
    Ok(figures)
}

fn read_locked<T: Table>(mut table: T, count: u64, reading: Reading, stop: &AtomicBool) -> Read {
    let mut samples = Vec::with_capacity(1 << 23);
    let mut random = Random(99);
    let start = Instant::now();
    let mut lookups = 0u64;
    while !stop.load(Ordering::Relaxed) {
        for _ in 0..BATCH {
            let address = random.address(count);
            let once = (reading == Reading::Lookups).then(Instant::now);
            std::hint::black_box(table.translate(address));
            samples.extend(once.map(sample));
        }
        lookups += BATCH;
    }
    Read { rate: lookups as f64 / start.elapsed().as_secs_f64(), samples }
}

/// 16 readers flat out, however few CPUs there are: they are preempted under their guards, and an unmap waits for that.
pub(crate) fn busy(effort: Effort) -> anyhow::Result<Figures> {
    let mut figures = Figures::new();
    let mut unit = Ours::new()?;
    let count = effort.small();
    dense::fill(&mut unit, count)?;
    let (domain, endpoint) = (&unit.domain, &unit.endpoint);
    for _ in 0..ROUNDS {
        let random = Random(1234);
        let mut churner = Churn { domain, random, count, group: 1, turn: 0, samples: Vec::new() };
        let (pairs, read) = beside(
            16,
            |stop| read_ours(endpoint, count, Reading::Batches, stop),
            || Ok(churn(effort.contended(), || churner.single())),
        )?;
        ensure!(read.len() == 16, "a reader is missing");
        push(&mut figures, "reads", read.iter().map(|one| one.rate).sum::<f64>() / 1e6);
        push(&mut figures, "pairs", pairs / 1e6);
        push(&mut figures, "wait p50", percentile(&mut churner.samples, 0.5));
        push(&mut figures, "wait p99.9", percentile(&mut churner.samples, 0.999));
    }
    Ok(figures)
}
