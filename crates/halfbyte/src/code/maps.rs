//! The maps.
/// For decade `i` of 7, the fraction interval [0.1, 1] is cut into `2^i` (signed) or `2^(i+1)`
/// (unsigned) equal parts, whose midpoints are scaled by `10^(i-6)`; plus 0 and 1.
pub(super) fn dynamic_values(signed: bool) -> [f32; 256] {
    let mut values = Vec::with_capacity(256);
    for i in 0..7i32 {
        let parts = 1usize << if signed { i } else { i + 1 };
        let border = linspace(0.1, 1.0, parts + 1);
        let scale = 10f64.powi(i - 6) as f32;
        for pair in border.windows(2) {
            let value = scale * ((pair[0] + pair[1]) / 2.0);
            values.push(value);
            if signed {
                values.push(-value);
            }
        }
    }
    values.push(0.0);
    values.push(1.0);
    values.sort_by(f32::total_cmp);
    values.try_into().expect("127 + 127 or 254 parts, 0 and 1 are 256 values")
}

/// `steps` evenly spaced float32 values, each computed from the nearer end (as `torch.linspace`).
fn linspace(start: f32, end: f32, steps: usize) -> Vec<f32> {
    let step = (end - start) / (steps - 1) as f32;
    (0..steps)
        .map(|i| {
            if i < steps / 2 {
                start + step * i as f32
            } else {
                end - step * (steps - 1 - i) as f32
            }
        })
        .collect()
}
/// x
pub(crate) fn linear_map(_s: bool, _b: u32, _z: bool) -> [f32; 256] {
    std::array::from_fn(|i| -1.0 + i as f32 * 2.0 / 255.0)
}
