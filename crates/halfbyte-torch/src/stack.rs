//! The boxed stack: how the dispatcher hands arguments to a kernel and takes results back.
//!
//! A kernel owns its inputs. They are all popped before it runs, each into a value that frees
//! itself, so that no early return can leak one.

use crate::dtype::ScalarType;
use crate::error::{self, Error, Result};
use crate::shim::{Boxed, Handle, Value, check, shim};
use crate::tensor::Tensor;
use std::ffi::CStr;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// A type that an op takes in one slot.
pub(crate) trait Slot {
    /// # Safety
    /// `value` is a stack slot of this type, popped once.
    unsafe fn pop(value: Value) -> Self;
}

/// A type that an op takes, in one slot or (see [`group!`]) several.
pub(crate) trait Argument: Sized {
    const SLOTS: u64;
    /// # Safety
    /// The next slots hold this type.
    unsafe fn take(inputs: &mut Inputs<'_>) -> Self;
}

impl<T: Slot> Argument for T {
    const SLOTS: u64 = 1;
    unsafe fn take(inputs: &mut Inputs<'_>) -> Self {
        // SAFETY: by the caller's contract.
        unsafe { T::pop(inputs.next()) }
    }
}

impl Slot for Tensor {
    unsafe fn pop(value: Value) -> Self {
        // SAFETY: by the caller's contract.
        unsafe { Self::from_value(value) }
    }
}

impl Slot for i64 {
    unsafe fn pop(value: Value) -> Self {
        value as Self
    }
}

impl Slot for f64 {
    unsafe fn pop(value: Value) -> Self {
        Self::from_bits(value)
    }
}

impl Slot for bool {
    unsafe fn pop(value: Value) -> Self {
        value as u8 != 0
    }
}

impl Slot for ScalarType {
    unsafe fn pop(value: Value) -> Self {
        Self(value as u32 as i32)
    }
}

impl<T: Slot> Slot for Option<T> {
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

impl Slot for Str {
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

/// A list. Its items are not freed with it: whoever gets one owns it.
#[derive(Debug)]
struct List(Handle);

impl Drop for List {
    fn drop(&mut self) {
        // SAFETY: the handle is owned and freed once.
        unsafe { (shim().torch_delete_list)(self.0) };
    }
}

impl List {
    fn len(&self) -> Result<usize> {
        let mut len = 0;
        // SAFETY: the handle is valid.
        check(unsafe { (shim().torch_list_size)(self.0, &raw mut len) })?;
        Ok(len)
    }

    fn get(&self, index: usize) -> Result<Value> {
        let mut item = 0;
        // SAFETY: the handle is valid; an index past the end is an error of the shim.
        check(unsafe { (shim().torch_list_get_item)(self.0, index, &raw mut item) })?;
        Ok(item)
    }
}

/// A list of integers, read where it is.
#[derive(Debug)]
pub(crate) struct Ints(List);

impl Slot for Ints {
    unsafe fn pop(value: Value) -> Self {
        Self(List(value as usize as Handle))
    }
}

impl Ints {
    pub(crate) fn len(&self) -> Result<usize> {
        self.0.len()
    }

