//! The runtime on each device at hand: buffers, streams, launches.

mod common;

use halfbyte_gpu::{
    Arg, DeviceBuffer, DeviceSlice, Error, Grid, ManagedBuffer, Packed, Runtime, Source,
    cuda_device_of, report, sources,
};

/// No device gets as far as to compile this.
static NOTHING: Source = Source::new("nothing", "", false, false, Packed::NONE);

#[test]
fn what_is_uploaded_comes_back() {
    for device in common::devices() {
        let stream = common::stream(device);
        let values: Vec<f32> = (0..1001).map(|i| i as f32 * 0.5).collect();
        let buffer = DeviceBuffer::from_slice(&stream, &values).unwrap();
        assert_eq!(buffer.to_vec(&stream).unwrap(), values, "{device}");
        assert_eq!(buffer.slice().bytes(), 4004);
        let zeros = DeviceBuffer::<u16>::zeroed(device, 777).unwrap();
        assert_eq!(zeros.to_vec(&stream).unwrap(), [0; 777], "{device}");
        let none = DeviceBuffer::<f32>::from_slice(&stream, &[]).unwrap();
        assert!(none.is_empty() && none.to_vec(&stream).unwrap().is_empty());
        assert_eq!(none.slice().pointer(), 0);
        stream.synchronize().unwrap();
        assert!(!stream.is_capturing().unwrap());
    }
}

#[test]
fn a_size_that_no_memory_has_is_refused() {
    for device in common::portable_devices() {
        let error = DeviceBuffer::<u64>::zeroed(device, usize::MAX / 4).unwrap_err();
        assert!(matches!(error, Error::Argument { what: "len", .. }), "{error}");
        let error = DeviceBuffer::<u8>::zeroed(device, usize::MAX / 4).unwrap_err();
        assert!(matches!(error, Error::Call { .. }), "{error}");
    }
}

#[test]
fn a_buffer_is_read_by_a_stream_of_its_own_device_only() {
    let devices = common::cuda_devices();
    if let [first, second, ..] = devices[..] {
        let buffer = DeviceBuffer::<u8>::zeroed(first, 8).unwrap();
        let error = buffer.to_vec(&common::stream(second)).unwrap_err();
        assert!(matches!(error, Error::Argument { what: "stream", .. }), "{error}");
    } else {
        assert!(common::on_hardware(), "the emulator has several devices");
    }
}

#[test]
fn managed_memory_is_the_host_s_too() {
    for device in common::devices() {
        let stream = common::stream(device);
        let buffer = match ManagedBuffer::zeroed(device, 1000) {
            Err(Error::Unsupported { runtime, .. }) => {
                assert_ne!(runtime, Runtime::Cuda, "{device}");
                continue;
            }
            other => other.unwrap(),
        };
        assert_eq!(buffer.bytes(), 1000);
        assert!(buffer.pointer().is_multiple_of(8));
        buffer.prefetch_to_device(&stream).unwrap();
        buffer.prefetch_to_host(&stream).unwrap();
        stream.synchronize().unwrap();
        let bytes = std::ptr::with_exposed_provenance::<u8>(buffer.pointer() as usize);
        // SAFETY: the buffer's memory is the host's as well, and nothing is launched.
        let bytes = unsafe { std::slice::from_raw_parts(bytes, 1000) };
        assert_eq!(bytes, [0; 1000], "{device}");
        let none = ManagedBuffer::zeroed(device, 0).unwrap();
        none.prefetch_to_device(&stream).unwrap();
        assert_eq!(none.pointer(), 0);
    }
}

