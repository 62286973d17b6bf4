//! Cubins, when the build has an NVRTC.
//!
//! What was compiled is kept in `<target>/nvrtc`, by a hash of everything it depends on: a debug build,
//! a release build and a changed comment elsewhere do not compile it again. The log of ptxas lies
//! beside it; `scripts/nvrtc-check` reads registers and spills there. So does each unit's code for all
//! architectures, packed together.

use crate::pack::Kind;
use std::ffi::{CString, c_char, c_int, c_void};
use std::fmt::Write as _;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Compute capability, and the name that NVRTC knows it by.
pub(crate) const ARCHITECTURES: [(u32, &str); 7] = [
    (75, "sm_75"),
    (80, "sm_80"),
    (86, "sm_86"),
    (89, "sm_89"),
    (90, "sm_90a"),
    (100, "sm_100"),
    (120, "sm_120"),
];

/// A file of kernels, its includes expanded.
pub(crate) struct Unit {
    pub(crate) name: String,
    pub(crate) text: String,
    pub(crate) exact: bool,
}

/// One unit for one architecture.
struct Job<'a> {
    unit: &'a Unit,
    architecture: &'static str,
    options: Vec<String>,
    /// Where the cubin is kept.
    kept: PathBuf,
}

/// The cubins of a unit.
pub(crate) struct Cubins {
    /// All of them in one packed stream.
    pub(crate) packed: PathBuf,
    /// Compute capability and length in bytes of each.
    pub(crate) parts: Vec<(u32, usize)>,
}

/// Cubins of all units, in their order, each for all of [`ARCHITECTURES`].
///
/// # Panics
/// With the compiler's log when a unit does not compile.
pub(crate) fn compile(library: &Path, units: &[Unit], kept: &Path) -> Vec<Cubins> {
    let nvrtc = Nvrtc::open(library).unwrap_or_else(|error| {
        panic!("NVRTC_LIB must name an NVRTC library, got {}: {error}", library.display())
    });
    fs::create_dir_all(kept).expect("a folder in target");
    let version = nvrtc.version();
    let jobs: Vec<Job<'_>> = units
        .iter()
        .flat_map(|unit| ARCHITECTURES.map(|(_, architecture)| (unit, architecture)))
        .map(|(unit, architecture)| {
            let options = options(architecture, unit.exact);
            let mut hash = DefaultHasher::new();
            (version, &options, &unit.text).hash(&mut hash);
            let kept =
                kept.join(format!("{}.{architecture}.{:016x}.cubin", unit.name, hash.finish()));
            Job { unit, architecture, options, kept }
        })
        .collect();

    on_all_cores(&jobs, |job| {
        if !job.kept.is_file() {
            nvrtc.run(job);
        }
    });
    list(kept, version, &jobs);
    let of_units: Vec<&[Job<'_>]> = jobs.chunks(ARCHITECTURES.len()).collect();
    on_all_cores(&of_units, |jobs| packed(jobs))
}

/// What `run` makes of each of `items`.
fn on_all_cores<T: Sync, R: Send>(items: &[T], run: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(index) else { return done };
            done.push((index, run(item)));
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut results: Vec<_> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads.min(items.len())).map(|_| scope.spawn(work)).collect();
        running
            .into_iter()
            .flat_map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)))
            .collect()
    });
    results.sort_by_key(|&(index, _)| index);
    results.into_iter().map(|(_, result)| result).collect()
}

