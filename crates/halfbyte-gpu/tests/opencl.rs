//! The kernel dialect as OpenCL C: what `kernels/port.h` promises, over every value where there are
//! few, and the runtime's answers to what does not fit.

mod common;

use halfbyte::{bf16, f16};
use halfbyte_gpu::{
    Arg, Device, DeviceBuffer, Error, Grid, ManagedBuffer, Packed, Runtime, Source, Stream,
    opencl_device,
};

/// Kernels of this test alone. Port.h is joined to them as the build joins it to others.
static DIALECT: Source = Source::new(
    "dialect",
    concat!(
        include_str!("../kernels/port.h"),
        r"
#define N 256
KERNEL(256, half_to_floats, (GLOBAL const u16* h, GLOBAL float* out)) {
    u64 i = GROUP * N + THREAD;
    out[i] = half_to_float(h[i]);
    if (i % 2) out[i] = load_f16(h, i);
}
KERNEL(256, floats_to_half, (GLOBAL const float* x, GLOBAL u16* out, GLOBAL u16* brain)) {
    u64 i = GROUP * N + THREAD;
    out[i] = float_to_half(x[i]);
    if (i % 2) store_f16(out, i, x[i]);
    store_bf16(brain, i, x[i]);
}
KERNEL(256, arithmetic, (GLOBAL const float* a, GLOBAL const float* b, GLOBAL float* out, u64 n)) {
    u64 i = GROUP * N + THREAD;
    out[i] = div_(a[i], b[i]);
    out[n + i] = sqrt_(abs_(a[i]));
    out[2 * n + i] = a[i] * b[i] + a[i]; // never fused
    out[3 * n + i] = fma_(a[i], b[i], a[i]);
}
KERNEL(256, integers, (GLOBAL const u32* a, GLOBAL u32* out, u64 n)) {
    u64 i = GROUP * N + THREAD;
    out[i] = mulhi_u32(a[i], 0xD2511F53u);
    out[n + i] = (u32)popcount_(a[i]);
    out[2 * n + i] = (u32)clz_(a[i]);
    out[3 * n + i] = isfinite_(as_float(a[i])) ? 1 : 0;
}
KERNEL(256, together, (GLOBAL const u64* addresses, GLOBAL u32* sums, float scale)) {
    SHARED(u32, parts, N);
    GLOBAL const U4* from = ADDRESS(const U4, addresses[GROUP]);
    U4 v = from[THREAD];
    parts[THREAD] = v.x + v.y + v.z + v.w;
    BARRIER();
    for (u32 apart = N / 2; apart > 0; apart /= 2) {
        if (THREAD < apart) parts[THREAD] += parts[THREAD + apart];
        BARRIER();
    }
    if (THREAD == 0) sums[GROUP + GROUPS * GROUP_Y] = parts[0] * (u32)scale + (u32)GROUP_Y;
    atomic_add_u32(&sums[2 * GROUPS], 1u);
    atomic_max_u32(&sums[2 * GROUPS + 1], THREAD);
    atomic_or_u32(&sums[2 * GROUPS + 2], 1u << THREAD % 32);
}
// A function with barriers that the one kernel of a file calls twice, with the same shared memory.
DEVICE u32 sum_of_all(u32 value, LOCAL u32* scratch) {
    BARRIER();
    scratch[THREAD] = value;
    BARRIER();
    u32 sum = 0, first = THREAD / 16 * 16;
    for (u32 i = 0; i < 16; i++) sum += scratch[first + i];
    BARRIER();
    scratch[THREAD] = sum;
    BARRIER();
    sum = 0;
    for (u32 i = 0; i < N; i += 16) sum += scratch[i];
    return sum;
}
KERNEL(256, apart, (GLOBAL const u32* x, GLOBAL u32* out)) {
    SHARED(u32, scratch, N);
    u32 value = x[GROUP * N + THREAD];
    u32 sum = sum_of_all(value, scratch);
    out[GROUP * N + THREAD] = sum + sum_of_all(value * THREAD, scratch);
}
"
    ),
    true,
    false,
    Packed::NONE,
);

/// The OpenCL device and a stream of it, where there is a platform. Where there is none, that is
/// said on the standard error by `common::devices`.
fn stream() -> Option<Stream> {
    let device = common::devices().into_iter().find(|one| one.runtime() == Runtime::OpenCl)?;
    Some(common::stream(device))
}

