//! Golden files made by upstream bitsandbytes' portable path (`tests/golden/README.md` has the
//! provenance and the few places where numerics differ on purpose), on every instruction set that
//! this machine has.

use halfbyte::checkpoint::{Checkpoint, TensorRef};
use halfbyte::{
    BlockSize, Code4, Code8, DType, Element, NestedScales, NonFinite, Scales, Weight4, bf16, code,
    f16,
};
use serde_json::Value;
use std::path::PathBuf;

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden")
}

struct Case {
    facts: Value,
    file: Checkpoint,
}

impl Case {
    fn name(&self) -> &str {
        self.facts["name"].as_str().unwrap()
    }

    fn has(&self, key: &str) -> bool {
        self.facts["tensors"].get(key).is_some()
    }

    fn tensor(&self, key: &str) -> TensorRef<'_> {
        self.file.tensor(self.facts["tensors"][key].as_str().unwrap()).unwrap()
    }

    fn vec<T: Element>(&self, key: &str) -> Vec<T> {
        self.tensor(key).to_vec().unwrap()
    }

    fn bytes(&self, key: &str) -> &[u8] {
        self.tensor(key).bytes()
    }

    fn text(&self, key: &str) -> &str {
        self.facts[key].as_str().unwrap()
    }

    fn blocksize(&self, key: &str) -> BlockSize {
        BlockSize::new(self.facts[key].as_u64().unwrap() as usize).unwrap()
    }

    fn code(&self) -> Code4 {
        self.text("quant_type").parse().unwrap()
    }

    fn dtype(&self) -> DType {
        match self.text("dtype") {
            "f32" => DType::F32,
            "f16" => DType::F16,
            "bf16" => DType::BF16,
            other => panic!("{other}"),
        }
    }
}

/// All cases of one op; at least `least` of them, so that an emptied index fails.
fn cases(op: &str, least: usize) -> Vec<Case> {
    let index = std::fs::read(folder().join("index.json")).unwrap();
    let index: Value = serde_json::from_slice(&index).unwrap();
    let cases: Vec<Case> = index["cases"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|c| c["op"] == op)
        .map(|facts| {
            let file = Checkpoint::open(folder().join(facts["file"].as_str().unwrap())).unwrap();
            Case { facts: facts.clone(), file }
        })
        .collect();
    assert!(cases.len() >= least, "only {} cases of {op}", cases.len());
    cases
}

/// Calls a generic check with the case's element type.
macro_rules! with_dtype {
    ($case:expr, $f:ident) => {
        match $case.dtype() {
            DType::F32 => $f::<f32>(&$case),
            DType::F16 => $f::<f16>(&$case),
            DType::BF16 => $f::<bf16>(&$case),
        }
    };
}

/// Equal values; zeros compare by value, NaN never equal.
fn assert_values<T: Element>(got: &[T], expected: &[T], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        assert_eq!(g, e, "{what}[{i}]");
    }
}

fn quantize<T: Element>(input: &[T], code: Code4, blocksize: BlockSize) -> (Vec<u8>, Vec<f32>) {
    let blocks = blocksize.over(input.len());
    let mut packed = vec![0xEE; blocks.packed_len()];
    let mut absmax = vec![f32::NAN; blocks.count()];
    halfbyte::quantize_4bit(input, code, blocksize, NonFinite::Refuse, &mut packed, &mut absmax)
        .unwrap();
    (packed, absmax)
}

#[test]
fn codes_equal_upstream_bit_for_bit() {
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    let mut checked = 0;
    for case in cases("codes", 40) {
        let golden: Vec<f32> = case.vec("code");
        let arguments = &case.facts["arguments"];
        // What a case does not name has upstream's default.
        let flag = |key: &str| arguments.get(key).is_none_or(|v| v.as_bool().unwrap());
        let int = |key: &str, default: u32| {
            arguments.get(key).map_or(default, |v| v.as_u64().unwrap() as u32)
        };
        let map = match case.facts.get("function").and_then(Value::as_str) {
            Some("create_dynamic_map") => {
                code::dynamic_map(flag("signed"), int("max_exponent_bits", 7), int("total_bits", 8))
            }
            Some("create_linear_map") => {
                code::linear_map(flag("signed"), int("total_bits", 8), flag("add_zero"))
            }
            Some("create_fp8_map") => code::fp8_map(
                flag("signed"),
                int("exponent_bits", 5),
                int("precision_bits", 2),
                int("total_bits", 8),
            ),
            Some("create_normal_map") => {
                let offset = arguments.get("offset").map_or(0.9677083, |v| v.as_f64().unwrap());
                code::normal_map(offset, flag("use_extra_value"))
            }
            Some(other) => panic!("{other}"),
            None => {
                match case.text("quant_type") {
                    "nf4" => assert_eq!(bits(Code4::Nf4.table()), bits(&golden)),
                    // By value: upstream's index 8 is +0.0.
                    "fp4" => assert_values(Code4::Fp4.table(), &golden, "fp4"),
                    _ => {} // upstream knows more 4-bit tables than it can quantize to
                }
                continue;
            }
        };
        let map = map.unwrap_or_else(|e| panic!("{}: {e}", case.name()));
        assert_eq!(bits(&map), bits(&golden), "{}", case.name());
        checked += 1;
    }
    assert!(checked > 40);
    for (signed, name) in [(true, "codes/dynamic-signed"), (false, "codes/dynamic-unsigned")] {
        let case = cases("codes", 40).into_iter().find(|c| c.name() == name).unwrap();
        assert_eq!(bits(Code8::dynamic(signed).values()), bits(&case.vec::<f32>("code")));
    }
}

