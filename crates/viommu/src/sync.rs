//! The synchronisation that the crate is written against: std's, or a model checker's stand-ins for it.

/// Std's, whatever the rest is made of: for what embedders hand in, and for what is never held over anything that a
/// schedule depends on.
pub(crate) use std::sync::{Arc as StdArc, Mutex as StdMutex, MutexGuard as StdMutexGuard};

#[cfg(not(any(loom, shuttle)))]
pub(crate) use std::{
    hint::spin_loop,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence},
    },
    thread::{Thread, current, park, park_timeout},
    thread_local,
};

#[cfg(loom)]
pub(crate) use loom::sync::{
    Arc, Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence},
};

/// Its own does not know constant initialisers.
#[cfg(loom)]
macro_rules! loom_local {
    ($(#[$attribute:meta])* static $name:ident: $of:ty = const { $init:expr };) => {
        loom::thread_local! { $(#[$attribute])* static $name: $of = $init; }
    };
}
#[cfg(loom)]
pub(crate) use loom_local as thread_local;

// Its Arc is std's.
#[cfg(shuttle)]
pub(crate) use shuttle::{
    hint::spin_loop,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence},
    },
    thread::{Thread, current, park, park_timeout},
    thread_local,
};

/// A counter of each thread: `const`, which makes reading it one load.
macro_rules! thread_counter {
    ($name:ident) => {
        $crate::sync::thread_local! {
            static $name: std::cell::Cell<u32> = const { std::cell::Cell::new(0) };
        }
    };
}
pub(crate) use thread_counter;

/// Locks, and says what a poisoned lock means here.
///
/// Only a subscriber's own code can panic under a lock of the core. What it did half-way is unknown, so going on
/// would be to trust a record that may be wrong.
#[inline]
#[track_caller]
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    match mutex.lock() {
        Ok(guard) => guard,
        Err(_) => poisoned(),
    }
}

/// As [`lock`], for what is not part of any model-checked protocol.
#[track_caller]
pub(crate) fn lock_std<T>(mutex: &StdMutex<T>) -> StdMutexGuard<'_, T> {
    match mutex.lock() {
        Ok(guard) => guard,
        Err(_) => poisoned(),
    }
}

#[cold]
#[track_caller]
fn poisoned() -> ! {
    panic!("a subscriber panicked inside a step: the record can no longer be trusted")
}
