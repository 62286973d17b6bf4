//! Quantizes a million values to NF4 on a GPU and back, and compares with the CPU.
//!
//! `cargo run --release -p halfbyte-gpu --example quantize`

use halfbyte::{BlockSize, Code4};
use halfbyte_gpu::ops::{Scales, Table4, dequantize_4bit, quantize_4bit};
use halfbyte_gpu::{DeviceBuffer, Stream, cuda_device};

fn main() {
    if let Err(error) = run() {
        eprintln!("{error}");
        std::process::exit(1);
    }
}

fn run() -> halfbyte_gpu::Result<()> {
    let (n, code, blocksize) = (1 << 20, Code4::Nf4, BlockSize::B64);
    let blocks = blocksize.over(n);
    let values: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin()).collect();

    // A device, a queue of its own, and the buffers. With PyTorch or candle, the stream and the
    // memory are theirs: Stream::from_raw, DeviceSlice::new.
    let device = cuda_device(0)?;
    let stream = Stream::new(device)?;
    let input = DeviceBuffer::from_slice(&stream, &values)?;
    let packed = DeviceBuffer::<u8>::zeroed(device, blocks.packed_len())?;
    let absmax = DeviceBuffer::<f32>::zeroed(device, blocks.count())?;
    let decoded = DeviceBuffer::<f32>::zeroed(device, n)?;

    // Both launches return at once; to_vec waits for them.
    quantize_4bit(&stream, input.slice().into(), code, blocksize, packed.slice(), absmax.slice())?;
    dequantize_4bit(
        &stream,
        packed.slice(),
        &Scales::Plain(absmax.slice()),
        &Table4::Standard(code),
        blocksize,
        decoded.slice().into(),
    )?;
    let decoded = decoded.to_vec(&stream)?;

    let worst = values.iter().zip(&decoded).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!("{device}: {n} values in {} bytes, largest error {worst:.4}", blocks.packed_len());
    Ok(())
}
