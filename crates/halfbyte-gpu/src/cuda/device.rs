//! One device of CUDA: its context, and its kernels' machine code.

use super::{Cuda, driver, nvrtc, runs};
use crate::device::{Module, Runtime};
use crate::error::{Error, Result};
use crate::module::Source;
use crate::native::{Calls, Handle, IMAGE_ERRORS, Platform};
use crate::packed::Packed;
use std::ffi::c_int;
use std::ptr;

/// One device, with its primary context.
pub(super) struct CudaDevice {
    pub(super) cuda: &'static Cuda,
    pub(super) ordinal: c_int,
    pub(super) context: Handle,
    pub(super) capability: u32,
    pub(super) architecture: String,
    pub(super) shared: c_int,
    pub(super) managed: bool,
}

// SAFETY: a context is a handle that the driver allows every thread to use.
unsafe impl Send for CudaDevice {}
// SAFETY: as above.
unsafe impl Sync for CudaDevice {}

/// The compute capability of the machine code of this build that a device runs: its own, else the
/// newest earlier one with the same major number.
pub(super) fn embedded(cubins: &Packed<u32>, capability: u32) -> Option<u32> {
    cubins.keys().filter(|&made_for| runs(made_for, capability)).max()
}

impl Platform for CudaDevice {
    /// True when the context was pushed.
    type Previous = bool;

    fn runtime(&self) -> Runtime {
        Runtime::Cuda
    }

    fn ordinal(&self) -> c_int {
        self.ordinal
    }

    fn calls(&self) -> &'static Calls {
        &self.cuda.calls
    }

    fn describe(&self, code: c_int) -> (String, String) {
        self.cuda.describe_error(code)
    }

    fn enter(&self) -> Result<bool> {
        let mut current = ptr::null_mut();
        // SAFETY: the handle is written during the call.
        let code = unsafe { (self.cuda.sys.current_context)(&raw mut current) };
        self.cuda.check(code, || "cuCtxGetCurrent".to_owned())?;
        if ptr::eq(current, self.context) {
            return Ok(false);
        }
        // SAFETY: the context is the device's primary one, which is never released.
        let code = unsafe { (self.cuda.sys.push_context)(self.context) };
        self.cuda.check(code, || "cuCtxPushCurrent".to_owned())?;
        Ok(true)
    }

    fn leave(&self, pushed: bool) {
        if pushed {
            let mut ours = ptr::null_mut();
            // SAFETY: the context on top is the one that `enter` pushed.
            unsafe { (self.cuda.sys.pop_context)(&raw mut ours) };
        }
    }

    fn shares_managed_memory(&self) -> bool {
        self.managed
    }

    fn code(
        &self,
        source: &'static Source,
        load: &dyn Fn(&[u8]) -> Result<Module>,
    ) -> Result<Module> {
        let mut reasons = Vec::new();
        match embedded(&source.cubins, self.capability) {
            None if source.cubins.is_empty() => reasons.push("this build holds none".to_owned()),
            None => reasons.push("this build holds none for this architecture".to_owned()),
            Some(made_for) => match source.cubins.unpack(made_for).map(|cubin| load(&cubin)) {
                Ok(Ok(module)) => return Ok(module),
                Ok(Err(Error::Call { code, name, .. })) if IMAGE_ERRORS.contains(&code) => {
                    reasons
                        .push(format!("that for sm_{made_for} in this build was refused ({name})"));
                }
                Ok(Err(error)) => return Err(error),
                Err(_) => reasons.push(format!("that for sm_{made_for} in this build is damaged")),
            },
        }
        match nvrtc::compiler_for(self.cuda.version, self.capability) {
            Ok((compiler, architecture)) => {
                let options = nvrtc::options(source, &architecture);
                compiler.build(source, &architecture, &options, load)
            }
            Err(reason) => {
                reasons.push(reason);
                let architecture = self.architecture.clone();
                Err(Error::NoCode { source_name: source.name, architecture, reasons })
            }
        }
    }

    /// Lets the function use all the shared memory there is; a launch says how much it takes.
    fn prepare(&self, function: Handle) {
        let mut declared = 0;
        // SAFETY: the value is written during the call; the function is loaded in the current
        // context.
        let code = unsafe {
            (self.cuda.sys.function_attribute)(&raw mut declared, driver::FUNCTION_SHARED, function)
        };
        let rest = self.shared - declared;
        if code == 0 && rest > 0 {
            // SAFETY: as above. Where this fails, a launch that needs it reports so.
            unsafe {
                (self.cuda.sys.set_function_attribute)(
                    function,
                    driver::FUNCTION_DYNAMIC_SHARED,
                    rest,
                )
            };
        }
    }
}