fn check_4bit<T: Element>(case: &Case) {
    let (code, blocksize) = (case.code(), case.blocksize("blocksize"));
    let input: Vec<T> = case.vec("input");
    let (packed, absmax) = quantize(&input, code, blocksize);
    assert_eq!(packed, case.bytes("packed"), "{}: packed", case.name());
    assert_values(&absmax, &case.vec::<f32>("absmax"), case.name());

    let scales = Scales::Plain(&absmax);
    let mut out = vec![T::default(); input.len()];
    halfbyte::dequantize_4bit(&packed, &scales, code.table(), blocksize, &mut out).unwrap();
    assert_values(&out, &case.vec::<T>("decoded"), case.name());
    if case.has("decoded_f16") {
        let mut out = vec![f16::ZERO; input.len()];
        halfbyte::dequantize_4bit(&packed, &scales, code.table(), blocksize, &mut out).unwrap();
        assert_values(&out, &case.vec::<f16>("decoded_f16"), case.name());
        let mut out = vec![bf16::ZERO; input.len()];
        halfbyte::dequantize_4bit(&packed, &scales, code.table(), blocksize, &mut out).unwrap();
        assert_values(&out, &case.vec::<bf16>("decoded_bf16"), case.name());
    }
}

#[test]
fn quantize_and_dequantize_4bit() {
    for case in cases("quantize_4bit", 100) {
        with_dtype!(case, check_4bit);
    }
}

fn check_double_quant<T: Element>(case: &Case) {
    let (code, blocksize) = (case.code(), case.blocksize("blocksize"));
    let input: Vec<T> = case.vec("input");
    let (packed, absmax) = quantize(&input, code, blocksize);
    assert_eq!(packed, case.bytes("packed"), "{}: packed", case.name());
    assert_values(&absmax, &case.vec::<f32>("absmax_f32"), case.name());

    let nested = case.blocksize("nested_blocksize");
    let mut codes = vec![0; absmax.len()];
    let mut absmax2 = vec![0.0; nested.over(absmax.len()).count()];
    let offset = halfbyte::quantize_absmax(&absmax, nested, &mut codes, &mut absmax2).unwrap();
    assert_eq!(offset.to_bits(), case.vec::<f32>("offset")[0].to_bits(), "{}", case.name());
    assert_eq!(codes, case.bytes("absmax"), "{}: absmax", case.name());
    assert_values(&absmax2, &case.vec::<f32>("nested_absmax"), case.name());

    let scales = Scales::Nested(NestedScales {
        absmax: &codes,
        code: Code8::dynamic(true).values(),
        absmax2: &absmax2,
        blocksize: nested,
        offset,
    });
    let mut out = vec![T::default(); input.len()];
    halfbyte::dequantize_4bit(&packed, &scales, code.table(), blocksize, &mut out).unwrap();
    assert_values(&out, &case.vec::<T>("decoded"), case.name());
}

#[test]
fn double_quantization() {
    for case in cases("double_quant", 8) {
        with_dtype!(case, check_double_quant);
    }
}

fn check_blockwise<T: Element>(case: &Case) {
    let blocksize = case.blocksize("blocksize");
    let codes_file = Checkpoint::open(folder().join("codes.safetensors")).unwrap();
    let values: Vec<f32> = codes_file.tensor(case.text("code")).unwrap().to_vec().unwrap();
    let code = Code8::new(&values).unwrap();
    let input: Vec<T> = case.vec("input");
    let mut q = vec![0; input.len()];
    let mut absmax = vec![0.0; blocksize.over(input.len()).count()];
    halfbyte::quantize_blockwise(&input, &code, blocksize, NonFinite::Refuse, &mut q, &mut absmax)
        .unwrap();
    assert_eq!(q, case.bytes("codes"), "{}: codes", case.name());
    assert_values(&absmax, &case.vec::<f32>("absmax"), case.name());
    let mut out = vec![T::default(); input.len()];
    halfbyte::dequantize_blockwise(&q, &absmax, code.values(), blocksize, &mut out).unwrap();
    assert_values(&out, &case.vec::<T>("decoded"), case.name());
}

