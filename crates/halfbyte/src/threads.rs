//! How an op is spread over threads.
//!
//! Every parallel op is cut into tasks whose results do not depend on who runs them, so any
//! thread count gives the same bytes. The calling thread works too and takes tasks from the same
//! counter as its helpers: a helper that wakes late only makes the caller do more.

use std::any::Any;
use std::ops::Range;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// 0 means: use rayon's current pool.
static THREADS: AtomicUsize = AtomicUsize::new(0);
static POOL: Mutex<Option<Pool>> = Mutex::new(None);
static HOST: OnceLock<Host> = OnceLock::new();

/// Threads of a host program, for ops to run on instead of a pool of their own: two pools that
/// both keep their threads awake fight for the cores.
///
/// `team(threads, work)` calls `work` once on the calling thread and, at the same time, once on
/// each of up to `threads - 1` others. It returns when all calls have returned. Fewer helpers, or
/// none, are right too: a call of `work` does whatever is still to be done. `work` never panics,
/// so it may be called through frames that cannot unwind. `false` says that the team cannot be
/// used now; what is left is then done by a pool of ops' own.
///
/// The caller has to wait for helpers even if it has done all the work before they came. Where
/// other programs hold the cores, that can take a time slice or two: 10 to 20 ms with OpenMP on two
/// busy cores. After such a wait ops use their own pool for a while.
pub type Team = fn(threads: usize, work: &(dyn Fn() + Sync)) -> bool;

/// Lets ops run on the threads of a host program wherever [`set_num_threads`] gave a number
/// other than 0. The first team stays; `false` says that there was one already.
pub fn set_team(team: Team) -> bool {
    HOST.set(Host::new(team)).is_ok()
}

struct Host {
    team: Team,
    epoch: Instant,
    /// The team is not used before this time, in nanoseconds from `epoch`.
    rests_until: AtomicU64,
}

impl Host {
    /// A thread that sleeps needs less than this to wake on a free core.
    const LONG_WAIT: Duration = Duration::from_millis(1);
    /// For how many times a long wait the team rests: trying it costs 1 part in 32 at most.
    const REST: u32 = 32;

    fn new(team: Team) -> Self {
        Self { team, epoch: Instant::now(), rests_until: AtomicU64::new(0) }
    }

    /// Runs `work` on the team, unless it rests. No thread of the team sees a panic: the first one
    /// is raised again here.
    fn run(&self, threads: usize, work: &(dyn Fn() + Sync)) -> bool {
        let start = self.now();
        if start < self.rests_until.load(Ordering::Relaxed) {
            return false;
        }
        let caller = thread::current().id();
        let caller_done = AtomicU64::new(start);
        let panicked: Mutex<Option<Box<dyn Any + Send>>> = Mutex::new(None);
        let done = (self.team)(threads, &|| {
            // The panic goes on below, and nobody looks at what it left behind.
            if let Err(reason) = panic::catch_unwind(AssertUnwindSafe(work)) {
                panicked.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(reason);
            }
            if thread::current().id() == caller {
                caller_done.store(self.now(), Ordering::Relaxed);
            }
        });
        if let Some(reason) = panicked.into_inner().unwrap_or_else(PoisonError::into_inner) {
            panic::resume_unwind(reason);
        }
        let (end, caller_done) = (self.now(), caller_done.into_inner());
        let (worked, waited) = (caller_done - start, end - caller_done);
        if let Some(rest) = Self::rest_after(worked, waited) {
            self.rests_until.store(end + rest, Ordering::Relaxed);
        }
        done
    }

    /// For how long the team rests after its caller has worked and then waited for the helpers,
    /// all in nanoseconds.
    fn rest_after(worked: u64, waited: u64) -> Option<u64> {
        // A helper that is merely busy with the last task needs no longer than the caller for one.
        let long = waited > Self::LONG_WAIT.as_nanos() as u64 && waited > 2 * worked;
        long.then(|| u64::from(Self::REST) * waited)
    }

    /// Nanoseconds from `epoch`; 584 years fit.
    fn now(&self) -> u64 {
        self.epoch.elapsed().as_nanos() as u64
    }
}

