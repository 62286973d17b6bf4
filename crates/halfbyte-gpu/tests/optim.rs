//! Optimizer steps equal the core's, bit for bit, on every device at hand.

mod common;
mod placed;
mod stepped;

use halfbyte::Code8;
use halfbyte::code::{dynamic_map, linear_map};
use halfbyte::optim::{Hyper, Rule};
use halfbyte::{DType, bf16};
use halfbyte_gpu::ops::optim as device_optim;
use halfbyte_gpu::{DeviceBuffer, DeviceSlice, Error, Stream};
use placed::Random;
use stepped::{Case, Rounded, Shape, shapes, wild};

const SIZES: [usize; 6] = [0, 1, 255, 256, 257, 4097];

fn of_one_type(dtype: DType, sizes: &[usize]) -> Vec<Shape> {
    let shape = |&n| Shape { n, param: dtype, grad: dtype, rounded: Rounded::Nearest };
    sizes.iter().map(shape).collect()
}

/// Every rule and width over all types, roundings and ragged sizes, in one launch.
#[test]
fn every_rule_width_type_rounding_and_size() {
    for rule in Rule::ALL {
        for bits in [8, 32] {
            let case = Case::new(rule, bits, shapes(&SIZES));
            case.run_on_portable_devices();
        }
    }
}

#[test]
fn every_architecture() {
    for bits in [8, 32] {
        let case = Case { steps: 2, ..Case::new(Rule::Adam, bits, shapes(&[1, 300, 9000])) };
        for device in common::devices() {
            case.run(device);
        }
    }
}

/// One table, several tables, several launches.
#[test]
fn groups_of_many_tensors() {
    for count in [1, 7, 49, 50, 200, 408, 409, 1000] {
        let sizes: Vec<usize> = (0..count).map(|i| (i * 37) % 700).collect();
        for (rule, bits) in [(Rule::Adam, 8), (Rule::Lion, 32)] {
            let case = Case { steps: 1, ..Case::new(rule, bits, of_one_type(DType::BF16, &sizes)) };
            case.run_on_portable_devices();
        }
    }
}

/// Buffers that are not aligned for vectors, and a second state that is not.
#[test]
fn any_alignment() {
    for rule in [Rule::Adam, Rule::AdEmaMix, Rule::ScheduleFree] {
        for shift in 1..=4 {
            for bits in [8, 32] {
                let case = Case { shift, steps: 2, ..Case::new(rule, bits, shapes(&[513, 516])) };
                case.run_on_portable_devices();
            }
        }
    }
}

/// NaN, infinity, zeros that are skipped, and both together.
#[test]
fn special_gradients() {
    for rule in Rule::ALL {
        for bits in [8, 32] {
            for skip_zeros in [false, true] {
                let mut case = Case::new(rule, bits, shapes(&[3, 300, 1000]));
                (case.gradient, case.hyper.skip_zeros) = (wild, skip_zeros);
                case.run_on_portable_devices();
            }
        }
    }
}

/// Without eps a zero gradient makes 0 / 0; a `gnorm_scale` of infinity makes NaN of it.
#[test]
fn unusual_hyperparameters() {
    for rule in Rule::ALL {
        for bits in [8, 32] {
            for (eps, gnorm_scale, lr) in
                [(0.0, 1.0, 1e-3), (1e-8, f64::INFINITY, 1e-3), (1e-8, 1.0, 0.0)]
            {
                let mut case = Case::new(rule, bits, shapes(&[70, 257]));
                case.hyper = Hyper { eps, gnorm_scale, lr, ..case.hyper };
                case.run_on_portable_devices();
            }
        }
    }
}

fn scaled<const EXPONENT: i32>(n: usize, _: u64, random: &mut Random) -> Vec<f32> {
    (0..n).map(|_| stepped::normal(random) * 10f32.powi(EXPONENT)).collect()
}

