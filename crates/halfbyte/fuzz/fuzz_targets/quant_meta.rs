//! Any bytes in place of a quantization state's JSON: an error or a state that survives a round
//! trip, never a panic.
#![no_main]

use halfbyte::QuantMeta;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(meta) = QuantMeta::from_json(bytes, "fuzz") {
        let again = QuantMeta::from_json(meta.to_json().as_bytes(), "fuzz").expect("own output");
        assert!(again == meta || meta.nested.is_some_and(|n| n.offset.is_nan()));
    }
});
