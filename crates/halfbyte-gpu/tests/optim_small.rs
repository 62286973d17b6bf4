//! Optimizer steps on a runtime whose kernels take 4096 bytes of arguments, as on ROCm and old CUDA
//! drivers: more than 49 tensors take several launches.

mod common;
mod placed;
mod stepped;

use halfbyte::optim::Rule;
use halfbyte_gpu::rocm_device;
use std::env;
use stepped::{Case, shapes};

#[test]
fn smaller_tables_take_several_launches() {
    common::set_up();
    if !common::on_hardware() {
        let emulator = halfbyte_gpu_emulator::path();
        // SAFETY: the only test of this program; nothing else runs yet.
        unsafe {
            env::set_var("HALFBYTE_HIP", emulator);
            env::set_var("HALFBYTE_HIPRTC", emulator);
        }
    }
    let device = match rocm_device(0) {
        Ok(device) => device,
        Err(error) if common::on_hardware() => return eprintln!("not tested on ROCm: {error}"),
        Err(error) => panic!("{error}"),
    };
    assert_eq!(device.parameter_bytes(), 4096, "{device}");
    let sizes: Vec<usize> = (0..14).map(|i| 90 * i).collect();
    for (rule, bits) in [(Rule::Adam, 8), (Rule::Adam, 32), (Rule::AdEmaMix, 8)] {
        let mut case = Case { steps: 2, ..Case::new(rule, bits, shapes(&sizes)) };
        case.hyper.max_unorm = 0.1;
        assert!(case.shapes.len() > 2 * 49);
        case.run(device);
    }
}