/// Blocks whose scale has no reciprocal, whose second moment is subnormal or infinite.
#[test]
fn tiny_and_huge_gradients() {
    type Gradient = fn(usize, u64, &mut Random) -> Vec<f32>;
    let gradients: [Gradient; 7] = [
        scaled::<-42>,
        scaled::<-38>,
        scaled::<-30>,
        scaled::<-20>,
        scaled::<-19>,
        scaled::<18>,
        scaled::<19>,
    ];
    for rule in Rule::ALL {
        for gradient in gradients {
            for weight_decay in [0.0, 0.1] {
                let mut case = Case::new(rule, 8, of_one_type(DType::F32, &[600]));
                (case.gradient, case.hyper.weight_decay) = (gradient, weight_decay);
                case.run_on_portable_devices();
            }
        }
    }
}

/// Codes of equal gradients lie near the top of their maps, and on borders.
#[test]
fn equal_gradients() {
    fn equal(n: usize, _: u64, _: &mut Random) -> Vec<f32> {
        (0..n).map(|i| 1.0 + 0.1 * (i % 7) as f32).collect()
    }
    for rule in Rule::ALL {
        let mut case = Case::new(rule, 8, of_one_type(DType::F32, &[700]));
        (case.gradient, case.hyper.weight_decay, case.steps) = (equal, 0.0, 6);
        case.run_on_portable_devices();
    }
}

/// Tables that the buckets of the kernel cannot hold, and some that they can.
#[test]
fn any_codes() {
    let table = |value: fn(i32) -> f32| {
        let values: Vec<f32> = (0..256).map(value).collect();
        Code8::new(&values).unwrap()
    };
    let codes = vec![
        Code8::new(&linear_map(true, 8, true).unwrap()).unwrap(),
        Code8::new(&linear_map(false, 8, true).unwrap()).unwrap(),
        Code8::new(&dynamic_map(true, 3, 8).unwrap()).unwrap(),
        Code8::new(&dynamic_map(true, 5, 6).unwrap()).unwrap(), // padded with zeros
        table(|i| (i as f32 + 0.5) / 128.0 - 1.0),              // without a zero
        table(|i| (i as f32 - 3.0) / 100.0),                    // hardly any negative, up to 2.52
        table(|i| (i as f32 - 254.0) / 100.0),                  // only one positive
        table(|i| (i as f32 - 255.0) / 200.0),                  // none
        table(|i| (i as f32 + 1.0) / 300.0),                    // all positive
        table(|i| (i as f32 - 127.0) * 1e-9),                   // all below the lowest bucket
        table(|i| ((i - 128) as f32 / 128.0).powi(3)),
        table(|i| (i - 100).signum() as f32), // three values
        table(|_| 0.0),
        Code8::dynamic(true).clone(),
        Code8::dynamic(false).clone(),
    ];
    for rule in [Rule::Adam, Rule::Lion, Rule::RmsProp] {
        for (i, code) in codes.iter().enumerate() {
            let mut case = Case::new(rule, 8, of_one_type(DType::F32, &[100, 700]));
            case.codes = [code.clone(), codes[(i * 4 + 1) % codes.len()].clone()];
            case.hyper.skip_zeros = i % 2 == 1;
            case.run_on_portable_devices();
        }
    }
}

/// The bounds on the update's norm, of tensors of several tasks too.
#[test]
fn trust_ratios() {
    let rules = [Rule::Adam, Rule::Momentum, Rule::RmsProp];
    for (i, rule) in rules.into_iter().enumerate() {
        let mut case = Case::new(rule, 32, shapes(&[0, 1, 250, 4100]));
        case.shapes.extend(of_one_type(DType::BF16, &[140_000]));
        (case.hyper.max_unorm, case.steps) = ([0.01, 1.0, 30.0][i], 2);
        case.run_on_portable_devices();
    }
}

