//! The emulator's search for races finds those of the kernels in its `racy.cu`, and none where
//! there is none. (That halfbyte's own kernels have none, all other tests see: `common::set_up`.)
//!
//! A race ends the process, so each kernel runs in a process of its own: this program again.

mod common;

use halfbyte_gpu::{DeviceBuffer, Grid, Packed, Source, Stream};
use std::env;
use std::ffi::CString;
use std::process::{Command, Output};

const GROUPS: usize = 3;

/// No device compiles this: the emulator has the kernels.
static RACY: Source = Source::new("racy", "", true, true, Packed::NONE);

fn run(kernel: &str, mode: &str) -> Output {
    Command::new(env::current_exe().expect("this program"))
        .args(["--ignored", "--exact", "child", "--nocapture"])
        .env("HALFBYTE_EMULATOR_RACES", mode)
        .env("HALFBYTE_EMULATOR_ORDER", "up")
        .env("RACY_KERNEL", kernel)
        .output()
        .expect("this program starts")
}

#[test]
#[ignore = "run by the tests below, in a process of its own"]
fn child() {
    let Ok(kernel) = env::var("RACY_KERNEL") else { return };
    let stream = Stream::new(common::cuda_devices()[0]).unwrap();
    let out = DeviceBuffer::<u32>::zeroed(stream.device(), 64 * GROUPS + 1).unwrap();
    let kernel = CString::new(kernel).unwrap();
    stream.launch(&RACY, &kernel, Grid::new(GROUPS, 64), &[out.slice().into()]).unwrap();
    println!("sum {}", out.to_vec(&stream).unwrap()[64 * GROUPS]);
}

#[test]
fn each_race_ends_the_process_with_its_name() {
    if common::on_hardware() {
        return;
    }
    for (kernel, said) in [
        (
            "racy_groups",
            "group (1, 0, 0) thread 0 reads byte 0 of 772 in device memory, which group (0, 0, 0) \
             thread 0 wrote",
        ),
        ("racy_shared", "thread 0 reads byte 252 of shared memory, which thread 63 wrote since"),
        ("racy_warps", "thread 31 reads byte 252 of shared memory, which thread 63 wrote since"),
        ("racy_reuse", "thread 0 writes byte 0 of shared memory, which thread 63 read since"),
    ] {
        let output = run(kernel, "1");
        let text = String::from_utf8_lossy(&output.stderr);
        let expected = format!("emulator: race in kernel {kernel}: ");
        assert!(!output.status.success(), "{kernel}: {text}");
        assert!(text.contains(&expected) && text.contains(said), "{kernel}: {text}");
        let output = run(kernel, "report");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && text.contains(said), "{kernel}, report: {text}");
        let output = run(kernel, "0");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && !text.contains("race"), "{kernel}, unwatched: {text}");
    }
}

#[test]
fn shared_memory_that_nobody_wrote_is_named_when_asked_for() {
    if common::on_hardware() {
        return;
    }
    let said = "thread 63 reads byte 252 of shared memory, which nobody wrote";
    for (mode, expected) in [("fresh", true), ("1", false)] {
        let output = run("racy_unwritten", mode);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{mode}: {text}");
        assert_eq!(text.contains(said), expected, "{mode}: {text}");
    }
}

#[test]
fn what_barriers_and_atomics_order_is_no_race() {
    if common::on_hardware() {
        return;
    }
    let output = run("not_racy", "1");
    let (text, errors) = (
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{errors}");
    // Of thread t: that of thread t ^ 0x21 and 7 from shared memory, and that of t ^ 3 from the warp.
    let one: u32 = (0..64u32).map(|t| (t ^ 0x21) + 7 + (t ^ 0x3)).sum();
    assert!(text.contains(&format!("sum {}", one * GROUPS as u32)), "{text}{errors}");
}

/// Groups that run at the same time leave what groups one after the other do.
#[test]
fn groups_on_several_workers() {
    if common::on_hardware() {
        return;
    }
    let expected = String::from_utf8_lossy(&run("not_racy", "0").stdout).into_owned();
    let output = Command::new(env::current_exe().expect("this program"))
        .args(["--ignored", "--exact", "child", "--nocapture"])
        .envs([("HALFBYTE_EMULATOR_WORKERS", "3"), ("RACY_KERNEL", "not_racy")])
        .env("HALFBYTE_EMULATOR_RACES", "0")
        .output()
        .expect("this program starts");
    // With one test thread the line begins with the test's name.
    let sum = |text: &str| {
        text.lines().find_map(|line| line.split_once("sum ")).map(|(_, sum)| sum.to_owned())
    };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(sum(&text).is_some() && sum(&text) == sum(&expected), "{text}");
}
