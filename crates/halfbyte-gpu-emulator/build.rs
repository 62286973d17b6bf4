//! Compiles `cpp/` and the kernels of `halfbyte-gpu` into shared libraries, and leaves them in
//! `target/emulator` as well, where the Python tests find them.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo"));
    let cpp = here.join("cpp");
    let kernels = here.join("../halfbyte-gpu/kernels");
    for folder in [&cpp, &kernels] {
        println!("cargo::rerun-if-changed={}", folder.display());
    }

    let machine = ["emulator.cpp", "races.cpp", "driver.cpp", "level_zero.cpp"];
    let machine: Vec<PathBuf> = machine.iter().map(|name| cpp.join(name)).collect();
    let mut units = files(&kernels, "cu");
    units.sort();
    // For work on one kernel: HALFBYTE_EMULATOR_ONLY=blockwise,int8_rows leaves the others out.
    println!("cargo::rerun-if-env-changed=HALFBYTE_EMULATOR_ONLY");
    if let Ok(only) = env::var("HALFBYTE_EMULATOR_ONLY") {
        units.retain(|path| {
            only.split(',').any(|name| path.file_stem().is_some_and(|stem| stem == name))
        });
    }
    units.push(cpp.join("racy.cu"));
    let includes = [&cpp, &kernels];
    let mut objects = compiler(&includes).files(&machine).compile_intermediates();
    // Every access to memory is told to races.cpp. One at an address that is no multiple of what it
    // reads or writes, which a GPU refuses, ends the process by SIGILL.
    let mut kernels = compiler(&includes);
    kernels.flag("-fsanitize=thread,alignment").flag("-fsanitize-undefined-trap-on-error");
    objects.extend(kernels.files(&units).compile_intermediates());
    link(&objects, &["-Wl,--wrap=memcpy,--wrap=memset"], &out, "libcuda_emulated.so");

    let mut runtime = files(&cpp, "cpp");
    runtime.retain(|path| {
        path.file_stem().is_some_and(|stem| stem.to_string_lossy().starts_with("cudart"))
    });
    runtime.sort();
    let objects = compiler(&[&cpp]).files(&runtime).compile_intermediates();
    // See cudart_driver.cpp.
    link(&objects, &["-Wl,-soname,libcuda.so.1"], &out, "libcudart_emulated.so");
    println!("cargo::rustc-env=HALFBYTE_EMULATOR_DIR={}", out.display());
}

fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("the folder of kernels");
    let paths = entries.filter_map(|entry| entry.ok().map(|entry| entry.path()));
    paths.filter(|path| path.extension().is_some_and(|found| found == extension)).collect()
}

fn compiler(includes: &[&PathBuf]) -> cc::Build {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(2).pic(true).warnings(false).cargo_metadata(false);
    build.flag("-ffp-contract=off").flag("-fvisibility=hidden").flag("-fno-strict-aliasing");
    build.flag("-xc++").define("EMULATED", "1");
    build.flag_if_supported("-Wno-unknown-pragmas");
    for folder in includes {
        build.include(folder);
    }
    build
}

fn link(objects: &[PathBuf], flags: &[&str], out: &Path, name: &str) {
    let tool = compiler(&[]).get_compiler();
    let path = out.join(name);
    let mut link = Command::new(tool.path());
    link.args(tool.args().iter().filter(|flag| *flag != "-xc++"));
    link.args(["-shared", "-Wl,-z,defs", "-o"]).arg(&path).args(objects).args(flags);
    link.args(["-lpthread", "-ldl"]);
    let status = link.status().expect("the C++ compiler runs");
    assert!(status.success(), "linking {name} failed: {link:?}");
    keep(&path, name);
}

/// A copy at a place that does not depend on cargo's hashes: `<target>/emulator`.
fn keep(path: &Path, name: &str) {
    // OUT_DIR is <target>/<profile>/build/<package-hash>/out.
    let Some(target) = path.ancestors().nth(5) else { return };
    let folder = target.join("emulator");
    fs::create_dir_all(&folder).expect("a folder in target");
    let partial = folder.join(format!("{name}.{}", std::process::id()));
    fs::copy(path, &partial).expect("a copy in target/emulator");
    fs::rename(&partial, folder.join(name)).expect("a copy in target/emulator");
}