/// Norms that are zero, infinite, NaN, subnormal or handed in.
#[test]
fn unusual_norms() {
    let numbers = [
        (1e-3, None, 1.0, stepped::ordinary as fn(usize, u64, &mut Random) -> Vec<f32>),
        (1e-3, None, 0.0, stepped::ordinary),
        (1e-3, None, 1.0, wild),
        (1e-3, None, 1e30, scaled::<15>),
        (1e-3, None, 1e-30, scaled::<-25>),
        (1e-300, None, 1.0, stepped::ordinary),
        (1e300, Some(1e-310), 1.0, stepped::ordinary),
        (5e-324, Some(0.75), 1.0, stepped::ordinary),
        (f64::INFINITY, None, 0.0, stepped::ordinary),
        (1e-3, Some(f64::INFINITY), 1.0, stepped::ordinary),
        (1e-3, Some(f64::NAN), 1.0, stepped::ordinary),
        (1.0 / 3.0, Some(0.1), 1.0, stepped::ordinary),
        (1e-40, None, 1.0, scaled::<18>),
    ];
    for (max_unorm, param_norm, scale, gradient) in numbers {
        for rule in [Rule::Adam, Rule::Momentum] {
            let mut case = Case::new(rule, 32, of_one_type(DType::F32, &[40, 300, 300, 600]));
            case.hyper.max_unorm = max_unorm;
            Case { gradient, param_norm, scale, ..case }.run_on_portable_devices();
        }
    }
}

#[test]
fn buffers_of_wrong_lengths_are_refused() {
    let device = common::portable_devices()[0];
    let stream = Stream::new(device).unwrap();
    let (floats, codes) = (
        DeviceBuffer::<f32>::zeroed(device, 300).unwrap(),
        DeviceBuffer::<u8>::zeroed(device, 300).unwrap(),
    );
    let rest = DeviceBuffer::<bf16>::zeroed(device, 299).unwrap();
    let (x, q) = (floats.slice(), codes.slice());
    let scales = x.part("scales", 0, 2).unwrap();
    let code = x.part("code", 0, 256).unwrap();
    let tensor = device_optim::Tensor8 {
        param: x.into(),
        grad: x.into(),
        floats: DeviceSlice::empty(),
        state1: q,
        absmax1: scales,
        state2: q,
        absmax2: scales,
        rounding: device_optim::Rounding::Nearest,
    };
    let short = x.part("short", 0, 1).unwrap();
    let step = |tensor, code1, code2| {
        let (hyper, workspace) = (Hyper::default(), DeviceSlice::empty());
        device_optim::step_8bit(&stream, Rule::Adam, &hyper, &[tensor], code1, code2, workspace)
    };
    let refused = |result: Result<(), Error>, what: &str| match result {
        Err(Error::Length { what: got, .. }) => assert_eq!(got, what),
        other => panic!("{what}: {other:?}"),
    };
    refused(
        step(device_optim::Tensor8 { grad: short.into(), ..tensor }, code, Some(code)),
        "gradient",
    );
    refused(
        step(device_optim::Tensor8 { state1: DeviceSlice::empty(), ..tensor }, code, Some(code)),
        "state1",
    );
    refused(
        step(device_optim::Tensor8 { state2: DeviceSlice::empty(), ..tensor }, code, Some(code)),
        "state2",
    );
    refused(step(device_optim::Tensor8 { absmax1: short, ..tensor }, code, Some(code)), "absmax1");
    refused(step(device_optim::Tensor8 { absmax2: short, ..tensor }, code, Some(code)), "absmax2");
    refused(
        step(device_optim::Tensor8 { floats: short, ..tensor }, code, Some(code)),
        "float32 state1",
    );
    let rounding = device_optim::Rounding::Kahan(rest.slice());
    refused(step(device_optim::Tensor8 { rounding, ..tensor }, code, Some(code)), "compensation");
    refused(step(tensor, short, Some(code)), "code1");
    refused(step(tensor, code, None), "code2");

    let tensor = device_optim::Tensor32 {
        param: x.into(),
        grad: x.into(),
        state1: x,
        state2: x,
        param_norm: None,
        update_norm: None,
        rounding: device_optim::Rounding::Nearest,
    };
    let step = |tensor| {
        let hyper = Hyper { max_unorm: 1.0, ..Hyper::default() };
        device_optim::step_32bit(&stream, Rule::Adam, &hyper, &[tensor], DeviceSlice::empty())
    };
    refused(step(device_optim::Tensor32 { state1: short, ..tensor }), "state1");
    refused(step(device_optim::Tensor32 { update_norm: Some(x), ..tensor }), "update_norm");
    refused(step(tensor), "workspace");
    let negative = step(device_optim::Tensor32 { param_norm: Some(-1.0), ..tensor });
    assert!(matches!(negative, Err(Error::Argument { what: "param_norm", .. })), "{negative:?}");
}