fn launch(stream: &Stream, kernel: &std::ffi::CStr, groups: usize, args: &[Arg<'_>]) {
    stream.launch(&DIALECT, kernel, Grid::new(groups, 256), args).unwrap();
}

#[test]
fn every_half_becomes_its_float() {
    let Some(stream) = stream() else { return };
    let all: Vec<u16> = (0..=u16::MAX).collect();
    let h = DeviceBuffer::from_slice(&stream, &all).unwrap();
    let out = DeviceBuffer::<f32>::zeroed(stream.device(), all.len()).unwrap();
    launch(&stream, c"half_to_floats", 256, &[h.slice().into(), out.slice().into()]);
    for (bits, got) in all.iter().zip(out.to_vec(&stream).unwrap()) {
        let expected = f16::from_bits(*bits).to_f32();
        let same = got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan();
        assert!(same, "{bits:#06x}: {got}, not {expected}");
    }
}

/// Numbers of every exponent and both signs, ties among them.
fn floats() -> Vec<f32> {
    let mut bits: Vec<u32> = (0..65536u32).map(|i| i.wrapping_mul(2654435761)).collect();
    bits.extend((0..32768u32).flat_map(|i| [i << 13 | 1 << 12, i << 17 | 0x8000]));
    bits.extend((0..32768u32).flat_map(|i| [i << 16 | 0x8000, i.wrapping_mul(0x9E3779B1) >> 3]));
    bits.into_iter().map(f32::from_bits).collect()
}

#[test]
fn floats_round_to_nearest_even() {
    let Some(stream) = stream() else { return };
    let values = floats();
    let x = DeviceBuffer::from_slice(&stream, &values).unwrap();
    let half = DeviceBuffer::<u16>::zeroed(stream.device(), values.len()).unwrap();
    let brain = DeviceBuffer::<u16>::zeroed(stream.device(), values.len()).unwrap();
    let args = [x.slice().into(), half.slice().into(), brain.slice().into()];
    launch(&stream, c"floats_to_half", values.len() / 256, &args);
    let (half, brain) = (half.to_vec(&stream).unwrap(), brain.to_vec(&stream).unwrap());
    for (i, x) in values.into_iter().enumerate() {
        assert_eq!(bf16::from_bits(brain[i]).is_nan(), x.is_nan(), "{x}");
        assert_eq!(f16::from_bits(half[i]).is_nan(), x.is_nan(), "{x}");
        if !x.is_nan() {
            assert_eq!(brain[i], bf16::from_f32(x).to_bits(), "{x:e}");
            assert_eq!(half[i], f16::from_f32(x).to_bits(), "{x:e}");
        }
    }
}

#[test]
fn each_operation_is_rounded_once() {
    let Some(stream) = stream() else { return };
    let a = floats();
    let b: Vec<f32> = a.iter().rev().map(|x| x * 1.000_123).collect();
    let n = a.len();
    let (x, y) = (DeviceBuffer::from_slice(&stream, &a), DeviceBuffer::from_slice(&stream, &b));
    let (x, y) = (x.unwrap(), y.unwrap());
    let out = DeviceBuffer::<f32>::zeroed(stream.device(), 4 * n).unwrap();
    let args = [x.slice().into(), y.slice().into(), out.slice().into(), n.into()];
    launch(&stream, c"arithmetic", n / 256, &args);
    let out = out.to_vec(&stream).unwrap();
    for (i, (a, b)) in a.into_iter().zip(b).enumerate() {
        let fused = a.mul_add(b, a);
        for (k, expected) in [a / b, a.abs().sqrt(), a * b + a, fused].into_iter().enumerate() {
            let got = out[k * n + i];
            let same = got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan();
            assert!(same, "operation {k} of {a:e}, {b:e}: {got:e}, not {expected:e}");
        }
    }
}

#[test]
fn integers_are_what_rust_makes_of_them() {
    let Some(stream) = stream() else { return };
    let values: Vec<u32> = floats().into_iter().map(f32::to_bits).collect();
    let n = values.len();
    let a = DeviceBuffer::from_slice(&stream, &values).unwrap();
    let out = DeviceBuffer::<u32>::zeroed(stream.device(), 4 * n).unwrap();
    launch(&stream, c"integers", n / 256, &[a.slice().into(), out.slice().into(), n.into()]);
    let out = out.to_vec(&stream).unwrap();
    for (i, a) in values.into_iter().enumerate() {
        let product = ((u64::from(a) * 0xD2511F53) >> 32) as u32;
        let finite = u32::from(f32::from_bits(a).is_finite());
        for (k, e) in [product, a.count_ones(), a.leading_zeros(), finite].into_iter().enumerate() {
            assert_eq!(out[k * n + i], e, "operation {k} of {a:#x}");
        }
    }
}

/// Groups in x and y, shared memory, atomics, and addresses that lie in memory.
#[test]
fn threads_work_together() {
    let Some(stream) = stream() else { return };
    let buffers: Vec<_> = (0..3u32)
        .map(|k| (0..1024).map(|i| i * (k + 1)).collect::<Vec<u32>>())
        .map(|values| DeviceBuffer::from_slice(&stream, &values).unwrap())
        .collect();
    let addresses: Vec<u64> = buffers.iter().map(|buffer| buffer.slice().pointer()).collect();
    let table = DeviceBuffer::from_slice(&stream, &addresses).unwrap();
    let sums = DeviceBuffer::<u32>::zeroed(stream.device(), 9).unwrap();
    let args = [table.slice().into(), sums.slice().into(), Arg::F32(2.0)];
    stream.launch(&DIALECT, c"together", Grid::new(3, 256).y(2), &args).unwrap();
    let one = 1023 * 1024; // twice the sum of 0..1024
    let expected = [one, 2 * one, 3 * one, one + 1, 2 * one + 1, 3 * one + 1, 6 * 256, 255, !0];
    assert_eq!(sums.to_vec(&stream).unwrap(), expected);
}

/// Groups that run at the same time have shared memory of their own. (PoCL 3.0 gives all of them one
/// where a function that is not inlined uses it: see `DEVICE` in port.h.)
#[test]
fn groups_keep_apart() {
    let Some(stream) = stream() else { return };
    let groups = 2000;
    let values: Vec<u32> = (0..groups * 256).map(|i: u32| i.wrapping_mul(2654435761)).collect();
    let x = DeviceBuffer::from_slice(&stream, &values).unwrap();
    let out = DeviceBuffer::<u32>::zeroed(stream.device(), values.len()).unwrap();
    for round in 0..5 {
        launch(&stream, c"apart", groups as usize, &[x.slice().into(), out.slice().into()]);
        let out = out.to_vec(&stream).unwrap();
        for (g, (x, out)) in values.chunks(256).zip(out.chunks(256)).enumerate() {
            let expected = (0..)
                .zip(x)
                .fold(0u32, |sum, (t, x)| sum.wrapping_add(*x).wrapping_add(x.wrapping_mul(t)));
            assert_eq!(out, [expected; 256], "group {g}, round {round}");
        }
    }
}

#[test]
fn launches_from_many_threads_keep_their_arguments() {
    let Some(stream) = stream() else { return };
    let device: &'static Device = stream.device();
    let work = |seed: u32| {
        let stream = Stream::new(device).unwrap();
        for round in 0..20u32 {
            let values: Vec<u32> = (0..256).map(|i| i * seed + round).collect();
            let a = DeviceBuffer::from_slice(&stream, &values).unwrap();
            let out = DeviceBuffer::<u32>::zeroed(device, 1024).unwrap();
            let args = [a.slice().into(), out.slice().into(), Arg::U64(256)];
            launch(&stream, c"integers", 1, &args);
            let out = out.to_vec(&stream).unwrap();
            let same = |(i, a): (usize, &u32)| out[256 + i] == a.count_ones();
            assert!(values.iter().enumerate().all(same), "thread {seed}, round {round}");
        }
    };
    std::thread::scope(|scope| {
        for seed in 1..5 {
            scope.spawn(move || work(seed));
        }
    });
}

#[test]
fn what_does_not_fit_is_refused_with_the_call() {
    static BROKEN: Source = Source::new("broken", "kernel void f( { }", false, false, Packed::NONE);
    static ELSEWHERE: Source = Source::new("elsewhere", "", false, true, Packed::NONE);
    let Some(stream) = stream() else { return };
    let launch = |kernel, grid, args: &[Arg<'_>]| {
        stream.launch(&DIALECT, kernel, grid, args).unwrap_err().to_string()
    };
    let error = launch(c"no_such_kernel", Grid::new(1, 256), &[]);
    assert!(error.contains("clCreateKernel(no_such_kernel) failed with CL_"), "{error}");
    let grid = Grid::new(1, 256);
    let error = launch(c"integers", grid.shared(16), &[]);
    assert_eq!(error, "OpenCL cannot give a kernel more shared memory than it declares");
    let error = launch(c"integers", grid, &[Arg::Bytes(&[0; 8])]);
    assert_eq!(error, "OpenCL cannot take structs by value");
    let error = launch(c"together", grid, &[Arg::Pointer(0), Arg::Pointer(0), Arg::U64(0)]);
    assert!(error.contains("clSetKernelArg(together, 2) failed with CL_"), "{error}");

    let error = stream.launch(&BROKEN, c"f", grid, &[]).unwrap_err();
    assert!(matches!(error, Error::Compile { source_name: "broken", .. }), "{error}");
    assert!(error.to_string().contains("CL_BUILD_PROGRAM_FAILURE"), "{error}");
    let error = stream.launch(&ELSEWHERE, c"f", grid, &[]).unwrap_err();
    assert!(matches!(error, Error::CudaOnly { runtime: Runtime::OpenCl, .. }), "{error}");
    let error = opencl_device(1000).unwrap_err();
    assert!(matches!(error, Error::Ordinal { got: 1000, .. }), "{error}");
}

#[test]
fn managed_memory_is_the_hosts_too() {
    let Some(stream) = stream() else { return };
    let buffer = ManagedBuffer::zeroed(stream.device(), 4096).unwrap();
    buffer.prefetch_to_device(&stream).unwrap();
    // SAFETY: 4096 bytes that no launch uses.
    let bytes = unsafe { std::slice::from_raw_parts(buffer.pointer() as *const u8, 4096) };
    assert_eq!(bytes, [0; 4096]);
}
