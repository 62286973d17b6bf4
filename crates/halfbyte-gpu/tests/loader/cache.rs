//! The disk cache across processes.

use crate::Case;
use std::fs;
use std::path::{Path, PathBuf};

/// How a process ends that has loaded its kernels (see `child.rs`).
const LOADED: &str = "CUDA: cuModuleGetFunction(no_such_kernel) failed with CUDA_ERROR_NOT_FOUND";

/// A process that loads a source without machine code, with its cache in `folder`, and the log of its calls.
fn with_cache(folder: &Path) -> (Case, PathBuf) {
    let case = Case::emulated("no code").set("HALFBYTE_CACHE_DIR", folder);
    let log = case.folder.join("log");
    (case.set("HALFBYTE_EMULATOR_LOG", &log), log)
}

/// Runs such a process: how many sources it compiled.
#[track_caller]
fn compilations(folder: &Path) -> usize {
    let (mut case, log) = with_cache(folder);
    let output = case.command.output().expect("this program starts");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains(LOADED), "{text}");
    let log = fs::read_to_string(&log).expect("the emulator writes it");
    log.lines().filter(|line| line.starts_with("nvrtcCompileProgram")).count()
}

/// The files in a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("the cache's folder");
    entries.map(|entry| entry.expect("an entry").path()).collect()
}

#[test]
fn a_kernel_is_compiled_once_per_machine() {
    let home = Case::new("nothing");
    let cache = home.folder.join("not/there/yet");
    assert_eq!(compilations(&cache), 1);
    assert_eq!(compilations(&cache), 0);
    let files = files(&cache);
    assert_eq!(files.len(), 1, "{files:?}");
    let name = files[0].file_stem().unwrap().to_string_lossy().into_owned();
    assert!(name.starts_with("quantize_4bit-sm_80-"), "{name}");
}

#[test]
fn what_is_damaged_is_built_again() {
    let home = Case::new("nothing");
    assert_eq!(compilations(&home.folder), 1);
    let path = files(&home.folder).remove(0);
    let whole = fs::read(&path).unwrap();
    let mut changed = whole.clone();
    *changed.last_mut().unwrap() ^= 1;
    let contents: [&[u8]; 4] = [&whole[..whole.len() / 2], &changed, b"", b"nonsense"];
    for content in contents {
        fs::write(&path, content).unwrap();
        assert_eq!(compilations(&home.folder), 1);
        assert_eq!(fs::read(&path).unwrap(), whole);
        assert_eq!(compilations(&home.folder), 0);
    }
}

#[test]
fn only_code_that_is_refused_is_built_again() {
    let home = Case::new("nothing");
    assert_eq!(compilations(&home.folder), 1);
    for (code, expected) in [("2", 0), ("719", 0), ("200", 1), ("209", 1)] {
        let (case, _) = with_cache(&home.folder);
        let log = home.folder.join(code);
        let failing = case.set("HALFBYTE_EMULATOR_LOG", &log);
        let failing = failing.set("HALFBYTE_EMULATOR_FAIL", format!("cuModuleLoadData={code}"));
        failing.says(&[&format!("({code})")]);
        let log = fs::read_to_string(&log).expect("the emulator writes it");
        assert_eq!(log.matches("nvrtcCompileProgram").count(), expected, "{code}: {log}");
        // What was refused is kept no more.
        assert_eq!(compilations(&home.folder), expected, "{code}");
    }
}

#[test]
fn without_a_folder_to_write_to_it_is_compiled_each_time() {
    let home = Case::new("nothing");
    let file = home.file("file", b"a file where the folder should be");
    for folder in [file.join("sub"), PathBuf::from("/proc/halfbyte"), PathBuf::new()] {
        assert_eq!(compilations(&folder), 1);
        assert_eq!(compilations(&folder), 1);
    }
}

#[test]
fn processes_that_write_at_once_leave_one_whole_file() {
    let home = Case::new("nothing");
    let cache = home.folder.join("cache");
    let mut cases: Vec<_> = (0..6).map(|_| with_cache(&cache).0).collect();
    let children: Vec<_> = cases
        .iter_mut()
        .map(|case| case.command.stdout(std::process::Stdio::null()).spawn().unwrap())
        .collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(files(&cache).len(), 1, "{:?}", files(&cache));
    assert_eq!(compilations(&cache), 0);
}

#[test]
fn what_a_killed_writer_left_does_no_harm() {
    let home = Case::new("nothing");
    assert_eq!(compilations(&home.folder), 1);
    let path = files(&home.folder).remove(0);
    let whole = fs::read(&path).unwrap();
    fs::remove_file(&path).unwrap();
    fs::write(path.with_extension("99-0.tmp"), &whole[..whole.len() / 2]).unwrap();
    assert_eq!(compilations(&home.folder), 1);
    assert_eq!(compilations(&home.folder), 0);
}

#[test]
fn the_user_s_folder_is_the_system_s() {
    let home = Case::new("nothing");
    for (variable, cache) in [("XDG_CACHE_HOME", "halfbyte"), ("HOME", ".cache/halfbyte")] {
        let (mut case, _) = with_cache(&home.folder);
        case.command.env_remove("HALFBYTE_CACHE_DIR").env_remove("XDG_CACHE_HOME");
        case.command.env(variable, &home.folder);
        assert!(case.command.output().unwrap().status.success());
        assert_eq!(files(&home.folder.join(cache)).len(), 1, "{variable}");
    }
}
