//! How an op is spread over threads.
//!
//! Every parallel op is cut into tasks whose results do not depend on who runs them, so any
//! thread count gives the same bytes. The calling thread works too and takes tasks from the same
//! counter as its helpers: a helper that wakes late only makes the caller do more.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// 0 means: use rayon's current pool.
static THREADS: AtomicUsize = AtomicUsize::new(0);
static POOL: Mutex<Option<Pool>> = Mutex::new(None);

struct Pool {
    threads: usize,
    /// Threads do not survive `fork`, so a pool belongs to the process that built it.
    process: u32,
    workers: Arc<rayon::ThreadPool>,
}

/// Sets the number of threads that ops use, the calling one included, through a pool of their
/// own. `0` (the default) uses the current rayon pool instead, so that `ThreadPool::install` and
/// `RAYON_NUM_THREADS` work as in any rayon program.
pub fn set_num_threads(threads: usize) {
    THREADS.store(threads, Ordering::Relaxed);
}

/// The number of threads that ops use, the calling one included.
#[must_use]
pub fn num_threads() -> usize {
    match THREADS.load(Ordering::Relaxed) {
        0 => rayon::current_num_threads(),
        n => n,
    }
}

/// Runs `task(0..tasks)`, each index exactly once, on up to [`num_threads`] threads.
pub(crate) fn run(tasks: usize, task: impl Fn(usize) + Sync) {
    let threads = num_threads().min(tasks);
    if threads <= 1 {
        return (0..tasks).for_each(task);
    }
    let next = AtomicUsize::new(0);
    let work = || {
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= tasks {
                break;
            }
            task(i);
        }
    };
    match THREADS.load(Ordering::Relaxed) {
        0 => rayon::in_place_scope(|scope| spread(scope, threads - 1, &work)),
        n => own_pool(n).in_place_scope(|scope| spread(scope, threads - 1, &work)),
    }
}

/// Runs `work` on `helpers` threads of the scope's pool and on this one.
fn spread<'s>(scope: &rayon::Scope<'s>, helpers: usize, work: &'s (impl Fn() + Sync)) {
    for _ in 0..helpers {
        scope.spawn(|_| work());
    }
    work();
}

fn own_pool(threads: usize) -> Arc<rayon::ThreadPool> {
    let process = std::process::id();
    let mut slot = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(pool) = slot.as_ref().filter(|p| p.threads == threads && p.process == process) {
        return Arc::clone(&pool.workers);
    }
    let workers = rayon::ThreadPoolBuilder::new()
        .num_threads(threads - 1)
        .thread_name(|i| format!("halfbyte-{i}"))
        .build()
        .expect("the operating system refused to start a thread");
    let workers = Arc::new(workers);
    let old = slot.replace(Pool { threads, process, workers: Arc::clone(&workers) });
    if let Some(old) = old.filter(|p| p.process != process) {
        // The parent's threads are not in this process: joining them would wait for ever.
        std::mem::forget(old);
    }
    workers
}

/// Cuts `len` items into tasks of about `target` items, each a multiple of `granule`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chunks {
    len: usize,
    size: usize,
}

impl Chunks {
    pub(crate) fn new(len: usize, target: usize, granule: usize) -> Self {
        Self { len, size: target.next_multiple_of(granule).max(granule) }
    }

    pub(crate) fn count(self) -> usize {
        self.len.div_ceil(self.size)
    }

    pub(crate) fn range(self, i: usize) -> Range<usize> {
        i * self.size..((i + 1) * self.size).min(self.len)
    }
}

/// A mutable slice that several tasks write at once, each its own part.
pub(crate) struct Shared<'a, T> {
    ptr: *mut T,
    len: usize,
    _slice: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: `Shared` only hands out parts through `part`, whose contract keeps them disjoint.
unsafe impl<T: Send> Sync for Shared<'_, T> {}
// SAFETY: as above; it is a `&mut [T]` in all but the borrow checker's eyes.
unsafe impl<T: Send> Send for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { ptr: slice.as_mut_ptr(), len: slice.len(), _slice: std::marker::PhantomData }
    }

    /// The part `range` of the slice.
    ///
    /// # Safety
    /// No two live parts overlap.
    ///
    /// # Panics
    /// When the range lies outside the slice.
    #[allow(clippy::mut_from_ref)] // disjointness is the caller's contract
    pub(crate) unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "part outside the slice");
        // SAFETY: in bounds by the assertion, disjoint from other parts by the caller's contract.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_in_any_pool() {
        for threads in [1, 2, 7] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let counts: Vec<AtomicUsize> = (0..1000).map(|_| AtomicUsize::new(0)).collect();
            pool.install(|| {
                run(1000, |i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
            });
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn chunks_cover_everything_in_granules() {
        for (len, target, granule) in [(0, 10, 4), (1, 10, 4), (1000, 100, 64), (128, 1, 64)] {
            let c = Chunks::new(len, target, granule);
            let mut next = 0;
            for i in 0..c.count() {
                let r = c.range(i);
                assert_eq!((r.start, r.start % granule), (next, 0));
                next = r.end;
            }
            assert_eq!(next, len);
        }
    }
}
