//! The boxed stack: how the dispatcher hands arguments to a kernel and takes results back.
//!
//! A kernel owns its inputs. They are all popped before it runs, each into a value that frees
//! itself, so that no early return can leak one.

use crate::error::{self, Error, Result};
use crate::shim::{Boxed, Handle, Value, check, shim};
use crate::tensor::{ScalarType, Tensor};
use std::ffi::CStr;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// A type that an op takes.
pub(crate) trait Argument {
    /// # Safety
    /// `value` is a stack slot of this type, popped once.
    unsafe fn pop(value: Value) -> Self;
}

impl Argument for Tensor {
    unsafe fn pop(value: Value) -> Self {
        // SAFETY: by the caller's contract.
        unsafe { Self::from_value(value) }
    }
}

impl Argument for i64 {
    unsafe fn pop(value: Value) -> Self {
        value as Self
    }
}

impl Argument for ScalarType {
    unsafe fn pop(value: Value) -> Self {
        Self(value as u32 as i32)
    }
}

impl<T: Argument> Argument for Option<T> {
    unsafe fn pop(value: Value) -> Self {
        let slot = value as usize as *mut Value;
        if slot.is_null() {
            return None;
        }
        // SAFETY: a non-null optional points to a heap slot of the inner type, owned by us.
        unsafe {
            let inner = T::pop(*slot);
            let s = shim();
            match (s.torch_delete_stable_ivalue, s.operator_delete) {
                (Some(delete), _) => drop(delete(slot)),
                (None, Some(delete)) => delete(slot.cast()),
                // No allocator to match: eight bytes leak.
                (None, None) => {}
            }
            Some(inner)
        }
    }
}

/// A string argument.
#[derive(Debug)]
pub(crate) struct Str(Handle);

impl Argument for Str {
    unsafe fn pop(value: Value) -> Self {
        Self(value as usize as Handle)
    }
}

impl Drop for Str {
    fn drop(&mut self) {
        // SAFETY: the handle is owned and freed once.
        unsafe { (shim().torch_delete_string)(self.0) };
    }
}

impl Str {
    pub(crate) fn bytes(&self) -> Result<&[u8]> {
        let (mut len, mut data) = (0, std::ptr::null());
        // SAFETY: the handle is valid; the string it owns lives as long as `self`.
        unsafe {
            check((shim().torch_string_length)(self.0, &raw mut len))?;
            check((shim().torch_string_c_str)(self.0, &raw mut data))?;
            Ok(std::slice::from_raw_parts(data.cast(), len))
        }
    }
}

/// A list of integers.
#[derive(Debug)]
pub(crate) struct Ints(Handle);

impl Argument for Ints {
    unsafe fn pop(value: Value) -> Self {
        Self(value as usize as Handle)
    }
}

impl Drop for Ints {
    fn drop(&mut self) {
        // SAFETY: the handle is owned and freed once.
        unsafe { (shim().torch_delete_list)(self.0) };
    }
}

impl Ints {
    pub(crate) fn len(&self) -> Result<usize> {
        let mut len = 0;
        // SAFETY: the handle is valid.
        check(unsafe { (shim().torch_list_size)(self.0, &raw mut len) })?;
        Ok(len)
    }

    fn get(&self, index: usize) -> Result<i64> {
        let mut item = 0;
        // SAFETY: the handle is valid; an index past the end is an error of the shim.
        check(unsafe { (shim().torch_list_get_item)(self.0, index, &raw mut item) })?;
        Ok(item as i64)
    }

    /// Calls `f` with the integers, without a heap allocation for up to eight.
    pub(crate) fn with<R>(&self, f: impl FnOnce(&[i64]) -> Result<R>) -> Result<R> {
        let len = self.len()?;
        let mut few = [0; 8];
        if len <= few.len() {
            for (index, slot) in few[..len].iter_mut().enumerate() {
                *slot = self.get(index)?;
            }
            return f(&few[..len]);
        }
        let many = (0..len).map(|index| self.get(index)).collect::<Result<Vec<_>>>()?;
        f(&many)
    }
}

/// What an op returns.
pub(crate) trait Outputs {
    const COUNT: u64;
    /// # Safety
    /// `stack` has room for `COUNT` slots.
    unsafe fn push(self, stack: *mut Value);
}

impl Outputs for () {
    const COUNT: u64 = 0;
    unsafe fn push(self, _: *mut Value) {}
}

impl Outputs for Tensor {
    const COUNT: u64 = 1;
    unsafe fn push(self, stack: *mut Value) {
        // SAFETY: by the caller's contract.
        unsafe { *stack = self.into_value() }
    }
}