/// Packs the cubins of one unit, for which `jobs` are, unless that is done already.
fn packed(jobs: &[Job<'_>]) -> Cubins {
    let mut hash = DefaultHasher::new();
    for job in jobs {
        job.kept.file_name().hash(&mut hash);
    }
    let name = format!("{}.{:016x}.lzma", jobs[0].unit.name, hash.finish());
    let packed = jobs[0].kept.with_file_name(name);
    let read = |job: &Job<'_>| fs::read(&job.kept).expect("a cubin that was compiled");
    let cubins: Vec<Vec<u8>> = jobs.iter().map(read).collect();
    if !packed.is_file() {
        write(&packed, &crate::pack::pack(&cubins.concat(), Kind::Code));
    }
    let capabilities = ARCHITECTURES.iter().map(|&(capability, _)| capability);
    Cubins { packed, parts: capabilities.zip(cubins.iter().map(Vec::len)).collect() }
}

/// What the run-time compiler is told too, and that the log is wanted.
fn options(architecture: &str, exact: bool) -> Vec<String> {
    let mut options = vec![
        format!("--gpu-architecture={architecture}"),
        "--std=c++17".to_owned(),
        "-default-device".to_owned(),
        "--ptxas-options=-v".to_owned(),
    ];
    if exact {
        options.push("--fmad=false".to_owned());
    }
    options
}

/// Says which logs belong to this build, for `scripts/nvrtc-check`.
fn list(kept: &Path, (major, minor): (c_int, c_int), jobs: &[Job<'_>]) {
    let mut text = format!("{major}.{minor}\n");
    for job in jobs {
        let log = job.kept.with_extension("log");
        let _ = writeln!(text, "{}\t{}\t{}", job.unit.name, job.architecture, log.display());
    }
    write(&kept.join("list.tsv"), text.as_bytes());
}

/// Whole or not at all.
fn write(path: &Path, bytes: &[u8]) {
    let partial = path.with_extension(format!("{}.partial", std::process::id()));
    fs::write(&partial, bytes).expect("target can be written to");
    fs::rename(&partial, path).expect("target can be written to");
}

type Program = *mut c_void;
type Create = unsafe extern "C" fn(
    *mut Program,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> c_int;
type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Get = unsafe extern "C" fn(Program, *mut u8) -> c_int;
type Destroy = unsafe extern "C" fn(*mut Program) -> c_int;
type Version = unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int;

struct Nvrtc(libloading::Library);

impl Nvrtc {
    fn open(path: &Path) -> Result<Self, libloading::Error> {
        // SAFETY: the caller names an NVRTC, whose initializers have no requirements.
        unsafe { libloading::Library::new(path) }.map(Self)
    }

    /// # Safety
    /// `T` is the type of the function.
    unsafe fn function<T: Copy>(&self, name: &str) -> T {
        // SAFETY: by the caller's contract.
        let found = unsafe { self.0.get::<T>(name.as_bytes()) };
        *found.unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    fn version(&self) -> (c_int, c_int) {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: the signature is that of nvrtc.h.
        unsafe { self.function::<Version>("nvrtcVersion")(&raw mut major, &raw mut minor) };
        (major, minor)
    }

    fn run(&self, job: &Job<'_>) {
        let c = |text: &str| CString::new(text).expect("no NUL in a kernel");
        let (source, file) = (c(&job.unit.text), c(&format!("{}.cu", job.unit.name)));
        let options: Vec<CString> = job.options.iter().map(|option| c(option)).collect();
        let options: Vec<_> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: the signatures are those of nvrtc.h, which allows calls from many threads; all
        // strings live until the end.
        let (status, log, cubin) = unsafe {
            let mut program = ptr::null_mut();
            let create: Create = self.function("nvrtcCreateProgram");
            let nothing = ptr::null();
            let status =
                create(&raw mut program, source.as_ptr(), file.as_ptr(), 0, nothing, nothing);
            assert_eq!(status, 0, "nvrtcCreateProgram of {}", job.unit.name);
            let compile: Compile = self.function("nvrtcCompileProgram");
            let status = compile(program, options.len() as c_int, options.as_ptr());
            let fetch = |size: &str, get: &str| {
                let (size, get): (Size, Get) = (self.function(size), self.function(get));
                let mut length = 0;
                size(program, &raw mut length);
                let mut bytes = vec![0; length];
                get(program, bytes.as_mut_ptr());
                bytes
            };
            let log = fetch("nvrtcGetProgramLogSize", "nvrtcGetProgramLog");
            let cubin = match status {
                0 => fetch("nvrtcGetCUBINSize", "nvrtcGetCUBIN"),
                _ => Vec::new(),
            };
            self.function::<Destroy>("nvrtcDestroyProgram")(&raw mut program);
            (status, log, cubin)
        };
        let text = String::from_utf8_lossy(&log);
        assert_eq!(status, 0, "{}.cu for {}:\n{text}", job.unit.name, job.architecture);
        write(&job.kept.with_extension("log"), text.trim_end_matches('\0').as_bytes());
        write(&job.kept, &cubin);
    }
}