struct Pool {
    threads: usize,
    /// Threads do not survive `fork`, so a pool belongs to the process that built it.
    process: u32,
    workers: Arc<rayon::ThreadPool>,
}

/// Sets the number of threads that ops use, the calling one included: those of the [`Team`], or
/// a pool of their own. `0` (the default) uses the current rayon pool instead, so that
/// `ThreadPool::install` and `RAYON_NUM_THREADS` work as in any rayon program.
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
    run_on(HOST.get(), THREADS.load(Ordering::Relaxed), tasks, task);
}

fn run_on(host: Option<&Host>, wanted: usize, tasks: usize, task: impl Fn(usize) + Sync) {
    // The number is asked for only where it matters: to ask rayon starts its pool.
    let limit = || if wanted == 0 { rayon::current_num_threads() } else { wanted };
    let threads = if tasks <= 1 { tasks } else { limit().min(tasks) };
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
    if wanted == 0 {
        rayon::in_place_scope(|scope| spread(scope, threads - 1, &work));
    } else if !host.is_some_and(|host| host.run(threads, &work)) {
        own_pool(wanted).in_place_scope(|scope| spread(scope, threads - 1, &work));
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

    /// No helpers, late ones, early ones, and no team at all.
    const TEAMS: [Team; 4] = [
        |_, work| {
            work();
            true
        },
        |threads, work| {
            thread::scope(|scope| {
                for i in 1..threads {
                    scope.spawn(move || {
                        thread::sleep(std::time::Duration::from_millis(i as u64));
                        work();
                    });
                }
                work();
            });
            true
        },
        |threads, work| {
            thread::scope(|scope| (1..threads).for_each(|_| drop(scope.spawn(work))));
            work();
            true
        },
        |_, _| false,
    ];

    #[test]
    fn every_task_runs_once_on_any_team() {
        for (team, threads) in TEAMS.iter().flat_map(|&team| [2, 3, 7].map(|n| (team, n))) {
            let counts: Vec<AtomicUsize> = (0..1000).map(|_| AtomicUsize::new(0)).collect();
            run_on(Some(&Host::new(team)), threads, counts.len(), |i| {
                counts[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn a_team_is_asked_only_where_there_is_work_for_two() {
        let team: Team = |_, _| panic!("asked");
        for (threads, tasks) in [(1, 9), (3, 1), (3, 0)] {
            let sum = AtomicUsize::new(0);
            run_on(Some(&Host::new(team)), threads, tasks, |i| {
                sum.fetch_add(i + 1, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), tasks * (tasks + 1) / 2);
        }
    }

    #[test]
    fn a_panic_crosses_no_frame_of_the_team() {
        static RETURNED: AtomicUsize = AtomicUsize::new(0);
        let team: Team = |threads, work| {
            thread::scope(|scope| {
                for _ in 0..threads {
                    scope.spawn(|| {
                        work();
                        RETURNED.fetch_add(1, Ordering::Relaxed);
                    });
                }
            });
            true
        };
        let raised = panic::catch_unwind(|| Host::new(team).run(3, &|| panic!("task 5")));
        assert_eq!(raised.unwrap_err().downcast_ref(), Some(&"task 5"));
        assert_eq!(RETURNED.load(Ordering::Relaxed), 3);
    }

    #[test]
    fn a_team_that_comes_late_rests() {
        let late: Team = |_, work| {
            work();
            thread::sleep(Duration::from_millis(20)); // as for a helper that gets no core
            true
        };
        let host = Host::new(late);
        // Once, unless this thread was halted in its own work.
        let runs = (0..100).take_while(|_| host.run(2, &|| ())).count();
        assert!((1..100).contains(&runs), "{runs}");
        // The wait may have been longer than asked for, and the rest with it.
        while !host.run(2, &|| ()) {
            thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn only_a_wait_that_was_long_makes_the_team_rest() {
        const MS: u64 = 1_000_000;
        assert_eq!(Host::rest_after(0, 20 * MS), Some(32 * 20 * MS));
        assert_eq!(Host::rest_after(9 * MS, 20 * MS), Some(32 * 20 * MS));
        assert_eq!(Host::rest_after(60 * MS, 20 * MS), None, "a helper does the last task");
        assert_eq!(Host::rest_after(0, MS), None, "a thread wakes");
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