impl<const N: usize> Outputs for [Tensor; N] {
    const COUNT: u64 = N as u64;
    unsafe fn push(self, stack: *mut Value) {
        for (i, tensor) in self.into_iter().enumerate() {
            // SAFETY: by the caller's contract.
            unsafe { *stack.add(i) = tensor.into_value() }
        }
    }
}

/// The arguments still on the stack, popped front to back.
pub(crate) struct Inputs<'a> {
    next: *const Value,
    left: u64,
    _stack: PhantomData<&'a [Value]>,
}

impl Inputs<'_> {
    /// # Safety
    /// The next slot holds a `T`.
    pub(crate) unsafe fn pop<T: Argument>(&mut self) -> T {
        assert!(self.left > 0, "more arguments popped than the dispatcher passed");
        self.left -= 1;
        // SAFETY: a slot is left, and it holds a T by the caller's contract.
        unsafe {
            let value = *self.next;
            self.next = self.next.add(1);
            T::pop(value)
        }
    }
}

/// An op: its name under the namespace, and its kernel.
pub(crate) trait Op {
    /// Name and overload, as `torch_library_impl` wants it.
    const NAME: &'static CStr;
    /// Number of arguments in the schema.
    const INPUTS: u64;
    type Outputs: Outputs;
    /// Pops all arguments, then runs.
    ///
    /// # Safety
    /// `inputs` are the arguments of this op's schema.
    unsafe fn call(inputs: Inputs<'_>) -> Result<Self::Outputs>;
    /// What is registered with the dispatcher.
    const BOXED: Boxed = boxed::<Self>;
}

/// The frame between the dispatcher and a kernel. Everything with a destructor lives and dies in
/// [`run`]; here nothing is left to drop when `aoti_torch_check` throws through.
unsafe extern "C-unwind" fn boxed<O: Op + ?Sized>(stack: *mut Value, inputs: u64, outputs: u64) {
    // SAFETY: the dispatcher passes a stack of this op's schema.
    if !unsafe { run::<O>(stack, inputs, outputs) } {
        // SAFETY: all pointers are NUL-terminated strings that outlive the call; it copies them.
        unsafe {
            (shim().aoti_torch_check)(
                false,
                O::NAME.as_ptr(),
                c"halfbyte-torch".as_ptr(),
                0,
                error::message(),
            );
        }
    }
}

/// Runs a kernel; false when it failed, with the reason kept by [`error::keep`]. Never unwinds.
///
/// # Safety
/// `stack` holds `inputs` arguments of the schema of `O` and has room for its outputs.
unsafe fn run<O: Op + ?Sized>(stack: *mut Value, inputs: u64, outputs: u64) -> bool {
    let result = catch_unwind(AssertUnwindSafe(|| {
        if (inputs, outputs) != (O::INPUTS, O::Outputs::COUNT) {
            return Err(Error::Torch(format!(
                "the schema has {inputs} arguments and {outputs} results, the kernel {} and {}",
                O::INPUTS,
                O::Outputs::COUNT
            )));
        }
        let inputs = Inputs { next: stack, left: inputs, _stack: PhantomData };
        // SAFETY: the counts match, and the schema is the one this kernel is written for.
        let outputs = unsafe { O::call(inputs) }?;
        // SAFETY: the stack has room for the schema's outputs.
        unsafe { outputs.push(stack) };
        Ok(())
    }));
    let error = match result {
        Ok(Ok(())) => return true,
        Ok(Err(error)) => error,
        Err(payload) => {
            let text = payload
                .downcast_ref::<&str>()
                .map(|s| (*s).to_owned())
                .or_else(|| payload.downcast_ref::<String>().cloned());
            Error::Panic(text.unwrap_or_else(|| "a panic without a message".into()))
        }
    };
    error::keep(O::NAME, &error);
    false
}

/// Declares ops: a unit struct each, whose schema is the argument list of the function it calls.
macro_rules! ops {
    ($($op:ident = $name:literal => $kernel:ident($($arg:ident: $t:ty),* $(,)?) -> $out:ty;)*) => {
        $(
            struct $op;
            impl $crate::stack::Op for $op {
                const NAME: &'static std::ffi::CStr = $name;
                const INPUTS: u64 = [$(stringify!($arg)),*].len() as u64;
                type Outputs = $out;
                unsafe fn call(mut inputs: $crate::stack::Inputs<'_>) -> $crate::error::Result<$out> {
                    // SAFETY: the slots hold these types, by the schema.
                    $(let $arg: $t = unsafe { inputs.pop() };)*
                    $kernel($($arg),*)
                }
            }
        )*

        /// Every op: its name under the namespace and its boxed kernel.
        pub(crate) const OPS: &[(&std::ffi::CStr, $crate::shim::Boxed)] =
            &[$((<$op as $crate::stack::Op>::NAME, <$op as $crate::stack::Op>::BOXED)),*];
    };
}
pub(crate) use ops;
