//! Optimizer steps under a driver whose kernels take 4096 bytes of arguments: several launches.

mod common;
mod placed;
mod stepped;

use halfbyte::optim::Rule;
use std::env;
use stepped::{Case, shapes};

#[test]
fn old_drivers_take_smaller_tables() {
    if !common::on_hardware() {
        // SAFETY: the only test of this program; nothing else runs yet.
        unsafe { env::set_var("HALFBYTE_EMULATOR_DRIVER", "12000") };
        for device in common::cuda_devices() {
            assert_eq!(device.parameter_bytes(), 4096, "{device}");
        }
    }
    let sizes: Vec<usize> = (0..14).map(|i| 90 * i).collect();
    for (rule, bits) in [(Rule::Adam, 8), (Rule::Adam, 32), (Rule::AdEmaMix, 8)] {
        let mut case = Case { steps: 2, ..Case::new(rule, bits, shapes(&sizes)) };
        case.hyper.max_unorm = 0.1;
        assert!(case.shapes.len() > 2 * 49);
        case.run_on_portable_devices();
    }
}