#[test]
fn quantize_and_dequantize_blockwise() {
    for case in cases("blockwise", 20) {
        // The op of this crate takes 256-entry codes and the block sizes of checkpoints.
        let blocksize = case.facts["blocksize"].as_u64().unwrap() as usize;
        if BlockSize::new(blocksize).is_ok() {
            with_dtype!(case, check_blockwise);
        }
    }
}

fn check_matmul<T: Element>(case: &Case) {
    let shape: Vec<usize> = case.facts["weight_shape"]
        .as_array()
        .unwrap()
        .iter()
        .map(|d| d.as_u64().unwrap() as usize)
        .collect();
    let (n, k) = (shape[0], shape[1]);
    let (plain, absmax2);
    let scales = if case.facts["nested"] == true {
        absmax2 = case.vec::<f32>("nested_absmax");
        Scales::Nested(NestedScales {
            absmax: case.bytes("absmax"),
            code: Code8::dynamic(true).values(),
            absmax2: &absmax2,
            blocksize: BlockSize::B256,
            offset: case.vec::<f32>("offset")[0],
        })
    } else {
        plain = case.vec::<f32>("absmax");
        Scales::Plain(&plain)
    };
    let code = case.code();
    let weight =
        Weight4::new(case.bytes("packed"), scales, code.table(), case.blocksize("blocksize"), n, k)
            .unwrap();
    let f64s = |key: &str| -> Vec<f64> {
        case.bytes(key).chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
    };
    // Float32 accumulation over at most a few hundred products of order 1, then one rounding.
    let tolerance = match T::DTYPE {
        DType::F32 => 2e-5,
        DType::F16 => 1.0 / 1024.0,
        DType::BF16 => 1.0 / 128.0,
    };
    let close = |got: &[T], expected: &[f64], what: &str| {
        assert_eq!(got.len(), expected.len(), "{} {what}", case.name());
        for (g, e) in got.iter().zip(expected) {
            let g = f64::from(g.to_f32());
            assert!(
                (g - e).abs() <= tolerance * (1.0 + e.abs()),
                "{} {what}: {g} instead of {e}",
                case.name()
            );
        }
    };
    let a: Vec<T> = case.vec("a");
    let rows = a.len() / k;
    let bias = case.has("bias").then(|| case.vec::<T>("bias"));
    let mut y = vec![T::default(); rows * n];
    halfbyte::matmul_4bit(&a, rows, &weight, bias.as_deref(), &mut y).unwrap();
    close(&y, &f64s("y_f64"), "y");
    let mut grad = vec![T::default(); rows * k];
    halfbyte::matmul_4bit_grad_input(&case.vec::<T>("grad_out"), rows, &weight, &mut grad).unwrap();
    close(&grad, &f64s("grad_a_f64"), "grad_a");
}

#[test]
fn matmul_4bit_and_its_gradient() {
    for case in cases("matmul_4bit", 30) {
        with_dtype!(case, check_matmul);
    }
}

#[test]
fn checkpoints_written_by_upstream_load_and_cross_back() {
    for case in cases("linear4bit", 8) {
        let params = case.file.params_4bit("weight").unwrap();
        let expected = Checkpoint::open(folder().join(case.text("expected_file"))).unwrap();
        let decoded = expected.tensor(case.facts["tensors"]["decoded"].as_str().unwrap()).unwrap();
        let out = params.dequantize::<bf16>().unwrap();
        assert_values(&out, &decoded.to_vec::<bf16>().unwrap(), case.name());

        // Written again, every tensor has the same bytes, dtype and shape.
        let path = std::env::temp_dir().join(format!(
            "halfbyte-golden-{}-{}.safetensors",
            std::process::id(),
            case.name().replace('/', "-")
        ));
        let mut writer = halfbyte::checkpoint::CheckpointWriter::new();
        writer.add_4bit("weight", &params);
        writer.write(&path).unwrap();
        let again = Checkpoint::open(&path).unwrap();
        for name in case.file.names().filter(|n| n.starts_with("weight")) {
            let (ours, theirs) = (again.tensor(name).unwrap(), case.file.tensor(name).unwrap());
            assert_eq!(ours.bytes(), theirs.bytes(), "{} {name}", case.name());
            assert_eq!((ours.dtype(), ours.shape()), (theirs.dtype(), theirs.shape()));
        }
        std::fs::remove_file(path).unwrap();
    }
}

/// `HALFBYTE_ISA` is read once per process, so the other instruction sets get processes of their own.
#[test]
fn every_other_instruction_set_agrees() {
    const THIS: &str = "every_other_instruction_set_agrees";
    let run = |isa: &str| {
        std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--skip", THIS])
            .env("HALFBYTE_ISA", isa)
            .output()
            .unwrap()
    };
    for isa in halfbyte::isa::available() {
        if isa != halfbyte::isa::selected().unwrap() {
            let output = run(isa.name());
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success(), "HALFBYTE_ISA={isa}:\n{text}");
            assert!(text.contains("6 passed"), "{text}");
        }
    }
    let output = run("sse9");
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("Isa { got: \"sse9\", available: [Scalar"), "{text}");
}