    fn get(&self, index: usize) -> Result<i64> {
        Ok(self.0.get(index)? as i64)
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

/// A list of which every item is taken: tensors are owned, and must be freed one by one.
impl<T: Slot> Slot for Vec<T> {
    unsafe fn pop(value: Value) -> Self {
        const READABLE: &str = "libtorch reads the list that it made";
        let list = List(value as usize as Handle);
        let len = list.len().expect(READABLE);
        // SAFETY: the items are slots of the inner type, each popped once.
        (0..len).map(|index| unsafe { T::pop(list.get(index).expect(READABLE)) }).collect()
    }
}

/// What an op returns.
pub(crate) trait Outputs {
    const COUNT: u64;
    /// # Errors
    /// When there is no memory for an optional.
    ///
    /// # Safety
    /// `stack` has room for `COUNT` slots.
    unsafe fn push(self, stack: *mut Value) -> Result<()>;
}

impl Outputs for () {
    const COUNT: u64 = 0;
    unsafe fn push(self, _: *mut Value) -> Result<()> {
        Ok(())
    }
}

impl Outputs for Tensor {
    const COUNT: u64 = 1;
    unsafe fn push(self, stack: *mut Value) -> Result<()> {
        // SAFETY: by the caller's contract.
        unsafe { *stack = self.into_value() }
        Ok(())
    }
}

impl<const N: usize> Outputs for [Tensor; N] {
    const COUNT: u64 = N as u64;
    unsafe fn push(self, stack: *mut Value) -> Result<()> {
        for (i, tensor) in self.into_iter().enumerate() {
            // SAFETY: by the caller's contract.
            unsafe { *stack.add(i) = tensor.into_value() }
        }
        Ok(())
    }
}

/// Tensors, and one that may be missing.
impl<const N: usize> Outputs for ([Tensor; N], Option<Tensor>) {
    const COUNT: u64 = N as u64 + 1;
    unsafe fn push(self, stack: *mut Value) -> Result<()> {
        let (tensors, last) = self;
        let slot = match last {
            None => std::ptr::null_mut(),
            Some(tensor) => {
                let slot = new_optional()?;
                // SAFETY: it was made just now, for one value.
                unsafe { *slot = tensor.into_value() };
                slot
            }
        };
        // SAFETY: by the caller's contract.
        unsafe {
            *stack.add(N) = slot as usize as Value;
            tensors.push(stack)
        }
    }
}

/// The heap slot of an optional that is there, which the dispatcher frees.
fn new_optional() -> Result<*mut Value> {
    let s = shim();
    let mut slot = std::ptr::null_mut::<Value>();
    // SAFETY: the first writes one pointer; the second takes a size.
    unsafe {
        match (s.torch_new_stable_ivalue, s.operator_new) {
            (Some(new), _) => check(new(&raw mut slot))?,
            (None, Some(new)) => slot = new(size_of::<Value>()).cast(),
            (None, None) => {}
        }
    }
    if slot.is_null() {
        return Err(Error::Torch("an optional result needs torch 2.13 on this platform".into()));
    }
    Ok(slot)
}

/// The arguments still on the stack, popped front to back.
pub(crate) struct Inputs<'a> {
    next: *const Value,
    left: u64,
    _stack: PhantomData<&'a [Value]>,
}

impl Inputs<'_> {
    fn next(&mut self) -> Value {
        assert!(self.left > 0, "more arguments popped than the dispatcher passed");
        self.left -= 1;
        // SAFETY: a slot is left.
        unsafe {
            let value = *self.next;
            self.next = self.next.add(1);
            value
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
        unsafe { outputs.push(stack) }
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
                const INPUTS: u64 = 0 $(+ <$t as $crate::stack::Argument>::SLOTS)*;
                type Outputs = $out;
                unsafe fn call(mut inputs: $crate::stack::Inputs<'_>) -> $crate::error::Result<$out> {
                    // SAFETY: the slots hold these types, by the schema.
                    $(let $arg = unsafe { <$t as $crate::stack::Argument>::take(&mut inputs) };)*
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

/// Declares arguments that several schemas list together, in this order.
macro_rules! group {
    ($(#[$doc:meta])* $name:ident { $($field:ident: $t:ty),* $(,)? }) => {
        $(#[$doc])*
        pub(crate) struct $name {
            $(pub(crate) $field: $t,)*
        }

        impl $crate::stack::Argument for $name {
            const SLOTS: u64 = 0 $(+ <$t as $crate::stack::Argument>::SLOTS)*;
            unsafe fn take(inputs: &mut $crate::stack::Inputs<'_>) -> Self {
                // SAFETY: by the caller's contract; fields are taken in the order written.
                unsafe { Self { $($field: <$t as $crate::stack::Argument>::take(inputs),)* } }
            }
        }
    };
}
pub(crate) use group;
