//! Checkpoints: round trips, damage, and a seeded run of the fuzz targets' bodies.

use halfbyte::checkpoint::{Checkpoint, CheckpointWriter};
use halfbyte::{
    BlockSize, Code4, Error, Params4bit, Params8bit, QuantMeta, QuantStorage, bf16, f16,
};
use std::path::{Path, PathBuf};

/// A folder that is removed at the end of the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("halfbyte-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn weight(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i as f32) * 0.731).sin() * (1.0 + (i % 13) as f32)).collect()
}

fn params(code: Code4, shape: &[usize], nested: bool) -> Params4bit {
    let p = Params4bit::quantize(&weight(shape.iter().product()), shape, code, BlockSize::B64);
    let p = p.unwrap();
    if nested { p.compress_statistics().unwrap() } else { p }
}

#[test]
fn every_kind_of_weight_round_trips() {
    let folder = Folder::new("roundtrip");
    let storages = [QuantStorage::U8, QuantStorage::BF16, QuantStorage::F16, QuantStorage::F32];
    let mut all = Vec::new();
    for code in Code4::ALL {
        for nested in [false, true] {
            for storage in storages {
                for shape in [&[64, 96][..], &[7, 13], &[1], &[0, 64], &[2, 3, 5]] {
                    all.push(params(code, shape, nested).with_storage(storage));
                }
            }
        }
    }
    let mut writer = CheckpointWriter::new();
    for (i, p) in all.iter().enumerate() {
        writer.add_4bit(&format!("layer{i}.weight"), p);
    }
    writer.add("norm.weight", &[3], &[bf16::ONE; 3]).unwrap();
    writer.add("half", &[2], &[f16::from_f32(0.5), f16::NEG_INFINITY]).unwrap();
    let path = folder.file("model.safetensors");
    writer.write(&path).unwrap();

    for opened in [&path, &folder.0] {
        let checkpoint = Checkpoint::open(opened).unwrap();
        assert_eq!(checkpoint.names_4bit().count(), all.len());
        for (i, p) in all.iter().enumerate() {
            assert_eq!(&checkpoint.params_4bit(&format!("layer{i}.weight")).unwrap(), p);
        }
        assert_eq!(checkpoint.tensor("norm.weight").unwrap().to_vec::<f32>().unwrap(), [1.0; 3]);
        assert_eq!(
            checkpoint.tensor("half").unwrap().to_vec::<f32>().unwrap(),
            [0.5, f32::NEG_INFINITY]
        );
    }
    let left = std::fs::read_dir(&folder.0).unwrap().count();
    assert_eq!(left, 1, "temporary files were left behind");
}

