//! Expands the includes of `kernels/*.cu` and, when `NVRTC_LIB` names an NVRTC, compiles each of them
//! for every architecture below. Without it the crate builds all the same, and kernels are compiled
//! when they are first used.

#[path = "build/nvrtc.rs"]
mod nvrtc;
#[path = "build/pack.rs"]
mod pack;
#[path = "build/spirv.rs"]
mod spirv;

use std::collections::BTreeSet;
use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

/// A path as a string literal of Rust.
fn literal(path: &Path) -> String {
    format!("{:?}", path.to_str().expect("a path that Rust source can hold"))
}

fn main() {
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo"));
    let kernels = here.join("kernels");
    println!("cargo::rerun-if-changed=kernels");
    println!("cargo::rerun-if-env-changed=NVRTC_LIB");
    let mut names: Vec<String> = fs::read_dir(&kernels)
        .expect("the folder of kernels")
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter_map(|name| name.strip_suffix(".cu").map(str::to_owned))
        .collect();
    names.sort();

    let mut units = Vec::new();
    let mut cuda_only = Vec::new();
    for name in &names {
        let text = expand(&kernels.join(format!("{name}.cu")), &mut BTreeSet::new());
        let marked = |what| text.lines().take(5).any(|line| line == format!("// halfbyte: {what}"));
        cuda_only.push(marked("cuda"));
        units.push(nvrtc::Unit { exact: marked("exact"), name: name.clone(), text });
    }
    let nvrtc_lib = env::var_os("NVRTC_LIB").filter(|path| !path.is_empty());
    let cubins = nvrtc_lib.map(|library| {
        // OUT_DIR is <target>/<profile>/build/<package-hash>/out.
        let target = out.ancestors().nth(4).expect("cargo's folders");
        nvrtc::compile(Path::new(&library), &units, &target.join("nvrtc"))
    });

    let mut table = String::new();
    let (clang, mut spirv) = (spirv::compiler(), String::new());
    for (index, (unit, &cuda_only)) in units.iter().zip(&cuda_only).enumerate() {
        let (name, exact) = (&unit.name, unit.exact);
        let expanded = out.join(format!("{name}.cu"));
        fs::write(&expanded, &unit.text).expect("OUT_DIR can be written to");
        if let Some(clang) = clang.as_ref().filter(|_| !cuda_only) {
            let code = spirv::compile(clang, &here, &expanded);
            let file = out.join(format!("{name}.spirv.lzma"));
            fs::write(&file, pack::pack(&code)).expect("OUT_DIR can be written to");
            let _ = writeln!(spirv, "    ({name:?}, include_bytes!({})),", literal(&file));
        }

        let mut embedded = String::new();
        let files = cubins.iter().flat_map(|cubins| &cubins[index]);
        for ((capability, _), file) in nvrtc::ARCHITECTURES.into_iter().zip(files) {
            let _ =
                writeln!(embedded, "        ({capability}, include_bytes!({})),", literal(file));
        }
        let _ = writeln!(
            table,
            "/// `kernels/{name}.cu`.\npub static {}: Source = Source::new(\n    {name:?},\n    \
             include_str!({}),\n    {exact},\n    {cuda_only},\n    &[\n{embedded}    ],\n);",
            name.to_uppercase(),
            literal(&expanded)
        );
    }
    let all: Vec<String> = names.iter().map(|name| format!("&{}", name.to_uppercase())).collect();
    let _ =
        writeln!(table, "/// All of them.\npub static ALL: &[&Source] = &[{}];", all.join(", "));
    fs::write(out.join("sources.rs"), table).expect("OUT_DIR can be written to");
    let spirv = format!(
        "/// SPIR-V of the portable sources, packed. Empty when the build had no `SPIRV_CLANG`.\n\
         pub(super) static SPIRV: &[(&str, &[u8])] = &[\n{spirv}];\n"
    );
    fs::write(out.join("spirv.rs"), spirv).expect("OUT_DIR can be written to");
}

/// The text of a file with every `#include "x"` replaced by that file, which is where the text of a
/// kernel may come to need no files: NVRTC, hiprtc and OpenCL get one string. A header with an
/// include guard comes once.
fn expand(path: &Path, seen: &mut BTreeSet<PathBuf>) -> String {
    let text = fs::read_to_string(path)
        .unwrap_or_else(|error| panic!("{}: cannot be read: {error}", path.display()));
    let once = text.contains("#ifndef HALFBYTE_");
    if once && !seen.insert(path.to_owned()) {
        return String::new();
    }
    let mut out = String::with_capacity(text.len());
    for line in text.lines() {
        let included =
            line.trim_start().strip_prefix("#include \"").and_then(|rest| rest.split('"').next());
        match included {
            // Only for the emulator, which has files.
            Some("emulator.h") => {}
            Some(name) => out.push_str(&expand(&path.with_file_name(name), seen)),
            None => {
                out.push_str(line);
                out.push('\n');
            }
        }
    }
    out
}
