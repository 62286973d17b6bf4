//! Expands the includes of `kernels/*.cu` and, when `NVRTC_LIB` names an NVRTC, compiles each of them
//! for every architecture below. Without it the crate builds all the same, and kernels are compiled
//! when they are first used.

#[path = "build/nvrtc.rs"]
mod nvrtc;
#[path = "build/pack.rs"]
mod pack;
#[path = "build/spirv.rs"]
mod spirv;

use pack::Kind;
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
    let (clang, mut spirv) = (spirv::compiler(), Vec::new());
    for (index, (unit, &cuda_only)) in units.iter().zip(&cuda_only).enumerate() {
        let (name, exact) = (&unit.name, unit.exact);
        if let Some(clang) = clang.as_ref().filter(|_| !cuda_only) {
            let expanded = out.join(format!("{name}.cu"));
            fs::write(&expanded, &unit.text).expect("OUT_DIR can be written to");
            spirv.push((name, spirv::compile(clang, &here, &expanded)));
        }
        let embedded = cubins.as_ref().map_or("Packed::NONE".to_owned(), |cubins| {
            pack::expression(&cubins[index].packed, &cubins[index].parts)
        });
        let _ = writeln!(
            table,
            "/// `kernels/{name}.cu`.\npub static {}: Source = Source {{ name: {name:?}, \
             text: None, exact: {exact}, cuda_only: {cuda_only}, cubins: {embedded} }};",
            name.to_uppercase(),
        );
    }
    let all: Vec<String> = names.iter().map(|name| format!("&{}", name.to_uppercase())).collect();
    let _ =
        writeln!(table, "/// All of them.\npub static ALL: &[&Source] = &[{}];", all.join(", "));
    let texts: Vec<_> = units.iter().map(|unit| (&unit.name, unit.text.as_bytes())).collect();
    let _ = writeln!(
        table,
        "/// Their texts, by name.\npub(crate) static TEXTS: Packed<&str> = {};",
        together(&texts, &out.join("texts.lzma"), Kind::Text)
    );
    fs::write(out.join("sources.rs"), table).expect("OUT_DIR can be written to");
    let spirv = format!(
        "/// SPIR-V of the portable sources. Empty when the build had no `SPIRV_CLANG`.\n\
         pub(super) static SPIRV: Packed<&str> = {};\n",
        together(&spirv, &out.join("spirv.lzma"), Kind::Code)
    );
    fs::write(out.join("spirv.rs"), spirv).expect("OUT_DIR can be written to");
}

/// Packs parts with names into one file, and returns its `Packed` as an expression.
fn together(parts: &[(&String, impl AsRef<[u8]>)], file: &Path, kind: Kind) -> String {
    if parts.is_empty() {
        return "Packed::NONE".to_owned();
    }
    let all: Vec<&[u8]> = parts.iter().map(|(_, part)| part.as_ref()).collect();
    fs::write(file, pack::pack(&all.concat(), kind)).expect("OUT_DIR can be written to");
    let lengths: Vec<_> = parts.iter().map(|(name, part)| (name, part.as_ref().len())).collect();
    pack::expression(file, &lengths)
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
