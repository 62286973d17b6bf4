//! The ops on torch's own threads.
//!
//! `at::parallel_for` (`torch_parallel_for` in the stable ABI) runs on the OpenMP team that torch's
//! own ops use. Its threads stay awake for a few milliseconds after work, so that an op that comes
//! soon after another starts on all of them within 1 to 2 us, where threads of a pool of ours would
//! need 50 to 100 us to wake and then share the cores with torch's.

use crate::shim::shim;
use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, Ordering};

/// True in a child of `fork`: OpenMP's threads stayed with the parent, and a team that waits for
/// them waits for ever (libgomp; torch's own ops hang so as well).
static FORKED: AtomicBool = AtomicBool::new(false);

/// Gives the core torch's threads. Once, after the shim is bound.
pub(crate) fn bind() {
    let s = shim();
    if s.torch_parallel_for.is_none() || s.torch_get_num_threads.is_none() {
        return; // the core then has a pool of its own
    }
    if forked_without_exec() {
        // Whether torch used its team before the fork is not known here.
        FORKED.store(true, Ordering::Relaxed);
    }
    #[cfg(unix)]
    {
        extern "C" fn in_child() {
            FORKED.store(true, Ordering::Relaxed);
        }
        // SAFETY: the handler only stores to a static, and extension modules are never unloaded.
        let status = unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
        if status != 0 {
            return; // no memory for the handler: a child would not know that it is one
        }
    }
    halfbyte::threads::set_team(run);
}

/// Lets the core use as many threads as torch does now on this thread.
pub(crate) fn use_torch_threads() {
    let Some(get) = shim().torch_get_num_threads else { return };
    let mut threads = 0;
    // SAFETY: writes one u32.
    let status = unsafe { get(&raw mut threads) };
    if status == 0 && threads > 0 {
        halfbyte::threads::set_num_threads(threads as usize);
    }
}

/// A [`Team`](halfbyte::threads::Team) of torch's threads. Inside a parallel region of torch, and
/// wherever torch has fewer threads than `threads`, there are fewer calls of `work`.
fn run(threads: usize, mut work: &(dyn Fn() + Sync)) -> bool {
    unsafe extern "C" fn call(_begin: i64, _end: i64, work: *mut c_void) {
        // SAFETY: `work` is the reference below, which outlives the parallel region.
        let work = unsafe { *work.cast::<&(dyn Fn() + Sync)>() };
        work(); // does not unwind, by the contract of a team
    }
    let Some(parallel_for) = shim().torch_parallel_for else { return false };
    if FORKED.load(Ordering::Relaxed) {
        return false;
    }
    // SAFETY: `call` takes what it is given here, and every call has returned when
    // `parallel_for` returns. The threads share only what is `Sync`.
    let status =
        unsafe { parallel_for(0, threads as i64, 1, call, (&raw mut work).cast::<c_void>()) };
    status == 0
}

/// Whether this process is a fork of another program's process: multiprocessing's forkserver, a
/// server that forks its workers. Only Linux says so.
#[cfg(target_os = "linux")]
fn forked_without_exec() -> bool {
    const PF_FORKNOEXEC: u64 = 0x40; // include/linux/sched.h
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // pid (name) state ppid pgrp session tty tpgid flags: a name may hold spaces and parentheses.
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let flags = after_name.split_ascii_whitespace().nth(6);
    flags.and_then(|f| f.parse::<u64>().ok()).is_some_and(|f| f & PF_FORKNOEXEC != 0)
}

#[cfg(not(target_os = "linux"))]
fn forked_without_exec() -> bool {
    false
}