#[test]
fn a_grid_that_no_device_takes_is_refused_and_an_empty_one_does_nothing() {
    let device = common::portable_devices()[0];
    let stream = common::stream(device);
    let launch = |grid, args: &[Arg<'_>]| stream.launch(&NOTHING, c"nothing", grid, args);
    launch(Grid::new(0, 256), &[]).unwrap();
    launch(Grid::new(1, 256).y(0), &[]).unwrap();
    let bytes = vec![0u8; device.parameter_bytes() + 1];
    let refused = [
        (Grid::new(1 << 31, 256), vec![], "groups in x must be at most 2147483647, got 2147483648"),
        (Grid::new(usize::MAX, 256), vec![], "groups in x must be at most"),
        (Grid::new(1, 256).y(65536), vec![], "groups in y and z must be at most 65535, got 65536"),
        (Grid::new(1, 2048), vec![], "threads per group must be at most 1024, got 2048"),
        (Grid::new(1, 32).shared(1 << 30), vec![], "shared_bytes must be at most"),
        (Grid::new(1, 32), vec![Arg::Bytes(&bytes)], "bytes of kernel arguments must be at most"),
    ];
    for (grid, args, message) in refused {
        let error = launch(grid, &args).unwrap_err();
        assert!(error.to_string().starts_with(message), "{error}");
    }
}

#[test]
fn slices_are_cut_within_their_bounds() {
    // SAFETY: nothing is launched with it.
    let workspace = unsafe { DeviceSlice::<u8>::new(0x1003, 200) };
    let mut rest = workspace;
    let first = rest.carve::<f32>("workspace", 10).unwrap();
    assert_eq!((first.pointer(), first.len(), first.bytes()), (0x1010, 10, 40));
    let second = rest.carve::<u64>("workspace", 3).unwrap();
    assert_eq!((second.pointer(), second.len()), (0x1040, 3));
    assert_eq!((rest.pointer(), rest.len()), (0x1058, 200 - 0x55));
    let error = rest.carve::<u8>("workspace", 200).unwrap_err();
    assert_eq!(error.to_string(), "workspace must hold 208 elements, got 115");
    let sizes = DeviceSlice::carved_bytes::<f32>(10) + DeviceSlice::carved_bytes::<u64>(3);
    assert!(sizes >= workspace.len() - rest.len());

    let part = first.part("scales", 4, 6).unwrap();
    assert_eq!((part.pointer(), part.len()), (0x1020, 6));
    assert!(first.part("scales", 4, 7).is_err() && first.part("scales", usize::MAX, 2).is_err());
    assert!(DeviceSlice::<f32>::empty().is_empty());
}

#[test]
fn memory_knows_its_device() {
    for device in common::cuda_devices() {
        if device.ordinal() == 0 || common::on_hardware() {
            let buffer = DeviceBuffer::<u8>::zeroed(device, 64).unwrap();
            let found = cuda_device_of(buffer.slice().pointer()).unwrap();
            assert!(std::ptr::eq(found, device), "{found} instead of {device}");
        }
    }
}

#[test]
fn devices_say_what_they_are() {
    for device in common::devices() {
        assert!(!device.name().is_empty() && device.multiprocessors() > 0, "{device:?}");
        assert!(device.max_shared_bytes() >= 16 << 10, "{device:?}");
        assert!(device.parameter_bytes() >= 1024, "{device:?}");
        let cuda = device.runtime() == Runtime::Cuda;
        assert_eq!(device.capability() >= 75, cuda, "{device:?}");
        if cuda {
            assert_eq!(device.architecture(), format!("sm_{}", device.capability()));
        }
    }
    let reports = report();
    let names: Vec<_> = reports.iter().map(|report| report.backend.name()).collect();
    assert_eq!(names, ["cuda", "rocm", "xpu", "cpu"]);
    assert!(reports[3].is_usable());
}

#[test]
fn sources_have_their_headers_and_names() {
    assert!(!sources::ALL.is_empty());
    for source in sources::ALL {
        let text = source.text().unwrap();
        assert!(text.contains("HALFBYTE_PORT_H"), "{}", source.name);
        let included = text.lines().find(|line| line.trim_start().starts_with("#include \""));
        assert_eq!(included, None, "{}", source.name);
        let marked = text.lines().take(5).any(|line| line == "// halfbyte: exact");
        assert_eq!(source.exact, marked, "{}", source.name);
    }
}
