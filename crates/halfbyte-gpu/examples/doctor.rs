//! What each back end looked for, found and refused, and which one serves.
//!
//! `cargo run -p halfbyte-gpu --example doctor`

fn main() {
    for report in halfbyte_gpu::report() {
        println!("{report}");
    }
    match halfbyte_gpu::choose() {
        Ok(backend) => println!("in use: {backend}"),
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(1);
        }
    }
}
