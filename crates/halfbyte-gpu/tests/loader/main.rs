//! Drivers and compilers that are missing, broken, old or failing: each gives a sentence, never a
//! panic or an abort, and the CPU goes on.
//!
//! A library is open for the life of a process, so each case runs in a process of its own: this
//! program again, with what the case is in its environment (`child.rs`).

mod cache;
mod child;
mod cuda;
mod hip;
mod stub;

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// A process that does what `child.rs` knows as `action`, with nothing of halfbyte's in its
/// environment but what is set here. No driver is found unless one is named.
struct Case {
    command: Command,
    /// A folder of the case's own, removed with it.
    folder: PathBuf,
}

impl Case {
    fn new(action: &str) -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let folder =
            env::temp_dir().join(format!("halfbyte-loader-{}-{number}", std::process::id()));
        fs::create_dir_all(&folder).expect("a temporary folder");
        let mut command = Command::new(env::current_exe().expect("this program"));
        command.args(["--ignored", "--exact", "child::child", "--nocapture", "--test-threads=1"]);
        for (name, _) in
            env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("HALFBYTE_"))
        {
            command.env_remove(name);
        }
        let nowhere = folder.join("no-such-library.so");
        for library in ["CUDA_DRIVER", "NVRTC", "HIP", "HIPRTC", "LEVEL_ZERO", "OPENCL"] {
            command.env(format!("HALFBYTE_{library}"), &nowhere);
        }
        command.env("HALFBYTE_CACHE_DIR", "").env("HALFBYTE_LOADER_CASE", action);
        Self { command, folder }
    }

    /// The same with the emulated CUDA driver and NVRTC.
    fn emulated(action: &str) -> Self {
        let emulator = halfbyte_gpu_emulator::path();
        Self::new(action).set("HALFBYTE_CUDA_DRIVER", emulator).set("HALFBYTE_NVRTC", emulator)
    }

    fn set(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// A file of this content in the case's folder.
    fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.folder.join(name);
        fs::write(&path, content).expect("a file in a temporary folder");
        path
    }

    /// What the process printed. It must have ended by itself, and the CPU's work must be done.
    #[track_caller]
    fn run(mut self) -> String {
        let output = self.command.stderr(Stdio::piped()).output().expect("this program starts");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}\n{text}\n{errors}", output.status);
        assert!(text.contains("CPU: ok"), "{text}\n{errors}");
        text
    }

    /// Runs and expects each of `texts` in what was printed.
    #[track_caller]
    fn says(self, texts: &[&str]) -> String {
        let output = self.run();
        for text in texts {
            assert!(output.contains(text), "expected {text:?} in:\n{output}");
        }
        output
    }
}

impl Drop for Case {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Compiles one C file to a shared library.
fn shared_library(source: &Path, library: &Path) {
    let compiler = env::var_os("CC").unwrap_or_else(|| "cc".into());
    let status = Command::new(compiler)
        .args(["-shared", "-fPIC", "-O2", "-w", "-o"])
        .args([library, source])
        .status()
        .expect("a C compiler, as the emulator needs one");
    assert!(status.success(), "{} does not compile", source.display());
}