#[test]
fn shards_are_found_through_their_index() {
    let folder = Folder::new("shards");
    let (a, b) = (params(Code4::Nf4, &[64, 64], true), params(Code4::Fp4, &[64, 64], false));
    for (file, name, p) in [("1.safetensors", "a", &a), ("2.safetensors", "b", &b)] {
        let mut writer = CheckpointWriter::new();
        writer.add_4bit(name, p);
        writer.write(folder.file(file)).unwrap();
    }
    let index = folder.file("model.safetensors.index.json");
    let write = |map: &str| std::fs::write(&index, format!(r#"{{"weight_map": {map}}}"#)).unwrap();

    write(r#"{"a": "1.safetensors", "a.absmax": "1.safetensors", "b": "2.safetensors"}"#);
    let checkpoint = Checkpoint::open(&folder.0).unwrap();
    assert_eq!(checkpoint.params_4bit("a").unwrap(), a);
    assert_eq!(checkpoint.params_4bit("b").unwrap(), b);

    for (map, expect) in [
        (r#"{"a": "1.safetensors", "c": "2.safetensors"}"#, "expected tensor \"c\""),
        (r#"{"a": "3.safetensors"}"#, "3.safetensors: No such file"),
        (r#"{"a": "../1.safetensors"}"#, "the name of a file beside it"),
        (r#"{"a": 1}"#, "no file name for \"a\""),
        ("[]", "expected an object under \"weight_map\""),
    ] {
        write(map);
        let message = Checkpoint::open(&folder.0).unwrap_err().to_string();
        assert!(message.contains(expect), "{map}\n  gave {message:?}");
    }
}

#[test]
fn a_missing_or_mistyped_part_is_named() {
    let folder = Folder::new("parts");
    let p = params(Code4::Nf4, &[64, 64], true);
    let path = folder.file("x.safetensors");
    for (suffix, expect) in [
        ("absmax", "tensor \"w.absmax\" must have dtype U8, got F32"),
        ("nested_absmax", "and the scales disagree"),
        ("nested_quant_map", "expected 256 float32 values, got 2"),
        ("quant_map", "expected 16 float32 values, got 2"),
        ("quant_state.bitsandbytes__nf4", "must have dtype U8, got F32"),
    ] {
        let mut writer = CheckpointWriter::new();
        writer.add_4bit("w", &p);
        writer.add(&format!("w.{suffix}"), &[2], &[1.0f32, 2.0]).unwrap();
        writer.write(&path).unwrap();
        let message = Checkpoint::open(&path).unwrap().params_4bit("w").unwrap_err().to_string();
        assert!(message.contains(expect), "{suffix}\n  gave {message:?}");
    }
    let mut writer = CheckpointWriter::new();
    writer.add("w", &[1], &[1.0f32]).unwrap();
    writer.write(&path).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let message = checkpoint.params_4bit("w").unwrap_err().to_string();
    assert!(message.contains("\"w.quant_state.bitsandbytes__nf4\""), "{message}");
    assert!(checkpoint.tensor("v").unwrap_err().to_string().contains("expected tensor \"v\""));
}

#[test]
fn a_failed_write_leaves_what_was_there() {
    let folder = Folder::new("atomic");
    let path = folder.file("x.safetensors");
    let mut writer = CheckpointWriter::new();
    writer.add("a", &[1], &[1.0f32]).unwrap();
    writer.write(&path).unwrap();
    let before = std::fs::read(&path).unwrap();

    // A folder where the file should go: the rename fails after the bytes are written.
    let blocked = folder.file("blocked");
    std::fs::create_dir_all(blocked.join("x")).unwrap();
    assert!(writer.write(&blocked).unwrap_err().to_string().contains("blocked"));
    assert!(writer.write(folder.file("no/such/folder.safetensors")).is_err());
    assert!(writer.write(Path::new("/")).unwrap_err().to_string().contains("file name"));
    assert_eq!(std::fs::read(&path).unwrap(), before);
    assert_eq!(std::fs::read_dir(&folder.0).unwrap().count(), 2);
}

/// xorshift64*: enough to damage bytes reproducibly.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % n
    }

    /// Flips, overwrites, cuts or repeats a few bytes.
    fn damage(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..=self.below(4) {
            if bytes.is_empty() {
                return;
            }
            let at = self.below(bytes.len());
            match self.below(5) {
                0 => bytes[at] ^= 1 << self.below(8),
                1 => bytes[at] = b"0123456789-[]{}\",:.eE"[self.below(21)],
                2 => bytes.truncate(at),
                3 => drop(bytes.drain(at..(at + 1 + self.below(8)).min(bytes.len()))),
                _ => bytes.insert(at, self.below(256) as u8),
            }
        }
    }
}

#[test]
fn damaged_states_are_refused_or_read_consistently() {
    let mut random = Random(0x5EED);
    let seeds = [params(Code4::Nf4, &[64, 96], true), params(Code4::Fp4, &[5], false)];
    let (mut read, mut refused) = (0, 0);
    for i in 0..40_000 {
        let mut json = seeds[i % 2].state().meta().to_json().into_bytes();
        random.damage(&mut json);
        match QuantMeta::from_json(&json, "w") {
            Ok(meta) => {
                read += 1;
                let again = QuantMeta::from_json(meta.to_json().as_bytes(), "w").unwrap();
                assert!(again == meta || meta.nested.is_some_and(|n| n.offset.is_nan()));
            }
            Err(e) => {
                refused += 1;
                assert!(!e.to_string().is_empty());
            }
        }
    }
    assert!(read > 200 && refused > 200, "the damage is one-sided: {read} read, {refused} not");
}

#[test]
fn damaged_files_never_panic() {
    let folder = Folder::new("damage");
    let path = folder.file("x.safetensors");
    let a = params(Code4::Nf4, &[16, 24], true);
    let b = params(Code4::Fp4, &[5], false).with_storage(QuantStorage::F32);
    let mut writer = CheckpointWriter::new();
    writer.add_4bit("a", &a);
    writer.add_4bit("b", &b);
    writer.write(&path).unwrap();
    let good = std::fs::read(&path).unwrap();
    // Damage mostly lands in the header and the JSON documents, where the structure is.
    let mut random = Random(0xF11E);
    let mut loaded = 0;
    for _ in 0..3000 {
        let mut bytes = good.clone();
        random.damage(&mut bytes);
        std::fs::write(&path, &bytes).unwrap();
        if let Ok(checkpoint) = Checkpoint::open(&path) {
            for name in checkpoint.names().map(str::to_owned).collect::<Vec<_>>() {
                if let Ok(p) = checkpoint.params_4bit(&name) {
                    loaded += 1;
                    assert_eq!(p.dequantize::<f32>().unwrap().len(), p.state().numel());
                }
            }
        }
    }
    assert!(loaded > 100, "only {loaded} weights survived: the damage never gets past the header");
    for cut in 0..good.len() {
        std::fs::write(&path, &good[..cut]).unwrap();
        let message = Checkpoint::open(&path).unwrap_err().to_string();
        assert!(message.contains("x.safetensors"), "cut at {cut}: {message}");
    }
}

#[test]
fn eight_bit_weights_round_trip_and_damage_is_named() {
    let folder = Folder::new("eight-bit");
    let path = folder.file("model.safetensors");
    let all = [[3, 70], [0, 8], [5, 1], [1, 0]]
        .map(|shape| Params8bit::quantize(&weight(shape[0] * shape[1]), shape).unwrap());
    let mut writer = CheckpointWriter::new();
    for (i, params) in all.iter().enumerate() {
        writer.add_8bit(&format!("{i}.weight"), params).unwrap();
    }
    let bad = writer.add_8bit("kernel", &all[0]);
    assert!(matches!(bad, Err(Error::State { tensor, .. }) if tensor == "kernel"));
    writer.add("plain.weight", &[2], &[1.0f32, 2.0]).unwrap();
    writer.write(&path).unwrap();

    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.names_8bit().count(), all.len());
    for (i, params) in all.iter().enumerate() {
        assert_eq!(&checkpoint.params_8bit(&format!("{i}.weight")).unwrap(), params);
    }
    assert_eq!(checkpoint.tensor("0.weight_format").unwrap().shape(), [0usize; 0]);
    let plain = checkpoint.params_8bit("plain.weight");
    assert!(matches!(plain, Err(Error::TensorDType { tensor, .. }) if tensor == "plain.weight"));

    // Scales of another length; a layout that is not row-major.
    for (name, shape, data) in
        [("0.SCB", &[2][..], vec![1.0f32, 2.0]), ("0.weight_format", &[1], vec![1.0])]
    {
        let mut writer = CheckpointWriter::new();
        writer.add_8bit("0.weight", &all[0]).unwrap();
        writer.add(name, shape, &data).unwrap();
        writer.write(&path).unwrap();
        let damaged = Checkpoint::open(&path).unwrap().params_8bit("0.weight");
        let message = damaged.unwrap_err().to_string();
        assert!(message.contains("0."), "{message}");
    }
}
